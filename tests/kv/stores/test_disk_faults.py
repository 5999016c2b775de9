"""Whatever the disk does, and whenever the process ends, the store serves no wrong record."""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import StoreError
from jaxserve.kv.stores.base import PutStatus
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.kv.stores.disk_options import DiskOptions
from jaxserve.kv.stores.disk_segment import ENTRY_BYTES, HEADER_BYTES, Segment
from tests.kv.stores.disk_mutations import run_disk_mutations
from tests.kv.stores.disk_records import (
    NOW_S,
    TENANTS,
    bytes_on_disk,
    key_of,
    payload_of,
    read,
    record,
    there,
)
from tests.kv.stores.power_cut import PowerCut

MIB = 1 << 20
ROOT = Path(__file__).parents[3]


def open_store(folder: Path, max_bytes: int = 2 * MIB, **options: Any) -> DiskStore:
    return DiskStore(folder, DiskOptions(max_bytes=max_bytes, **options), lambda: NOW_S)


def put(store, numbers, **record_options):
    return store.put([record(number, **record_options) for number in numbers])


def failing(monkeypatch, name, error, *, after=0, when=lambda *args: True):
    """Let `os.name` fail from its call number `after` on; returns how to count its failures."""
    call, state = getattr(os, name), {"left": after, "failures": 0}

    def wrapped(*args, **kwargs):
        if when(*args):
            state["left"] -= 1
            if state["left"] < 0:
                state["failures"] += 1
                raise OSError(error, os.strerror(error))
        return call(*args, **kwargs)

    monkeypatch.setattr(os, name, wrapped)
    return state


def test_a_killed_process_leaves_nothing_wrong():
    command = [sys.executable, "-m", "tests.kv.stores.disk_crash", "--kills", "25", "--seed", "7"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert '"lost": 0' in run.stdout and '"kills": 25' in run.stdout


def test_damage_to_the_files_is_always_found(tmp_path):
    tried = run_disk_mutations(tmp_path, seed=2, count=400)
    assert tried.total() == 400 and len(tried) == 8 and min(tried.values()) > 20


@pytest.mark.parametrize("fsync", ["put", "flush"])
def test_a_power_cut_loses_only_what_was_not_promised(tmp_path, monkeypatch, fsync):
    num_lost = num_evicted = 0
    for seed in range(16):
        rng = random.Random(seed)
        folder = tmp_path / str(seed)
        with monkeypatch.context() as patch:
            disk = PowerCut(patch, rng)
            # Without evictions in every other history: then a promise is a promise.
            store = open_store(folder, fsync=fsync, max_bytes=(1 + 7 * (seed % 2)) * MIB)
            promised: set[int] = set()
            put_since: set[int] = set()
            for _ in range(rng.randint(3, 30)):
                numbers = rng.sample(range(300), rng.randint(1, 16))
                statuses = put(store, numbers)
                pairs = zip(numbers, statuses, strict=True)
                put_since |= {n for n, status in pairs if status is PutStatus.STORED}
                if fsync == "flush" and rng.random() < 0.3:
                    store.flush()
                    promised, put_since = promised | put_since, set()
                if rng.random() < 0.2:
                    store.delete([key_of(n) for n in numbers])
                    promised -= set(numbers)
                    put_since -= set(numbers)
            deleted = set(range(300)) - there(store, range(300))
            if fsync == "put":
                promised |= put_since
            promised -= deleted
            num_evicted += store.stats().num_evicted
            is_strict = fsync == "put" or not store.stats().num_evicted
            patch.setattr(DiskStore, "flush", lambda self: None)
            store.close()
            num_lost += disk.cut()
        again = open_store(folder, fsync=fsync, max_bytes=8 * MIB)
        found = there(again, range(300))
        came_back = read(again, sorted(found))
        # A slot that was reused since the flush may have lost its new content and its old.
        assert promised <= came_back or not is_strict
        again.check_integrity()
        again.close()
    assert num_evicted and (num_lost > 100 or fsync == "put")


def test_a_full_disk_makes_room_by_itself(tmp_path, monkeypatch):
    store = open_store(tmp_path / "kv", max_bytes=8 * MIB)
    put(store, range(50))
    failing(monkeypatch, "posix_fallocate", errno.ENOSPC)
    number = 50
    while not store.stats().num_evicted:
        assert put(store, [number]) == [PutStatus.STORED]
        number += 1
    assert read(store, [number - 1]) == {number - 1}
    assert not list((tmp_path / "kv").glob("*.tmp"))
    store.check_integrity()
    store.close()


def test_a_disk_without_any_room_stores_nothing(tmp_path, monkeypatch, caplog):
    failing(monkeypatch, "posix_fallocate", errno.ENOSPC)
    store = open_store(tmp_path / "kv")
    for _ in range(3):
        assert put(store, [1, 2]) == [PutStatus.FULL] * 2
        store._index._grow_at_s = 0.0
    assert [" is full; " in record.message for record in caplog.records] == [True], "said once"
    assert there(store, [1, 2]) == set() == set(os.listdir(tmp_path / "kv"))
    monkeypatch.undo()
    assert put(store, [1, 2]) == [PutStatus.STORED] * 2
    store.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_within_a_file_stores_nothing_more(tmp_path, monkeypatch, code):
    """Copy-on-write file systems can run full where space was set aside."""
    store = open_store(tmp_path / "kv")
    put(store, [1])
    failing(monkeypatch, "pwritev", code)
    assert put(store, [2, 3]) == [PutStatus.FULL] * 2
    assert read(store, [1, 2]) == {1}
    monkeypatch.undo()
    assert put(store, [2, 3]) == [PutStatus.STORED] * 2
    store.check_integrity()
    store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_file_system_is_filled_and_no_more(tmp_path):
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m,mode=0700", "tmpfs", str(tmp_path / "disk")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        store, statuses = open_store(tmp_path / "disk", max_bytes=1 << 30), []
        for start in range(0, 600, 6):
            statuses = put(store, range(start, start + 6))
            assert set(statuses) <= {PutStatus.STORED, PutStatus.FULL}
            store.check_integrity()
        assert PutStatus.STORED in statuses and store.stats().num_evicted > 50
        kept = there(store, range(600))
        assert read(store, sorted(kept)) == kept and 599 in kept
        assert bytes_on_disk(tmp_path / "disk") <= 3 * MIB + 4096
        store.close()
        remount = ["mount", "-o", "remount,ro", str(tmp_path / "disk")]
        subprocess.run(remount, capture_output=True, check=True)
        check_read_only(tmp_path / "disk", kept)
    finally:
        subprocess.run(["umount", str(tmp_path / "disk")], capture_output=True, check=True)


def check_read_only(folder, kept):
    store = open_store(folder, max_bytes=1 << 30)
    assert store.is_read_only
    assert read(store, sorted(kept)) == kept == there(store, kept)
    assert put(store, [5000, 5001]) == [PutStatus.FAILED] * 2
    for call in (
        lambda: store.delete([key_of(599)]),
        lambda: store.delete_tenant(TENANTS[0]),
        lambda: store.pin([key_of(599)], True),
    ):
        with pytest.raises(StoreError, match="cannot be written"):
            call()
    assert store.sweep().num_records == 0
    store.flush()
    store.close()


@pytest.mark.parametrize("how", ["access", "open"])
def test_a_read_only_folder_is_read(tmp_path, monkeypatch, how):
    store = open_store(tmp_path / "kv")
    put(store, range(5))
    store.close()
    before = {path: path.read_bytes() for path in (tmp_path / "kv").iterdir()}
    if how == "access":
        monkeypatch.setattr(os, "access", lambda *args: False)
    else:
        failing(monkeypatch, "open", errno.EROFS, when=lambda path, flags, *rest: flags & os.O_RDWR)
    check_read_only(tmp_path / "kv", set(range(5)))
    assert {path: path.read_bytes() for path in (tmp_path / "kv").iterdir()} == before


def test_a_disk_that_becomes_read_only_still_reads(tmp_path, monkeypatch):
    store = open_store(tmp_path / "kv")
    put(store, range(5))
    for name in ("pwrite", "pwritev", "posix_fallocate"):
        failing(monkeypatch, name, errno.EROFS)
    assert put(store, [10, 11]) == [PutStatus.FAILED] * 2
    assert read(store, [*range(5), 10]) == set(range(5))
    with pytest.raises(StoreError, match="Read-only"):
        store.delete([key_of(0)])
    assert there(store, [0]) == set()
    monkeypatch.undo()
    store.close()


@pytest.mark.parametrize("name", ["pwrite", "pwritev", "posix_fallocate"])
def test_a_disk_that_was_read_only_for_a_while_loses_nothing_by_it(
    tmp_path, monkeypatch, caplog, name
):
    """Neither records that would have left for what cannot be written, nor their places."""
    store = open_store(tmp_path / "kv", threads=1)
    num_full = 0
    while not store.stats().num_evicted and name != "posix_fallocate":
        put(store, [num_full])
        num_full += 1
    before = there(store, range(num_full))
    clock = {"now_s": 0.0}
    monkeypatch.setattr(time, "monotonic", lambda: clock["now_s"])
    with monkeypatch.context() as patch:
        for call in (name, "unlink"):
            failing(patch, call, errno.EROFS)
        made = failing(patch, "open", errno.EROFS, when=lambda path, *rest: "try" in str(path))
        caplog.clear()
        for number in range(1000, 1040):
            assert put(store, [number, number + 100]) == [PutStatus.FAILED] * 2
            clock["now_s"] += 2.0
        assert 1 <= made["failures"] <= 3, "tried again every 30 s"
        assert [record.message.split(": ")[0] for record in caplog.records] == [
            f"the KV store's folder {tmp_path}/kv cannot be written any more "
            "(Read-only file system)"
        ]
        num_lost = len(before - read(store, sorted(before)))
        assert num_lost <= (name == "pwritev") * 2, "at most what left for the first try"
    clock["now_s"] += 31.0
    stored = list(range(2000, 2000 + max(num_full, 10)))
    for number in stored:
        assert put(store, [number]) == [PutStatus.STORED]
    assert caplog.records[-1].message.endswith("can be written again")
    assert len(there(store, stored)) == len(before) or name == "posix_fallocate"
    store.check_integrity()
    store.close()
    again = open_store(tmp_path / "kv")
    assert there(again, stored) == read(again, stored) and not again.usage().num_damaged
    again.close()


@pytest.mark.parametrize("after", range(0, 12, 3))
def test_write_errors_cost_the_records_and_their_places_only(tmp_path, monkeypatch, after):
    store = open_store(tmp_path / "kv", threads=1)
    put(store, range(20))
    state = failing(monkeypatch, "pwritev", errno.EIO, after=after)
    stored = set()
    for number in range(100, 120):
        if put(store, [number]) == [PutStatus.STORED]:
            stored.add(number)
    assert stored == set(range(100, 100 + after)) and state["failures"] == 20 - after
    assert store.stats().num_io_errors == 20 - after
    monkeypatch.undo()
    assert read(store, [*range(20), *range(100, 120)]) == set(range(20)) | stored
    store.check_integrity()
    store.close()
    again = open_store(tmp_path / "kv")
    assert read(again, [*range(20), *range(100, 120)]) == set(range(20)) | stored
    again.close()


@pytest.mark.parametrize("name", ["pwrite", "posix_fallocate", "rename"])
def test_errors_of_the_table_and_of_new_files_are_failures_not_exceptions(
    tmp_path, monkeypatch, name
):
    store = open_store(tmp_path / "kv")
    if name == "pwrite":
        put(store, [1])
    with monkeypatch.context() as patch:
        failing(patch, name, errno.EIO)
        assert put(store, [2, 3]) == [PutStatus.FAILED] * 2
        assert there(store, [2, 3]) == set()
        assert not list((tmp_path / "kv").glob("*.tmp"))
    assert put(store, [2, 3]) == [PutStatus.STORED] * 2
    store.check_integrity()
    store.close()


def test_what_cannot_be_read_is_a_miss_and_gone(tmp_path, monkeypatch):
    store = open_store(tmp_path / "kv", threads=1)
    for number in range(0, 10, 2):
        put(store, [number])
    put(store, range(20, 26))
    with monkeypatch.context() as patch:
        failing(patch, "preadv", errno.EIO)
        assert read(store, [0, 2]) == set()
    assert there(store, [0, 2, 4]) == {4}
    assert read(store, [0, 2, 4, *range(20, 26)]) == {4, *range(20, 26)}
    assert store.stats().num_io_errors == 2
    assert put(store, [0]) == [PutStatus.STORED]
    assert read(store, [0]) == {0}
    store.check_integrity()
    store.close()


def test_a_deletion_that_fails_says_so(tmp_path, monkeypatch):
    store = open_store(tmp_path / "kv")
    put(store, range(5))
    for name in ("pwrite", "pwritev", "fdatasync"):
        with monkeypatch.context() as patch:
            failing(patch, name, errno.EIO)
            with pytest.raises(StoreError, match="could not erase"):
                store.delete([key_of(0)])
        assert there(store, [0]) == set()
        put(store, [0])
    with monkeypatch.context() as patch:
        failing(patch, "fsync", errno.EIO)
        with pytest.raises(StoreError, match="could not erase"):
            store.delete_namespaces()
    store.delete([])
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("name", ["pwrite", "pwritev", "fdatasync"])
@pytest.mark.parametrize("is_reopened", [False, True])
def test_what_a_deletion_could_not_overwrite_belongs_to_the_next_one(
    tmp_path, monkeypatch, name, is_reopened
):
    """Else its receipt would say that all is gone, while the bytes are still on the disk."""
    store = open_store(tmp_path / "kv")
    put(store, range(5))
    with monkeypatch.context() as patch:
        failing(patch, name, errno.EIO)
        for _ in range(2):  # nothing that is there matches any more, and yet it is not done
            with pytest.raises(StoreError, match="could not erase"):
                store.delete([key_of(0), key_of(3)])
    if is_reopened:
        store.close()
        store = open_store(tmp_path / "kv")
        if name == "pwrite":  # not even noted in the file: the records are there again
            assert there(store, range(5)) == set(range(5))
    store.delete([key_of(0), key_of(3)])
    assert on_disk(tmp_path / "kv", range(5)) == {1, 2, 4} == there(store, range(5))
    assert put(store, [0, 3]) == [PutStatus.STORED] * 2
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("step", ["mark_erased", "wipe", "clear_entries"])
def test_an_erasure_that_was_killed_is_finished_at_the_next_start(tmp_path, monkeypatch, step):
    store = open_store(tmp_path / "kv")
    put(store, range(5))
    put(store, range(5, 8), tenant=1)

    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Segment, step, die)
        with pytest.raises(Killed):
            store.delete_tenant(TENANTS[1])
    monkeypatch.setattr(DiskStore, "flush", lambda self: None)
    store.close()
    store = open_store(tmp_path / "kv")
    left = set(range(5, 8)) if step == "mark_erased" else set()
    assert there(store, range(8)) == {0, 1, 2, 3, 4} | left == on_disk(tmp_path / "kv", range(8))
    assert store.stats().num_corrupt == 0
    assert store.delete_tenant(TENANTS[1]).num_records == len(left)
    assert on_disk(tmp_path / "kv", range(8)) == set(range(5))
    store.check_integrity()
    store.close()


def on_disk(folder: Path, numbers) -> set[int]:
    """Of which numbers' records there are bytes in the files, reachable or not."""
    content = b"".join(path.read_bytes() for path in folder.iterdir())
    return {n for n in numbers if key_of(n) in content or payload_of(n)[5000:5032] in content}


def test_damaged_entries_are_counted_and_what_a_kill_cut_short_is_not(tmp_path):
    """Entries of 272 bytes lie across pages, and a killed process may have written half of one."""
    store = open_store(tmp_path / "kv")
    put(store, range(60))
    store.close()
    (path,) = (tmp_path / "kv").iterdir()
    starts = [HEADER_BYTES + ENTRY_BYTES * slot for slot in range(60)]
    cut = next(at for at in starts if at // 4096 != (at + ENTRY_BYTES - 1) // 4096)
    damaged = next(at for at in starts if at > cut)
    with open(path, "r+b") as file:
        file.seek(cut)
        file.write(bytes(-cut % 4096))
        file.seek(damaged + 30)
        file.write(b"?")
    store = open_store(tmp_path / "kv")
    assert store.usage().num_records == 58 == len(read(store, sorted(there(store, range(60)))))
    assert store.stats().num_corrupt == 1
    assert len(on_disk(tmp_path / "kv", range(60))) == 58, "what has no entry is wiped"
    store.check_integrity()
    store.close()


def test_a_failed_sync_is_not_a_success(tmp_path, monkeypatch):
    store = open_store(tmp_path / "kv", fsync="put")
    with monkeypatch.context() as patch:
        failing(patch, "fdatasync", errno.EIO)
        assert put(store, [1]) == [PutStatus.FAILED]
        with pytest.raises(StoreError, match="flush"):
            store.flush()
    store.flush()
    store.close()


def test_leftovers_and_useless_files_are_removed_at_opening(tmp_path):
    folder = tmp_path / "kv"
    store = open_store(folder, max_bytes=4 * MIB)
    for start in range(0, 400, 10):
        put(store, range(start, start + 10))
    store.close()
    files = sorted(folder.glob("*.segment"))
    assert len(files) >= 3
    (folder / "0000ffff.segment.tmp").write_bytes(b"half")
    with open(files[0], "r+b") as file:
        file.truncate(files[0].stat().st_size - 1)
    with open(files[1], "r+b") as file:
        file.write(b"?")
    shutil.copy(files[2], folder / "00001234.segment")
    store = open_store(folder, max_bytes=4 * MIB)
    assert sorted(folder.iterdir()) == files[2:]
    kept = there(store, range(400))
    assert kept and read(store, sorted(kept)) == kept
    store.check_integrity()
    store.close()


def test_of_two_records_of_one_block_the_later_is_kept(tmp_path, monkeypatch):
    """A power cut can undo a removal and keep what was written after it."""
    store = open_store(tmp_path / "kv")
    put(store, [1, 2], created_s=NOW_S - 1)
    store.pin([key_of(1)], True)
    with monkeypatch.context() as patch:
        patch.setattr(Segment, "clear_entries", lambda *args: None)
        patch.setattr(Segment, "wipe", lambda *args: None)
        store.delete([key_of(1), key_of(2)])
    put(store, [1, 2, 3])
    store.close()
    for _ in range(2):
        store = open_store(tmp_path / "kv")
        assert {info.created_s for info in store.scan()} == {NOW_S}
        assert store.usage().num_records == 3 and read(store, [1, 2, 3]) == {1, 2, 3}
        store.check_integrity()
        store.close()


def test_a_folder_that_cannot_be_made_or_read_is_an_error_of_the_store(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, "open", errno.EIO, when=lambda path, *rest: str(path).endswith("kv"))
        with pytest.raises(StoreError, match="Input/output error"):
            open_store(tmp_path / "kv")
    store = open_store(tmp_path / "kv")
    put(store, [1])
    store.close()
    with monkeypatch.context() as patch:
        failing(patch, "pread", errno.EIO)
        with pytest.raises(StoreError, match="Input/output error"):
            open_store(tmp_path / "kv")
    with contextlib.closing(open_store(tmp_path / "kv")) as store:
        assert read(store, [1]) == {1}
