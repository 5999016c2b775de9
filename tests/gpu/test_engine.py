"""The engine on a GPU: the embedded model says what it says on a CPU, with tiers and without."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from jaxserve.transfers import STAGING_KIND, check_memory_kinds, with_memory_kind
from tests.gpu.conftest import IS_TINY, has_gpu

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
NUM_PROMPTS = 3 if IS_TINY else 12
NUM_PAGES = 48 if IS_TINY else 96
"""Too few for all prompts."""

LIMIT_S = 900 if IS_TINY else 150
EXACT = {"dtype": "float32"}
"""Products in full float32: a GPU would round their factors to tf32."""


@cache
def answers(platform: str, **settings: Any) -> dict[str, Any]:
    """What `greedy` prints on that platform."""
    variables = dict(os.environ, JAX_PLATFORMS=platform, JAX_DEFAULT_MATMUL_PRECISION="highest")
    variables.pop("XLA_FLAGS", None)
    given = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    command = [sys.executable, "-m", "tests.gpu.greedy", f"num_prompts={NUM_PROMPTS}", *given]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def here() -> str:
    return "cuda" if has_gpu() else "cpu"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_float32_answers_are_those_of_the_cpu_token_for_token(backend: str):
    found = answers(here(), attention_backend=backend, **EXACT)
    expected = answers("cpu", **EXACT)
    assert found["tokens"] == expected["tokens"]
    assert found["right"] >= NUM_PROMPTS - 1


def test_bfloat16_answers_are_as_often_right_as_on_the_cpu():
    """Tokens may differ where two are nearly as likely; what was asked for may not."""
    found, expected = (answers(x, dtype="bfloat16") for x in (here(), "cpu"))
    assert found["right"] >= expected["right"] - NUM_PROMPTS // 12
    if has_gpu() and getattr(jax.devices()[0], "compute_capability", "") == "9.0":
        assert found["attention"] == "mosaic_gpu"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kv_that_comes_back_from_the_host_gives_the_same_answers(dtype: str):
    """The device has room for few prompts, so the second round is served from host memory."""
    tiers = {"kv_host_bytes": 64 << 20, "kv_offload": "eager", "kv_load": "load"}
    found = answers(here(), dtype=dtype, max_model_len=640, num_pages=NUM_PAGES, **tiers)
    alone = answers(here(), dtype=dtype, max_model_len=640, num_pages=NUM_PAGES)
    assert found["again"] == found["tokens"] == alone["tokens"]
    assert sum(sources.get("host", 0) for sources in found["sources"]) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "int8", "float8_e4m3fn"])
def test_each_dtype_goes_through_pinned_memory_unchanged(dtype: str):
    device = SingleDeviceSharding(jax.devices()[0])
    host = with_memory_kind(device, STAGING_KIND)
    check_memory_kinds([device], [host], [(2, 2, 2, 16, 64)], np.dtype(jnp.dtype(dtype)))
