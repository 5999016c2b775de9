"""Stores by URL: what is said is what is opened, and what cannot be is refused with a reason."""

import logging
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from jaxserve.errors import ConfigError
from jaxserve.kv.stores import url as url_module
from jaxserve.kv.stores.base import PutStatus
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.kv.stores.disk_options import DiskOptions
from jaxserve.kv.stores.faults import FaultPlan, FaultyStore
from jaxserve.kv.stores.limits import WorkerLimits
from jaxserve.kv.stores.objects import ObjectOptions, ObjectStore
from jaxserve.kv.stores.options import as_bytes, as_seconds
from jaxserve.kv.stores.tensorstores import DriverOptions
from jaxserve.kv.stores.url import StoreAddress, open_store, open_worker, parse_address
from jaxserve.kv.stores.valkey import ValkeyOptions
from tests.kv.stores.records import payload, read, record


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("/var/cache", "is no URL"),
        ("foo://x", "expected one of file, gs, memory"),
        ("memory://?max_byte=1", "Did you mean max_bytes?"),
        ("memory://?max_bytes=1&max_bytes=2", "twice"),
        ("memory://?max_bytes=many", "100GiB"),
        ("memory://?ttl=soon", "7d"),
        ("memory://?policy=best", "lru, arc"),
        ("memory://?load_threads=0", "from 1 to 64"),
        ("ocdbt+s3://bucket/path", "keeps what is deleted"),
        ("s3:///path", "s3://bucket/path"),
        ("objects+file://", "objects+file:///folder"),
        ("valkey://", "host:port"),
        ("valkey://localhost:99999/0", "host:port"),
        ("valkey://localhost/zero", "host:port"),
        ("valkey://localhost?password_env=NOT_SET_ANYWHERE", "NOT_SET_ANYWHERE is not set"),
        ("fault+memory://?error_rate=2", "from 0 to 1"),
        ("memory://?get_timeout=0s", "above 0"),
        ("s3://bucket?endpoint=ftp://somewhere", "http://host:port"),
        ("file:///var/cache/\0", "characters that no URL has"),
        ("file:///usr?max_bytes=1GiB", "of its own"),
        ("fault+foo://", "unknown KV store scheme 'foo'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(url: str, hint: str):
    with pytest.raises(ConfigError) as error:
        open_store(url)
    assert hint in str(error.value)


def test_passwords_are_in_no_message_and_no_repr():
    url = "valkey://user:secret@localhost:1/0?unknown=1"
    with pytest.raises(ConfigError) as error:
        open_store(url)
    assert "secret" not in str(error.value) and "***" in str(error.value)
    assert "secret" not in parse_address(url).shown


def test_each_scheme_opens_its_store(tmp_path: Path):
    disk = open_store(f"file://{tmp_path}/a?max_bytes=10MiB&load_threads=2")
    assert isinstance(disk, DiskStore) and disk.name == "disk"
    assert disk.usage().max_bytes == 10 << 20
    disk.close()
    files = open_store(f"objects+file://{tmp_path}/b?max_bytes=1.5GB&name=mine")
    assert isinstance(files, ObjectStore) and files.name == "mine"
    assert files.usage().max_bytes == 1_500_000_000
    faulty = open_store("fault+memory://?latency=0.5s&bandwidth=1MiB&corrupt=0.25&hang=true&seed=3")
    assert isinstance(faulty, FaultyStore) and faulty.name == "memory"
    assert faulty.plan == FaultPlan(
        latency_s=0.5, bytes_per_s=1 << 20, corrupt_rate=0.25, hang=True, seed=3
    )


@pytest.mark.parametrize(
    ("page", "heading", "table", "options"),
    [
        ("kv-disk", "## Knobs", None, DiskOptions()),
        ("kv-stores", "## Options of all stores", url_module._WORKER, WorkerLimits()),
        ("kv-stores", "## S3 and GCS", url_module._RECORDS, ObjectOptions()),
        ("kv-stores", "## S3 and GCS", url_module._BUCKET, DriverOptions()),
        ("kv-stores", "## Valkey and Redis", url_module._VALKEY, ValkeyOptions()),
    ],
)
def test_the_docs_tell_the_defaults_that_are_in_force(
    page: str, heading: str, table: Any, options: Any
):
    text = (Path(__file__).parents[3] / "docs" / f"{page}.md").read_text()
    section = text.split(f"{heading}\n")[1].split("\n## ")[0]
    told = {}
    for row in re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", section, re.MULTILINE):
        names, values = (re.sub(r" \(.*?\)", "", cell).split(", ") for cell in row)
        told |= zip((name.strip("`") for name in names), values * len(names), strict=False)
    num_checked = 0
    for name, said in told.items():
        field = name + "_s" * (name == "ttl")
        if table is not None:
            field = table[name][0] if name in table else ""
        actual = getattr(options, field, None)
        if said.strip("` ") in ("", "as above") or actual is None:
            continue
        unbound = {"no bound": 0, "no limit": 0}
        value: Any = unbound.get(said, said.strip("`"))
        if isinstance(actual, float):
            value = 0.0 if value == "0" else as_seconds(name, str(value))
        elif isinstance(actual, int) and value:
            value = as_bytes(name, str(value))
        assert value == actual, (name, said)
        num_checked += 1
    assert num_checked >= 2


def test_the_workers_limits_are_options_of_every_url():
    worker = open_worker(
        "memory://?load_threads=7&write_threads=3&queue_bytes=1MiB&scratch_bytes=2MiB"
        "&probe_timeout=0.5s&get_timeout=1m&put_timeout=2m&max_bytes=1GiB&name=ram"
    )
    limits = worker.limits
    assert worker.name == "ram" and worker.store.usage().max_bytes == 1 << 30
    assert (limits.num_load_threads, limits.num_write_threads) == (7, 3)
    assert (limits.max_queued_write_bytes, limits.scratch_bytes) == (1 << 20, 2 << 20)
    assert (limits.probe_timeout_s, limits.get_timeout_s, limits.put_timeout_s) == (0.5, 60, 120)
    assert worker.close()


def test_two_stores_in_memory_are_two():
    first, second = open_store("memory://"), open_store("memory://")
    first.put([record(1)])
    assert read(first, 1) == payload(1) and read(second, 1) is None


def test_a_remote_store_that_is_down_opens_and_misses_until_it_is_there(
    caplog: pytest.LogCaptureFixture,
):
    for url in (
        "valkey://127.0.0.1:1/0",
        "s3://blocks/p?endpoint=http://127.0.0.1:1&region=x&retries=1&anonymous=true",
    ):
        with caplog.at_level(logging.WARNING):
            store = open_store(url)
        assert "is not there yet" in caplog.text
        assert store.usage().num_records == 0
        store.close()
        caplog.clear()


class MyStore(ObjectStore):
    """As a third party's package has one."""


def open_mine(address: StoreAddress) -> MyStore:
    inner = open_store("memory://", address.clock)
    assert isinstance(inner, ObjectStore)
    return MyStore(address.name + address.url, inner._open_kv, clock=address.clock)


def open_badly(address: StoreAddress) -> MyStore:
    raise KeyError("a bug of theirs")


def test_a_third_partys_store_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch):
    points = [
        EntryPoint("mine", f"{__name__}:open_mine", url_module.ENTRY_POINTS),
        EntryPoint("bad", f"{__name__}:open_badly", url_module.ENTRY_POINTS),
    ]
    monkeypatch.setattr(url_module, "entry_points", lambda group: points)
    monkeypatch.setattr(EntryPoint, "load", lambda self: globals()[self.attr])
    worker = open_worker("mine://somewhere?their_option=1&load_threads=9")
    assert worker.name == "minemine://somewhere?their_option=1"
    assert worker.limits.num_load_threads == 9
    assert worker.store.put([record(1)]) == [PutStatus.STORED]
    assert worker.close()
    with pytest.raises(ConfigError, match="a bug of theirs"):
        open_store("bad://x")
    with pytest.raises(ConfigError, match="bad, file, gs, memory, mine"):
        open_store("worse://x")
