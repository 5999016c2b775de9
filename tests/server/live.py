"""A server over a real socket, in a thread of its own, over a fake engine."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from jaxserve.server.app import create_app
from tests.fake_engine import FakeEngine


class Live:
    """A running server."""

    def __init__(self, engine: FakeEngine):
        self.engine = engine
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        app: Any = create_app(engine)
        # Its own logging set-up would close absl's handler, and with it pytest's captured stderr.
        settings = uvicorn.Config(app, log_level="warning", log_config=None)
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()
        wait_for(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive() and self.engine.closed


def wait_for(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.005)
