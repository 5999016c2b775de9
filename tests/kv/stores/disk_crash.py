"""Kill a process that uses a disk store, open the store again, and look at what is left.

    python -m tests.kv.stores.disk_crash [--kills 1000] [--seed 0]

Half of the kills come at a random time, half inside a random one of the process's system calls
that change something: before it, after half of its bytes, or after it. The killed process puts,
reads, pins and deletes, in a store so small that records leave all the time and segments come and
go. After each kill the store is opened and used further, so damage would add up. Prints a JSON
line; fails if anything is wrong.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jaxserve.kv.stores.disk import DiskStore
from jaxserve.kv.stores.disk_options import DiskOptions
from tests.kv.stores.disk_records import NOW_S, bytes_on_disk, key_of, read, record, there

MAX_BYTES = 1 << 20
NUM_NUMBERS = 400
CALLS = ("pwrite", "pwritev", "rename", "unlink", "posix_fallocate", "fsync", "fdatasync")


def open_store(folder: Path, seed: int) -> DiskStore:
    fsync = ("never", "flush", "put")[seed % 3]
    options = DiskOptions(max_bytes=MAX_BYTES, fsync=fsync, threads=1 + seed % 2)
    return DiskStore(folder, options, lambda: NOW_S)


def length_of(number: int) -> int:
    """Two sizes of slots, so that segments have to leave, too."""
    return 8192 if number % 4 else 30_000


def work(store: DiskStore, rng: random.Random, say) -> None:
    """Use the store until killed."""
    while True:
        numbers = rng.sample(range(NUM_NUMBERS), rng.randint(1, 8))
        choice = rng.random()
        if choice < 0.7:
            for number in numbers:
                say(b"+", number)
            store.put([record(n, length_of(n)) for n in numbers])
        elif choice < 0.8:
            store.delete([key_of(number) for number in numbers])
            for number in numbers:
                say(b"-", number)
        elif choice < 0.85:
            store.pin([key_of(number) for number in numbers], rng.random() < 0.3)
        elif choice < 0.9:
            store.flush()
        else:
            for number in numbers:
                read(store, [number], length_of(number))


def die_inside(rng: random.Random) -> None:
    """Arrange that a random one of the coming system calls is the last."""
    left = [rng.randrange(400)]

    def wrap(name: str) -> None:
        call = getattr(os, name)

        def wrapped(*args: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                return call(*args)
            if rng.random() < 0.5 and name in ("pwrite", "pwritev"):
                half(call, *args)
            elif rng.random() < 0.5:
                call(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, wrapped)

    for name in CALLS:
        wrap(name)


def half(call, descriptor: int, data: Any, offset: int) -> None:
    """Half of a write, in whole pages if it is long enough."""
    if isinstance(data, bytes):
        call(descriptor, data[: len(data) // 2], offset)
        return
    data = list(data)
    if len(data) > 1:
        call(descriptor, data[: len(data) // 2], offset)
    elif data[0].nbytes > 4096:
        call(descriptor, [data[0][: data[0].nbytes // 8192 * 4096]], offset)


def run_child(folder: Path, seed: int, pipe: int) -> None:
    rng = random.Random(seed)

    def say(what: bytes, number: int) -> None:
        os.write(pipe, what + number.to_bytes(4, "little"))

    if seed % 2:
        die_inside(rng)
    store = open_store(folder, seed)
    say(b"!", 0)
    work(store, rng, say)


def check(folder: Path, seed: int, offered: set[int]) -> dict[str, int]:
    """Open after a kill; every record that is there must come back as it was."""
    store = open_store(folder, seed)
    try:
        names = [path.name for path in folder.iterdir()]
        assert all(name.endswith(".segment") for name in names), names
        assert bytes_on_disk(folder) <= MAX_BYTES
        store.check_integrity()
        found = there(store, range(NUM_NUMBERS))
        assert {info.block_hash for info in store.scan()} == {key_of(n) for n in found}
        came_back = set()
        for number in found:
            came_back |= read(store, [number], length_of(number))
        assert found <= offered, f"deleted, but back: {found - offered}"
        assert store.stats().num_io_errors == 0
        return {"found": len(found), "lost": len(found - came_back)}
    finally:
        store.close()


def run_kills(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill as often as asked for; raises AssertionError if something is wrong."""
    total = {"kills": 0, "while_opening": 0, "found": 0, "lost": 0}
    offered: set[int] = set()
    for number in range(seed, seed + kills):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(reading)
                run_child(folder, number, writing)
            except BaseException as error:
                print(f"child {number}: {error!r}", file=sys.stderr, flush=True)
            finally:
                os._exit(1)
        os.close(writing)
        if not number % 2:
            time.sleep(random.Random(number).random() * 0.03)
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reading, "rb") as pipe:
            events = pipe.read()
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the process of seed {number} failed by itself"
        total["kills"] += 1
        total["while_opening"] += not events.startswith(b"!")
        for start in range(0, len(events), 5):
            what, number_said = events[start : start + 1], events[start + 1 : start + 5]
            if what == b"+":
                offered.add(int.from_bytes(number_said, "little"))
            elif what == b"-":
                offered.discard(int.from_bytes(number_said, "little"))
        counts = check(folder, number, offered)
        total["found"] += counts["found"]
        total["lost"] += counts["lost"]
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.monotonic()
        total = run_kills(Path(folder) / "kv", args.kills, args.seed)
        print(json.dumps(total | {"seconds": round(time.monotonic() - start_s, 1)}), flush=True)
    assert total["found"], "nothing survived, so nothing was tested"
    assert not total["lost"], "a record was found and could not be read"


if __name__ == "__main__":
    main()
