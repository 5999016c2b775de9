"""`jaxserve kv` on a store of its own, and on a running server."""

import io
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from jaxserve.cli import main
from jaxserve.config import ServerConfig
from jaxserve.kv.envelope import seal, tenant_digest
from jaxserve.kv.keys import KeyFolder, MasterKey
from jaxserve.kv.stores.disk import DiskStore
from jaxserve.server.app import create_app
from jaxserve.types import Request, SamplingParams
from tests.engine.tiers_harness import make_engine, settle

Capture = pytest.CaptureFixture[str]
NUM, SIZE = 12, 20_000
SPACE = b"n" * 16
KEY = "ab" * 32


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch):
    for name in ("JAXSERVE_ADMIN_KEY", "JAXSERVE_KV_KEY"):
        monkeypatch.delenv(name, raising=False)


def fill(folder: Path, keys: KeyFolder | None = None, secret: bytes = b"") -> None:
    """Records 0 to 11; the first four belong to a tenant."""
    store = DiskStore(folder)
    tenant = tenant_digest("acme", secret)
    for number in range(NUM):
        owner = tenant if number < 4 else bytes(16)
        payload = memoryview(bytes([number]) * SIZE)
        key = None if keys is None else keys.find_or_make(owner)
        record = seal(
            bytes([number]) * 32, SPACE, owner, payload, created_s=time.time() - 7200, key=key
        )
        assert store.put([record])[0].value == "stored"
    store.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    fill(tmp_path / "disk")
    return tmp_path / "disk"


def kv(*argv: str) -> int:
    return main(["kv", *argv])


def offline(capsys: Capture, disk: Path, *argv: str) -> dict[str, Any]:
    code = kv(argv[0], "--kv-store", f"file://{disk}", "--json", *argv[1:])
    body = json.loads(capsys.readouterr().out)
    return {**body, "code": code}


def test_a_store_is_described_and_listed_without_a_server(disk: Path, capsys: Capture):
    assert kv("stat", "--kv-store", f"file://{disk}?max_bytes=1MiB") == 0
    out = capsys.readouterr().out
    assert "disk: 12 records" in out and "2 h old" in out and "1 tenant\n" in out
    assert f"namespace {SPACE.hex()}: 12 records" in out
    assert kv("ls", "--kv-store", f"file://{disk}", "--limit", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and "and more" in lines[-1]
    assert kv("ls", "--kv-store", f"file://{disk}", "--prefix", "0B") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("0b" * 32) and "disk" in line and "2 h old" in line


def test_looking_evicts_nothing_whatever_bound_the_url_says(tmp_path: Path, capsys: Capture):
    store = DiskStore(tmp_path / "disk")
    for number in range(100):
        payload = memoryview(bytes([number]) * SIZE)
        store.put([seal(bytes([number]) * 32, SPACE, bytes(16), payload, created_s=time.time())])
    store.close()
    url = f"file://{tmp_path}/disk?max_bytes=1MiB&policy=tinylfu&ttl=1s"
    assert kv("stat", "--kv-store", url) == 0
    assert "disk: 100 records" in capsys.readouterr().out


def test_verify_finds_a_flipped_bit_on_the_disk_and_exits_with_1(disk: Path, capsys: Capture):
    assert kv("verify", "--kv-store", f"file://{disk}") == 0
    out = capsys.readouterr().out
    assert "disk: 12 records" in out and "12 ok" in out and "nothing is damaged" in out
    payload = bytes([7]) * SIZE
    for path in disk.rglob("*"):
        if path.is_file() and (place := path.read_bytes().find(payload)) >= 0:
            with path.open("r+b") as file:
                file.seek(place + 1000)
                file.write(b"\x06")
            break
    else:
        raise AssertionError("record 7 is in no file")
    assert kv("verify", "--kv-store", f"file://{disk}") == 1
    out = capsys.readouterr().out
    assert "1 corrupt" in out and "1 damaged, 1 deleted" in out and "damage was found" in out
    assert offline(capsys, disk, "verify")["stores"][0]["verdicts"] == {"ok": 11}


def test_verify_counts_what_was_found_damaged_when_the_store_was_opened(
    disk: Path, capsys: Capture
):
    """A damaged entry or file header hides its records, so that reading all records is no proof."""
    (path,) = disk.iterdir()
    for at, outcome in ((4096 + 272 + 30, {"ok": 11, "corrupt": 1}), (20, {})):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"?!")
        body = offline(capsys, disk, "verify")
        assert body["code"] == 1 and body["stores"][0]["verdicts"] == outcome
        assert body["is_damaged"] == bool(outcome) != bool(body["stores"][0]["error"])
        assert offline(capsys, disk, "verify")["code"] == 0, "it is gone now"


@pytest.mark.parametrize("scheme", ["objects+file", "fault+file"])
def test_stores_of_every_scheme_are_opened(tmp_path: Path, capsys: Capture, scheme: str):
    (tmp_path / "a store").mkdir(mode=0o700)
    assert kv("stat", "--kv-store", f"{scheme}://{tmp_path}/a%20store") == 0
    assert "0 records" in capsys.readouterr().out


def test_ctrl_c_is_one_line_and_leaves_the_store_to_the_next(
    disk: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    whole, calls = DiskStore.get, []

    def get(store: DiskStore, *args: Any) -> Any:
        calls.append(args)
        if len(calls) > 1:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(store, *args)

    with monkeypatch.context() as patch:
        patch.setattr(DiskStore, "get", get)
        assert kv("verify", "--kv-store", f"file://{disk}") == 130
    assert capsys.readouterr() == ("", "jaxserve: interrupted\n")
    assert offline(capsys, disk, "verify")["stores"][0]["verdicts"] == {"ok": 12}


def test_an_option_of_the_url_that_is_wrong_is_told_as_it_was_typed(disk: Path, capsys: Capture):
    assert kv("stat", "--kv-store", f"file://{disk}?max_byte=1GiB") == 2
    err = capsys.readouterr().err
    assert "?max_byte=1GiB has an unknown option" in err and "TiB" not in err


def test_pin_erase_and_clear_without_a_server(
    disk: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    names = [(bytes([number]) * 32).hex() for number in (0, 5, 99)]
    assert offline(capsys, disk, "pin", *names)["by_tier"] == {"disk": 2}
    listed = offline(capsys, disk, "ls")["blocks"]
    assert {block["name"] for block in listed if block["is_pinned"]} == set(names[:2])
    missing = offline(capsys, disk, "pin", names[2], names[2])
    assert missing["code"] == 1 and missing["num_blocks"] == 1 and "none of" in missing["note"]
    monkeypatch.setattr("sys.stdin", io.StringIO("acme\n"))
    receipt = offline(capsys, disk, "erase", "-")
    assert receipt["code"] == 0 and receipt["is_complete"] and receipt["key"] == "not encrypted"
    assert receipt["stores"][0]["num_records"] == 4
    assert receipt["tenant"] == tenant_digest("acme").hex()
    assert offline(capsys, disk, "stat")["num_records"] == 8
    assert offline(capsys, disk, "clear", "all")["stores"][0]["num_records"] == 8


def test_an_erasure_that_a_store_did_not_confirm_does_not_begin_with_erased(
    disk: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert kv("erase", "acme", "--kv-store", f"file://{disk}") == 1
    out = capsys.readouterr().out
    assert out.startswith("NOT everywhere erased: tenant") and "cannot be written" in out


def test_an_encrypted_store_is_checked_and_erased_with_the_master_key(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("JAXSERVE_KV_KEY", KEY)
    master = MasterKey.from_environment()
    keys = KeyFolder(tmp_path / "keys", master)
    fill(tmp_path / "disk", keys, master.tenant_secret)
    more = ("--kv-key-folder", str(tmp_path / "keys"))
    assert offline(capsys, tmp_path / "disk", "verify", *more)["stores"][0]["verdicts"] == {
        "ok": 12
    }
    with monkeypatch.context() as patch:
        patch.delenv("JAXSERVE_KV_KEY")
        assert kv("erase", "acme", "--kv-store", f"file://{tmp_path / 'disk'}") == 2
    assert "named under the master key: give it" in capsys.readouterr().err
    (tmp_path / "empty").mkdir(mode=0o700)
    argv = ("--kv-store", f"file://{tmp_path}/disk", "--kv-key-folder", str(tmp_path / "empty"))
    assert kv("erase", "acme", *argv) == 2, "a wrong folder would say that there was no key"
    assert "there is no key folder" in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())
    receipt = offline(capsys, tmp_path / "disk", "erase", "acme", *more)
    assert receipt["key"] == "destroyed" and receipt["stores"][0]["num_records"] == 4
    keys = KeyFolder(tmp_path / "keys", master)
    assert keys.find(tenant_digest("acme", master.tenant_secret)) is None
    assert keys.find(bytes(16)) is not None
    monkeypatch.delenv("JAXSERVE_KV_KEY")
    verdicts = offline(capsys, tmp_path / "disk", "verify")["stores"][0]["verdicts"]
    assert verdicts == {"ok": 8}, "by their checksums alone"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stat"], "wants its admin key"),
        (["stat", "--server", "http://127.0.0.1:9", "--admin-key", "k"], "no answer from"),
        (["stat", "--server", "host:8000", "--admin-key", "k"], "expected a URL such as http"),
        (["stat", "--kv-key-folder", "x", "--admin-key", "k"], "go with --kv-store"),
        (["stat", "--kv-store", "file:///a s3://b"], "names 2 stores; expected one"),
        (["stat", "--kv-store", "file://a/b"], "expected file:///folder"),
        (["stat", "--server", "x", "--kv-store", "file:///y"], "either --server or --kv-store"),
        (["stat", "--kv-store", "file:///nowhere/at/all"], "there is no store at"),
        (["stat", "--kv-store", "memory://"], "nothing to look at"),
        (["stat", "--kv-store", "ftp://x"], "unknown KV store scheme"),
        (["clear"], "missing argument 'TIER...'"),
        (["erase"], "missing argument 'SALT'"),
        (["pin", "--admin-key", "k"], "nothing to pin"),
        (["verify", "--prompts", "/nowhere", "--recompute", "1"], "cannot read /nowhere"),
        (["ls", "--limit", "0", "--admin-key", "k"], "--limit is 0"),
        (["verify", "--limt", "3"], "unknown option '--limt'"),
    ],
)
def test_wrong_options_are_one_line(capsys: Capture, argv: list[str], message: str):
    assert kv(*argv) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify", "--recompute", "3"], "needs a model"),
        (["clear", "all", "--stale"], "ask its server"),
        (["clear", "host"], "this store is called disk"),
        (["pin", "--prompt", "x"], "only under a model"),
        (["pin", "xyz"], "is no block hash"),
        (["ls", "--prefix", "xyz"], "expected the first hex digits"),
    ],
)
def test_what_needs_a_model_says_so(disk: Path, capsys: Capture, argv: list[str], message: str):
    assert kv(argv[0], "--kv-store", f"file://{disk}", *argv[1:]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["stat"], ["clear", "all"], ["pin", "ab" * 32], ["erase", "x"]])
def test_a_store_that_fails_is_told_in_one_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, argv: list[str]
):
    monkeypatch.setattr(logging.root, "handlers", [])  # as in a shell: what is logged is shown
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert kv(argv[0], "--kv-store", f"valkey://127.0.0.1:{port}", *argv[1:]) == 1
    out, err = capsys.readouterr()
    assert (out + err).count("cannot answer") == 1 and (out + err).count("\n") == 1


def test_what_a_store_logs_is_told_beside_what_was_asked_for(disk: Path, capsys: Capture):
    (path,) = disk.iterdir()
    with path.open("r+b") as file:
        file.write(b"?")
    assert kv("stat", "--kv-store", f"file://{disk}") == 0
    assert capsys.readouterr().err.startswith(f"jaxserve: warning: the KV store's file {path} is")


def test_a_store_in_use_is_told(disk: Path, capsys: Capture):
    with_server = DiskStore(disk)
    assert kv("stat", "--kv-store", f"file://{disk}") == 2
    assert "in use by this process" in capsys.readouterr().err
    with_server.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """A live server whose tiers have seen a prompt: the options that reach it."""
    folder = tmp_path_factory.mktemp("kv")
    engine = make_engine(kv_host_bytes=1 << 20, kv_store=f"file://{folder}/disk?max_bytes=16MiB")
    engine.config = replace(engine.config, server=ServerConfig(admin_key="boss"))
    sampling = SamplingParams(temperature=0.0, max_tokens=4, seed=0, ignore_eos=True)
    for salt in ("", "acme"):
        prompt = tuple(3 + (7 * i) % 200 for i in range(50))
        engine.add(Request(f"r{salt}", prompt, sampling, cache_salt=salt))
    while engine.has_work:
        engine.step()
    settle(engine)
    listener = socket.create_server(("127.0.0.1", 0))
    app: Any = create_app(engine)
    web = uvicorn.Server(uvicorn.Config(app, log_level="warning", log_config=None))
    thread = threading.Thread(target=web.run, args=([listener],))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    while not web.started:
        time.sleep(0.01)
    yield ["--server", url, "--admin-key", "boss"]
    web.should_exit = True
    thread.join(30)


def test_every_command_works_on_a_running_server(server: list[str], capsys: Capture):
    assert kv("stat", *server) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["device", "12"],
        ["host", "12"],
        ["disk", "12"],
    ]
    assert kv("ls", "--limit", "3", *server) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "device+host+disk" in first and "and more" in last
    assert " s old" in first, "the store knows when it was made"
    assert kv("verify", "--recompute", "2", *server) == 0
    out = capsys.readouterr().out
    assert "disk: 12 records" in out and "nothing is damaged" in out
    assert "recomputed: 4 copies compared" in out and " 0 wrong" in out
    assert kv("pin", first.split()[0], *server) == 0
    assert "of 1 block: 1 pinned in host, 1 pinned in disk" in capsys.readouterr().out
    assert kv("clear", "device", "host", *server) == 0 and capsys.readouterr()
    assert kv("ls", "--prefix", first[:8], *server) == 0
    assert "  disk  " in (line := capsys.readouterr().out) and "pinned" in line
    assert kv("stat", *server) == 0
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines()[1:4]] == list("001")
    assert kv("pin", "ab" * 32, *server) == 1
    assert "no tier has any of these blocks" in capsys.readouterr().out
    assert kv("clear", "disk", "device", "--stale", *server) == 0
    assert kv("clear", "device", "--stale", *server) == 1
    assert "device and host have only what" in capsys.readouterr().err
    assert kv("erase", "acme", *server) == 0
    out = capsys.readouterr().out
    assert "device: 0 blocks, host: 0 blocks" in out and "disk: 6 records" in out
    assert kv("clear", "device", "all", *server) == 0
    assert "disk: 6 records" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["wrong", "b\u00f6ss", "bo\x00ss"])
def test_the_wrong_admin_key_is_told(server: list[str], capsys: Capture, key: str):
    assert kv("stat", *server[:2], "--admin-key", key) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("jaxserve: error: ") and err.count("\n") == 1 and "admin key" in err
