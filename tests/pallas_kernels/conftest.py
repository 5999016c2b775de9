"""Interpreted kernels that fail instead of hanging."""

import threading
from types import SimpleNamespace

import pytest

PATIENCE_S = 120


class Impatient(threading.Condition):
    """A wait that ends."""

    def wait(self, timeout: float | None = None) -> bool:
        if not super().wait(timeout or PATIENCE_S):
            raise TimeoutError(f"a thread of the kernel waited for {PATIENCE_S} s")
        return True


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """If one thread of a Mosaic GPU kernel fails, jax 0.10 lets the others wait for it for ever."""
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    impatient = SimpleNamespace(**vars(threading) | {"Condition": Impatient})
    monkeypatch.setattr(shared_memory, "threading", impatient)
