"""Vectored reads and writes of page-aligned data, past the page cache where the disk allows it.

Direct I/O needs aligned memory. Views that are aligned are used as they are; others go through a
buffer of the calling thread. What was read short or not at all is the caller's to see. Knows
nothing of segments, records or their meaning.
"""

import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ALIGNMENT = 4096
_MAX_VIEWS = 1024  # IOV_MAX
_BOUNCE_BYTES = 4 << 20
_LOCAL = threading.local()


def round_up(num_bytes: int, multiple: int = ALIGNMENT) -> int:
    """The next multiple at or above."""
    return -(-num_bytes // multiple) * multiple


def open_direct(path: str | os.PathLike[str], flags: int) -> int | None:
    """Open for direct I/O; None where the file system has none."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise


def is_aligned(view: memoryview) -> bool:
    """Whether direct I/O can use the view: address and length."""
    if view.nbytes % ALIGNMENT or not view.nbytes:
        return False
    return np.frombuffer(view, np.uint8).__array_interface__["data"][0] % ALIGNMENT == 0


def read_run(descriptor: int, offset: int, stride: int, views: Sequence[memoryview]) -> int:
    """Fill views from places that lie `stride` apart; a view may be shorter than the stride.

    Args:
        descriptor: of the file.
        offset: of the first place, aligned.
        stride: aligned.
        views: writable.

    Returns:
        How many views were filled; fewer than all where the file ended.
    """
    done = 0
    for chunk, is_direct in _chunks(views, stride):
        if is_direct:
            num_bytes = os.preadv(descriptor, chunk, offset)
        else:
            bounce = _bounce(len(chunk) * stride)
            num_bytes = os.preadv(descriptor, [bounce], offset)
            for index, view in enumerate(chunk):
                view[:] = bounce[index * stride : index * stride + view.nbytes]
        filled = num_bytes // stride
        if filled < len(chunk):
            # The last place of a file may be short of its padding, not of its view.
            tail = num_bytes - filled * stride
            return done + filled + (tail >= chunk[filled].nbytes)
        done += filled
        offset += filled * stride
    return done


def write_run(descriptor: int, offset: int, stride: int, views: Sequence[memoryview]) -> None:
    """Write views to places that lie `stride` apart; the rest of a place becomes zeros.

    Raises:
        OSError: not everything was written.
    """
    for chunk, is_direct in _chunks(views, stride):
        pieces = chunk
        if not is_direct:
            bounce = _bounce(len(chunk) * stride)
            for index, view in enumerate(chunk):
                start = index * stride
                bounce[start : start + view.nbytes] = view
                if view.nbytes < stride:
                    bounce[start + view.nbytes : start + stride] = bytes(stride - view.nbytes)
            pieces = [bounce]
        _write_all(descriptor, offset, pieces, len(chunk) * stride)
        offset += len(chunk) * stride


def write_zeros(descriptor: int, offset: int, num_bytes: int) -> None:
    """Overwrite an aligned range."""
    zeros = memoryview(mmap.mmap(-1, min(num_bytes, _BOUNCE_BYTES)))
    while num_bytes:
        piece = zeros[: min(num_bytes, zeros.nbytes)]
        _write_all(descriptor, offset, [piece], piece.nbytes)
        offset += piece.nbytes
        num_bytes -= piece.nbytes


class IOThreads:
    """Runs tasks side by side.

    Args:
        num_threads: 1 runs them one after the other in the caller.
    """

    def __init__(self, num_threads: int):
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads - 1, "kv-disk") if num_threads > 1 else None

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Return when all are done; a task handles its own errors."""
        if self._pool is None or len(tasks) < 2:
            return _run_each(tasks)
        # Threads help themselves, the caller too: handing a task over costs as much as it does.
        left = iter(tasks)
        num_helpers = min(self._num_threads, len(tasks)) - 1
        helpers = [self._pool.submit(_run_each, left) for _ in range(num_helpers)]
        _run_each(left)
        for helper in helpers:
            helper.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _run_each(tasks: Iterable[Callable[[], None]]) -> None:
    for task in tasks:
        task()


def _write_all(descriptor: int, offset: int, pieces: Sequence[memoryview], num_bytes: int) -> None:
    written = os.pwritev(descriptor, pieces, offset)
    while written < num_bytes:
        # Short writes happen at signals and full disks; the next call tells which.
        start, rest = 0, []
        for piece in pieces:
            if (end := start + piece.nbytes) > written:
                rest.append(piece[max(written - start, 0) :])
            start = end
        more = os.pwritev(descriptor, rest, offset + written)
        if not more:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written += more


def _chunks(
    views: Sequence[memoryview], stride: int
) -> Iterator[tuple[Sequence[memoryview], bool]]:
    """Cut into pieces for one call each, and say whether memory is fit for direct I/O."""
    position = 0
    fit = [view.nbytes == stride and is_aligned(view) for view in views]
    for is_direct, group in itertools.groupby(fit):
        count = len(list(group))
        most = _MAX_VIEWS if is_direct else max(1, _BOUNCE_BYTES // stride)
        for start in range(position, position + count, most):
            yield views[start : min(start + most, position + count)], is_direct
        position += count


def _bounce(num_bytes: int) -> memoryview:
    """Aligned memory of this thread."""
    memory = getattr(_LOCAL, "memory", None)
    if memory is None or memory.nbytes < num_bytes:
        memory = memoryview(mmap.mmap(-1, max(num_bytes, _BOUNCE_BYTES)))
        _LOCAL.memory = memory
    return memory[:num_bytes]
