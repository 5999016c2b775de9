"""What a workload must move and compute, against counting it by hand."""

import numpy as np
import pytest

from bench.attention_workloads import MAIN, OTHERS, Workload

ROWS = [
    ((5, 9), None),
    ((5, 9), 3),
    ((5, 9), 7),
    ((1, 9), 3),
    ((1, 2), 3),
    ((4, 4), 2),
    ((6, 6), 1),
]


@pytest.mark.parametrize(("row", "window"), ROWS)
def test_flops_and_bytes_follow_from_the_mask(row, window):
    q_len, kv_len = row
    work = Workload("x", prefills=(row,), heads=(6, 2), head_dim=64, page_size=4, window=window)
    q_position, k_position = np.arange(kv_len - q_len, kv_len)[:, None], np.arange(kv_len)
    seen = (k_position <= q_position) & (k_position > q_position - (window or kv_len))
    assert work.flops == 2 * 2 * 6 * 64 * seen.sum()
    num_keys = seen.any(axis=0).sum()
    kv_bytes = num_keys * 2 * 2 * 64 * 2
    q_bytes = 2 * q_len * 6 * 64 * 2
    assert work.bytes_moved == kv_bytes + q_bytes + 4 * -(-num_keys // 4)


def test_quantised_tokens_carry_their_scales():
    plain, quantised = Workload("x"), Workload("x", quantised="int8")
    assert plain.token_bytes == 2 * 8 * 128 * 2
    assert quantised.token_bytes == 2 * 8 * (128 + 4)


def test_names_differ_and_pools_fit():
    work = [*MAIN, *OTHERS]
    assert len(set(map(str, work))) == len(work)
    for pool_bytes in (4 << 30, 96 << 30):
        for fitted in (x.within(pool_bytes) for x in work):
            pages = fitted.abstract_pages().rows_rkph
            assert pool_bytes // 2 < pages.size * pages.dtype.itemsize <= pool_bytes
            assert pages.shape[0] == fitted.num_pages * fitted.num_layers * 2
