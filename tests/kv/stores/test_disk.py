"""The disk store keeps what it says, within its bound, for as long as it may."""

import os
import random
import stat
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from jaxserve.errors import ConfigError, StoreError
from jaxserve.kv.envelope import sealed_bytes
from jaxserve.kv.stores.base import PutStatus, RecordInfo, SealedRecord, StoreUsage
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.kv.stores.disk_options import DiskOptions, parse_disk_url
from tests.kv.stores.disk_records import (
    NAMESPACES,
    NOW_S,
    PAYLOAD_BYTES,
    TENANTS,
    bytes_on_disk,
    key_of,
    payload_of,
    read,
    record,
    there,
)

STORED, PRESENT = PutStatus.STORED, PutStatus.PRESENT
MIB = 1 << 20


@pytest.fixture
def opened(tmp_path):
    """Opens stores on one folder, one after the other; checks and closes them at the end."""
    stores = []

    def open_(clock=lambda: NOW_S, max_bytes: int = 2 * MIB, **options: Any) -> DiskStore:
        for store in stores:
            store.close()
        options_ = DiskOptions(max_bytes=max_bytes, **options)
        stores.append(DiskStore(tmp_path / "kv", options_, clock))
        return stores[-1]

    yield open_
    for store in stores:
        if store is stores[-1] and not store._is_closed:
            store.check_integrity()
        store.close()


def put(store, numbers, **record_options):
    return store.put([record(number, **record_options) for number in numbers])


@pytest.mark.parametrize(
    "num_bytes", [1, 4095, 4096, 4096 + 128, 4096 + 160, 4096 + 161, 8192 + 156, 50_000, 300_000]
)
@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_records_of_any_length_come_back(opened, num_bytes, io):
    store = opened(io=io)
    data = [random.Random(i).randbytes(num_bytes) for i in range(3)]
    records = []
    for i, whole in enumerate(data):
        cut = min(i * 100, num_bytes)
        info = RecordInfo(key_of(i), NAMESPACES[0], TENANTS[0], num_bytes, NOW_S)
        parts = (memoryview(whole)[:cut], memoryview(whole)[cut:])
        records.append(SealedRecord(info, parts[1:] if i == 0 else parts))
    assert store.put(records) == [STORED] * 3
    for _ in range(2):
        buffers = [memoryview(bytearray(num_bytes + 1000 * i)) for i in range(3)]
        assert store.get([key_of(i) for i in range(3)], buffers) == [num_bytes] * 3
        assert [bytes(buffer[:num_bytes]) for buffer in buffers] == data
        store = opened(io=io)


def test_what_is_missing_or_too_long_is_not_read(opened):
    store = opened()
    put(store, [1])
    exact, short = sealed_bytes(PAYLOAD_BYTES, False), bytearray(sealed_bytes(PAYLOAD_BYTES, False))
    buffers = [memoryview(bytearray(exact - 1)), memoryview(short), memoryview(bytearray(exact))]
    assert store.get([key_of(1), key_of(2), key_of(1)], buffers) == [0, 0, exact]
    assert not any(short)
    assert store.get([], []) == [] and store.put([]) == [] and store.probe([]) == []


def test_a_record_is_stored_once(opened):
    store = opened()
    assert put(store, [1, 1, 2]) == [STORED, PRESENT, STORED]
    assert put(store, [2, 3]) == [PRESENT, STORED]
    assert store.usage() == StoreUsage(3, 3 * sealed_bytes(PAYLOAD_BYTES, False), 2 * MIB)


def test_a_restart_keeps_everything(opened):
    store = opened()
    put(store, range(20))
    infos = {info.block_hash: info for info in store.scan()}
    assert infos[key_of(3)] == record(3).info
    again = opened()
    assert {info.block_hash: info for info in again.scan()} == infos
    assert read(again, list(range(20))) == set(range(20))


def test_the_folder_never_exceeds_its_bound(opened, tmp_path):
    store = opened(max_bytes=3 * MIB, fsync="never")
    highest, is_over = [0], threading.Event()

    def sample():
        while not is_over.is_set():
            highest[0] = max(highest[0], bytes_on_disk(tmp_path / "kv"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        rng = random.Random(5)
        for start in range(0, 1200, 8):
            num_bytes = rng.choice((4096, 8192, 8192, 50_000, 200_000))
            statuses = put(store, range(start, start + 8), num_bytes=num_bytes)
            assert statuses == [STORED] * 8
            assert store.stats().physical_bytes <= 3 * MIB
    finally:
        is_over.set()
        thread.join()
    assert 2.5 * MIB < highest[0] <= 3 * MIB
    store.check_integrity()


def test_a_smaller_bound_holds_after_a_restart(opened, tmp_path):
    store = opened(max_bytes=8 * MIB)
    for start in range(0, 900, 10):
        put(store, range(start, start + 10))
    assert bytes_on_disk(tmp_path / "kv") > 7 * MIB
    store = opened(max_bytes=3 * MIB)
    assert bytes_on_disk(tmp_path / "kv") <= 3 * MIB
    kept = there(store, range(900))
    assert kept and max(kept) > 880 and read(store, sorted(kept)) == kept
    assert put(store, [1000]) == [STORED]


def test_least_recently_used_records_leave_first(opened):
    store = opened(policy="lru")
    number = 0
    while not store.stats().num_evicted:
        put(store, [number])
        number += 1
    assert there(store, range(number)) == set(range(1, number))
    read(store, [1])
    put(store, [number, number + 1])
    assert there(store, range(number)) == {1, *range(4, number)}


def test_a_sequence_loses_its_tail_before_its_head(opened):
    store = opened(policy="lru")
    put(store, range(100))
    left: set[int] = set()
    for start in range(1000, 2000, 10):
        put(store, range(start, start + 10))
        left = there(store, range(100))
        if len(left) < 100:
            break
    assert left and left == set(range(len(left)))


def test_eviction_order_survives_a_restart(opened):
    store = opened(policy="lru")
    put(store, [1])
    put(store, [2])
    store = opened(policy="lru")
    number = 10
    while not store.stats().num_evicted:
        put(store, [number])
        number += 1
    assert there(store, [1, 2]) == {2}


def test_pinned_records_stay_until_they_are_deleted(opened):
    store = opened()
    put(store, range(5))
    assert store.pin([key_of(i) for i in (0, 1, 99)], True) == 2
    store = opened()
    for start in range(100, 700, 10):
        put(store, range(start, start + 10))
    assert there(store, range(5)) == {0, 1}
    assert store.pin([key_of(0)], False) == 1
    for start in range(700, 1400, 10):
        put(store, range(start, start + 10))
    assert there(store, range(5)) == {1}
    assert store.delete([key_of(1)]).num_records == 1
    assert there(store, range(5)) == set()


def test_a_store_full_of_pins_is_full(opened):
    store = opened()
    number = 0
    while put(store, [number]) == [STORED] and not store.stats().num_evicted:
        store.pin([key_of(number)], True)
        number += 1
    store.pin([key_of(number)], True)
    before = there(store, range(number + 1))
    assert put(store, [5000, 5001]) == [PutStatus.FULL] * 2
    assert there(store, range(number + 1)) == before


def test_records_of_another_size_take_over_but_pins_stay(opened):
    store = opened(policy="arc")
    put(store, range(200))
    store.pin([key_of(7)], True)
    for start in range(1000, 1100, 4):
        assert put(store, range(start, start + 4), num_bytes=60_000) == [STORED] * 4
        store.check_integrity()
    assert there(store, range(200)) == {7}
    assert read(store, [1099], 60_000) == {1099}
    for start in range(2000, 2400, 8):
        put(store, range(start, start + 8))
    assert read(store, [7, 2399]) == {7, 2399}


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo", "tinylfu", "lru?store_threshold=2"])
def test_every_policy_keeps_the_store_whole(opened, policy):
    rng = random.Random(3)
    store = opened(policy=policy)
    for step in range(300):
        numbers = [min(int(rng.paretovariate(0.6)), 2000) for _ in range(4)]
        missing = [n for n in numbers if n not in read(store, numbers)]
        statuses = put(store, missing)
        assert set(statuses) <= {STORED, PRESENT, PutStatus.DECLINED}
        if step % 50 == 49:
            store.check_integrity()
            store = opened(policy=policy)
    assert store.stats().num_corrupt == 0


def test_the_gate_declines_what_is_offered_once(opened):
    store = opened(policy="lru?store_threshold=2")
    assert put(store, [1]) == [PutStatus.DECLINED]
    assert put(store, [1]) == [STORED]


def test_deletions_leave_nothing_on_disk(opened, tmp_path):
    store = opened()
    put(store, range(10))
    put(store, range(10, 20), tenant=1)
    put(store, range(20, 30), tenant=1, namespace=1)
    store.pin([key_of(12)], True)
    size = sealed_bytes(PAYLOAD_BYTES, False)

    def on_disk(numbers):
        content = b"".join(path.read_bytes() for path in (tmp_path / "kv").iterdir())
        return {n for n in numbers if key_of(n) in content or payload_of(n)[5000:5032] in content}

    assert on_disk(range(30)) == set(range(30))
    count = store.delete([key_of(0), key_of(1), key_of(77)])
    assert (count.num_records, count.num_bytes) == (2, 2 * size)
    assert on_disk(range(30)) == set(range(2, 30))
    count = store.delete_tenant(TENANTS[1])
    assert (count.num_records, count.num_bytes) == (20, 20 * size)
    assert on_disk(range(30)) == there(store, range(30)) == set(range(2, 10))
    put(store, range(20, 30), namespace=1)
    assert store.delete_namespaces(keep=NAMESPACES[1]).num_records == 8
    assert on_disk(range(30)) == there(store, range(30)) == set(range(20, 30))
    assert store.delete_namespaces().num_records == 10
    assert list((tmp_path / "kv").iterdir()) == []
    assert store.delete_tenant(b"?" * 16).num_records == 0


def test_a_record_that_is_deleted_while_it_is_written_does_not_appear(opened, monkeypatch):
    store = opened()
    put(store, [0])
    counts = []
    pwritev = os.pwritev

    def delete_meanwhile(*args):
        written = pwritev(*args)
        monkeypatch.setattr(os, "pwritev", pwritev)
        counts.append(store.delete_tenant(TENANTS[1]))
        return written

    monkeypatch.setattr(os, "pwritev", delete_meanwhile)
    assert put(store, [1, 2], tenant=1) == [PutStatus.FAILED] * 2
    assert len(counts) == 1 and there(store, [0, 1, 2]) == {0}
    content = b"".join(path.read_bytes() for path in store._folder.iterdir())
    assert payload_of(1)[5000:5032] not in content
    store.check_integrity()
    assert put(store, [1, 2], tenant=1) == [STORED] * 2


def test_expired_records_are_gone_and_leave_nothing(opened):
    now = [NOW_S]
    store = opened(clock=lambda: now[0], ttl_s=100)
    put(store, [1])
    put(store, [2], ttl_s=50)
    put(store, [3], ttl_s=500)
    assert [int(info.expires_s - NOW_S) for info in store.scan()] == [100, 50, 100]
    now[0] += 60
    assert there(store, [1, 2, 3]) == {1, 3} == read(store, [1, 2, 3])
    assert len(list(store.scan())) == 2
    store = opened(clock=lambda: now[0], ttl_s=100)
    assert there(store, [1, 2, 3]) == {1, 3}
    now[0] += 60
    assert put(store, [4]) == [PutStatus.DECLINED], "too old already"
    assert store.sweep().num_records == 2
    assert store.usage().num_records == 0
    assert put(store, [4], created_s=now[0]) == [STORED]
    content = b"".join(path.read_bytes() for path in store._folder.iterdir())
    assert not any(payload_of(n)[5000:5032] in content for n in (1, 2, 3))


def test_an_expired_record_can_be_stored_anew(opened):
    now = [NOW_S]
    store = opened(clock=lambda: now[0])
    put(store, [1], ttl_s=50)
    now[0] += 60
    assert put(store, [1], created_s=now[0]) == [STORED]
    assert there(store, [1]) == {1}


def test_a_clock_that_goes_backwards_ends_what_would_live_too_long(opened):
    now = [NOW_S]
    store = opened(clock=lambda: now[0])
    put(store, [1])
    put(store, [2], ttl_s=3600)
    now[0] -= 7200
    assert there(store, [1, 2]) == {1} == read(store, [1, 2])
    now[0] += 7200
    assert there(store, [1, 2]) == {1, 2}, "the clock is right again, before a sweep"
    now[0] -= 7200
    store = opened(clock=lambda: now[0])
    assert there(store, [1, 2]) == {1}
    content = b"".join(path.read_bytes() for path in store._folder.iterdir())
    assert payload_of(2)[5000:5032] not in content
    now[0] += 7200
    assert there(store, [1, 2]) == {1}, "gone for good: nobody knew how old it was"


@pytest.mark.parametrize("back_s", [-200, -30, 0, 50, 359, 361, 5000])
def test_a_clock_set_anew_across_a_restart_prolongs_a_record_by_a_bound(opened, back_s: int):
    """By what it went back, and never to more than twice the time to live and five minutes."""
    now, ttl_s, age_s = [NOW_S], 100, 60
    store = opened(clock=lambda: now[0], ttl_s=ttl_s)
    put(store, [1])
    now[0] += age_s - back_s
    store = opened(clock=lambda: now[0], ttl_s=ttl_s)
    served_at_s = [0]
    for real_s in range(age_s, age_s + 6000, 10):
        served_at_s += [real_s] if there(store, [1]) else []
        store.sweep()
        now[0] += 10
    assert served_at_s[-1] <= ttl_s + max(back_s, 0)
    assert served_at_s[-1] <= 2 * ttl_s + 300
    assert (served_at_s == [0]) == (back_s in (-200, 361, 5000))


def test_everything_is_private_whatever_the_umask(opened, tmp_path):
    before = os.umask(0)
    try:
        put(opened(), [1], tenant=1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    for path in (tmp_path / "kv").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert TENANTS[1].hex() not in path.name and key_of(1).hex() not in path.name


def test_a_folder_that_others_may_use_is_refused(tmp_path):
    (tmp_path / "kv").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        DiskStore(tmp_path / "kv")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a folder"):
        DiskStore(tmp_path / "file")


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "kv").mkdir(mode=0o700)
    (tmp_path / "kv" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        DiskStore(tmp_path / "kv")
    assert (tmp_path / "kv" / "thesis.tex").read_text() == "precious"


def test_one_process_at_a_time(opened, tmp_path):
    store = opened()
    put(store, [1])
    with pytest.raises(ConfigError, match="in use by this process"):
        DiskStore(tmp_path / "kv")
    code = (
        "import sys\nfrom jaxserve.kv.stores.disk import DiskStore\n"
        "try: DiskStore(sys.argv[1])\nexcept Exception as error: print(type(error).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "kv")]
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    assert run.stdout.strip() == "FolderInUseError", run.stderr
    store.close()
    DiskStore(tmp_path / "kv").close()


def test_a_closed_store_says_so(opened):
    store = opened()
    store.close()
    store.close()
    for call in (lambda: store.probe([b"k"]), lambda: put(store, [1]), store.usage, store.sweep):
        with pytest.raises(StoreError, match="closed"):
            call()


@pytest.mark.parametrize(("fsync", "after_put", "after_flush"), [("put", 1, 0), ("flush", 0, 1)])
def test_durability_is_as_chosen(opened, monkeypatch, fsync, after_put, after_flush):
    store = opened(fsync=fsync)
    put(store, [0])
    store.flush()
    synced = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    put(store, [1, 2])
    assert len(synced) == after_put
    store.flush()
    assert len(synced) == after_put + after_flush
    store.flush()
    assert len(synced) == after_put + after_flush, "nothing was written since"


def test_urls_say_all_of_it(tmp_path):
    parsed = parse_disk_url(
        "file:///a/b%20c?max_bytes=1.5GiB&policy=s3fifo%3Fsmall%3D0.2&ttl=7d&fsync=put"
        "&io=buffered&threads=2"
    )
    assert str(parsed.folder) == "/a/b c"
    assert parsed.options == DiskOptions(
        3 << 29, "s3fifo?small=0.2", 7 * 86_400, "put", "buffered", 2
    )
    store = DiskStore.from_url(f"file://{tmp_path}/kv?max_bytes=2MiB", "fast")
    assert (store.name, store.usage()) == ("fast", StoreUsage(0, 0, 2 * MIB))
    store.close()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("file:///kv?max_byte=1GiB", "Did you mean max_bytes"),
        ("file:///kv?size=1GiB", "expected one of fsync, io, max_bytes, policy, threads, ttl"),
        ("file:///kv?max_bytes=1XB", "such as 100GiB"),
        ("file:///kv?max_bytes=1000", "at least 1 MiB"),
        ("file:///kv?ttl=soon", "such as 7d"),
        ("file:///kv?policy=mru", "lru"),
        ("file:///kv?fsync=yes", "put, flush, never"),
        ("file:///kv?threads=0", "from 1 to 64"),
        ("file:///kv?max_bytes=1GiB&max_bytes=2GiB", "twice"),
        ("file://host/kv", "expected file:///folder"),
        ("file:kv", "full path"),
        ("file:///", "folder of its own"),
        ("s3://bucket", "expected file:///folder"),
    ],
)
def test_urls_that_make_no_sense_are_refused_with_what_would(url, text):
    with pytest.raises(ConfigError, match=text):
        parse_disk_url(url)


def test_threads_may_do_everything_at_once(opened):
    store = opened(max_bytes=4 * MIB, fsync="never")
    errors = []
    until_s = time.monotonic() + 1.5

    def work(seed):
        rng = random.Random(seed)
        try:
            while time.monotonic() < until_s:
                numbers = rng.sample(range(900), 6)
                choice = rng.random()
                if choice < 0.45:
                    store.put([record(n) for n in numbers])
                elif choice < 0.9:
                    read(store, numbers)
                elif choice < 0.95:
                    store.delete([key_of(n) for n in numbers])
                elif choice < 0.97:
                    store.pin([key_of(n) for n in numbers], rng.random() < 0.3)
                else:
                    list(store.scan())
                    store.flush()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    store.check_integrity()
    assert store.stats().num_corrupt == 0 and store.stats().num_io_errors == 0


def test_random_histories_agree_with_a_model_across_restarts(opened, tmp_path):
    rng = random.Random(11)
    now = [NOW_S]
    store = opened(clock=lambda: now[0], max_bytes=3 * MIB)
    model: dict[int, tuple[int, int]] = {}
    for _ in range(400):
        numbers = rng.sample(range(60), rng.randint(1, 6))
        choice = rng.random()
        if choice < 0.5:
            tenant, namespace = rng.randrange(2), rng.randrange(2)
            statuses = put(store, numbers, tenant=tenant, namespace=namespace)
            for number, status in zip(numbers, statuses, strict=True):
                assert status is (PRESENT if number in model else STORED)
                model.setdefault(number, (tenant, namespace))
        elif choice < 0.6:
            store.delete([key_of(number) for number in numbers])
            for number in numbers:
                model.pop(number, None)
        elif choice < 0.65:
            tenant = rng.randrange(2)
            gone = {number for number, owner in model.items() if owner[0] == tenant}
            assert store.delete_tenant(TENANTS[tenant]).num_records == len(gone)
            model = {number: owner for number, owner in model.items() if number not in gone}
        elif choice < 0.68:
            keep = rng.randrange(2)
            gone = {number for number, owner in model.items() if owner[1] != keep}
            assert store.delete_namespaces(NAMESPACES[keep]).num_records == len(gone)
            model = {number: owner for number, owner in model.items() if number not in gone}
        elif choice < 0.78:
            store = opened(clock=lambda: now[0], max_bytes=3 * MIB)
        else:
            for number in numbers:
                tenant, namespace = model.get(number, (0, 0))
                found = read(store, [number], tenant=tenant, namespace=namespace)
                assert found == ({number} & model.keys())
        assert there(store, range(60)) == model.keys()
        store.check_integrity()
        assert bytes_on_disk(tmp_path / "kv") <= 3 * MIB
