"""The engines that `serve_streams` drives, by name."""

from typing import Any

from bench.streams.paced import PacedEngine
from jaxserve.config import Config, ModelConfig, SchedulerConfig


def make_config(name: str, num_streams: int) -> Config:
    """Room for all streams at once."""
    scheduler = SchedulerConfig(max_num_seqs=num_streams, max_num_batched_tokens=4096)
    model = ModelConfig() if name == "embedded" else ModelConfig(served_model_name="paced")
    return Config(scheduler=scheduler, model=model)


def make_engine(name: str, config: Config, step_ms: float) -> Any:
    if name == "paced":
        return PacedEngine(config, step_ms / 1e3)
    from jaxserve.engine import build_engine

    return build_engine(config)
