"""A server over one of the engines of `serve_streams`, until SIGTERM.

python -m bench.streams.server inside|apart PORT ENGINE STREAMS STEP_MS
"""

import sys
from dataclasses import replace

import jaxserve.server.launch
from bench.streams.engines import make_config, make_engine
from jaxserve.cli.serve import SWITCH_S, bind
from jaxserve.types import no_progress


def main(way: str, port: int, name: str, num_streams: int, step_ms: float) -> None:
    sys.setswitchinterval(SWITCH_S)
    config = make_config(name, num_streams)
    config = replace(
        config, server=replace(config.server, port=port, engine_process=way == "apart")
    )
    jaxserve.server.launch.serve(
        config,
        bind(config),
        no_progress,
        lambda engine: None,
        command=[sys.executable, "-m", "bench.streams.engine_apart", name, str(step_ms)],
        build=lambda config, progress: make_engine(name, config, step_ms),
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
