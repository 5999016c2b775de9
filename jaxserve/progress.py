"""Shows how far a task is: a bar on a terminal or in a notebook, else a line per finished task.

Writes to stderr only. Knows nothing of what is being done.
"""

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """A callable that `build_engine` and others report to: (what, done, of how many).

    Reports of one task follow each other; a new `what` ends the task before. Use it as a context
    manager, so that the last bar is closed.
    """

    def __init__(self):
        self._has_bars = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._what: str | None = None
        self._bar: Any = None
        self._started_s = 0.0
        self._done = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self._finish()
            self._what, self._started_s = what, time.monotonic()
            if self._has_bars:
                self._bar = tqdm(total=total, desc=what, unit_scale=total >= 10_000, leave=True)
        self._done = done
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
        if done >= total:
            self._finish()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._finish(is_done=kind is None)

    def _finish(self, is_done: bool = True) -> None:
        if self._what is None:
            return
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif is_done and not self._has_bars:
            elapsed_s = time.monotonic() - self._started_s
            print(f"{self._what}: {self._done} in {elapsed_s:.1f} s", file=sys.stderr, flush=True)
        self._what = None
