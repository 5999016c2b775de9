"""Paged attention in float64 numpy, one row at a time: slow, and plain enough to trust."""

from typing import NamedTuple

import numpy as np
from ml_dtypes import float8_e4m3fn

from jaxserve.pallas_kernels.paged_attention.specs import AttentionSpec, KVPages, RaggedRows


class Expected(NamedTuple):
    """Float64 results of the real tokens."""

    out_tqh: np.ndarray
    lse_tq: np.ndarray


def read_rows(pages: KVPages, row: np.ndarray, compute: np.dtype) -> np.ndarray:
    """Float64 values of some rows of the pool: [len(row), K, P, H]."""
    values = np.asarray(pages.rows_rkph)[row]
    if pages.scales_rkp is None:
        raw = values.dtype == np.uint16
        return (values.view(compute) if raw else values).astype(np.float64)
    if values.dtype == np.uint8:
        values = values.view(float8_e4m3fn)
    return (
        values.astype(np.float64) * np.asarray(pages.scales_rkp)[row].astype(np.float64)[..., None]
    )


def attention(
    q_tqh: np.ndarray,
    pages: KVPages,
    rows: RaggedRows,
    spec: AttentionSpec,
    sinks_q: np.ndarray | None = None,
) -> Expected:
    """What `ragged_paged_attention` has to yield for the tokens of `rows[:num_rows]`."""
    num_q, head_dim = q_tqh.shape[1:]
    value_dim = spec.latent_dim or head_dim
    num_kv, page_size = pages.rows_rkph.shape[1:3]
    num_rows = int(rows.num_rows)
    num_tokens = int(np.asarray(rows.q_len)[:num_rows].sum())
    out_tqh = np.zeros((num_tokens, num_q, value_dim))
    lse_tq = np.zeros((num_tokens, num_q))
    for row in range(num_rows):
        start, q_len, kv_len = (int(x[row]) for x in (rows.q_start, rows.q_len, rows.kv_len))
        page_m = np.asarray(rows.page_table[row])[: -(-kv_len // page_size)]
        row_m = (page_m * spec.num_layers + spec.layer) * spec.parts
        k_kch, v_kch = (
            read_rows(pages, row_m + i, q_tqh.dtype)
            .swapaxes(0, 1)
            .reshape(num_kv, -1, head_dim)[:, :kv_len]
            for i in (0, spec.parts - 1)
        )
        v_kch = v_kch[..., :value_dim]
        q_qbh = q_tqh[start : start + q_len].astype(np.float64).swapaxes(0, 1)
        q_position_b = np.arange(kv_len - q_len, kv_len)
        k_position_c = np.arange(kv_len)
        ahead_bc = k_position_c[None, :] - q_position_b[:, None]
        window = kv_len if spec.window is None else spec.window
        seen_bc = (ahead_bc <= 0) & (ahead_bc > -window)
        needed_c: np.ndarray = np.any(seen_bc, axis=0)  # the others hold anything
        k_kch, v_kch = (np.where(needed_c[:, None], x, 0.0) for x in (k_kch, v_kch))
        for head in range(num_q):
            kv_head = head // (num_q // num_kv)
            score_bc = q_qbh[head] @ k_kch[kv_head].T * spec.scale
            if spec.soft_cap is not None:
                score_bc = spec.soft_cap * np.tanh(score_bc / spec.soft_cap)
            score_bc = np.where(seen_bc, score_bc, -np.inf)
            sink = -np.inf if sinks_q is None else float(sinks_q[head])
            max_b = np.maximum(score_bc.max(axis=1), sink)
            weight_bc = np.exp(score_bc - max_b[:, None])
            sum_b = weight_bc.sum(axis=1) + np.exp(sink - max_b)
            out_tqh[start : start + q_len, head] = weight_bc @ v_kch[kv_head] / sum_b[:, None]
            lse_tq[start : start + q_len, head] = max_b + np.log(sum_b)
    return Expected(out_tqh, lse_tq)
