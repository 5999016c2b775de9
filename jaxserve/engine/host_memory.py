"""How much host memory this process can still take, and giving back what it no longer needs.

Counts file cache as available, since it gives way: after a checkpoint was read, hardly anything is
"free". Knows cgroups of both versions; knows nothing of devices.
"""

import ctypes
import gc
import os
import threading
from pathlib import Path
from typing import NamedTuple

GIVE_BACK_EVERY_S = 60.0

MAX_ARENAS = 2
_M_ARENA_MAX = -8  # of malloc.h


class _Names(NamedTuple):
    """The files of one cgroup version, below its folder; `cache` is a line of memory.stat."""

    folder: str
    limit: str
    used: str
    cache: str


_VERSIONS = (
    _Names("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    _Names(
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def available_bytes(root: Path = Path("/")) -> int:
    """The least of what the machine has and what each enclosing cgroup allows."""
    left = [_machine_bytes(root)]
    for names in _VERSIONS:
        top = root / names.folder
        for group in _own_groups(root):
            for folder in (top / group, *(top / group).parents):
                if not folder.is_relative_to(top):
                    break
                limit, used = _number(folder / names.limit), _number(folder / names.used)
                if limit is not None and used is not None:
                    cache = _table(folder / "memory.stat").get(names.cache, 0)
                    left.append(max(0, limit - used + cache))
    return min(left)


def share_arenas() -> None:
    """Let all threads allocate from the same few arenas, where the C library has them (glibc).

    By default it makes eight for each core, and each keeps gaps of its own: with the engine's 17
    threads they grew by 50 MB an hour. Threads that have one by now keep it. Whoever has set
    MALLOC_ARENA_MAX or GLIBC_TUNABLES for that decides.
    """
    is_set = "MALLOC_ARENA_MAX" in os.environ
    if is_set or "glibc.malloc.arena_max" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(_M_ARENA_MAX, MAX_ARENAS)


def give_back_freed() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    Compiling leaves hundreds of megabytes of freed memory in the library's hands, which it would
    keep as long as the process lives.
    """
    gc.collect()
    _trim()


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class FreedMemory:
    """Returns freed memory to the system now and then, while the engine goes on.

    The library keeps, for each thread, as much as that thread ever had at once. Such records are
    broken ever more rarely, but for hours: that would look like a leak.
    """

    def __init__(self) -> None:
        self._next_s = 0.0
        self._thread: threading.Thread | None = None

    def maybe_give_back(self, now_s: float) -> None:
        """Start to if the last time was long ago; `now_s` is on any clock that goes on."""
        if now_s < self._next_s or (self._thread is not None and self._thread.is_alive()):
            return
        self._next_s = now_s + GIVE_BACK_EVERY_S
        self._thread = threading.Thread(target=_trim, name="give-back", daemon=True)
        self._thread.start()


def _machine_bytes(root: Path) -> int:
    kilobytes = _table(root / "proc" / "meminfo").get("MemAvailable:")
    if kilobytes is not None:
        return kilobytes * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _own_groups(root: Path) -> set[str]:
    """This process's cgroups, as relative paths; "" is where a container sees its own."""
    lines = _read(root / "proc" / "self" / "cgroup").splitlines()
    return {"", *(line.split(":", 2)[-1].strip("/") for line in lines)}


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
