"""Compiles programs ahead of time, several at once, and keeps their traced form on disk.

XLA's own persistent cache saves compiling, not tracing and lowering, which is most of a warm start.
So the traced program is exported (StableHLO) into a folder beside it, under a digest of everything
that decides it: the caller's identity, argument types, this package's source, jax and its flags.
Each file begins with a digest of the rest, so that a damaged one is never run: whatever cannot be
read back is traced again. Files that no start has used lately go when the folder grows beyond
MAX_FOLDER_BYTES. Programs over several devices are not kept.

Knows nothing of what the programs compute. Arguments and results are flat lists of arrays.
"""

import contextlib
import functools
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from blake3 import blake3
from jax import export

from jaxserve.types import Progress, no_progress

logger = logging.getLogger(__name__)

COMPILE_STACK_BYTES = 64 << 20
"""XLA overflows the default stack of a thread when it compiles a deep model."""

MAX_COMPILE_THREADS = 8

MAX_FOLDER_BYTES = 512 << 20
"""A default engine keeps some twenty files of 0.1 to 2 MB for each model."""

_DIGEST_BYTES = 32

_DECIDING_FLAGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_numpy_dtype_promotion")


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """One program to compile.

    Attributes:
        name: for people.
        function: takes and returns flat lists of arrays; traced at most once.
        args: arrays, or things with shape, dtype and sharding, in order.
        donate: which of them the program may overwrite.
        out_shardings: of the results, or None to let XLA choose.
        custom_calls: names of custom calls that the program may hold.
    """

    name: str
    function: Callable[..., Sequence[Any]]
    args: Sequence[Any]
    donate: tuple[int, ...]
    out_shardings: Any = None
    custom_calls: tuple[str, ...] = ()


class ProgramStore:
    """Traced programs on disk.

    Args:
        folder: created with mode 0700 if missing; None keeps nothing.
        identity: everything, beyond its arguments, that decides what a program computes.

    Attributes:
        num_kept: programs that an earlier start had traced, so far.
    """

    def __init__(self, folder: Path | None, identity: str):
        self.num_kept = 0
        self._folder = folder
        self._identity = "\n".join(
            (
                identity,
                _source_digest(),
                jax.__version__,
                jax.default_backend(),
                os.environ.get("XLA_FLAGS", ""),
                repr([jax.config.values[name] for name in _DECIDING_FLAGS]),
            )
        )

    def lower(self, spec: ProgramSpec) -> jax.stages.Lowered:
        """The program ready to compile; traced only if it is not in the store."""
        function = spec.function
        if self._folder is not None:
            function = self._exported(spec, self._folder).call
        jitted = jax.jit(function, donate_argnums=spec.donate, out_shardings=spec.out_shardings)
        return jitted.lower(*spec.args)

    def _exported(self, spec: ProgramSpec, folder: Path) -> export.Exported:
        types = [f"{jax.numpy.shape(arg)} {jax.numpy.result_type(arg)}" for arg in spec.args]
        key = "\n".join((self._identity, spec.name, *types))
        path = folder / f"{blake3(key.encode()).hexdigest()}.stablehlo"
        try:
            kept = export.deserialize(bytearray(_read(path)))
            self.num_kept += 1
            return kept
        except FileNotFoundError:
            pass
        except Exception as error:  # what another jaxlib wrote can fail anywhere in the parser
            logger.warning("%s cannot be used (%s): tracing %s again", path, error, spec.name)
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in spec.custom_calls]
        exported = export.export(jax.jit(spec.function), disabled_checks=checks)(*spec.args)
        _write(path, bytes(exported.serialize()))
        return exported


def compile_all(
    store: ProgramStore, specs: Iterable[ProgramSpec], progress: Progress = no_progress
) -> "dict[str, jax.stages.Compiled]":
    """Compile every program, by name; `progress` hears of each that is done.

    Tracing holds the interpreter, so it stays in this thread; compiling does not.
    """
    specs = list(specs)
    progress("compile", 0, len(specs))
    threads = min(MAX_COMPILE_THREADS, os.cpu_count() or 1, max(1, len(specs)))
    old_stack_bytes = threading.stack_size(COMPILE_STACK_BYTES)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
            names = {}
            for spec in specs:
                names[pool.submit(store.lower(spec).compile)] = spec.name
            compiled = {}
            for done, future in enumerate(as_completed(names), 1):
                compiled[names[future]] = future.result()
                progress("compile", done, len(specs))
            return compiled
    finally:
        threading.stack_size(old_stack_bytes)


@functools.cache
def _source_digest() -> str:
    """Digest of this package's source: what was traced by other code is another program."""
    digest = blake3()
    root = Path(__file__).parent
    kernels = [f"pallas_kernels/**/*.{kind}" for kind in ("py", "cc", "json")]
    for pattern in ("**/*.py", "models/*.py", *kernels):
        for path in sorted(root.glob(pattern)):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    """What was written; marks the file as used.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what was written.
    """
    data = path.read_bytes()
    os.utime(path)
    digest, payload = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if blake3(payload).digest() != digest:
        raise ValueError("it is damaged")
    return payload


def _write(path: Path, payload: bytes) -> None:
    """All of the file or nothing, also when several processes write it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(blake3(payload).digest() + payload)
        os.replace(file.name, path)
        _prune(path.parent, MAX_FOLDER_BYTES)
    except OSError as error:
        logger.warning("traced programs are not kept: %s", error)


def _prune(folder: Path, max_bytes: int) -> None:
    """Remove the files used longest ago, until the others fit."""
    used = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process prunes, too
            stat = path.stat()
            used.append((stat.st_mtime, stat.st_size, path))
    total_bytes = sum(size for _, size, _ in used)
    for _, size, path in sorted(used):
        if total_bytes <= max_bytes:
            return
        path.unlink(missing_ok=True)
        total_bytes -= size
