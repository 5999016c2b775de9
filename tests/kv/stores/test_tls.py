"""Valkey over TLS: a server is believed only if its certificate is signed and is the host's."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme

from jaxserve.errors import ConfigError, StoreError
from jaxserve.kv.stores.base import PutStatus
from jaxserve.kv.stores.url import open_store
from tests.kv.stores.records import key_of, payload, read, record
from tests.kv.stores.servers import Server, start_valkey


class Authority(NamedTuple):
    """Who signs, and the file by which clients know it."""

    ca: trustme.CA
    ca_file: Path

    def issue(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Certificate and key files for a host name or address."""
        issued = self.ca.issue_cert(name)
        cert, key = folder / f"{name}.pem", folder / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(str(cert))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return Authority(ca, tmp_path / "ca.pem")


@pytest.fixture
def start(tmp_path: Path, authority: Authority) -> Iterator[object]:
    servers: list[Server] = []

    def start(name: str, clients: str = "no") -> Server:
        cert, key = authority.issue(tmp_path, name)
        files = ["--tls-cert-file", cert, "--tls-key-file", key]
        files += ["--tls-ca-cert-file", authority.ca_file, "--tls-auth-clients", clients]
        servers.append(start_valkey(tmp_path, *map(str, files), has_tls=True))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
def test_records_are_kept_over_tls_by_a_server_with_a_certificate_of_ones_own(
    scheme: str, start, authority: Authority
):
    url = f"{scheme}://127.0.0.1:{start('127.0.0.1').port}/0?ca_file={authority.ca_file}"
    store = open_store(url)
    assert store.put([record(1), record(2)]) == [PutStatus.STORED] * 2
    assert read(store, 2) == payload(2) and store.probe([key_of(3)]) == [False]
    store.close()


def test_a_server_that_nobody_known_has_signed_is_refused(start):
    store = open_store(f"rediss://127.0.0.1:{start('127.0.0.1').port}/0?timeout=2s")
    with pytest.raises(StoreError, match="certificate"):
        store.put([record(1)])
    store.close()


def test_a_signed_certificate_of_another_host_is_refused(start, authority: Authority):
    server = start("cache.example")
    store = open_store(f"rediss://127.0.0.1:{server.port}/0?ca_file={authority.ca_file}&timeout=2s")
    with pytest.raises(StoreError, match="certificate"):
        store.put([record(1)])
    store.close()


def test_a_server_that_wants_to_know_its_clients_gets_their_certificate(
    start, authority: Authority, tmp_path: Path
):
    server = start("127.0.0.1", clients="yes")
    url = f"rediss://127.0.0.1:{server.port}/0?ca_file={authority.ca_file}&timeout=2s"
    stranger = open_store(url)
    with pytest.raises(StoreError):
        stranger.put([record(1)])
    stranger.close()
    cert, key = authority.issue(tmp_path, "engine.example")
    store = open_store(f"{url}&cert_file={cert}&key_file={key}")
    assert store.put([record(1)]) == [PutStatus.STORED]
    store.close()


def test_a_certificate_file_that_is_not_there_is_refused_at_start(tmp_path: Path):
    with pytest.raises(ConfigError, match="ca_file.*cannot be read"):
        open_store(f"rediss://127.0.0.1:1/0?ca_file={tmp_path}/none.pem")


def test_a_plain_connection_has_no_certificates(tmp_path: Path):
    with pytest.raises(ConfigError, match="ca_file"):
        open_store("redis://127.0.0.1:1/0?ca_file=ca.pem")


def test_a_certificate_file_without_a_certificate_is_refused_at_start(tmp_path: Path):
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    with pytest.raises(ConfigError, match="certificate"):
        open_store(f"rediss://127.0.0.1:1/0?ca_file={empty}")
