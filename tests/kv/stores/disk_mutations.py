"""Damage to the files of a disk store: what it then serves is what was stored, or nothing."""

import random
from collections import Counter
from pathlib import Path

from jaxserve.kv.envelope import Verdict, sealed_bytes, unseal
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.kv.stores.disk_options import DiskOptions
from tests.kv.stores.disk_records import (
    NAMESPACES,
    NOW_S,
    PAYLOAD_BYTES,
    TENANTS,
    key_of,
    payload_of,
    record,
)

_NUM_RECORDS = 24
_TABLE_BYTES = 272
_LENGTH = sealed_bytes(PAYLOAD_BYTES, False)


def _open(folder: Path) -> DiskStore:
    return DiskStore(folder, DiskOptions(max_bytes=1 << 20, threads=1), lambda: NOW_S)


def _mutate(rng: random.Random, path: Path, original: bytes, used: tuple[range, range]) -> str:
    """Change the file in place in one random way, within what records use."""
    table, slots = used
    kind = rng.choice(
        ("bit", "bits", "zero", "swap slots", "swap entries", "swap both", "copy", "truncate")
    )
    data = bytearray(original)
    region = rng.choice((table, slots))
    if kind in ("bit", "bits"):
        for _ in range(1 if kind == "bit" else rng.randint(2, 50)):
            data[rng.choice(region)] ^= 1 << rng.randrange(8)
    elif kind in ("zero", "copy"):
        start, length = rng.choice(region), rng.choice((1, 16, 512, 4096))
        length = min(length, region.stop - start)
        source = rng.randrange(region.start, region.stop - length + 1)
        filler = bytes(length) if kind == "zero" else original[source : source + length]
        data[start : start + length] = filler
    elif kind == "truncate":
        del data[rng.choice(region) :]
    else:
        first, second = rng.sample(range(_NUM_RECORDS), 2)
        parts = []
        if kind != "swap slots":
            parts.append((table.start, _TABLE_BYTES))
        if kind != "swap entries":
            parts.append((slots.start, PAYLOAD_BYTES))
        for start, size in parts:
            one, two = start + first * size, start + second * size
            data[one : one + size] = original[two : two + size]
            data[two : two + size] = original[one : one + size]
    # In place: the store has the file open.
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate(len(data))
    return kind


def run_disk_mutations(folder: Path, seed: int, count: int) -> Counter[str]:
    """Damage a store's file `count` times, half of them while it is open.

    Returns:
        How often each kind of damage was done.

    Raises:
        AssertionError: a record came back that is not what was stored.
    """
    rng = random.Random(seed)
    tried: Counter[str] = Counter()
    folder = folder / "mutated"
    store = _open(folder)
    store.put([record(number, tenant=number % 2) for number in range(_NUM_RECORDS)])
    store.close()
    (path,) = folder.iterdir()
    original = path.read_bytes()
    slots_at = original.index(payload_of(0))
    used = (
        range(4096, 4096 + _NUM_RECORDS * _TABLE_BYTES),
        range(slots_at, slots_at + _NUM_RECORDS * PAYLOAD_BYTES),
    )
    keys = [key_of(number) for number in range(_NUM_RECORDS)]
    buffers = [memoryview(bytearray(_LENGTH)) for _ in keys]
    out = memoryview(bytearray(PAYLOAD_BYTES))
    num_served = 0
    for round_ in range(count):
        is_open = round_ % 2 == 0
        store = _open(folder) if is_open else None
        tried[_mutate(rng, path, original, used)] += 1
        store = store or _open(folder)
        lengths = store.get(keys, buffers)
        num_served += sum(map(bool, lengths))
        for number, (length, buffer) in enumerate(zip(lengths, buffers, strict=True)):
            if not length:
                continue
            verdict = unseal(
                buffer[:length],
                keys[number],
                NAMESPACES[0],
                TENANTS[number % 2],
                out,
                now_s=NOW_S,
            )
            # The store's own checksums are to find it all; the envelope is the second line.
            assert verdict is Verdict.OK, f"round {round_} of seed {seed}: {verdict}"
            assert out == payload_of(number), f"round {round_} of seed {seed}: wrong payload"
        assert sum(map(bool, lengths)) < _NUM_RECORDS or _is_as_before(path, original)
        store.close()
        path.write_bytes(original)
        path.chmod(0o600)
    assert num_served > count * _NUM_RECORDS / 4, "hardly anything was served"
    return tried


def _is_as_before(path: Path, original: bytes) -> bool:
    return path.read_bytes() == original
