"""Sealed records: a payload that leaves the process, and how to know it again when it comes back.

    record  = header (128 bytes) | payload                                        plain
              header (128 bytes) | nonce (12) | ciphertext | tag (16)             encrypted

    header, little endian, at byte
      0  magic "JXKV"          16  block hash (32)       80  created (float64)   96  checksum (16)
      4  version (2)           48  namespace (16)        88  expires (float64)  112  checksum (16)
      6  flags (2)             64  tenant (16)
      8  payload bytes (8)

The checksum at 96 is the xxh3-128 of everything after the header, the one at 112 of the header
before it, so whoever has no key can still tell whether a record is whole. In an encrypted record
(AES-256-GCM, a random nonce each) the header up to 96 is authenticated together with the payload.

`unseal` knows what it asked for: another block's record in the place of this one, however whole,
is refused, and so is a plain record where an encrypted one was expected. Checksums find accidents,
not forgers: who may write to a plain store may change what it holds.

Knows nothing of stores, key files or jax.
"""

import enum
import os
import struct
from dataclasses import dataclass

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from xxhash import xxh3_128_digest

from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.copying import copy_into
from jaxserve.kv.stores.base import RecordInfo, SealedRecord

VERSION = 1
HEADER_BYTES = 128
NO_TENANT = bytes(16)
CLOCK_SLACK_S = 300.0
"""How far clocks of machines that share a store may differ."""

_MAGIC = b"JXKV"
_ENCRYPTED = 1
_FIELDS = struct.Struct("<4sHHQ32s16s16sdd")
_AUTHENTICATED_BYTES = _FIELDS.size
_CHECKED_BYTES = 112
_NONCE_BYTES = 12
_TAG_BYTES = 16
_NAMESPACE_CONTEXT = "jaxserve kv namespace name v1"
_TENANT_CONTEXT = "jaxserve kv tenant name v1"


class Verdict(enum.Enum):
    """What `unseal` found; everything but OK means that the block is not there."""

    OK = "ok"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    WRONG_VERSION = "wrong version"
    WRONG_BLOCK = "wrong block"
    WRONG_NAMESPACE = "wrong namespace"
    WRONG_TENANT = "wrong tenant"
    WRONG_SIZE = "wrong size"
    EXPIRED = "expired"
    NO_KEY = "no key"
    NOT_ENCRYPTED = "not encrypted"


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says of itself; `info.num_bytes` is the length of the whole record."""

    info: RecordInfo
    payload_bytes: int
    encrypted: bool


def namespace_digest(root: bytes) -> bytes:
    """The 16 bytes that name a namespace in records; `root` is `Namespace.root()`."""
    return blake3(root, derive_key_context=_NAMESPACE_CONTEXT).digest(16)


def tenant_digest(cache_salt: str, secret: bytes = b"") -> bytes:
    """The 16 bytes that name a tenant in records; `NO_TENANT` for the empty salt.

    A salt that can be guessed can be recognised by its digest, unless the digest is keyed with a
    secret (`MasterKey.tenant_secret`).
    """
    if not cache_salt:
        return NO_TENANT
    key = blake3(secret, derive_key_context=_TENANT_CONTEXT).digest()
    return blake3(cache_salt.encode("utf-8", "surrogatepass"), key=key).digest(16)


def sealed_bytes(payload_bytes: int, encrypted: bool) -> int:
    """Length of a record with such a payload."""
    return HEADER_BYTES + payload_bytes + (_NONCE_BYTES + _TAG_BYTES if encrypted else 0)


def has_expired(created_s: float, expires_s: float, now_s: float) -> bool:
    """Whether a record's time is over.

    A clock that went backwards cannot say how old a record is that was created in its future. If
    that record was to expire at all, it counts as expired, so it is never kept for longer.
    """
    return expires_s != 0 and not created_s - CLOCK_SLACK_S <= now_s < expires_s


def seal(
    block_hash: BlockHash,
    namespace: bytes,
    tenant: bytes,
    payload: memoryview,
    *,
    created_s: float,
    ttl_s: float = 0.0,
    key: AESGCM | None = None,
) -> SealedRecord:
    """Make a record of a payload.

    Args:
        block_hash: 32 bytes.
        namespace: 16 bytes, `namespace_digest`.
        tenant: 16 bytes, `tenant_digest`.
        payload: contiguous. A plain record refers to it and does not copy it, so it must not
            change until the record is stored.
        created_s: seconds since the epoch, now.
        ttl_s: how long the record may live; 0 for ever.
        key: the tenant's; without one the record is plain.
    """
    assert len(block_hash) == 32 and len(namespace) == 16 and len(tenant) == 16
    payload = payload.cast("B")
    expires_s = created_s + ttl_s if ttl_s else 0.0
    header = _FIELDS.pack(
        _MAGIC,
        VERSION,
        _ENCRYPTED if key else 0,
        payload.nbytes,
        block_hash,
        namespace,
        tenant,
        created_s,
        expires_s,
    )
    body = payload
    if key is not None:
        nonce = os.urandom(_NONCE_BYTES)
        sealed = bytearray(_NONCE_BYTES + payload.nbytes + _TAG_BYTES)
        sealed[:_NONCE_BYTES] = nonce
        body = memoryview(sealed)
        key.encrypt_into(nonce, payload, header, body[_NONCE_BYTES:])
        body = body.toreadonly()
    header += xxh3_128_digest(body)
    header += xxh3_128_digest(header)
    num_bytes = HEADER_BYTES + body.nbytes
    info = RecordInfo(block_hash, namespace, tenant, num_bytes, created_s, expires_s)
    return SealedRecord(info, (memoryview(header), body))


def read_header(blob: memoryview) -> Header | None:
    """The header at the start of `blob`, if it is whole and of this version."""
    verdict, header = _parse_header(blob)
    return header if verdict is Verdict.OK else None


def unseal(
    blob: memoryview,
    block_hash: BlockHash,
    namespace: bytes,
    tenant: bytes,
    out: memoryview,
    *,
    now_s: float,
    key: AESGCM | None = None,
) -> Verdict:
    """Check a record and write its payload to `out`.

    Args:
        blob: the record, no byte more and no byte less.
        block_hash, namespace, tenant: of the block that was asked for.
        out: writable, contiguous, exactly as long as the payload. Its content is undefined unless
            the verdict is OK. It is what is checked, so a blob that changes meanwhile is found.
        now_s: seconds since the epoch.
        key: the tenant's, if records are encrypted.
    """
    verdict, header = _parse_header(blob)
    if header is None:
        return verdict
    info = header.info
    if info.block_hash != block_hash:
        return Verdict.WRONG_BLOCK
    if info.namespace != namespace:
        return Verdict.WRONG_NAMESPACE
    if info.tenant != tenant:
        return Verdict.WRONG_TENANT
    if blob.nbytes != info.num_bytes:
        return Verdict.TRUNCATED if blob.nbytes < info.num_bytes else Verdict.CORRUPT
    if has_expired(info.created_s, info.expires_s, now_s):
        return Verdict.EXPIRED
    if out.nbytes != header.payload_bytes:
        return Verdict.WRONG_SIZE
    out = out.cast("B")
    checksum = blob[_AUTHENTICATED_BYTES:_CHECKED_BYTES]
    body = blob[HEADER_BYTES:]
    if not header.encrypted:
        if key is not None:
            return Verdict.NOT_ENCRYPTED
        copy_into(out, body)
        return Verdict.OK if xxh3_128_digest(out) == checksum else Verdict.CORRUPT
    if xxh3_128_digest(body) != checksum:
        return Verdict.CORRUPT
    if key is None:
        return Verdict.NO_KEY
    try:
        key.decrypt_into(body[:_NONCE_BYTES], body[_NONCE_BYTES:], blob[:_AUTHENTICATED_BYTES], out)
    except InvalidTag:
        return Verdict.CORRUPT
    return Verdict.OK


def check(blob: memoryview, now_s: float) -> Verdict:
    """Whether a record is whole, by its checksums alone: needs no key and copies nothing."""
    verdict, header = _parse_header(blob)
    if header is None:
        return verdict
    info = header.info
    if blob.nbytes != info.num_bytes:
        return Verdict.TRUNCATED if blob.nbytes < info.num_bytes else Verdict.CORRUPT
    checksum = blob[_AUTHENTICATED_BYTES:_CHECKED_BYTES]
    if xxh3_128_digest(blob[HEADER_BYTES:]) != checksum:
        return Verdict.CORRUPT
    return Verdict.EXPIRED if has_expired(info.created_s, info.expires_s, now_s) else Verdict.OK


def _parse_header(blob: memoryview) -> tuple[Verdict, Header | None]:
    if blob.nbytes < HEADER_BYTES:
        return Verdict.TRUNCATED, None
    magic, version, flags, payload_bytes, block_hash, namespace, tenant, created_s, expires_s = (
        _FIELDS.unpack_from(blob)
    )
    if magic != _MAGIC:
        return Verdict.CORRUPT, None
    if xxh3_128_digest(blob[:_CHECKED_BYTES]) != blob[_CHECKED_BYTES:HEADER_BYTES]:
        return Verdict.CORRUPT, None
    # Only now: a flipped bit is not a version.
    if version != VERSION or flags & ~_ENCRYPTED:
        return Verdict.WRONG_VERSION, None
    encrypted = bool(flags & _ENCRYPTED)
    num_bytes = sealed_bytes(payload_bytes, encrypted)
    info = RecordInfo(block_hash, namespace, tenant, num_bytes, created_s, expires_s)
    return Verdict.OK, Header(info, payload_bytes, encrypted)
