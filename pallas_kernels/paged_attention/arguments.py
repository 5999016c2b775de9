"""Checks what is asked of paged attention, the same for every backend, while it is traced."""

import jax

from jaxserve.pallas_kernels.paged_attention.quant import LARGEST
from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages, RaggedRows


def check_arguments(
    q_tqh: jax.Array,
    pages: KVPages,
    rows: RaggedRows,
    spec: AttentionSpec,
    sinks_q: jax.Array | None,
) -> None:
    """What no backend could do, because it has no meaning.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    pool, scales = pages.rows_rkph, pages.scales_rkp

    def expect(is_right: bool, problem: str) -> None:
        if not is_right:
            raise ValueError(problem)

    expect(q_tqh.ndim == 3, f"queries are {q_tqh.shape}; expected [T, Q, H]")
    expect(pool.ndim == 4, f"pages are {pool.shape}; expected the kernel view [N*L*2, K, P, H]")
    num_tokens, num_q, head_dim = q_tqh.shape
    num_rows, num_kv = pool.shape[:2]
    expect(
        pool.shape[3] == head_dim and num_q % num_kv == 0,
        f"queries are {q_tqh.shape} and pages {pool.shape}; expected the same head dimension, and "
        "query heads that are a multiple of KV heads",
    )
    expect(
        0 <= spec.layer < spec.num_layers and num_rows % (spec.parts * spec.num_layers) == 0,
        f"layer {spec.layer} of {spec.num_layers} in {num_rows} rows; expected a layer below the "
        f"number of layers, and {spec.parts} rows for each layer of each page",
    )
    expect(
        spec.latent_dim is None or (num_kv == 1 and 0 < spec.latent_dim <= head_dim),
        f"latent_dim is {spec.latent_dim}, pages are {pool.shape}; expected one head, and a latent "
        "that is a part of it",
    )
    expect(
        spec.window is None or spec.window > 0,
        f"window is {spec.window}; expected a positive number, or None to see all keys",
    )
    is_quantised = pool.dtype.name in LARGEST
    expect(
        is_quantised == (scales is not None),
        f"pages of {pool.dtype.name} {'lack' if is_quantised else 'have'} scales; expected them "
        f"with {', '.join(LARGEST)} only",
    )
    expect(
        scales is None or (scales.shape == pool.shape[:3] and scales.dtype.name == "float32"),
        f"scales are {_what(scales)}; expected {pool.shape[:3]} of float32",
    )
    expect(
        sinks_q is None or sinks_q.shape == (num_q,),
        f"sinks are {_what(sinks_q)}; expected ({num_q},)",
    )
    expect(
        rows.page_table.ndim == 2 and num_tokens >= rows.page_table.shape[0],
        f"{num_tokens} query tokens and a page table {rows.page_table.shape}; expected [R, M] with "
        "at most as many rows as tokens",
    )


def _what(x: jax.Array | None) -> str:
    return "none" if x is None else f"{x.shape} of {x.dtype}"
