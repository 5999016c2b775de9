"""Paged attention: write this step's keys and values, then attend, on the chosen backend.

A backend raises NotImplementedError when it cannot do what is asked; ValueError is the caller's
mistake. `reference` can do everything.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, RaggedRows


class Backend(NamedTuple):
    """One way to do paged attention; see `reference` for the meaning of both calls."""

    write_kv: Callable[..., jax.Array]
    ragged_paged_attention: Callable[
        [jax.Array, jax.Array, RaggedRows, AttentionSpec], jax.Array
    ]


BACKENDS = {
    "reference": Backend(reference.write_kv, reference.ragged_paged_attention),
}


def get_backend(name: str) -> Backend:
    """Backend by name; "auto" picks what is best for the platform.

    Raises:
        ValueError: no backend of that name.
    """
    if name == "auto":
        name = "reference"
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r}; expected auto or one of {list(BACKENDS)}")
    return BACKENDS[name]
