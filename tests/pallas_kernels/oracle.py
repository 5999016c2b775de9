"""Paged attention in float64 numpy, one query at a time: slow, and plain enough to trust."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, RaggedRows


@dataclass(frozen=True)
class Case:
    """A random step: its queries, the pool after this step's keys were written, its rows."""

    q_tqh: np.ndarray
    pool_rkph: np.ndarray
    rows: RaggedRows
    num_tokens: int


def make_case(
    rng: np.random.Generator,
    *,
    decode_lens: tuple[int, ...],
    prefills: tuple[tuple[int, int], ...],
    spec: AttentionSpec,
    num_q: int,
    num_kv: int,
    head_dim: int,
    page_size: int,
    table_width: int,
    pad_rows: int = 0,
    pad_tokens: int = 0,
) -> Case:
    """`prefills` are (query tokens, all tokens). Pages are shuffled; what no query sees is NaN."""
    q_len = np.array([1] * len(decode_lens) + [q for q, _ in prefills], np.int32)
    kv_len = np.array([*decode_lens, *(kv for _, kv in prefills)], np.int32)
    num_rows, num_tokens = len(q_len), int(q_len.sum())
    pages_r = -(-kv_len // page_size)
    num_pages = int(pages_r.sum()) + 3
    order = rng.permutation(num_pages)
    pool = np.full(
        (num_pages * spec.num_layers * 2, num_kv, page_size, head_dim), np.nan, np.float32
    )
    table = np.full((num_rows + pad_rows, table_width), order[-1], np.int32)
    taken = 0
    for row in range(num_rows):
        table[row, : pages_r[row]] = order[taken : taken + pages_r[row]]
        taken += pages_r[row]
        first = 0 if spec.window is None else max(0, kv_len[row] - q_len[row] - spec.window + 1)
        position_p = np.arange(page_size)
        for page in table[row, : pages_r[row]]:
            at = (page * spec.num_layers + spec.layer) * 2
            kv = rng.standard_normal((2, num_kv, page_size, head_dim))
            kv[:, :, (position_p < first) | (position_p >= kv_len[row])] = np.nan
            pool[at : at + 2] = kv
            position_p = position_p + page_size

    def padded(values: np.ndarray, fill: int) -> jnp.ndarray:
        return jnp.asarray(np.pad(values, (0, pad_rows), constant_values=fill), jnp.int32)

    rows = RaggedRows(
        num_decodes=jnp.int32(len(decode_lens)),
        num_rows=jnp.int32(num_rows),
        q_start=padded(np.cumsum(q_len) - q_len, num_tokens),
        q_len=padded(q_len, 0),
        kv_len=padded(kv_len, 0),
        page_table=jnp.asarray(table),
        has_prefills=bool(prefills) or pad_tokens > 0,
    )
    total = max(num_tokens + pad_tokens, num_rows + pad_rows)
    q = rng.standard_normal((total, num_q, head_dim)).astype(np.float32)
    return Case(q, pool, rows, num_tokens)


def attention(case: Case, spec: AttentionSpec) -> np.ndarray:
    """Outputs of the real tokens, float64 [tokens, Q, H]."""
    rows, page_size = case.rows, case.pool_rkph.shape[2]
    num_kv = case.pool_rkph.shape[1]
    out = np.zeros((case.num_tokens, *case.q_tqh.shape[1:]))
    group = case.q_tqh.shape[1] // num_kv
    for row in range(int(rows.num_rows)):
        start, q_len, kv_len = (int(x[row]) for x in (rows.q_start, rows.q_len, rows.kv_len))
        pages = np.asarray(rows.page_table[row])[: -(-kv_len // page_size)]
        at = (pages * spec.num_layers + spec.layer) * 2
        k, v = (
            case.pool_rkph[at + i].transpose(1, 0, 2, 3).reshape(num_kv, -1, case.q_tqh.shape[2])
            for i in (0, 1)
        )
        for token in range(q_len):
            position = kv_len - q_len + token
            first = 0 if spec.window is None else max(0, position - spec.window + 1)
            for head in range(case.q_tqh.shape[1]):
                keys = k[head // group, first : position + 1].astype(np.float64)
                scores = keys @ case.q_tqh[start + token, head] * spec.scale
                if spec.soft_cap is not None:
                    scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
                weights = np.exp(scores - scores.max())
                values = v[head // group, first : position + 1]
                out[start + token, head] = weights @ values / weights.sum()
    return out
