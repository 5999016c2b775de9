"""Part `layers`: a scan over stacked layers against the unrolled loop: compile time, step time.

On CPU the unrolled loop wins by far (a scan copies each layer's weights); on a GPU nobody has
measured it. The scanned kernel does not know its layer when it is compiled: page n of layer l is
told to it as page n*L + l of a pool with one layer, which is the same row.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bench.attention_workloads import Workload
from bench.gpu.inputs import make_rows
from bench.gpu.kernels import load
from bench.gpu.report import Context
from bench.model_shapes import SHAPES, TINY
from jaxserve.models import decoder
from jaxserve.models import layers as nn
from jaxserve.models.config import DecoderConfig
from jaxserve.models.registry import read_config
from jaxserve.models.spec import random_params
from jaxserve.pallas_kernels.paged_attention.api import get_backend, this_machine
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages, RaggedRows

STEPS = 20


def run(context: Context) -> None:
    shape = TINY if context.is_tiny else SHAPES["Llama-3.1-8B"]
    batch, kv_len = (2, 40) if context.is_tiny else (16, 2048)
    config = read_config(shape)
    layer = config.layers[0]
    work = Workload(
        f"decode {batch}x{kv_len}",
        decodes=(kv_len,) * batch,
        heads=(layer.num_heads, layer.num_kv_heads),
        head_dim=layer.head_dim,
        page_size=16,
        num_layers=config.num_layers,
    )
    backend: Any = get_backend("auto", this_machine())
    if context.is_tiny:
        backend = load("triton", is_tiny=True)
    params = random_params(decoder.param_specs(config), jnp.bfloat16)
    rows = make_rows(work, work.num_pages, seed=0)
    about = {"batch": batch, "kv_len": kv_len, "layers": config.num_layers}
    variants: dict[str, tuple[Callable[..., Any], Any]] = {}
    unrolled = {"layers": params["layers"], "vectors": params["vectors"]}
    variants["unrolled"] = (_unrolled, unrolled)
    stack = jax.jit(lambda layers: jax.tree.map(lambda *x: jnp.stack(x), *layers))
    with context.attempt(about | {"loop": "stacking"}):
        stacked = stack(params["layers"]) | params["vectors"]
        variants["scan"] = (_scanned, stacked)
    for name, (function, weights) in variants.items():
        with context.attempt(about | {"loop": name}):
            _time(context, about | {"loop": name}, function, weights, config, work, rows, backend)


def _time(
    context: Context,
    about: dict[str, Any],
    function: Callable[..., Any],
    weights: Any,
    config: DecoderConfig,
    work: Workload,
    rows: RaggedRows,
    backend: Any,
) -> None:
    abstract = work.abstract_pages().rows_rkph
    pool = jax.random.normal(jax.random.key(0), abstract.shape, abstract.dtype)
    x_td = jax.random.normal(jax.random.key(1), (len(work.rows), config.hidden_size), jnp.bfloat16)

    def step(weights: Any, pool: jax.Array, x_td: jax.Array, rows: RaggedRows) -> Any:
        return function(weights, KVPages(pool), x_td, rows, config, backend)

    start_s = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(weights, pool, x_td, rows)
    lower_s = time.perf_counter() - start_s
    compiled = lowered.compile()
    compile_s = time.perf_counter() - start_s - lower_s
    memory = compiled.memory_analysis()
    pool, x_td = jax.block_until_ready(compiled(weights, pool, x_td, rows))
    count = 2 if context.is_tiny else STEPS
    start_s = time.perf_counter()
    for _ in range(count):
        pool, x_td = compiled(weights, pool, x_td, rows)
    jax.block_until_ready(x_td)
    context.line(
        **about,
        us=round((time.perf_counter() - start_s) / count * 1e6, 1),
        lower_s=round(lower_s, 2),
        compile_s=round(compile_s, 2),
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def _unrolled(
    weights: Any,
    pages: KVPages,
    x_td: jax.Array,
    rows: RaggedRows,
    config: DecoderConfig,
    backend: Any,
) -> Any:
    for index, matrices in enumerate(weights["layers"]):
        w = matrices | {name: stack[index] for name, stack in weights["vectors"].items()}
        x_td, pages = _layer(w, pages, x_td, rows, config, backend, config.num_layers, index)
    return pages.rows_rkph, x_td


def _scanned(
    weights: Any,
    pages: KVPages,
    x_td: jax.Array,
    rows: RaggedRows,
    config: DecoderConfig,
    backend: Any,
) -> Any:
    num_layers = config.num_layers

    def one(carry: Any, xs: Any) -> Any:
        pool, x_td = carry
        w, index = xs
        table = rows.page_table * num_layers + index
        own = replace(rows, page_table=table)
        x_td, pages = _layer(w, KVPages(pool), x_td, own, config, backend, 1, 0)
        return (pages.rows_rkph, x_td), None

    index_l = jnp.arange(num_layers, dtype=jnp.int32)
    carry, _ = lax.scan(one, (pages.rows_rkph, x_td), (weights, index_l))
    return carry


def _layer(
    w: Any,
    pages: KVPages,
    x_td: jax.Array,
    rows: RaggedRows,
    config: DecoderConfig,
    backend: Any,
    num_layers: int,
    index: int,
) -> Any:
    """A decoder layer that decodes one token for each row."""
    layer, page_size = config.layers[0], pages.rows_rkph.shape[2]
    position_t = rows.kv_len - 1
    table = None if layer.rope is None else nn.rotation(layer.rope, position_t)
    q_tqh, k_tkh, v_tkh = decoder._before_attention(
        w, x_td, position_t, table, config=config, layer=layer, kernels=nn.XLA
    )
    spec = AttentionSpec(layer.scale, num_layers, index, needs_lse=False)
    row_t = jnp.arange(position_t.shape[0])
    page_t = rows.page_table[row_t, position_t // page_size]
    pages = backend.write_kv(pages, k_tkh, v_tkh, page_t, position_t % page_size, spec)
    o_tqh = backend.ragged_paged_attention(q_tqh, pages, rows, spec).out_tqh
    x_td = decoder._after_attention(
        w,
        x_td,
        o_tqh,
        None,
        config=config,
        latent_spec=None,
        experts_spec=None,
        kernels=nn.XLA,
    )
    return x_td, pages
