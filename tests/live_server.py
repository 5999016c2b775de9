"""A real server on a real port, over a fake engine, in a thread of this process."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from jaxserve.server.app import create_app
from tests.fake_engine import FakeEngine


@contextlib.contextmanager
def live_server(engine: FakeEngine) -> Iterator[str]:
    """Its URL, without /v1."""
    app: Any = create_app(engine)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # Its own logging set-up would close absl's handler, and with it pytest's captured stderr.
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", log_config=None))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        deadline_s = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < deadline_s, "the server did not start"
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
