"""Tenants' keys survive restarts, stay secret, and are gone when destroyed."""

import os
import stat
import threading

import pytest

from jaxserve.errors import ConfigError, StoreError
from jaxserve.kv.keys import KeyFolder, MasterKey

SECRET = bytes(range(32))
MASTER = MasterKey(SECRET, "test")
TENANT, OTHER = b"t" * 16, b"o" * 16


def works_together(key, other) -> bool:
    nonce = bytes(12)
    return key.encrypt(nonce, b"text", None) == other.encrypt(nonce, b"text", None)


@pytest.mark.parametrize(
    "content",
    [SECRET, SECRET.hex().encode() + b"\n", b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"],
    ids=["raw", "hex", "base64"],
)
def test_a_key_file_is_read_in_each_form(tmp_path, content):
    path = tmp_path / "master"
    path.write_bytes(content)
    path.chmod(0o600)
    assert MasterKey.from_file(path).secret == SECRET


def test_a_key_file_that_others_can_read_is_refused(tmp_path):
    path = tmp_path / "master"
    path.write_bytes(SECRET)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"0640.*chmod 600"):
        MasterKey.from_file(path)


@pytest.mark.parametrize("content", [b"", b"short", b"!" * 64, b"ab" * 31])
def test_what_is_not_a_key_is_refused_without_being_shown(tmp_path, content):
    path = tmp_path / "master"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="openssl rand") as raised:
        MasterKey.from_file(path)
    assert not content or content.decode() not in str(raised.value)
    with pytest.raises(ConfigError, match="Make one with"):
        MasterKey.from_file(tmp_path / "missing")


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("JAXSERVE_KV_KEY", SECRET.hex())
    master = MasterKey.from_environment()
    assert master.secret == SECRET and SECRET.hex() not in repr(master)
    monkeypatch.delenv("JAXSERVE_KV_KEY")
    with pytest.raises(ConfigError, match="not set"):
        MasterKey.from_environment()


def test_keys_survive_a_restart_and_differ_between_tenants(tmp_path):
    folder = KeyFolder(tmp_path / "keys", MASTER)
    assert folder.find(TENANT) is None
    key = folder.find_or_make(TENANT)
    again = KeyFolder(tmp_path / "keys", MASTER)
    found = again.find(TENANT)
    assert found is not None and works_together(key, found)
    assert works_together(key, again.find_or_make(TENANT))
    assert not works_together(key, again.find_or_make(OTHER))


def test_the_folder_is_private_and_names_nobody(tmp_path):
    folder = KeyFolder(tmp_path / "keys", MASTER)
    folder.find_or_make(TENANT)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    files = list((tmp_path / "keys").iterdir())
    assert len(files) == 2
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert TENANT.hex() not in file.name and TENANT not in file.read_bytes()
        assert SECRET not in file.read_bytes()


def test_a_destroyed_key_is_gone_for_good(tmp_path):
    folder = KeyFolder(tmp_path / "keys", MASTER)
    old, other = folder.find_or_make(TENANT), folder.find_or_make(OTHER)
    assert folder.destroy(TENANT).existed
    assert not folder.destroy(TENANT).existed
    assert folder.find(TENANT) is None
    again = KeyFolder(tmp_path / "keys", MASTER)
    assert again.find(TENANT) is None
    assert not works_together(old, again.find_or_make(TENANT))
    found = again.find(OTHER)
    assert found is not None and works_together(other, found)


def test_another_master_key_is_refused_at_once(tmp_path):
    KeyFolder(tmp_path / "keys", MASTER)
    with pytest.raises(ConfigError, match="another master key"):
        KeyFolder(tmp_path / "keys", MasterKey(b"x" * 32, "test"))


def test_a_folder_that_others_may_use_is_refused(tmp_path):
    (tmp_path / "keys").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="chmod 700"):
        KeyFolder(tmp_path / "keys", MASTER)


def test_a_damaged_key_is_replaced_because_its_records_are_lost_anyway(tmp_path):
    folder = KeyFolder(tmp_path / "keys", MASTER)
    folder.find_or_make(TENANT)
    (file,) = (tmp_path / "keys").glob("*.key")
    whole = file.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole + b"?"):
        file.write_bytes(damaged)
        again = KeyFolder(tmp_path / "keys", MASTER)
        assert again.find(TENANT) is None
        assert works_together(again.find_or_make(TENANT), again.find_or_make(TENANT))


def test_a_key_that_cannot_be_kept_is_not_used(tmp_path, monkeypatch):
    folder = KeyFolder(tmp_path / "keys", MASTER)

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        folder.find_or_make(TENANT)
    monkeypatch.undo()
    assert folder.find(TENANT) is None
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["master.check"]


def test_two_processes_that_make_the_same_key_agree(tmp_path):
    folders = [KeyFolder(tmp_path / "keys", MASTER) for _ in range(4)]
    keys = []
    threads = [
        threading.Thread(target=lambda folder=folder: keys.append(folder.find_or_make(TENANT)))
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 4 and all(works_together(keys[0], key) for key in keys)
