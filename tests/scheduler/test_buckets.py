"""Buckets: few graphs, and one for every step."""

import pytest

from jaxserve.config import SchedulerConfig
from jaxserve.errors import ConfigError
from jaxserve.plan import Bucket
from jaxserve.scheduler.buckets import BucketChooser, default_buckets

DEFAULT = SchedulerConfig()


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens"),
    [(DEFAULT.max_num_seqs, DEFAULT.max_num_batched_tokens), (256, 8192), (1, 1), (5, 12)],
)
def test_at_most_twenty_graphs_hold_every_step(max_num_seqs: int, max_num_batched_tokens: int):
    buckets = default_buckets(max_num_seqs, max_num_batched_tokens)
    assert len(buckets) == len(set(buckets)) <= 20
    chooser = BucketChooser(buckets, max_num_seqs, max_num_batched_tokens)
    assert chooser.max_num_tokens == max_num_batched_tokens
    for rows in range(1, max_num_seqs + 1):
        bucket = chooser.choose(rows, rows, is_decode=True)
        assert bucket.is_decode and rows <= bucket.num_rows == bucket.num_tokens
        for tokens in {rows, min(rows * 7, max_num_batched_tokens), max_num_batched_tokens}:
            bucket = chooser.choose(tokens, rows, is_decode=False)
            assert not bucket.is_decode
            assert bucket.num_tokens >= tokens and bucket.num_rows >= rows


def test_the_smallest_bucket_is_chosen():
    chooser = BucketChooser(default_buckets(64, 2048), 64, 2048)
    assert chooser.choose(3, 3, is_decode=True) == Bucket(4, 4, True)
    assert chooser.choose(17, 2, is_decode=False) == Bucket(32, 8, False)
    assert chooser.choose(17, 9, is_decode=False) == Bucket(128, 64, False)
    assert chooser.choose(1025, 1, is_decode=False) == Bucket(2048, 8, False)


def test_a_step_is_cut_where_the_padding_that_this_saves_is_worth_more_steps():
    chooser = BucketChooser(default_buckets(64, 2048), 64, 2048)
    assert chooser.fit(300, 1) == 256 and chooser.fit(400, 1) == 400
    assert chooser.fit(1100, 3) == 1024 and chooser.fit(1960, 3) == 1960
    assert chooser.fit(40, 1) == 40, "a step of 8 would cost more than padding to 64"
    assert chooser.fit(5, 1) == 5 and chooser.fit(70, 64) == 70
    for tokens in range(1, 2049):
        fit = chooser.fit(tokens, 1)
        assert 0 < fit <= tokens
        num_steps, num_padded = chooser.steps(tokens)
        whole = chooser.choose(tokens, 1, is_decode=False).num_tokens
        assert num_padded + 64 * num_steps <= whole + 64
        assert (num_steps > 1) == (fit < tokens)


@pytest.mark.parametrize(
    "buckets",
    [
        (Bucket(4, 4, True), Bucket(64, 8, False)),
        (Bucket(8, 8, True), Bucket(64, 4, False)),
        (Bucket(8, 8, True),),
        (Bucket(64, 8, False),),
        (Bucket(8, 8, True), Bucket(4, 8, False)),
    ],
)
def test_buckets_that_cannot_hold_every_step_are_refused(buckets: tuple[Bucket, ...]):
    with pytest.raises(ConfigError, match="max_num_seqs"):
        BucketChooser(buckets, 8, 64)


@pytest.mark.parametrize(
    ("num_tokens", "steps"),
    [
        (0, (0, 0)),
        (16, (1, 16)),
        (100, (1, 128)),
        (90, (1, 128)),
        (4096 + 300, (4, 4096 + 256 + 64)),
    ],
)
def test_a_prefill_is_cut_into_steps_that_are_well_filled(num_tokens: int, steps: tuple[int, int]):
    chooser = BucketChooser(default_buckets(64, 2048), 64, 2048)
    assert chooser.steps(num_tokens) == steps
