"""A process that serves a fake engine, as `engine_process` serves a real one.

    python -m tests.server.fake_engine_process FOLDER [OPTIONS] FD

FOLDER gets the fake tokenizer. OPTIONS is a JSON object with fields of `FakeEngine`, and:
`refuse`: the model cannot be loaded; `load_s`: loading takes so long.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from jaxserve.config import Config
from jaxserve.errors import WeightsError
from jaxserve.server.engine_process import serve_engine
from jaxserve.types import Progress
from tests.fake_engine import CHAT_TEMPLATE, FakeEngine, byte_level_backend


class Engine(FakeEngine):
    folder = Path()

    @property
    def model(self) -> Any:
        model = super().model
        return SimpleNamespace(dtype=model.dtype, config=model.config, path=self.folder)


def main(folder: str, options: dict[str, Any], fd: int) -> None:
    def build(config: Config, progress: Progress) -> Engine:
        load_s, length = options.pop("load_s", 0.0), options.pop("reply_len", None)
        for done in range(4):
            progress("loading", done, 4)
            time.sleep(load_s / 4)
        if options.pop("refuse", False):
            raise WeightsError("a tensor is missing")
        save_tokenizer(Path(folder))
        Engine.folder = Path(folder)
        reply = None if length is None else (lambda request: [40] * length)
        return Engine(config=config, reply=reply, **options)

    (Path(folder) / "pid").write_text(str(os.getpid()))
    with socket.socket(fileno=fd) as connection:
        serve_engine(connection, build)


def save_tokenizer(folder: Path) -> None:
    """The fake tokenizer as a checkpoint has it."""
    byte_level_backend().save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
