"""The engine: from a config to a running model, and from requests to token events."""

from jaxserve.engine.core import Engine
from jaxserve.engine.startup import build_engine
from jaxserve.types import StartupReport

__all__ = ["Engine", "StartupReport", "build_engine"]
