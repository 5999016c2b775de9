"""Chooses how to multiply runs of rows with a matrix each: by machine, and by what can.

    grouped_matmul = get_grouped_matmul(this_machine())
    y_mo = grouped_matmul(x_mi, w_eoi, sizes_e, jnp.float32)

`reference` says what the operation means. A backend is a module of this package with that function;
one that raises NotImplementedError is passed over (see `fallback`). XLA's own operation for this,
`ragged_dot`, is none of them: but on TPU, it computes every row with every matrix.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxserve.pallas_kernels.fallback import Fallback, module_of
from jaxserve.pallas_kernels.paged_attention.api import Machine

GroupedMatmul = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]

BACKENDS = ("triton", "tpu", "cpu_native", "reference")


def backends_for(machine: Machine) -> tuple[str, ...]:
    """Names of what can run there, the fastest first."""
    return tuple(name for name in machine.backends if name in BACKENDS)


def get_grouped_matmul(machine: Machine, load: Callable[[str], Any] | None = None) -> GroupedMatmul:
    """The operation on that machine.

    Args:
        load: gives the module of a backend's name; raises ImportError.
    """
    package = "jaxserve.pallas_kernels.grouped_matmul"
    chain = Fallback("grouped matmul", backends_for(machine), load or module_of(package))

    def grouped_matmul(
        x_mi: jax.Array, w_eoi: jax.Array, sizes_e: jax.Array, out_dtype: Any
    ) -> jax.Array:
        check_arguments(x_mi, w_eoi, sizes_e)
        return chain.ask("grouped_matmul", x_mi, w_eoi, sizes_e, out_dtype)

    return grouped_matmul


def check_arguments(x_mi: jax.Array, w_eoi: jax.Array, sizes_e: jax.Array) -> None:
    """What no backend could do.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    fits = x_mi.ndim == 2 and w_eoi.ndim == 3 and x_mi.shape[1] == w_eoi.shape[2]
    if not fits or sizes_e.shape != w_eoi.shape[:1]:
        raise ValueError(
            f"rows are {x_mi.shape}, matrices {w_eoi.shape}, sizes {sizes_e.shape}; expected "
            "[M, I], [E, O, I] and [E]"
        )
    if x_mi.dtype != w_eoi.dtype or sizes_e.dtype.name != "int32":
        raise ValueError(
            f"rows are {x_mi.dtype}, matrices {w_eoi.dtype}, sizes {sizes_e.dtype}; expected rows "
            "and matrices of one dtype, and int32"
        )
