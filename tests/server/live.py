"""A server over a real socket, in a thread of its own, over a fake engine."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import uvicorn

from jaxserve.server.app import create_app
from jaxserve.server.launch import CLOSE_TIMEOUT_S
from jaxserve.server.protocol import Connection


class Live:
    """A running server.

    Args:
        send_bytes: what the system keeps of an answer for a client that does not read.
    """

    def __init__(self, engine: Any, send_bytes: int | None = None):
        self.engine = engine
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        if send_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app: Any = create_app(engine)
        # Its own logging set-up would close absl's handler, and with it pytest's captured stderr.
        settings = uvicorn.Config(
            app,
            http=Connection,
            log_level="warning",
            log_config=None,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        self._server = uvicorn.Server(settings)
        # A daemon: a server that does not stop fails its test, and does not keep the process.
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True
        )
        self._thread.start()
        wait_for(lambda: self._server.started)

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        """A client that writes and reads bytes."""
        client = socket.socket()
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.settimeout(10)
        client.connect(("127.0.0.1", self.port))
        return client

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive() and getattr(self.engine, "closed", True)


def wait_for(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true"
        time.sleep(0.005)
