"""The folder of a disk store: made private, and locked for one process."""

import fcntl
import os
from pathlib import Path

from jaxserve.errors import ConfigError, StoreError


def lock_folder(folder: Path) -> int:
    """A descriptor of the folder, made if it is not there, locked until it is closed.

    Raises:
        ConfigError: it is no folder, others may use it, or another process does.
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
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_mode & 0o077:
            raise ConfigError(
                f"Others than its owner may use the KV store's folder {folder}; expected a folder "
                f"of its own with mode 0700: name a new one or, if nothing else uses this one, "
                f"`chmod 700 {folder}`."
            )
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"The KV store's folder {folder} is in use by another process. Stop that, or give "
            f"this one a folder of its own."
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
