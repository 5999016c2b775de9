"""The disk store beside plain reads and writes, and beside tensorstore's drivers.

    python -m bench.kv_disk [--folder .] [--rounds 3] [--mib 256] [--only direct,store]

Writes blocks of 32 KiB, 256 KiB, 1 MiB and 4 MiB to the disk of `--folder` until they are durable,
and reads them back in a random order from a cold cache; 16 in a call or, of the smallest, 4 MiB,
as of one prompt. Every way takes its turn in each round; nothing else should run meanwhile.

    direct        pwrite and pread past the page cache, one block a call, one thread
    direct_4      the same from four threads
    buffered      through the page cache; fdatasync at the end
    store         `DiskStore`: sealed records written, read and checked by the store
    store_sealing the same, with sealing and unsealing, one record after the other, in the time
    ts_file       tensorstore's `file` driver: the blocks of a call in one object
    ts_direct     the same, read with `file_io_mode` direct
    ts_segment    the same with segments of 16 MiB, four on their way at once
    ts_ocdbt      its `ocdbt` driver on files: one key a block, a transaction for 64 MiB
    ts_zarr3      its `zarr3` driver: an array of 64 MiB in one shard, a chunk a block

Prints one JSON line per way, block size and round, and one with the medians and their share of
the best of the two direct ones. GB are 1e9 bytes; `*_cpu_s` is CPU time of the process per GB.
"""

import argparse
import json
import mmap
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from jaxserve.kv.envelope import NO_TENANT, Verdict, seal, sealed_bytes, unseal
from jaxserve.kv.stores.base import PutStatus, SealedRecord
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.kv.stores.disk_options import DiskOptions
from jaxserve.kv.stores.tasks import Scratch

BLOCK_SIZES = (32 << 10, 256 << 10, 1 << 20, 4 << 20)
PLAIN = ("direct", "direct_4")


class Way(Protocol):
    """One way of keeping blocks in a folder; made anew for each round."""

    def prepare(self, blocks: Sequence[memoryview]) -> None:
        """What is not measured; each call of `write` will bring these blocks."""
        ...

    def write(self, first: int, blocks: Sequence[memoryview]) -> None: ...

    def finish(self) -> None:
        """Return when all is durable."""
        ...

    def read(self, wanted: Sequence[int], buffers: Sequence[memoryview]) -> None: ...

    def close(self) -> None: ...


def memory(num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, num_bytes))


class Plain:
    def __init__(self, folder: Path, num_blocks: int, block_bytes: int, threads: int, flag: int):
        self._size = block_bytes
        path = folder / "slab"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flag, 0o600)
        os.posix_fallocate(self._descriptor, 0, num_blocks * block_bytes)
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def _each(self, call: Callable[[int, memoryview], int], places, views) -> None:
        mapped = self._pool.map(call, places, views) if self._pool else map(call, places, views)
        assert all(done == self._size for done in mapped)

    def prepare(self, blocks):
        pass

    def write(self, first, blocks):
        places = range(first, first + len(blocks))
        self._each(
            lambda at, view: os.pwrite(self._descriptor, view, at * self._size), places, blocks
        )

    def finish(self):
        os.fdatasync(self._descriptor)

    def read(self, wanted, buffers):
        self._each(
            lambda at, view: os.preadv(self._descriptor, [view], at * self._size), wanted, buffers
        )

    def close(self):
        os.close(self._descriptor)


class Store:
    """Records as a worker hands them over and takes them."""

    def __init__(
        self, folder: Path, num_blocks: int, block_bytes: int, *, is_sealing: bool = False
    ):
        # As large as a store is in earnest; it takes a 128th of that at a time.
        self._store = DiskStore(folder / "store", DiskOptions(max_bytes=32 << 30))
        self._length = sealed_bytes(block_bytes, False)
        self._is_sealing = is_sealing
        self._last: tuple[list[memoryview], Sequence[memoryview]] | None = None
        self._scratch = Scratch(0)
        self._records: list[SealedRecord] = []
        self._num_blocks = num_blocks

    def prepare(self, blocks):
        for view in self._scratch.views([self._length] * len(blocks)):
            view[:] = bytes(view.nbytes)  # as a worker's scratch is after its first call
        if not self._is_sealing:
            for first in range(0, self._num_blocks, len(blocks)):
                self._records += self._seal(first, blocks)

    def _seal(self, first: int, blocks: Sequence[memoryview]) -> list[SealedRecord]:
        return [
            seal(_hash(index), bytes(16), NO_TENANT, block, created_s=1.0)
            for index, block in enumerate(blocks, first)
        ]

    def write(self, first, blocks):
        records = self._records[first : first + len(blocks)] or self._seal(first, blocks)
        assert set(self._store.put(records)) == {PutStatus.STORED}

    def finish(self):
        self._store.flush()

    def read(self, wanted, buffers):
        views = self._scratch.views([self._length] * len(wanted))
        lengths = self._store.get([_hash(index) for index in wanted], views)
        assert all(length == self._length for length in lengths)
        for index, view, length, out in zip(wanted, views, lengths, buffers, strict=True):
            if not self._is_sealing:
                # The last batch is compared with what was written.
                self._last = (views, buffers)
                continue
            name = (_hash(index), bytes(16), NO_TENANT)
            assert unseal(view[:length], *name, out, now_s=1.0) is Verdict.OK

    def close(self):
        if self._last is not None:
            for view, out in zip(*self._last, strict=True):
                out[:] = view[-out.nbytes :]
        self._store.close()


class Objects:
    """Segments as whole objects of tensorstore's `file` driver, read by byte ranges."""

    def __init__(
        self,
        folder: Path,
        num_blocks: int,
        block_bytes: int,
        *,
        segment_bytes: int = 0,
        in_flight: int = 1,
        mode: str = "default",
    ):
        self._folder = folder / "objects"
        context = {
            "file_io_sync": in_flight > 1,
            "file_io_mode": {"mode": mode},
            "file_io_concurrency": {"limit": 4},
            "file_io_locking": {"mode": "none"},
        }
        spec = {"driver": "file", "path": f"{self._folder}/"}
        self._objects = ts.KvStore.open(spec, context=ts.Context(context)).result()
        self._size = block_bytes
        self._per_segment = segment_bytes // block_bytes or batch_of(block_bytes)
        self._is_synced = in_flight > 1
        self._in_flight = in_flight
        self._pending: list[Any] = []
        self._parts: list[memoryview | bytes] = []
        self._num_segments = 0

    def prepare(self, blocks):
        pass

    def write(self, first, blocks):
        for start in range(0, len(blocks), self._per_segment):
            part = blocks[start : start + self._per_segment]
            # What waits for its segment to be full has to be kept.
            is_whole = len(part) == self._per_segment
            self._parts += part if is_whole else [bytes(block) for block in part]
            if len(self._parts) >= self._per_segment:
                self._write_segment()

    def _write_segment(self):
        while len(self._pending) >= self._in_flight:
            self._pending.pop(0).result()
        data = b"".join(self._parts)
        self._pending.append(self._objects.write(f"{self._num_segments:06d}", data))
        self._parts.clear()
        self._num_segments += 1

    def finish(self):
        if self._parts:
            self._write_segment()
        for write in self._pending:
            write.result()
        if not self._is_synced:
            sync_files(self._folder)

    def read(self, wanted, buffers):
        reads = []
        for index in wanted:
            segment, place = divmod(index, self._per_segment)
            span = slice(place * self._size, (place + 1) * self._size)
            reads.append(self._objects.read(f"{segment:06d}", byte_range=span))
        for read, buffer in zip(reads, buffers, strict=True):
            buffer[:] = read.result().value

    def close(self):
        pass


class Ocdbt:
    """One key a block."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int):
        self._folder = folder / "ocdbt"
        context = ts.Context(
            {
                "file_io_sync": False,
                "file_io_concurrency": {"limit": 4},
                "file_io_locking": {"mode": "none"},
            }
        )
        spec = {
            "driver": "ocdbt",
            "base": f"file://{self._folder}/",
            "config": {"max_inline_value_bytes": 1024},
            "target_data_file_size": 64 << 20,
        }
        self._store = ts.KvStore.open(spec, context=context).result()
        self._per_transaction = max(16, (64 << 20) // block_bytes)
        self._transaction: ts.Transaction | None = None
        self._count = 0

    def prepare(self, blocks):
        pass

    def write(self, first, blocks):
        if self._transaction is None:
            self._transaction, self._count = ts.Transaction(), 0
        store = self._store.with_transaction(self._transaction)
        for index, block in enumerate(blocks, first):
            store[f"{index:08d}"] = bytes(block)
        self._count += len(blocks)
        if self._count >= self._per_transaction:
            self._commit()

    def _commit(self):
        if self._transaction is not None:
            self._transaction.commit_async().result()
            self._transaction = None

    def finish(self):
        self._commit()
        sync_files(self._folder)

    def read(self, wanted, buffers):
        reads = [self._store.read(f"{index:08d}") for index in wanted]
        for read, buffer in zip(reads, buffers, strict=True):
            buffer[:] = read.result().value

    def close(self):
        pass


class Zarr3:
    """Arrays of one shard each; a chunk is a block."""

    def __init__(self, folder: Path, num_blocks: int, block_bytes: int):
        self._folder = folder / "zarr3"
        self._context = ts.Context(
            {
                "file_io_sync": False,
                "file_io_concurrency": {"limit": 4},
                "file_io_locking": {"mode": "none"},
            }
        )
        self._size = block_bytes
        self._per_array = min(max(16, (64 << 20) // block_bytes), num_blocks)
        self._arrays: list[Any] = []
        self._transaction = ts.Transaction()
        self._writes: list[Any] = []

    def _open(self) -> Any:
        index_codecs = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ]
        shard = {
            "chunk_shape": [1, self._size],
            "codecs": [{"name": "bytes"}],
            "index_codecs": index_codecs,
        }
        shape = [self._per_array, self._size]
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self._folder}/{len(self._arrays)}/"},
            "metadata": {
                "shape": shape,
                "data_type": "uint8",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
                "codecs": [{"name": "sharding_indexed", "configuration": shard}],
                "fill_value": 255,
            },
        }
        return ts.open(spec, context=self._context, create=True).result()

    def prepare(self, blocks):
        pass

    def write(self, first, blocks):
        if first % self._per_array == 0:
            self._arrays.append(self._open())
            self._transaction = ts.Transaction()
        array = self._arrays[-1].with_transaction(self._transaction)
        for index, block in enumerate(blocks, first):
            data = np.frombuffer(block, np.uint8)
            self._writes.append(array[index % self._per_array].write(data))
        if (first + len(blocks)) % self._per_array == 0:
            for write in self._writes:
                write.copy.result()
            self._transaction.commit_async().result()
            self._writes.clear()

    def finish(self):
        sync_files(self._folder)

    def read(self, wanted, buffers):
        reads = []
        for index, buffer in zip(wanted, buffers, strict=True):
            array, place = divmod(index, self._per_array)
            target = ts.array(np.frombuffer(buffer, np.uint8))
            reads.append(target.write(self._arrays[array][place]))
        for read in reads:
            read.result()

    def close(self):
        pass


WAYS: dict[str, Callable[[Path, int, int], Way]] = {
    "direct": lambda folder, count, size: Plain(folder, count, size, 1, os.O_DIRECT),
    "direct_4": lambda folder, count, size: Plain(folder, count, size, 4, os.O_DIRECT),
    "buffered": lambda folder, count, size: Plain(folder, count, size, 1, 0),
    "store": Store,
    "store_sealing": lambda *args: Store(*args, is_sealing=True),
    "ts_file": Objects,
    "ts_direct": lambda *args: Objects(*args, mode="direct"),
    "ts_segment": lambda *args: Objects(*args, segment_bytes=16 << 20, in_flight=4, mode="direct"),
    "ts_ocdbt": Ocdbt,
    "ts_zarr3": Zarr3,
}


def _hash(index: int) -> bytes:
    return index.to_bytes(32, "little")


def batch_of(block_bytes: int) -> int:
    """Blocks in a call."""
    return max(16, (4 << 20) // block_bytes)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def sync_files(folder: Path) -> None:
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.close(descriptor)


def drop_cache(folder: Path) -> None:
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(make: Callable[[Path, int, int], Way], folder: Path, num_blocks: int, size: int):
    """One round of one way; GB/s and CPU seconds per GB."""
    batch = batch_of(size)
    source, target = memory(batch * size), memory(batch * size)
    source[:] = np.random.default_rng(0).bytes(batch * size)
    target[:] = bytes(batch * size)
    blocks = [source[index * size : (index + 1) * size] for index in range(batch)]
    buffers = [target[index * size : (index + 1) * size] for index in range(batch)]
    gigabytes = num_blocks * size / 1e9
    os.sync()
    way = make(folder, num_blocks, size)
    way.prepare(blocks)
    try:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for first in range(0, num_blocks, batch):
            way.write(first, blocks)
        way.finish()
        write_s, write_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        drop_cache(folder)
        order = random.Random(1).sample(range(num_blocks), num_blocks)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        for first in range(0, num_blocks, batch):
            way.read(order[first : first + batch], buffers)
        read_s, read_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    finally:
        way.close()
    for index, buffer in zip(order[-batch:], buffers, strict=True):
        assert buffer == blocks[index % batch], "read something else than was written"
    return {
        "write_gb_per_s": round(gigabytes / write_s, 3),
        "read_gb_per_s": round(gigabytes / read_s, 3),
        "write_cpu_s": round(write_cpu_s / gigabytes, 3),
        "read_cpu_s": round(read_cpu_s / gigabytes, 3),
    }


def environment(folder: Path) -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "tensorstore": version("tensorstore"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "file_system": _file_system(folder),
    }


def _file_system(folder: Path) -> str:
    command = ["stat", "-f", "-c", "%T", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("."), help="on the disk in question")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=256, help="written and read in each turn")
    default = ",".join(str(size >> 10) for size in BLOCK_SIZES)
    parser.add_argument("--kib", default=default, help="block sizes, with commas between")
    parser.add_argument("--only", default=",".join(WAYS), help="ways, with commas between")
    args = parser.parse_args()
    about = environment(args.folder)
    for size in [int(kib) << 10 for kib in args.kib.split(",")]:
        num_blocks = (args.mib << 20) // size // batch_of(size) * batch_of(size)
        rounds: dict[str, list[dict[str, float]]] = {}
        for round_ in range(args.rounds):
            for name in args.only.split(","):
                with tempfile.TemporaryDirectory(dir=args.folder, prefix=".kv-disk-") as folder:
                    figures = measure(WAYS[name], Path(folder), num_blocks, size)
                rounds.setdefault(name, []).append(figures)
                line = {"bench": "kv_disk", "way": name, "block_bytes": size, "round": round_}
                print(json.dumps(line | figures), flush=True)
        medians = {
            name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
            for name, figures in rounds.items()
        }
        for name, figures in medians.items():
            line = {"bench": "kv_disk", "way": name, "block_bytes": size, "median": True}
            shares = {
                f"{what}_share": round(
                    figures[f"{what}_gb_per_s"]
                    / max(
                        medians[plain][f"{what}_gb_per_s"] for plain in PLAIN if plain in medians
                    ),
                    3,
                )
                for what in ("write", "read")
                if any(plain in medians for plain in PLAIN)
            }
            print(json.dumps(line | figures | shares | about), flush=True)


if __name__ == "__main__":
    main()
