"""Every family through the engine, paged, chunked and in company, against `transformers`."""

from pathlib import Path

import jax
import pytest

from tests.parity.harness import TOLERANCE, Settings, check

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
FAMILIES = sorted(folder.name for folder in TINY.iterdir())

# Each family gets one of these in turn, so that all are met without the full product.
SETTINGS = (
    Settings(page_size=16, max_num_batched_tokens=64),
    Settings(page_size=4, max_num_batched_tokens=16, few_shapes=True),
    Settings(page_size=8, max_num_batched_tokens=40, max_num_seqs=2, few_shapes=True),
    Settings(page_size=1, max_num_batched_tokens=24, max_num_seqs=3, few_shapes=True),
    Settings(page_size=32, max_num_batched_tokens=64, enable_prefix_caching=False, few_shapes=True),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_matches_transformers(family: str):
    settings = SETTINGS[FAMILIES.index(family) % len(SETTINGS)]
    assert check(TINY / family, settings) <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "devices"),
    [
        ("gemma3-v3", 4),
        ("deepseek_v3-v0", 2),
        ("mixtral-v3", 4),
    ],
)
def test_tensor_parallel_output_is_that_of_one_device(family: str, devices: int):
    assert jax.device_count() >= devices
    assert (
        check(TINY / family, Settings(tensor_parallel_size=devices, few_shapes=True)) <= TOLERANCE
    )


@pytest.mark.parametrize("family", ["llama31-v0", "gemma3-v0", "deepseek_v2-v3"])
def test_preempted_sequences_resume_with_the_same_tokens(family: str):
    """Two sequences of 48 to 72 tokens fill 32 pages of 4 before the first of them is done."""
    settings = Settings(page_size=4, num_pages=32, max_num_batched_tokens=32, few_shapes=True)
    assert check(TINY / family, settings, must_preempt=True) <= TOLERANCE


def test_plain_xla_matches_transformers_where_there_is_no_compiler():
    assert check(TINY / "llama31-v0", Settings(native_cpu=False, few_shapes=True)) <= TOLERANCE
