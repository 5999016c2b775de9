"""GPU tests run where JAX has a GPU; with GPU_SUITE=tiny anywhere, kernels interpreted.

The second shows that the tests themselves work (`bench/gpu/suite.sh --tiny`).
"""

import os

import jax
import pytest

IS_TINY = os.environ.get("GPU_SUITE") == "tiny"


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def pytest_collection_modifyitems(items: "list[pytest.Item]") -> None:
    if has_gpu() or IS_TINY:
        return
    reason = f"JAX runs on {jax.default_backend()} here, and there is no GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def interpret() -> bool:
    """Kernels are interpreted where there is no GPU."""
    return not has_gpu()
