"""Servers that many store tests share, and stores of every kind on them."""

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jaxserve.kv.stores.base import Store
from jaxserve.kv.stores.url import open_store
from tests.kv.stores.servers import Server, start_gcs, start_s3, start_valkey

BUCKET = "blocks"


@dataclass
class FakeClock:
    """Seconds that pass when a test says so."""

    now_s: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class StoreKind:
    """Opens stores of one kind, all of them in the same place."""

    url: str
    is_persistent: bool
    clock: FakeClock = field(default_factory=FakeClock)
    opened: list[Store] = field(default_factory=list)

    def open(self, **options: object) -> Store:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        mark = "&" if "?" in self.url else "?"
        store = open_store(f"{self.url}{mark}{query}" if query else self.url, self.clock)
        self.opened.append(store)
        return store

    def reopen(self, **options: object) -> Store:
        self.opened.pop().close()
        return self.open(**options)


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_s3(tmp_path_factory.mktemp("s3"), BUCKET)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_gcs(tmp_path_factory.mktemp("gcs"))
    yield server
    server.kill()


@pytest.fixture
def aws_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


@pytest.fixture(params=["disk", "files", "memory", "s3", "gcs", "valkey", "faulty"])
def kind(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StoreKind]:
    """Each kind of store in turn."""
    unique = uuid.uuid4().hex

    def gcs() -> str:
        # Where tensorstore's driver finds another server, and a token instead of credentials.
        port = request.getfixturevalue("gcs_server").port
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "test")
        return f"gs://{BUCKET}/{unique}"

    def s3() -> str:
        request.getfixturevalue("aws_keys")
        port = request.getfixturevalue("s3_server").port
        return f"s3://{BUCKET}/{unique}?endpoint=http://127.0.0.1:{port}&region=us-east-1"

    def valkey() -> str:
        port = request.getfixturevalue("valkey_server").port
        return f"valkey://127.0.0.1:{port}/0?prefix={unique}:"

    urls: dict[str, Callable[[], str]] = {
        "disk": lambda: f"file://{tmp_path}/store",
        "files": lambda: f"objects+file://{tmp_path}/store",
        "memory": lambda: "memory://",
        "s3": s3,
        "gcs": gcs,
        "valkey": valkey,
        "faulty": lambda: f"fault+file://{tmp_path}/store?seed=1",
    }
    kind = StoreKind(urls[request.param](), is_persistent=request.param != "memory")
    yield kind
    for store in kind.opened:
        store.close()
