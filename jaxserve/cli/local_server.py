"""An engine of this process behind its own HTTP API, on a Unix socket that only this user can open.

`chat` and `run-batch` ask it like any other server, so both speak to one kind of endpoint.
"""

import contextlib
import dataclasses
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.config import Config, ServerConfig
from jaxserve.errors import JaxserveError

SWITCH_S = 0.0005
START_S = 60.0
STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A running one.

    Attributes:
        socket: path of its Unix socket.
    """

    socket: str
    model_name: str
    engine: Any


@contextlib.contextmanager
def local_server(config: Config) -> Iterator[LocalServer]:
    """Build the engine and serve it until the block ends.

    Raises:
        ConfigError: the settings do not fit the model or the machine.
        WeightsError: the checkpoint is broken or not supported.
    """
    import uvicorn

    from jaxserve.engine import build_engine
    from jaxserve.progress import Progress
    from jaxserve.server.app import create_app

    config = dataclasses.replace(config, server=ServerConfig())  # nobody else can reach it
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    with Progress() as bars:
        engine: Any = build_engine(config, bars)
    sys.setswitchinterval(SWITCH_S)
    with tempfile.TemporaryDirectory(prefix="jaxserve-") as folder:
        path = str(Path(folder) / "http")
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(engine),  # pyright: ignore[reportArgumentType]
                uds=path,
                log_level="error",
                log_config=None,  # its own would close the handlers of the whole process
                access_log=False,
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(target=server.run, name="jaxserve-http", daemon=True)
        thread.start()
        try:
            _wait_until(lambda: server.started, thread)
            yield LocalServer(path, engine.model_name, engine)
        finally:
            server.should_exit = True
            thread.join(STOP_S)


def _wait_until(condition: Any, thread: threading.Thread) -> None:
    deadline_s = time.monotonic() + START_S
    while not condition():
        if not thread.is_alive() or time.monotonic() > deadline_s:
            raise JaxserveError("the server in this process did not start")
        time.sleep(0.005)
