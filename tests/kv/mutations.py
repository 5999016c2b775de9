"""Damage to stored records, and the proof that reading finds all of it."""

import random
from collections import Counter
from dataclasses import dataclass

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jaxserve.kv.envelope import Verdict, seal, unseal

NOW_S = 1.8e9


@dataclass(frozen=True, slots=True)
class Stored:
    """A record, and under which name it should be found."""

    block_hash: bytes
    namespace: bytes
    tenant: bytes
    blob: bytes
    payload: bytes


def stored_records(rng: random.Random, count: int, key: AESGCM | None) -> list[Stored]:
    """Records of a few lengths, of two namespaces and two tenants."""
    records = []
    names = [rng.randbytes(16) for _ in range(4)]
    for _ in range(count):
        block_hash, payload = rng.randbytes(32), rng.randbytes(rng.choice((64, 512, 4096)))
        namespace, tenant = rng.choice(names[:2]), rng.choice(names[2:])
        record = seal(
            block_hash, namespace, tenant, memoryview(payload), created_s=NOW_S, ttl_s=60, key=key
        )
        blob = b"".join(record.parts)
        records.append(Stored(block_hash, namespace, tenant, blob, payload))
    return records


def mutate(rng: random.Random, blob: bytes, others: list[bytes]) -> tuple[str, bytes]:
    """One random kind of damage; the result always differs from `blob`."""
    kind = rng.choice(
        ("bit", "bits", "byte", "truncate", "extend", "zero", "shift", "splice", "swap", "header")
    )
    data, start = bytearray(blob), rng.randrange(len(blob))
    if kind == "bit":
        data[start] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for at in rng.sample(range(8 * len(data)), rng.randint(2, 64)):
            data[at // 8] ^= 1 << at % 8
    elif kind == "byte":
        data[start] = rng.randrange(256)
    elif kind == "truncate":
        del data[start:]
    elif kind == "extend":
        data += rng.randbytes(rng.randint(1, 64))
    elif kind == "zero":
        data[start : start + 512] = bytes(len(data[start : start + 512]))
    elif kind == "shift":
        data = data[1:] + data[:1]
    else:
        other = rng.choice(others)
        if kind == "swap":
            data = bytearray(other)
        elif kind == "header":
            data[:128] = other[:128]
        else:
            data[start:] = other[start:]
    return kind, bytes(data)


def run_mutations(seed: int, count: int) -> Counter[str]:
    """Damage `count` records, half of them encrypted.

    Returns:
        How often each kind of damage was tried.

    Raises:
        AssertionError: damage was not found, or an undamaged record was refused.
    """
    rng = random.Random(seed)
    tried: Counter[str] = Counter()
    for key in (None, AESGCM(rng.randbytes(32))):
        records = stored_records(rng, 50, key)
        blobs = [record.blob for record in records]
        out = memoryview(bytearray(4096))
        done = 0
        while done < count // 2:
            record = rng.choice(records)
            kind, data = mutate(rng, record.blob, blobs)
            if data == record.blob:
                continue
            verdict = unseal(
                memoryview(data),
                record.block_hash,
                record.namespace,
                record.tenant,
                out[: len(record.payload)],
                now_s=NOW_S,
                key=key,
            )
            assert verdict is not Verdict.OK, f"{kind} was not found (seed {seed})"
            tried[kind] += 1
            done += 1
        for record in records:
            view = out[: len(record.payload)]
            verdict = unseal(
                memoryview(record.blob),
                record.block_hash,
                record.namespace,
                record.tenant,
                view,
                now_s=NOW_S,
                key=key,
            )
            assert verdict is Verdict.OK and view == record.payload
    return tried
