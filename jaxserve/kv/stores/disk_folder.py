"""The folder of a disk store: made private, locked for one process, watched for being writable."""

import fcntl
import logging
import os
import threading
import time
from pathlib import Path

from jaxserve.errors import ConfigError, StoreError
from jaxserve.kv.stores.disk_segment import TEMPORARY_SUFFIX

_LOG = logging.getLogger(__name__)
_TRY_AGAIN_S = 30.0
_locked_here: set[tuple[int, int]] = set()  # device and inode; the file's own lock settles races


class FolderInUseError(ConfigError):
    """Another process has the folder; it may be about to end."""


class WriteGate:
    """Whether a folder that could be written still can; any thread.

    A file system that has become read-only refuses every write. While it does there is nothing to
    be gained from trying, and records to be lost that would leave for new ones. So nothing is
    written but a file, now and then; when that can be made, one call may try.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.Lock()
        self._is_shut = False
        self._try_at_s = 0.0

    def shut(self, error: OSError) -> None:
        """A write was refused because nothing may be written."""
        with self._lock:
            self._try_at_s = time.monotonic() + _TRY_AGAIN_S
            if self._is_shut:
                return
            self._is_shut = True
        _LOG.warning(
            "the KV store's folder %s cannot be written any more (%s): reading only; tried again "
            "every %.0f s",
            self._folder,
            error.strerror,
            _TRY_AGAIN_S,
        )

    def is_open(self) -> bool:
        """Whether this call may write."""
        if not self._is_shut:
            return True
        with self._lock:
            if not self._is_shut:
                return True
            if time.monotonic() < self._try_at_s:
                return False
            self._try_at_s = time.monotonic() + _TRY_AGAIN_S
        return self._can_make_a_file()

    def confirm(self) -> None:
        """A record has been written."""
        if self._is_shut:
            self._is_shut = False
            _LOG.warning("the KV store's folder %s can be written again", self._folder)

    def _can_make_a_file(self) -> bool:
        path = self._folder / f"try{TEMPORARY_SUFFIX}"
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
            path.unlink()
        except OSError:
            return False
        return True


def lock_folder(folder: Path) -> int:
    """A descriptor of the folder, made if it is not there; locked until `unlock_folder`.

    Raises:
        FolderInUseError: another process has locked it.
        ConfigError: this process has, it is no folder, or others than its owner may use it.
        StoreError: it cannot be made or read.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"The KV store's folder {folder} is not a folder.") from error
    except OSError as error:
        raise StoreError(f"Cannot use the KV store's folder {folder}: {error.strerror}.") from error
    try:
        identity = _identity(descriptor)
        if identity in _locked_here:
            raise ConfigError(
                f"The KV store's folder {folder} is in use by this process. Close the engine that "
                f"has it, or give this one a folder of its own."
            )
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_mode & 0o077:
            raise ConfigError(
                f"Others than its owner may use the KV store's folder {folder}; expected a folder "
                f"of its own with mode 0700: name a new one or, if nothing else uses this one, "
                f"`chmod 700 {folder}`."
            )
    except BlockingIOError:
        os.close(descriptor)
        raise FolderInUseError(
            f"The KV store's folder {folder} is in use by another process. Stop that, or give "
            f"this one a folder of its own."
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    _locked_here.add(identity)
    return descriptor


def unlock_folder(descriptor: int) -> None:
    """Let others have the folder, and close the descriptor."""
    _locked_here.discard(_identity(descriptor))
    os.close(descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
