"""Records for tests of the disk store: what they hold follows from their number."""

import os
import random
from functools import lru_cache
from pathlib import Path

from jaxserve.kv.envelope import Verdict, seal, sealed_bytes, unseal
from jaxserve.kv.stores.base import SealedRecord
from jaxserve.kv.stores.disk import DiskStore

NOW_S = 1_800_000_000.0
NAMESPACES = (b"n" * 16, b"m" * 16)
TENANTS = (b"t" * 16, b"u" * 16)
PAYLOAD_BYTES = 8192


def key_of(number: int) -> bytes:
    return number.to_bytes(4, "little") + random.Random(number).randbytes(28)


@lru_cache(2048)
def payload_of(number: int, num_bytes: int = PAYLOAD_BYTES) -> bytes:
    return random.Random(~number).randbytes(num_bytes)


def record(
    number: int,
    num_bytes: int = PAYLOAD_BYTES,
    *,
    tenant: int = 0,
    namespace: int = 0,
    created_s: float = NOW_S,
    ttl_s: float = 0.0,
) -> SealedRecord:
    """The record of a number, sealed for real."""
    return seal(
        key_of(number),
        NAMESPACES[namespace],
        TENANTS[tenant],
        memoryview(payload_of(number, num_bytes)),
        created_s=created_s,
        ttl_s=ttl_s,
    )


def read(
    store: DiskStore,
    numbers: list[int],
    num_bytes: int = PAYLOAD_BYTES,
    *,
    tenant: int = 0,
    namespace: int = 0,
) -> set[int]:
    """Which of the numbers' records come back; asserts that those are as they were."""
    buffers = [memoryview(bytearray(sealed_bytes(num_bytes, False))) for _ in numbers]
    lengths = store.get([key_of(number) for number in numbers], buffers)
    found = set()
    out = memoryview(bytearray(num_bytes))
    for number, buffer, length in zip(numbers, buffers, lengths, strict=True):
        if not length:
            continue
        verdict = unseal(
            buffer[:length],
            key_of(number),
            NAMESPACES[namespace],
            TENANTS[tenant],
            out,
            now_s=NOW_S,
        )
        assert verdict is Verdict.OK, (number, verdict)
        assert out == payload_of(number, num_bytes), number
        found.add(number)
    return found


def there(store: DiskStore, numbers) -> set[int]:
    """Which of the numbers' records the store says that it has."""
    numbers = list(numbers)
    found = store.probe([key_of(number) for number in numbers])
    return {number for number, is_there in zip(numbers, found, strict=True) if is_there}


def bytes_on_disk(folder: Path) -> int:
    """Of the folder and all in it, as `du` counts them, or as `ls` does if that is more."""
    total = max(folder.stat().st_blocks * 512, 4096)
    for name in os.listdir(folder):
        try:
            status = os.stat(folder / name)
        except FileNotFoundError:
            continue
        total += max(status.st_blocks * 512, status.st_size)
    return total
