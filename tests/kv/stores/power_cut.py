"""A disk that loses what was not synced: any part of it, in any order.

While it is in force, writes, renames and removals through `os` are noted with what they replaced.
`cut` undoes a random half of those that no sync has made durable, page by page.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PAGE = 4096


@dataclass(slots=True)
class _Page:
    path: str
    offset: int
    before: bytes


class PowerCut:
    """Installs itself through a pytest monkeypatch."""

    def __init__(self, monkeypatch: Any, rng: random.Random):
        self._rng = rng
        self._pages: list[_Page] = []
        self._unsynced_files: set[str] = set()
        self._calls = {name: getattr(os, name) for name in ("pwrite", "pwritev", "rename")}
        self._syncs = {name: getattr(os, name) for name in ("fsync", "fdatasync")}
        monkeypatch.setattr(os, "pwrite", self._pwrite)
        monkeypatch.setattr(os, "pwritev", self._pwritev)
        monkeypatch.setattr(os, "rename", self._rename)
        monkeypatch.setattr(os, "fsync", lambda fd: self._sync("fsync", fd))
        monkeypatch.setattr(os, "fdatasync", lambda fd: self._sync("fdatasync", fd))

    def cut(self) -> int:
        """Lose a random half of what was not synced; returns how many pages that were."""
        num_lost = 0
        for page in reversed(self._pages):
            if self._rng.random() < 0.5 and Path(page.path).exists():
                with open(page.path, "r+b") as file:
                    file.seek(page.offset)
                    file.write(page.before)
                num_lost += 1
        for path in sorted(self._unsynced_files):
            if self._rng.random() < 0.5:
                Path(path).unlink(missing_ok=True)
        self._pages.clear()
        self._unsynced_files.clear()
        return num_lost

    def _pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        self._note(descriptor, len(data), offset)
        return self._calls["pwrite"](descriptor, data, offset)

    def _pwritev(self, descriptor: int, pieces: Any, offset: int) -> int:
        self._note(descriptor, sum(piece.nbytes for piece in pieces), offset)
        return self._calls["pwritev"](descriptor, pieces, offset)

    def _rename(self, old: Any, new: Any) -> None:
        self._calls["rename"](old, new)
        self._unsynced_files.add(str(new))

    def _sync(self, name: str, descriptor: int) -> None:
        self._syncs[name](descriptor)
        path = _path_of(descriptor)
        if os.path.isdir(path):
            self._unsynced_files.clear()
        else:
            self._pages = [page for page in self._pages if page.path != path]

    def _note(self, descriptor: int, num_bytes: int, offset: int) -> None:
        path = _path_of(descriptor)
        with open(path, "rb") as file:
            for start in range(offset // _PAGE * _PAGE, offset + num_bytes, _PAGE):
                file.seek(start)
                self._pages.append(_Page(path, start, file.read(_PAGE)))


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
