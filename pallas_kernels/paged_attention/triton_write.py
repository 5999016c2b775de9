"""The write of a step's new keys and values on Pallas-Triton: one launch, whatever the pages hold.

XLA takes a scatter for each of keys, values and both their scales, and two reductions to quantise:
six launches for quantised pages. Here a program writes one token's keys and values of all heads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from jaxserve.pallas_kernels.paged_attention import triton_ptx
from jaxserve.pallas_kernels.paged_attention.page_moves import to_storage
from jaxserve.pallas_kernels.paged_attention.quant import LARGEST
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages
from jaxserve.pallas_kernels.paged_attention.triton_decode import anywhere
from jaxserve.pallas_kernels.paged_attention.triton_tile import (
    largest_magnitude,
    load_tile,
    powers_of_two,
    store_tile,
)


def write_kv(
    pages: KVPages,
    k_tkh: jax.Array,
    v_tkh: jax.Array | None,
    page_t: jax.Array,
    offset_t: jax.Array,
    layer: jax.Array,
    *,
    spec: AttentionSpec,
    interpret: bool,
) -> KVPages:
    """As `page_moves.write_kv`, in place."""
    num_tokens, num_kv, head_dim = k_tkh.shape
    pool = pages.rows_rkph
    new = {"k": k_tkh} if v_tkh is None else {"k": k_tkh, "v": v_tkh}
    if pages.scales_rkp is None:
        new = {name: to_storage(x, pool.dtype) for name, x in new.items()}
    inputs = {
        **{name: x.reshape(-1, head_dim) for name, x in new.items()},
        "page": page_t,
        "offset": offset_t,
        "layer": layer,
    }
    outputs = {"slots": pool.reshape(-1, head_dim)}
    if pages.scales_rkp is not None:
        outputs["scales"] = pages.scales_rkp.reshape(-1)
    written = pl.pallas_call(
        functools.partial(
            _kernel, num_kv=num_kv, page_size=pool.shape[2], spec=spec, interpret=interpret
        ),
        grid=(num_tokens,),
        in_specs=[anywhere(inputs), anywhere(outputs)],
        out_specs=anywhere(outputs),
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs),
        input_output_aliases={len(inputs) + i: i for i in range(len(outputs))},
        compiler_params=pltriton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="write_kv",
    )(inputs, outputs)
    scales = written.get("scales")
    return KVPages(
        written["slots"].reshape(pool.shape),
        None if scales is None else scales.reshape(pool.shape[:3]),
    )


def _kernel(
    inputs: dict[str, Any],
    before: dict[str, Any],
    outputs: dict[str, Any],
    *,
    num_kv: int,
    page_size: int,
    spec: AttentionSpec,
    interpret: bool,
) -> None:
    del before  # the same memory as `outputs`
    token = pl.program_id(0)
    page, offset = inputs["page"][token], inputs["offset"][token]
    head_k = lax.iota(jnp.int32, pl.next_power_of_2(num_kv))
    is_head_k = head_k < num_kv
    is_written_k = is_head_k & (page >= 0)
    pool_row = spec.first_row(jnp.maximum(page, 0), inputs["layer"][0])
    pieces = powers_of_two(inputs["k"].shape[1])
    storage = outputs["slots"].dtype
    for part, name in enumerate(("k", "v")[: spec.parts]):
        slot_k = ((pool_row + part) * num_kv + head_k) * page_size + offset
        tile_kh = load_tile(inputs[name], token * num_kv + head_k, is_head_k, pieces)
        if "scales" in outputs:
            wide_kh = [x.astype(jnp.float32) for x in tile_kh]
            largest = LARGEST[storage.name]
            scale_k = largest_magnitude(wide_kh) / largest
            pltriton.store(outputs["scales"].at[slot_k], scale_k, mask=is_written_k)
            divisor_k = jnp.where(scale_k > 0, scale_k, 1.0)
            scaled_kh = [jnp.clip(x / divisor_k[:, None], -largest, largest) for x in wide_kh]
            tile_kh = tuple(_rounded(x, storage, interpret) for x in scaled_kh)
        store_tile(outputs["slots"], slot_k, is_written_k, pieces, tile_kh)


def _rounded(x: jax.Array, storage: jnp.dtype, interpret: bool) -> jax.Array:
    """To nearest. An unsigned storage holds the bits of float8_e4m3fn."""
    if storage == jnp.int8:
        return triton_ptx.nearest(x, interpret=interpret).astype(storage)
    x = x.astype(jnp.float8_e4m3fn)
    return lax.bitcast_convert_type(x, storage) if storage == jnp.uint8 else x
