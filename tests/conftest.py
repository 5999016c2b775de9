"""Strict JAX for every test: several CPU devices, no implicit promotion of dtypes or ranks."""

import os
import signal
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
if os.environ["JAX_PLATFORMS"] == "cpu":  # on a GPU, kernels are tested as they are served
    # Halves compile time, which is most of the suite's.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # halves it again; later versions lack the flag
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing a test caches lands in the user's own cache folder; compiled programs are kept for the
# next run. From the start, so that fixtures of every scope see it.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".cache")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# A shell's background job ignores Ctrl-C, and so would the tests that send one.
signal.signal(signal.SIGINT, signal.default_int_handler)
