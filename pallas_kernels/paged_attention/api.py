"""Paged attention: write this step's keys and values, then attend, on the chosen backend.

A backend raises NotImplementedError when it cannot do what is asked; ValueError is the caller's
mistake. `reference` can do everything. Which ones the machine can run is the caller's to know.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxserve.pallas_kernels.paged_attention import cpu_native, reference
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, RaggedRows


class Backend(NamedTuple):
    """One way to do paged attention; see `reference` for the meaning of both calls."""

    write_kv: Callable[..., jax.Array]
    ragged_paged_attention: Callable[[jax.Array, jax.Array, RaggedRows, AttentionSpec], jax.Array]


BACKENDS = {
    "reference": Backend(reference.write_kv, reference.ragged_paged_attention),
    "cpu_native": Backend(reference.write_kv, cpu_native.ragged_paged_attention),
}


def get_backend(name: str, *, native_cpu: bool = False) -> Backend:
    """Backend by name; "auto" picks the best one.

    Args:
        native_cpu: the kernels of `pallas_kernels.cpu` are loaded, and the step runs on them.

    Raises:
        ValueError: no backend of that name.
    """
    if name == "auto":
        name = "cpu_native" if native_cpu else "reference"
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r}; expected auto or one of {list(BACKENDS)}")
    if name == "cpu_native" and not native_cpu:
        raise ValueError("attention backend 'cpu_native' is not available here; expected auto")
    return BACKENDS[name]
