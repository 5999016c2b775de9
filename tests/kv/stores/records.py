"""Records for store tests: any bytes do, since stores never look inside."""

import random

from jaxserve.kv.stores.base import RecordInfo, SealedRecord, Store

SIZE = 30_000
TENANT_A, TENANT_B = b"A" * 16, b"B" * 16
SPACE_1, SPACE_2 = b"1" * 16, b"2" * 16


def key_of(index: int) -> bytes:
    return index.to_bytes(4, "big") * 8


def payload(index: int, size: int = SIZE) -> bytes:
    return random.Random(index).randbytes(size)


def record(
    index: int,
    *,
    size: int = SIZE,
    tenant: bytes = TENANT_A,
    namespace: bytes = SPACE_1,
    created_s: float = 1_000_000.0,
    expires_s: float = 0.0,
) -> SealedRecord:
    """Record `index`, in two parts as envelopes make them."""
    data = payload(index, size)
    info = RecordInfo(key_of(index), namespace, tenant, size, created_s, expires_s)
    return SealedRecord(info, (memoryview(data[:64]), memoryview(data[64:])))


def read(store: Store, index: int, size: int = SIZE) -> bytes | None:
    """The bytes of a record, or None."""
    buffer = memoryview(bytearray(size))
    (num_bytes,) = store.get([key_of(index)], [buffer])
    return bytes(buffer[:num_bytes]) if num_bytes else None
