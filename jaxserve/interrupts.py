"""Ctrl-C between steps, never inside one: a half-done step would leave an engine out of order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Pass Ctrl-C on when the block is done; a second one, for who has waited long, at once.

    Signals reach the main thread only: in others, and where Ctrl-C is ignored, it does nothing.
    """
    previous: Any = None
    if threading.current_thread() is threading.main_thread():
        previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        yield
        return
    arrived: list[Any] = []

    def hold(number: int, frame: Any) -> None:
        arrived.append(frame)
        if len(arrived) > 1:
            previous(number, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if len(arrived) == 1:
        previous(signal.SIGINT, arrived[0])
