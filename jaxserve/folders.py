"""Where things are kept for the next start. Knows nothing of what is kept there."""

import os
from pathlib import Path


def user_cache_folder() -> Path | None:
    """`jaxserve` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).

    None if the user has no home, as in some containers: then nothing is kept.
    """
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "jaxserve"
    try:
        return Path.home() / ".cache" / "jaxserve"
    except RuntimeError:
        return None
