"""Keys of encrypted records: one per tenant, kept wrapped by a master key.

The master key comes from a file or an environment variable and is never written. A tenant's key
is random, made at its first use, and lies in a small file of the key folder, encrypted with the
master key. Destroying that file makes every record of the tenant unreadable, in every store and
backup: that is the erasure. Nothing in the folder names a tenant to somebody without the master
key. Several processes may share a folder.

Knows nothing of records, stores or jax.
"""

import base64
import binascii
import errno
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from jaxserve.errors import ConfigError, StoreError

KEY_BYTES = 32
_MAGIC = b"JXKEY\x00\x00\x01"
_NONCE_BYTES = 12
_FILE_BYTES = len(_MAGIC) + _NONCE_BYTES + KEY_BYTES + 16
_CHECK_FILE = "master.check"
_SUFFIX = ".key"


@dataclass(frozen=True, slots=True)
class MasterKey:
    """32 secret bytes that wrap the tenants' keys.

    Args:
        secret: the bytes.
        source: where they came from, for messages.
    """

    secret: bytes = field(repr=False)
    source: str

    def __post_init__(self):
        if len(self.secret) != KEY_BYTES:
            raise ConfigError(
                f"The master key in {self.source} has {len(self.secret)} bytes; expected "
                f"{KEY_BYTES}. Make one with `openssl rand -hex {KEY_BYTES}`."
            )

    @classmethod
    def from_file(cls, path: str | Path) -> "MasterKey":
        """Read a key file: 64 hex digits, base64 or 32 raw bytes; mode 0600 or 0400.

        Raises:
            ConfigError: the file is missing, is readable by others, or holds no key.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(
                f"Cannot read the key file {path}: {error.strerror}. Make one with "
                f"`umask 077; openssl rand -hex {KEY_BYTES} > {path}`."
            ) from error
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"The key file {path} is not a regular file.")
            if status.st_mode & 0o077:
                raise ConfigError(
                    f"The key file {path} has mode {stat.S_IMODE(status.st_mode):04o}, so others "
                    f"than its owner may use it. Expected 0600: `chmod 600 {path}`."
                )
            return cls(_decode(file.read(1024), f"file {path}"), f"file {path}")

    @classmethod
    def from_environment(cls, variable: str = "JAXSERVE_KV_KEY") -> "MasterKey":
        """Read 64 hex digits or base64 from an environment variable.

        Raises:
            ConfigError: the variable is not set or holds no key.
        """
        text = os.environ.get(variable)
        if not text:
            raise ConfigError(
                f"The environment variable {variable} is not set; expected the master key, as "
                f"`openssl rand -hex {KEY_BYTES}` makes it."
            )
        return cls(_decode(text.encode(), f"variable {variable}"), f"variable {variable}")

    @property
    def tenant_secret(self) -> bytes:
        """What `tenant_digest` is keyed with."""
        return self._derive("tenant names")

    def _derive(self, purpose: str) -> bytes:
        return blake3(self.secret, derive_key_context=f"jaxserve kv {purpose} v1").digest()


@dataclass(frozen=True, slots=True)
class KeyReceipt:
    """What `KeyFolder.destroy` did: `existed` is False if the tenant had no key."""

    tenant: bytes
    existed: bool


class KeyFolder:
    """The tenants' keys, wrapped, one file each. Methods may be called by several threads.

    Args:
        folder: made with mode 0700 if it is not there.
        master: must be the one that the folder was made with.

    Raises:
        ConfigError: the folder belongs to another master key, or others may write to it.
        StoreError: the folder cannot be made or read.
    """

    def __init__(self, folder: str | Path, master: MasterKey):
        self._folder = Path(folder)
        self._wrapping = AESGCM(master._derive("key wrapping"))
        self._naming_key = master._derive("key file names")
        self._keys: dict[bytes, AESGCM] = {}
        self._lock = threading.Lock()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._folder.stat().st_mode & 0o077:
                raise ConfigError(
                    f"Others than its owner may use the key folder {folder}; expected a folder of "
                    f"its own with mode 0700: name a new one or, if nothing else uses this one, "
                    f"`chmod 700 {folder}`."
                )
            check = self._folder / _CHECK_FILE
            expected = master._derive("master key check")
            if not _create(check, expected) and check.read_bytes() != expected:
                raise ConfigError(
                    f"The keys in {folder} were wrapped by another master key than the one in "
                    f"{master.source}. Use that one, or another folder."
                )
        except OSError as error:
            raise StoreError(f"Cannot use the key folder {folder}: {error.strerror}.") from error

    @staticmethod
    def is_one(folder: str | Path) -> bool:
        """Whether a key folder is there already. Raises StoreError if that cannot be seen."""
        try:
            return (Path(folder) / _CHECK_FILE).is_file()
        except OSError as error:
            raise StoreError(f"Cannot use the key folder {folder}: {error.strerror}.") from error

    def find(self, tenant: bytes) -> AESGCM | None:
        """The tenant's key if it has one that can be read."""
        with self._lock:
            if (key := self._keys.get(tenant)) is not None:
                return key
            try:
                key = self._read(tenant)
            except OSError:
                return None
            if key is not None:
                self._keys[tenant] = key
            return key

    def find_or_make(self, tenant: bytes) -> AESGCM:
        """The tenant's key; a new one, durably kept, if it has none.

        Raises:
            StoreError: the key cannot be kept.
        """
        with self._lock:
            if (key := self._keys.get(tenant)) is not None:
                return key
            try:
                key = self._read(tenant) or self._make(tenant)
            except OSError as error:
                raise StoreError(
                    f"Cannot keep a tenant's key in {self._folder}: {error.strerror}."
                ) from error
            self._keys[tenant] = key
            return key

    def destroy(self, tenant: bytes) -> KeyReceipt:
        """Forget and erase the tenant's key, durably: its file is overwritten, then removed.

        Raises:
            StoreError: the file is still there.
        """
        path = self._path(tenant)
        with self._lock:
            self._keys.pop(tenant, None)
            try:
                with open(path, "r+b") as file:
                    file.write(bytes(_FILE_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
                path.unlink()
                _sync_folder(self._folder)
            except FileNotFoundError:
                return KeyReceipt(tenant, existed=False)
            except OSError as error:
                raise StoreError(
                    f"Cannot erase a tenant's key in {self._folder}: {error.strerror}."
                ) from error
        return KeyReceipt(tenant, existed=True)

    def _path(self, tenant: bytes) -> Path:
        name = blake3(tenant, key=self._naming_key).hexdigest(16)
        return self._folder / (name + _SUFFIX)

    def _read(self, tenant: bytes) -> AESGCM | None:
        try:
            blob = self._path(tenant).read_bytes()
        except FileNotFoundError:
            return None
        if len(blob) != _FILE_BYTES or not blob.startswith(_MAGIC):
            return None
        nonce_end = len(_MAGIC) + _NONCE_BYTES
        try:
            secret = self._wrapping.decrypt(
                blob[len(_MAGIC) : nonce_end], blob[nonce_end:], _MAGIC + tenant
            )
        except InvalidTag:
            return None
        return AESGCM(secret)

    def _make(self, tenant: bytes) -> AESGCM:
        path = self._path(tenant)
        secret, nonce = os.urandom(KEY_BYTES), os.urandom(_NONCE_BYTES)
        blob = _MAGIC + nonce + self._wrapping.encrypt(nonce, secret, _MAGIC + tenant)
        if not _create(path, blob):
            # Another process was faster, or the file is broken and all under its key is lost.
            if (key := self._read(tenant)) is not None:
                return key
            path.unlink()
            if not _create(path, blob):
                raise OSError(errno.EEXIST, "another process makes the same key", str(path))
        return AESGCM(secret)


def _decode(data: bytes, source: str) -> bytes:
    if len(data) == KEY_BYTES:
        return data
    text = data.strip()
    if len(text) == 2 * KEY_BYTES:
        try:
            return bytes.fromhex(text.decode())
        except ValueError:
            pass
    try:
        return base64.b64decode(
            text, altchars=b"-_" if b"-" in text or b"_" in text else None, validate=True
        )
    except binascii.Error as error:
        raise ConfigError(
            f"The {source} holds no master key; expected {2 * KEY_BYTES} hex digits or base64 of "
            f"{KEY_BYTES} bytes. Make one with `openssl rand -hex {KEY_BYTES}`."
        ) from error


def _create(path: Path, data: bytes) -> bool:
    """Write a file whole or not at all, durably; False if there is one already."""
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
    finally:
        temporary.unlink()
    _sync_folder(path.parent)
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
