"""A store in a Valkey or Redis server, which several engines may share.

    <prefix>r:<block hash>   header (namespace, tenant, times), then the sealed record
    <prefix>pins             set of block hashes

Reads go by the hash alone, so what one engine wrote is a hit for all. The server lets records
expire by itself. The bound is kept by this process's books (`Ledger`): what it wrote, what it
read, and what a scan found when it connected; several writers each keep their own, so together
they are bounded by the server's `maxmemory` only. What the server evicts, or loses by a restart, is
a miss; after a restart the books are made anew. A sweep asks for both, so that the books of an idle
engine are true, too.

Knows nothing of what a record holds.
"""

import logging
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import valkey
from valkey.backoff import NoBackoff
from valkey.retry import Retry

from jaxserve.errors import StoreError
from jaxserve.kv.blocks import BlockHash
from jaxserve.kv.copying import copy_into
from jaxserve.kv.envelope import has_expired
from jaxserve.kv.stores.base import EraseCount, PutStatus, RecordInfo, SealedRecord, StoreUsage
from jaxserve.kv.stores.ledger import Grant, Ledger

_LOG = logging.getLogger(__name__)
_HEADER = struct.Struct("<4s16s16sdd")
_MAGIC = b"jkv1"
_PAGE = 512
"""Keys per step of a scan."""
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ValkeyOptions:
    """Where the server is and how the store behaves.

    Attributes:
        host, port, db: of the server.
        username, password: empty if it asks for none.
        tls: encrypt the connection; check the server's certificate, and that it is the host's.
        ca_file: PEM file of who may have signed it; empty: those that the system trusts.
        cert_file, key_file: PEM files of this client's own certificate, if the server wants one.
        prefix: of all keys.
        max_bytes: bound of this process's books; 0 leaves it to the server.
        policy: replacement policy, as in `make_policy`.
        ttl_s: a record expires this long after it was made, or earlier if it says so; 0: never.
        timeout_s: of one answer of the server; connect_timeout_s: of a new connection.
        connections: at the same time.
    """

    host: str = "127.0.0.1"
    port: int = 6379
    db: int = 0
    username: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    prefix: str = "jaxserve:"
    max_bytes: int = 0
    policy: str = "lru"
    ttl_s: float = 0.0
    timeout_s: float = 5.0
    connect_timeout_s: float = 1.0
    connections: int = 16


class ValkeyStore:
    """One server. See the module and `Store`.

    Args:
        name: for metrics.
        options: server and bounds.
        clock: seconds since the epoch.
    """

    def __init__(self, name: str, options: ValkeyOptions, clock: Callable[[], float] = time.time):
        self.name = name
        self._options = options
        self._clock = clock
        self._prefix = options.prefix.encode()
        self._ledger = Ledger(options.max_bytes, options.policy, clock)
        self._lock = threading.Lock()
        self._checking = threading.Lock()
        self._run_id: str | None = None
        self._is_checked = False
        self._num_removals = 0  # so far: what was read before one may be gone after it
        tls: dict[str, Any] = {}
        if options.tls:
            tls = {
                "ssl_check_hostname": True,  # else anybody's certificate would do
                "ssl_ca_certs": options.ca_file or None,
                "ssl_certfile": options.cert_file or None,
                "ssl_keyfile": options.key_file or None,
            }
        pool = valkey.BlockingConnectionPool(
            connection_class=valkey.SSLConnection if options.tls else valkey.Connection,
            **tls,
            host=options.host,
            port=options.port,
            db=options.db,
            username=options.username or None,
            password=options.password or None,
            socket_timeout=options.timeout_s,
            socket_connect_timeout=options.connect_timeout_s,
            socket_keepalive=True,
            max_connections=options.connections,
            timeout=options.timeout_s,  # pyright: ignore[reportArgumentType]
            # A connection may have died since its last use: one new one, at once.
            retry=Retry(NoBackoff(), 1),
            retry_on_error=[valkey.ConnectionError],
        )
        self._client = valkey.Valkey(connection_pool=pool)
        try:
            self._check()
        except StoreError as error:
            _LOG.warning("store %s is not there yet: %s", name, error)

    def probe(self, keys: Sequence[BlockHash]) -> list[bool]:
        self._check()
        found = self._pipeline([("EXISTS", self._key(key)) for key in keys])
        with self._lock:
            late = {key for key in keys if key in self._ledger and not self._ledger.find(key)}
        return [bool(one) and key not in late for key, one in zip(keys, found, strict=True)]

    def get(self, keys: Sequence[BlockHash], buffers: Sequence[memoryview]) -> list[int]:
        self._check()
        if not keys:
            return []
        names = [self._key(key) for key in keys]
        num_removals = self._num_removals
        values: list[bytes | None] = self._ask(lambda: self._client.execute_command("MGET", *names))
        lengths = [0] * len(keys)
        for index in reversed(range(len(keys))):  # the policy hears of a sequence suffix first
            key, value, buffer = keys[index], values[index], buffers[index]
            info = None if value is None else _parse(key, value[: _HEADER.size], len(value))
            with self._lock:
                if info is None or self._has_expired(info):
                    self._ledger.remove(key)
                    self._ledger.find(key)  # counts as a miss for the policy
                    continue
                if key in self._ledger:
                    self._ledger.touch(key)
                elif self._num_removals == num_removals:  # else it may have been removed since
                    self._ledger.add(info)
            if value is not None and info.num_bytes <= len(buffer):
                copy_into(buffer[: info.num_bytes], memoryview(value)[_HEADER.size :])
                lengths[index] = info.num_bytes
        return lengths

    def put(self, records: Sequence[SealedRecord]) -> list[PutStatus]:
        self._check()
        there = self._pipeline([("EXISTS", self._key(r.info.block_hash)) for r in records])
        statuses: list[PutStatus] = []
        grants: list[tuple[int, Grant]] = []
        with self._lock:
            while self._ledger.expired():  # the server has removed them by itself
                pass
            for index, (record, is_there) in enumerate(zip(records, there, strict=True)):
                key = record.info.block_hash
                if not is_there:
                    self._ledger.remove(key)
                grant = PutStatus.PRESENT if is_there else self._ledger.admit(self._timed(record))
                if isinstance(grant, Grant):
                    grants.append((index, grant))
                    grant = PutStatus.FAILED
                statuses.append(grant)
        if not grants:
            return statuses
        victims = [victim for _, grant in grants for victim in grant.victims]
        self._num_removals += len(victims)
        try:
            self._pipeline([("DEL", self._key(victim.block_hash)) for victim in victims])
        except StoreError:
            with self._lock:
                for _, grant in grants:
                    self._ledger.cancel(grant)
                for victim in victims:
                    self._ledger.add(victim)
            raise
        try:
            answers = self._pipeline([self._set(records[index], grant) for index, grant in grants])
        except StoreError:
            with self._lock:
                for _, grant in grants:  # some may have arrived: on the books until they are missed
                    self._ledger.commit(grant)
            raise
        with self._lock:
            for (index, grant), answer in reversed(list(zip(grants, answers, strict=True))):
                statuses[index] = _put_status(answer)
                if statuses[index] is PutStatus.STORED:
                    self._ledger.commit(grant)
                else:
                    self._ledger.cancel(grant)
        return statuses

    def delete(self, keys: Sequence[BlockHash]) -> EraseCount:
        self._check()
        return self._delete(list(keys))

    def delete_tenant(self, tenant: bytes) -> EraseCount:
        self._check()
        return self._delete([info.block_hash for info in self._scan() if info.tenant == tenant])

    def delete_namespaces(self, keep: bytes | None = None) -> EraseCount:
        self._check()
        return self._delete([info.block_hash for info in self._scan() if info.namespace != keep])

    def pin(self, keys: Sequence[BlockHash], pinned: bool) -> int:
        self._check()
        found = self.probe(keys)
        there = [key for key, is_there in zip(keys, found, strict=True) if is_there]
        command = "SADD" if pinned else "SREM"
        self._pipeline([(command, self._prefix + b"pins", key) for key in there])
        with self._lock:
            unknown = [key for key in there if not self._ledger.pin(key, pinned)]
        for info in self._infos(unknown):
            with self._lock:
                self._ledger.add(info)
                self._ledger.pin(info.block_hash, pinned)
        return len(there)

    def sweep(self) -> EraseCount:
        """The server removes what has expired, and may have lost more; the books have to follow."""
        self._is_checked = False  # it may have been restarted since it was last asked
        self._check()
        with self._lock:
            while self._ledger.expired():
                pass
            known = list(self._ledger)
        if self._ask(self._client.dbsize) < len(known):
            self._forget_missing(known)
        return EraseCount(0, 0)

    def _forget_missing(self, known: Sequence[RecordInfo]) -> None:
        """Take off the books what the server does not have any more."""
        for start in range(0, len(known), _PAGE):
            page = known[start : start + _PAGE]
            there = self._pipeline([("EXISTS", self._key(info.block_hash)) for info in page])
            with self._lock:
                for info, is_there in zip(page, there, strict=True):
                    if is_there == 0 and self._ledger.find(info.block_hash) is info:
                        self._ledger.remove(info.block_hash)

    def scan(self) -> Iterator[RecordInfo]:
        self._check()
        for info in self._scan():
            if not self._has_expired(info):
                with self._lock:
                    is_pinned = self._ledger.is_pinned(info.block_hash)
                yield replace(info, is_pinned=is_pinned)

    def sample(self, count: int) -> list[RecordInfo]:
        with self._lock:
            return self._ledger.sample(count)

    def usage(self) -> StoreUsage:
        with self._lock:
            return self._ledger.usage()

    def flush(self) -> None:
        """Nothing to do: what outlives the server's own crash is for its configuration to say."""

    def close(self) -> None:
        self._client.close()
        self._client.connection_pool.disconnect()

    def _check(self) -> None:
        """After an error, look whether this is still the same server; make the books if not."""
        if self._is_checked:
            return
        with self._checking:
            if self._is_checked:
                return
            run_id = self._ask(lambda: self._client.info("server")).get("run_id")
            if run_id != self._run_id:
                infos = sorted(self._scan(), key=lambda info: info.created_s)
                names = self._prefix + b"pins"
                pins = self._ask(lambda: self._client.execute_command("SMEMBERS", names))
                with self._lock:
                    self._ledger.clear()
                    for info in infos:
                        self._ledger.add(info)
                    for key in pins:
                        self._ledger.pin(key, True)
                self._run_id = run_id
            self._is_checked = True

    def _scan(self) -> Iterator[RecordInfo]:
        pattern, cursor = self._prefix + b"r:*", 0
        while True:
            cursor, names = self._ask(
                lambda at=cursor: self._client.scan(at, match=pattern, count=_PAGE)
            )
            yield from self._infos([name[len(pattern) - 1 :] for name in names])
            if cursor == 0:
                return

    def _infos(self, keys: Sequence[BlockHash]) -> Iterator[RecordInfo]:
        """What the server says of these records; those that are gone are left out."""
        ends = [("GETRANGE", self._key(key), 0, _HEADER.size - 1) for key in keys]
        headers = self._pipeline(ends)
        lengths = self._pipeline([("STRLEN", self._key(key)) for key in keys])
        for key, header, num_bytes in zip(keys, headers, lengths, strict=True):
            info = _parse(key, header, num_bytes)
            if info is not None:
                yield info

    def _delete(self, keys: list[BlockHash]) -> EraseCount:
        num_records = num_bytes = 0
        for start in range(0, len(keys), _PAGE):
            page = keys[start : start + _PAGE]
            lengths = self._pipeline([("STRLEN", self._key(key)) for key in page])
            deleted = self._pipeline([("DEL", self._key(key)) for key in page])
            self._pipeline([("SREM", self._prefix + b"pins", key) for key in page])
            with self._lock:
                self._num_removals += len(page)
                for key in page:
                    self._ledger.remove(key)
            for length, was_there in zip(lengths, deleted, strict=True):
                num_records += bool(was_there)
                num_bytes += max(length - _HEADER.size, 0) if was_there else 0
        return EraseCount(num_records, num_bytes)

    def _has_expired(self, info: RecordInfo) -> bool:
        return has_expired(info.created_s, info.expires_s, self._clock())

    def _timed(self, record: SealedRecord) -> RecordInfo:
        info, ttl_s = record.info, self._options.ttl_s
        if not ttl_s:
            return info
        latest_s = info.created_s + ttl_s
        return replace(info, expires_s=min(info.expires_s or latest_s, latest_s))

    def _set(self, record: SealedRecord, grant: Grant) -> tuple[Any, ...]:
        info = grant.info
        times = (info.created_s, info.expires_s)
        header = _HEADER.pack(_MAGIC, info.namespace, info.tenant, *times)
        command = ("SET", self._key(info.block_hash), b"".join((header, *record.parts)))
        if not info.expires_s:
            return command
        left_ms = max(int((info.expires_s - self._clock()) * 1000), 1)
        return (*command, "PX", left_ms)

    def _key(self, key: BlockHash) -> bytes:
        return self._prefix + b"r:" + key

    def _pipeline(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers of many commands, an error of one of them among them."""
        if not commands:
            return []

        def ask() -> list[Any]:
            with self._client.pipeline(transaction=False) as pipe:
                for command in commands:
                    pipe.execute_command(*command)
                return pipe.execute(raise_on_error=False)

        return self._ask(ask)

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (valkey.ValkeyError, OSError) as error:
            self._is_checked = False
            where = f"{self._options.host}:{self._options.port}"
            text = " ".join(str(error).split())[:200]
            raise StoreError(f"store {self.name} at {where} cannot answer: {text}") from error


def _parse(key: BlockHash, header: bytes, num_bytes: int) -> RecordInfo | None:
    """None if there is nothing, or nothing of ours."""
    if len(header) != _HEADER.size or len(key) != 32:
        return None
    magic, namespace, tenant, created_s, expires_s = _HEADER.unpack(header)
    if magic != _MAGIC:
        return None
    return RecordInfo(key, namespace, tenant, num_bytes - _HEADER.size, created_s, expires_s)


def _put_status(answer: Any) -> PutStatus:
    if isinstance(answer, valkey.OutOfMemoryError):
        return PutStatus.FULL
    return PutStatus.FAILED if isinstance(answer, Exception) else PutStatus.STORED
