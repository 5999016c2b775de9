"""The process of an engine of `serve_streams` that runs apart from the server.

python -m bench.streams.engine_apart ENGINE STEP_MS FD
"""

import socket
import sys

from bench.streams.engines import make_engine
from jaxserve.server.engine_process import serve_engine

if __name__ == "__main__":
    name, step_ms = sys.argv[1], float(sys.argv[2])
    with socket.socket(fileno=int(sys.argv[3])) as connection:
        serve_engine(connection, lambda config, progress: make_engine(name, config, step_ms))
