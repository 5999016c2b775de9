"""jaxserve: serving large language models on JAX/XLA. Public names load on first use (PEP 562)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.errors import (
        ConfigError,
        EngineDeadError,
        JaxserveError,
        RequestError,
        WeightsError,
    )
    from jaxserve.llm import LLM, CompletionOutput, EmbeddingRequestOutput, RequestOutput
    from jaxserve.types import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "jaxserve.llm",
    "RequestOutput": "jaxserve.llm",
    "CompletionOutput": "jaxserve.llm",
    "EmbeddingRequestOutput": "jaxserve.llm",
    "SamplingParams": "jaxserve.types",
    "StructuredOutputsParams": "jaxserve.types",
    "JaxserveError": "jaxserve.errors",
    "ConfigError": "jaxserve.errors",
    "WeightsError": "jaxserve.errors",
    "RequestError": "jaxserve.errors",
    "EngineDeadError": "jaxserve.errors",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingRequestOutput",
    "EngineDeadError",
    "JaxserveError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "WeightsError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
