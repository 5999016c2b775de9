"""Remote stores whose servers die, hang, forget, fill up or are shared: at worst a miss."""

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import StoreError
from jaxserve.kv.stores.base import EraseCount, PutStatus
from jaxserve.kv.stores.breaker import BreakerState
from jaxserve.kv.stores.limits import WorkerLimits
from jaxserve.kv.stores.objects import ObjectOptions, ObjectStore
from jaxserve.kv.stores.tasks import Outcome, Reason
from jaxserve.kv.stores.tensorstores import DriverOptions, open_driver
from jaxserve.kv.stores.url import open_store
from jaxserve.kv.stores.worker import StoreWorker
from tests.kv.stores.conftest import BUCKET, FakeClock
from tests.kv.stores.records import SIZE, TENANT_A, TENANT_B, key_of, payload, read, record
from tests.kv.stores.servers import Server, make_bucket, start_s3, start_valkey

LIMITS = WorkerLimits(
    probe_timeout_s=0.5,
    get_timeout_s=0.5,
    put_timeout_s=1.0,
    max_failures=2,
    min_backoff_s=0.1,
    max_backoff_s=0.2,
)


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers that a test may do anything to."""
    servers: list[Server] = []

    def start(*options: str) -> Server:
        servers.append(start_valkey(tmp_path, *options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def own_s3(tmp_path: Path, aws_keys: None) -> Iterator[Server]:
    server = start_s3(tmp_path, BUCKET)
    yield server
    server.kill()


def valkey_url(server: Server, options: str = "") -> str:
    return f"valkey://127.0.0.1:{server.port}/0?timeout=1s&{options}".rstrip("&")


def s3_url(server: Server, options: str = "") -> str:
    place = f"endpoint=http://127.0.0.1:{server.port}&region=us-east-1&retries=1"
    return f"s3://{BUCKET}/p?timeout=1s&{place}&{options}".rstrip("&")


class Caller:
    """Asks a worker and waits for the answers."""

    def __init__(self, worker: StoreWorker):
        self.worker = worker
        self._outcomes: queue.SimpleQueue[Outcome[Any]] = queue.SimpleQueue()

    def put(self, index: int) -> PutStatus | None:
        """None if it was refused."""
        task = self.worker.submit_put([record(index)], self._outcomes.put)
        return None if task is None else self._outcomes.get(timeout=5).values[0]

    def get(self, index: int) -> bytes | None:
        """The record's bytes or None; never wrong bytes, and never late."""
        buffer = memoryview(bytearray(b"\xee" * SIZE))
        start_s = time.monotonic()
        task = self.worker.submit_get([key_of(index)], [buffer], self._outcomes.put)
        if task is None:
            return None
        outcome = self._outcomes.get(timeout=5)
        assert time.monotonic() - start_s < LIMITS.get_timeout_s + 2.0
        if outcome.values == [0]:
            assert bytes(buffer) == b"\xee" * SIZE
            return None
        assert outcome.reason is Reason.OK and buffer == payload(index)
        return bytes(buffer)

    def until(self, holds: Callable[[], bool]) -> None:
        until_s = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < until_s, "it never came true"
            time.sleep(0.01)


def dies_and_comes_back(caller: Caller, server: Server, come_back: Callable[[], None]) -> None:
    """What must hold for any server that is killed and comes back empty."""
    assert caller.put(1) is PutStatus.STORED and caller.get(1) == payload(1)
    server.kill()
    for index in range(4):
        assert caller.get(1) is None
        assert caller.put(10 + index) in (None, PutStatus.FAILED)
    stats = caller.worker.stats()
    assert BreakerState.CLOSED not in (stats.load_breaker, stats.write_breaker)
    come_back()
    caller.until(lambda: caller.worker.stats().load_breaker is BreakerState.CLOSED)
    caller.until(lambda: caller.put(2) in (PutStatus.STORED, PutStatus.PRESENT))
    assert caller.get(1) is None, "what is gone is a miss"
    assert caller.get(2) == payload(2)
    assert caller.worker.store.usage().num_records == 1, "the books know that the rest is gone"


def test_valkey_killed_and_restarted_empty(own_valkey: Callable[..., Server]):
    server = own_valkey()
    caller = Caller(StoreWorker(open_store(valkey_url(server, "max_bytes=2MiB")), LIMITS))
    dies_and_comes_back(caller, server, server.start)
    assert caller.worker.close()


def test_valkey_hangs_and_wakes_up(own_valkey: Callable[..., Server]):
    server = own_valkey()
    caller = Caller(StoreWorker(open_store(valkey_url(server)), LIMITS))
    assert caller.put(1) is PutStatus.STORED
    server.pause()
    start_s = time.monotonic()
    assert caller.get(1) is None and caller.get(1) is None
    for _ in range(1000):
        assert caller.get(1) is None, "now it costs nothing"
    assert time.monotonic() - start_s < 2 * LIMITS.get_timeout_s + 2.0
    server.resume()
    caller.until(lambda: caller.get(1) == payload(1))
    assert caller.worker.close()


def test_a_worker_closes_in_time_while_valkey_hangs(own_valkey: Callable[..., Server]):
    server = own_valkey()
    caller = Caller(StoreWorker(open_store(valkey_url(server)), LIMITS))
    server.pause()
    outcomes: list[Outcome[Any]] = []
    caller.worker.submit_put([record(1)], outcomes.append)
    caller.worker.submit_get([key_of(1)], [memoryview(bytearray(SIZE))], outcomes.append)
    start_s = time.monotonic()
    assert not caller.worker.close(0.1)
    assert time.monotonic() - start_s < 1.0
    assert [outcome.values for outcome in outcomes] in ([[0], [PutStatus.FAILED]],)


def test_a_full_valkey_refuses_and_a_cache_of_valkey_forgets(own_valkey: Callable[..., Server]):
    full = own_valkey("--maxmemory", "3mb")
    store = open_store(valkey_url(full))
    statuses = [store.put([record(i)])[0] for i in range(100)]
    assert set(statuses) == {PutStatus.STORED, PutStatus.FULL}
    for index, status in enumerate(statuses):
        assert read(store, index) == (payload(index) if status is PutStatus.STORED else None)
    store.close()
    cache = own_valkey("--maxmemory", "3mb", "--maxmemory-policy", "allkeys-lru")
    store = open_store(valkey_url(cache))
    assert {store.put([record(i)])[0] for i in range(100)} == {PutStatus.STORED}
    found = [read(store, i) for i in range(100)]
    assert {data == payload(i) for i, data in enumerate(found) if data is not None} == {True}
    there = sum(data is not None for data in found)
    assert 10 < there < 100 and store.usage().num_records == there
    store.close()


def test_engines_share_a_valkey(valkey_server: Server):
    url = valkey_url(valkey_server, "prefix=shared:")
    one, other = open_store(url), open_store(url)
    assert one.put([record(1, tenant=TENANT_A), record(2, tenant=TENANT_B)])
    assert other.probe([key_of(1), key_of(2)]) == [True, True]
    assert read(other, 1) == payload(1)
    assert other.put([record(1)]) == [PutStatus.PRESENT]
    assert other.delete_tenant(TENANT_A) == EraseCount(1, SIZE)
    assert read(one, 1) is None and read(one, 2) == payload(2)
    assert one.usage().num_records == 1
    bounded = open_store(valkey_url(valkey_server, "prefix=shared:&max_bytes=100KB"))
    for index in range(10, 20):
        assert bounded.put([record(index)]) == [PutStatus.STORED]
    assert read(one, 2) is None, "found when it connected, and evicted"
    for store in (one, other, bounded):
        store.close()


def test_the_books_of_an_idle_engine_follow_its_valkey(own_valkey: Callable[..., Server]):
    """Metrics ask the books, not the server: only a sweep tells them what it has lost."""
    import valkey

    server = own_valkey()
    store = open_store(valkey_url(server))
    client = valkey.Valkey(port=server.port)
    for lose, num_left in ((None, 3), (server.kill, 0), (client.flushall, 0)):
        assert store.put([record(1), record(2), record(3)]) == [PutStatus.STORED] * 3
        if lose is not None:
            lose()
        if lose == server.kill:
            server.start()
        store.sweep()
        assert store.usage().num_records == num_left
        client.flushall()
        store.sweep()
    store.put([record(1), record(2)])
    client.delete(b"jaxserve:r:" + key_of(1))
    store.sweep()
    assert store.usage().num_records == 1 and read(store, 2) == payload(2)
    store.close()
    client.close()


def test_valkey_wants_a_password(
    own_valkey: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
):
    server = own_valkey("--requirepass", "open sesame")
    place = f"127.0.0.1:{server.port}/0"
    for wrong in (f"valkey://{place}", f"valkey://:wrong@{place}"):
        with pytest.raises(StoreError, match="cannot answer"):
            open_store(wrong).probe([key_of(1)])
    monkeypatch.setenv("MY_PASSWORD", "open sesame")
    for right in (f"valkey://:open%20sesame@{place}", f"valkey://{place}?password_env=MY_PASSWORD"):
        assert open_store(right).probe([key_of(1)]) == [False]


def test_what_is_not_ours_in_valkey_is_left_alone(valkey_server: Server):
    import valkey

    client = valkey.Valkey(port=valkey_server.port)
    foreign = {b"odd:r:short": b"x", b"odd:r:" + bytes(32): b"y" * 100, b"odd:else": b"z"}
    client.mset(foreign)
    store = open_store(valkey_url(valkey_server, "prefix=odd:"))
    assert list(store.scan()) == [] and read(store, 0) is None
    assert store.delete_namespaces() == EraseCount(0, 0)
    assert {name: client.get(name) for name in foreign} == foreign
    store.close()
    client.close()


def test_s3_killed_and_restarted_empty(own_s3: Server):
    def come_back() -> None:
        own_s3.start()
        make_bucket(own_s3, BUCKET)
        # Nobody tells the engine that the objects are gone: it finds out as it reads.
        assert caller.worker.store.get([key_of(1)], [memoryview(bytearray(SIZE))]) == [0]

    caller = Caller(StoreWorker(open_store(s3_url(own_s3, "max_bytes=2MiB")), LIMITS))
    dies_and_comes_back(caller, own_s3, come_back)
    assert caller.worker.close()


def test_s3_hangs(own_s3: Server):
    store = open_store(s3_url(own_s3))
    assert store.put([record(1)]) == [PutStatus.STORED]
    own_s3.pause()
    start_s = time.monotonic()
    with pytest.raises(StoreError, match="did not answer within 1 s"):
        read(store, 1)
    with pytest.raises(StoreError):
        store.put([record(2)])
    assert time.monotonic() - start_s < 3.0
    own_s3.resume()
    assert read(store, 1) == payload(1)
    assert store.usage().num_records == 2, "the second may have arrived"
    assert read(store, 2) in (payload(2), None)
    assert store.usage().num_records == len(list(store.scan()))
    store.close()


def test_engines_share_a_bucket(s3_server: Server, aws_keys: None, tmp_path: Path):
    """What another engine wrote or deleted is known after a refresh, and harmless before."""
    url = s3_url(s3_server, "refresh=0.01s").replace("/p?", "/shared?")
    one, other = open_store(url), open_store(url)
    one.put([record(1), record(2)])
    until_s = time.monotonic() + 10
    while other.probe([key_of(1), key_of(2)]) != [True, True]:
        assert time.monotonic() < until_s
        time.sleep(0.01)
    assert read(other, 1) == payload(1)
    other.delete([key_of(1)])
    assert read(one, 1) is None
    while one.usage().num_records != 1:
        one.probe([])
        assert time.monotonic() < until_s
        time.sleep(0.01)
    for store in (one, other):
        store.close()


def test_objects_that_are_not_ours_or_are_damaged_are_no_records(tmp_path: Path):
    store = open_store(f"objects+file://{tmp_path}/store")
    store.put([record(1), record(2)])
    store.close()
    (tmp_path / "store" / "README").write_text("not ours")
    names = {path.name: path for path in (tmp_path / "store").rglob("*.*.*")}
    damaged = next(path for name, path in names.items() if name.startswith(key_of(1).hex()))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    store = open_store(f"objects+file://{tmp_path}/store")
    assert store.usage().num_records == 2
    assert read(store, 1) is None and read(store, 2) == payload(2)
    assert store.usage().num_records == 1
    store.delete_namespaces()
    assert [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()] == ["README"]


def test_two_objects_for_one_record_become_one(tmp_path: Path):
    """Two engines wrote the same blocks before they knew of each other.

    As many as keep tensorstore's threads busy: it gives up what is queued and nobody holds.
    """
    url = f"objects+file://{tmp_path}/store?max_bytes=16MiB"
    one, other = open_store(url), open_store(url)
    numbers = range(1, 101)
    one.put([record(number, created_s=1.0) for number in numbers])
    other.put([record(number, created_s=2.0) for number in numbers])
    store = open_store(url)
    assert store.usage().num_records == len(numbers)
    assert all(read(store, number) == payload(number) for number in numbers)
    until_s = time.monotonic() + 60
    while len(list(store.scan())) != len(numbers):
        assert time.monotonic() < until_s
        time.sleep(0.01)


class Undeletable:
    """A key-value store in memory that refuses to delete."""

    def __init__(self):
        self._inner = open_driver("memory", "", "", DriverOptions())
        self.may_delete = False

    def read(self, key: str) -> Any:
        return self._inner.read(key)

    def list(self) -> Any:
        return self._inner.list()

    def write(self, key: str, value: bytes | None) -> Any:
        if value is None and not self.may_delete:
            return self
        return self._inner.write(key, value)

    def result(self, timeout: float) -> Any:
        raise ValueError("no permission")


def test_the_bound_holds_even_if_nothing_can_be_deleted():
    kv = Undeletable()
    options = ObjectOptions(max_bytes=200_000)
    store = ObjectStore("mine", lambda: kv, options, FakeClock())
    statuses = [store.put([record(i)])[0] for i in range(20)]
    assert set(statuses) == {PutStatus.STORED, PutStatus.FAILED}
    objects = kv.list().result()
    assert len(objects) == statuses.count(PutStatus.STORED) == store.usage().num_records == 6
    assert len(objects) * SIZE <= 200_000
    with pytest.raises(StoreError, match="no permission"):
        store.delete([key_of(0)])
    kv.may_delete = True
    assert store.put([record(30)]) == [PutStatus.STORED]
