"""Records come back as they were, or not at all."""

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from xxhash import xxh3_128_digest

from jaxserve.kv.envelope import (
    CLOCK_SLACK_S,
    HEADER_BYTES,
    NO_TENANT,
    Verdict,
    check,
    namespace_digest,
    read_header,
    seal,
    sealed_bytes,
    tenant_digest,
    unseal,
)
from tests.kv.mutations import run_mutations

HASH, NAMESPACE, TENANT = b"h" * 32, b"n" * 16, b"t" * 16
PAYLOAD = bytes(range(256)) * 8
PAYLOAD_BYTES = len(PAYLOAD)
NOW_S = 1_800_000_000.25
KEY, OTHER_KEY = AESGCM(b"k" * 32), AESGCM(b"o" * 32)


def make(key=None, ttl_s=0.0, payload=PAYLOAD) -> bytes:
    record = seal(
        HASH, NAMESPACE, TENANT, memoryview(payload), created_s=NOW_S, ttl_s=ttl_s, key=key
    )
    assert record.info.num_bytes == sum(part.nbytes for part in record.parts)
    assert record.info.num_bytes == sealed_bytes(len(payload), key is not None)
    return b"".join(record.parts)


def open_(blob, *, now_s=NOW_S, key=None, out_bytes=PAYLOAD_BYTES, **name):
    name = {"block_hash": HASH, "namespace": NAMESPACE, "tenant": TENANT} | name
    out = bytearray(out_bytes)
    return unseal(memoryview(blob), **name, out=memoryview(out), now_s=now_s, key=key), bytes(out)


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_sealed_payload_comes_back(key):
    assert open_(make(key), key=key) == (Verdict.OK, PAYLOAD)
    assert open_(make(key, payload=b""), key=key, out_bytes=0) == (Verdict.OK, b"")


def test_a_plain_record_refers_to_its_payload_and_an_encrypted_one_does_not_show_it():
    payload = memoryview(bytearray(PAYLOAD))
    record = seal(HASH, NAMESPACE, TENANT, payload, created_s=NOW_S)
    assert record.parts[1].obj is payload.obj
    assert PAYLOAD[:16] not in make(KEY)
    assert make(KEY) != make(KEY), "a nonce was used twice"


def test_the_header_tells_what_the_record_is_without_a_key():
    header = read_header(memoryview(make(KEY, ttl_s=60)))
    assert header is not None
    assert header.encrypted and header.payload_bytes == len(PAYLOAD)
    assert (header.info.block_hash, header.info.namespace) == (HASH, NAMESPACE)
    assert (header.info.tenant, header.info.created_s) == (TENANT, NOW_S)
    assert header.info.expires_s == NOW_S + 60
    assert header.info.num_bytes == len(make(KEY, ttl_s=60))


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ({"block_hash": b"x" * 32}, Verdict.WRONG_BLOCK),
        ({"namespace": b"x" * 16}, Verdict.WRONG_NAMESPACE),
        ({"tenant": NO_TENANT}, Verdict.WRONG_TENANT),
        ({"out_bytes": len(PAYLOAD) + 1}, Verdict.WRONG_SIZE),
        ({"out_bytes": len(PAYLOAD) - 1}, Verdict.WRONG_SIZE),
    ],
)
@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_a_whole_record_of_something_else_is_refused(key, name, verdict):
    assert open_(make(key), key=key, **name)[0] is verdict


def test_keys_must_match_what_was_stored():
    assert open_(make(KEY))[0] is Verdict.NO_KEY
    assert open_(make(KEY), key=OTHER_KEY)[0] is Verdict.CORRUPT
    assert open_(make(), key=KEY)[0] is Verdict.NOT_ENCRYPTED


def test_lengths_must_match_to_the_byte():
    blob = make()
    assert open_(b"")[0] is Verdict.TRUNCATED
    assert open_(blob[: HEADER_BYTES - 1])[0] is Verdict.TRUNCATED
    assert open_(blob[:-1])[0] is Verdict.TRUNCATED
    assert open_(blob + b"\0")[0] is Verdict.CORRUPT


def test_a_record_of_a_later_version_is_refused_by_name():
    header = bytearray(make()[:112])
    header[4] = 2
    blob = bytes(header) + xxh3_128_digest(bytes(header)) + PAYLOAD
    assert open_(blob)[0] is Verdict.WRONG_VERSION
    assert read_header(memoryview(blob)) is None


def test_a_forged_header_of_an_encrypted_record_fails_its_authentication():
    """Checksums made to fit: only the tag knows that the record was to expire."""
    blob = bytearray(make(KEY, ttl_s=60))
    blob[88:96] = bytes(8)
    blob[112:128] = xxh3_128_digest(bytes(blob[:112]))
    assert read_header(memoryview(blob)) is not None
    assert open_(blob, key=KEY)[0] is Verdict.CORRUPT


@pytest.mark.parametrize(
    ("after_s", "verdict"),
    [
        (0, Verdict.OK),
        (59, Verdict.OK),
        (60, Verdict.EXPIRED),
        (-CLOCK_SLACK_S, Verdict.OK),
        (-CLOCK_SLACK_S - 1, Verdict.EXPIRED),
    ],
)
def test_records_expire_and_a_clock_that_goes_back_does_not_prolong_them(after_s, verdict):
    blob = make(ttl_s=60)
    assert open_(blob, now_s=NOW_S + after_s)[0] is verdict
    assert check(memoryview(blob), NOW_S + after_s) is verdict
    assert open_(make(), now_s=NOW_S + after_s)[0] is Verdict.OK


def test_a_check_without_a_key_finds_damage_anywhere():
    blob = make(KEY)
    assert check(memoryview(blob), NOW_S) is Verdict.OK
    for at in range(len(blob)):
        damaged = blob[:at] + bytes([blob[at] ^ 16]) + blob[at + 1 :]
        assert check(memoryview(damaged), NOW_S) is not Verdict.OK, at


def test_random_damage_is_always_found():
    tried = run_mutations(seed=1, count=4_000)
    assert len(tried) == 10 and min(tried.values()) > 100


def test_names_differ_where_they_must():
    assert tenant_digest("") == NO_TENANT
    names = {tenant_digest("a"), tenant_digest("b"), tenant_digest("a", b"secret")}
    assert len(names) == 3 and {len(name) for name in names} == {16}
    assert tenant_digest("\ud800") != tenant_digest("?")
    assert namespace_digest(b"r" * 32) != namespace_digest(b"s" * 32)
