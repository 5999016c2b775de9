"""Block names: equal exactly when everything that the KV depends on is equal."""

from array import array
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.kv.blocks import Namespace, block_hashes, salted_root
from jaxserve.types import LayerCache, group_layers

NAMESPACE = Namespace(
    weights_fingerprint="w",
    model_config_digest="c",
    kv_dtype="bfloat16",
    layout_version=1,
    page_size=4,
    kv_groups=group_layers((LayerCache(2, 8), LayerCache(2, 8, 16))),
)
ROOT = NAMESPACE.root()


@pytest.mark.parametrize(
    "change",
    [
        {"weights_fingerprint": "other"},
        {"model_config_digest": "other"},
        {"kv_dtype": "float32"},
        {"layout_version": 2},
        {"page_size": 8},
        {"kv_groups": group_layers((LayerCache(2, 8), LayerCache(2, 8, 32)))},
        {"numerics": "exact"},
        {"adapter": "lora"},
        {"tenant_salt": "tenant"},
        # The same characters, divided in another way among neighbouring fields.
        {"weights_fingerprint": "wc", "model_config_digest": ""},
    ],
    ids=lambda change: next(iter(change)),
)
def test_no_block_is_shared_across_a_change_of_namespace(change: dict):
    other = replace(NAMESPACE, **change).root()
    assert other != ROOT
    assert not set(block_hashes(range(16), 4, other)) & set(block_hashes(range(16), 4, ROOT))


def test_namespace_root_is_the_same_in_every_process():
    assert ROOT.hex() == "ec90d9d615c4e98db7bd434ebdb24dec58d8e055fd556dd27d0f7b431a0c06a7"


def test_salts_keep_blocks_apart_and_the_empty_salt_shares():
    assert salted_root(ROOT, "") == ROOT
    assert len({ROOT, salted_root(ROOT, "a"), salted_root(ROOT, "b")}) == 3
    assert salted_root(ROOT, "a") != salted_root(salted_root(ROOT, "a"), "a")


def test_partial_last_block_has_no_name():
    assert len(block_hashes(range(11), 4, ROOT)) == 2
    assert block_hashes(range(3), 4, ROOT) == []
    assert block_hashes([], 4, ROOT) == []


def test_extra_key_changes_the_name():
    plain = block_hashes(range(8), 4, ROOT)
    assert not set(plain) & set(block_hashes(range(8), 4, ROOT, extra_key=b"image"))


@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=60),
    page_size=st.integers(1, 8),
    cut=st.integers(0, 8),
)
def test_chain_can_be_continued_from_any_block(tokens: list[int], page_size: int, cut: int):
    whole = block_hashes(tokens, page_size, ROOT)
    cut = min(cut, len(whole))
    head = block_hashes(tokens[: cut * page_size], page_size, ROOT)
    tail = block_hashes(tokens[cut * page_size :], page_size, head[-1] if head else ROOT)
    assert head + tail == whole


@given(
    first=st.lists(st.integers(0, 3), min_size=8, max_size=24),
    second=st.lists(st.integers(0, 3), min_size=8, max_size=24),
)
def test_names_are_equal_exactly_as_long_as_the_prefixes_are(first: list[int], second: list[int]):
    pairs = zip(block_hashes(first, 4, ROOT), block_hashes(second, 4, ROOT), strict=False)
    for index, (a, b) in enumerate(pairs):
        end = 4 * (index + 1)
        assert (a == b) == (first[:end] == second[:end])


@given(tokens=st.lists(st.integers(0, 2**31 - 1), max_size=40))
def test_names_do_not_depend_on_the_container_of_the_tokens(tokens: list[int]):
    expected = block_hashes(tokens, 4, ROOT)
    assert block_hashes(array("i", tokens), 4, ROOT) == expected
    assert block_hashes(np.array(tokens, np.int32), 4, ROOT) == expected
    assert block_hashes(np.array(tokens, ">i8"), 4, ROOT) == expected
