"""The engine: from a config to a running model, and from requests to token events."""

from jaxserve.engine.core import Engine, StartupReport
from jaxserve.engine.startup import build_engine

__all__ = ["Engine", "StartupReport", "build_engine"]
