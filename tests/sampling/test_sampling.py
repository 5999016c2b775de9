"""Sampling against a float64 oracle: what is kept, how often it is drawn, and by whom it is not."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import sampling
from jaxserve.sampling import sample
from tests.sampling.oracle import Row, edited_logits, kept_tokens, make_batch, probabilities

VOCAB = 211
run = jax.jit(sample)


def draw(logits_rv: np.ndarray, rows: list[Row], num_rows: int = 64) -> np.ndarray:
    """One token of each row, in a step of `num_rows` rows: the rest are nobody's."""
    idle = [Row(active=False)] * (num_rows - len(rows))
    padded_rv = np.zeros((num_rows, logits_rv.shape[1]), np.float32)
    padded_rv[: len(rows)] = logits_rv
    return np.asarray(run(jnp.asarray(padded_rv), make_batch(rows + idle, len(padded_rv[0]))))[
        : len(rows)
    ]


def draw_many(logits_v: np.ndarray, row: Row, num_draws: int) -> np.ndarray:
    """Tokens of one row at positions 0, 1, ..., many at a time."""
    num_rows = 512
    batch = make_batch([row], len(logits_v))
    batch = jax.tree.map(lambda x: jnp.repeat(x, num_rows) if x.ndim == 1 else x, batch)
    logits_rv = jnp.tile(jnp.asarray(logits_v, jnp.float32)[None, :], (num_rows, 1))
    drawn = [
        run(logits_rv, replace(batch, position=start + jnp.arange(num_rows, dtype=jnp.int32)))
        for start in range(0, num_draws, num_rows)
    ]
    return np.concatenate(drawn)[:num_draws]


def logits_of(values: dict[int, float], others: float) -> np.ndarray:
    logits_v = np.full(VOCAB, others)
    logits_v[list(values)] = list(values.values())
    return logits_v


FILTERS = [
    Row(temperature=t, top_k=k, top_p=p, min_p=m)
    for t, k, p, m in itertools.product(
        (0.3, 1.0, 2.5), (0, 2, 40, 10**6), (0.05, 0.7, 0.95, 0.999, 1.0), (0.0, 0.02, 1.0)
    )
]


@pytest.mark.parametrize("vocab_size", [50, 3001])
def test_kept_sets_equal_the_sorted_float64_ones(vocab_size: int):
    rng = np.random.default_rng(vocab_size)
    logits_rv = rng.normal(0, 3, (len(FILTERS), vocab_size)).astype(np.float32)
    logits_rv[::3] = np.round(logits_rv[::3])  # many ties
    batch = make_batch(FILTERS, vocab_size)
    weights_rv = sampling._weights(jnp.asarray(logits_rv), batch.temperature)
    threshold_r = sampling._threshold(weights_rv, batch, batch.active)
    kept_rv = np.asarray((weights_rv >= threshold_r[:, None]) & (weights_rv > 0))
    for row, logits_v, kept_v in zip(FILTERS, logits_rv, kept_rv, strict=True):
        # Sums of float32 may miss the goal by their rounding: one part in a million either way.
        fewest = kept_tokens(logits_v, row, row.top_p * (1 - 1e-6))
        most = kept_tokens(logits_v, row, min(row.top_p * (1 + 1e-6), 1.0))
        assert np.all(fewest <= kept_v) and np.all(kept_v <= most), row


@pytest.mark.parametrize(
    "row",
    [
        Row(),
        Row(temperature=0.5),
        Row(temperature=3.0, min_p=0.3),
        Row(top_k=7),
        Row(top_p=0.8),
        Row(temperature=1.4, top_k=30, top_p=0.9, min_p=0.02),
        Row(
            prompt=[1, 2, 3] * 300,
            answer=[4, 5, 5, 5, 6, 1],
            repetition=1.3,
            frequency=0.2,
            presence=0.4,
            bias={7: 1.5, 8: -2.0},
            banned=[9],
            top_p=0.97,
        ),
    ],
    ids=lambda row: f"T{row.temperature} k{row.top_k} p{row.top_p} m{row.min_p}",
)
def test_tokens_are_drawn_as_often_as_their_probability(row: Row):
    num_draws = 20_000
    logits_v = np.random.default_rng(5).normal(0, 1.5, VOCAB)
    counts_v = np.bincount(draw_many(logits_v, row, num_draws), minlength=len(logits_v))
    expected_v = probabilities(logits_v.astype(np.float32), row) * num_draws
    assert counts_v[expected_v == 0].sum() == 0
    # Pearson's chi-square over the tokens expected five times or more, the rest pooled.
    often = expected_v >= 5
    observed = np.append(counts_v[often], counts_v[~often].sum())
    expected = np.append(expected_v[often], max(expected_v[~often].sum(), 1e-9))
    freedom = len(expected) - 1
    chi_square = np.sum((observed - expected) ** 2 / expected)
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def random_rows(rng: np.random.Generator, num_rows: int, vocab_size: int) -> list[Row]:
    """Every option on or off at random; every fourth row is greedy."""

    def maybe(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    def ids(most: int) -> list[int]:
        return rng.integers(0, vocab_size, rng.integers(1, most)).tolist()

    return [
        Row(
            temperature=0.0 if i % 4 == 0 else float(rng.uniform(0.2, 2.0)),
            top_k=maybe(int(rng.integers(1, 100)), 0),
            top_p=maybe(float(rng.uniform(0.1, 1.0)), 1.0),
            min_p=maybe(float(rng.uniform(0.0, 0.2)), 0.0),
            presence=maybe(float(rng.uniform(-2, 2)), 0.0),
            frequency=maybe(float(rng.uniform(-2, 2)), 0.0),
            repetition=maybe(float(rng.uniform(0.5, 2)), 1.0),
            seed=int(rng.integers(0, 2**63)),
            position=int(rng.integers(0, 1000)),
            prompt=ids(800),
            answer=ids(400),
            min_tokens=maybe(500, 0),
            stop_ids=ids(16),
            bias=maybe(dict(zip(ids(8), rng.uniform(-5, 5, 8).tolist(), strict=False)), {}),
            allowed=maybe(ids(vocab_size), None) if i % 3 == 0 else None,
            banned=maybe(ids(20), []),
            bad=maybe([ids(3) or [0] for _ in range(4)], []),
        )
        for i in range(num_rows)
    ]


def test_every_mix_of_options_draws_from_the_oracle_distribution():
    rng = np.random.default_rng(11)
    rows = random_rows(rng, 64, VOCAB)
    logits_rv = rng.normal(0, 3, (64, VOCAB)).astype(np.float32)
    drawn_r = draw(logits_rv, rows)
    for row, logits_v, token in zip(rows, logits_rv, drawn_r, strict=True):
        if row.temperature == 0:
            assert token == np.argmax(edited_logits(logits_v, row)), row
        else:
            assert probabilities(logits_v, row)[token] > 0, row


@pytest.mark.parametrize(
    ("vocab_size", "sizes"), [(VOCAB, (1, 3, 24, 512)), (32_000, (1, 8))], ids=["small", "large"]
)
def test_a_seeded_token_is_the_same_alone_and_in_any_batch(vocab_size: int, sizes: tuple[int, ...]):
    rng = np.random.default_rng(vocab_size)
    rows = random_rows(rng, 64, vocab_size)
    logits_rv = rng.normal(0, 2, (64, vocab_size)).astype(np.float32)
    together = draw(logits_rv, rows)
    for num_rows in sizes:
        some = rng.permutation(64)[:num_rows]
        for _ in range(8 if num_rows == 1 else 1):
            apart = draw(logits_rv[some], [rows[i] for i in some], num_rows)
            assert np.array_equal(apart, together[some]), num_rows
            some = (some + 1) % 64


def test_a_sample_depends_on_no_slot():
    rng = np.random.default_rng(4)
    rows = random_rows(rng, 64, VOCAB)
    logits_rv = rng.normal(0, 2, (64, VOCAB)).astype(np.float32)
    slots = rng.permutation(80)[:64].tolist()
    drawn_r = run(jnp.asarray(logits_rv), make_batch(rows, VOCAB, slots))
    assert np.array_equal(drawn_r, draw(logits_rv, rows))


def test_weights_of_a_row_have_the_same_running_sums_in_any_batch():
    """Bit for bit: a different order of addition would show in one draw of a million."""
    logits_rv = np.random.default_rng(3).normal(0, 2, (64, 32_000)).astype(np.float32)

    def masses(logits_rv: jax.Array) -> jax.Array:
        weights_rv = sampling._weights(logits_rv, jnp.ones(len(logits_rv), jnp.float32))
        return jnp.sum(sampling._blocks(weights_rv, 0.0), axis=-1)

    together = np.asarray(jax.jit(masses)(jnp.asarray(logits_rv)))
    for num_rows in (1, 2, 7, 32):
        apart = np.asarray(jax.jit(masses)(jnp.asarray(logits_rv[-num_rows:])))
        assert np.array_equal(apart, together[-num_rows:])


def test_seeds_and_positions_decide_the_sample():
    logits_v = np.zeros(VOCAB)
    rows = [Row(seed=s, position=p) for s in (0, 1, 2**32, 2**63, -1 % 2**64) for p in range(8)]
    drawn_r = draw(np.tile(logits_v, (len(rows), 1)), rows)
    assert len(set(drawn_r.tolist())) > 30
    assert np.array_equal(drawn_r, draw(np.tile(logits_v, (len(rows), 1)), rows))


def test_a_bad_sequence_is_never_completed_but_its_tokens_come_otherwise():
    logits_v = logits_of({3: 20.0, 9: 20.0}, 0.0)
    row = Row(prompt=[1, 6], answer=[5, 6], bad=[[5, 6, 3], [7, 9], [6, 6, 9]])
    assert set(draw_many(logits_v, row, 500).tolist()) == {9}
    others = ([5, 5], [6], [], [6, 5, 4])
    for answer in others:  # [6] with the prompt's 6 before it: a prompt begins nothing
        free = draw_many(logits_v, replace(row, answer=answer), 500)
        assert set(free.tolist()) == {3, 9}, answer
    drawn = draw_many(logits_v, replace(row, answer=[7], bad=[[7, 9], [3]]), 500)
    assert not {3, 9} & set(drawn.tolist())


def test_min_tokens_holds_stop_ids_back_until_it_is_reached():
    logits_v = logits_of({3: 20.0, 9: 20.0}, 0.0)
    row = Row(prompt=[1, 2], answer=[5, 6], min_tokens=3, stop_ids=[3, 9, 210])
    held = draw_many(logits_v, row, 500)
    assert not {3, 9, 210} & set(held.tolist())
    assert {3, 9} == set(draw_many(logits_v, replace(row, answer=[5, 6, 7]), 500).tolist())
    greedy = [replace(row, temperature=0.0, answer=[5, 6, 7, 8][:n]) for n in (2, 3, 4)]
    assert draw(np.tile(logits_v, (3, 1)), greedy).tolist() == [0, 3, 3]


def test_only_allowed_tokens_and_no_banned_ones_come_out():
    logits_v = np.random.default_rng(0).normal(0, 5, VOCAB)
    row = Row(temperature=5.0, allowed=[0, 31, 32, 63, 64, 210], banned=[31, 5])
    assert set(draw_many(logits_v, row, 2000).tolist()) == {0, 32, 63, 64, 210}
    assert 210 not in draw_many(logits_v, Row(temperature=50.0, banned=[210]), 5000)


def test_bias_pushes_tokens_in_and_out():
    logits_v = np.zeros(VOCAB)
    assert set(draw_many(logits_v, Row(bias={210: 100.0}), 200).tolist()) == {210}
    assert 0 not in draw_many(logits_v, Row(bias={0: -100.0}), 5000)
    assert draw(logits_v[None, :], [Row(temperature=0.0, bias={17: 0.5, 3: 0.25})]) == [17]


def test_a_row_that_forbids_everything_is_sampled_as_if_it_forbade_nothing():
    logits_v = np.random.default_rng(1).normal(0, 1, VOCAB)
    row = Row(allowed=[4], banned=[4])
    assert draw(logits_v[None, :], [replace(row, temperature=0.0)]) == [np.argmax(logits_v)]
    free = draw_many(logits_v, Row(), 300)
    assert np.array_equal(draw_many(logits_v, row, 300), free)


def test_top_k_of_one_is_greedy_and_ties_at_the_kth_are_all_kept():
    logits_v = logits_of({0: 1.0, 1: 5.0, 2: 5.0, 3: 3.0, 4: 3.0, 5: 3.0}, 0.0)
    assert set(draw_many(logits_v, Row(top_k=1), 100).tolist()) == {1}
    assert set(draw_many(logits_v, Row(top_k=3), 1000).tolist()) == {1, 2, 3, 4, 5}
    assert set(draw_many(logits_v, Row(top_p=0.1), 1000).tolist()) == {1, 2}


def test_tokens_a_hair_less_likely_are_told_apart():
    logits_v = (1.0 + np.arange(VOCAB) * 2e-6).astype(np.float32)
    drawn = set(draw_many(logits_v, Row(top_k=5), 500).tolist())
    assert drawn == {206, 207, 208, 209, 210}
    drawn = set(draw_many(logits_v, Row(top_p=9.5 / VOCAB), 500).tolist())
    assert drawn == set(range(201, 211))


def test_extreme_logits_give_possible_tokens():
    big = logits_of({1: 1e30, 4: 1e30}, -1e30)
    infinite = logits_of({3: -50.0}, -np.inf)
    plus_infinite = logits_of({2: np.inf}, 0.0)
    some_nan = logits_of({4: -1e30}, np.nan)
    for row in (Row(), Row(top_p=0.5), Row(top_k=2, min_p=0.1), Row(temperature=1e-4)):
        assert set(draw_many(big, row, 50).tolist()) == {1, 4}, row
        assert set(draw_many(infinite, row, 20).tolist()) == {3}, row
        assert set(draw_many(plus_infinite, row, 20).tolist()) == {2}, row
        assert set(draw_many(some_nan, row, 20).tolist()) == {4}, row
    greedy = [Row(temperature=0.0)] * 4
    logits_rv = np.stack([big, infinite, plus_infinite, some_nan])
    assert draw(logits_rv, greedy).tolist() == [1, 3, 2, 4]


@pytest.mark.parametrize("vocab_size", [3, 128])
def test_tiny_vocabularies_work_with_every_option(vocab_size: int):
    rows = [
        Row(position=i, top_p=0.9, top_k=2, min_p=0.1, repetition=1.2, bias={1: 1.0})
        for i in range(64)
    ]
    logits_v = np.random.default_rng(6).normal(0, 1, vocab_size)
    possible = np.flatnonzero(probabilities(logits_v, rows[0]))
    drawn_r = draw(np.tile(logits_v, (64, 1)), rows)
    assert set(drawn_r.tolist()) == set(possible.tolist())


def test_hopeless_rows_still_give_a_valid_id():
    logits_rv = np.stack([np.full(VOCAB, value) for value in (np.nan, -np.inf, np.inf)])
    for row in (Row(), Row(temperature=0.0), Row(top_p=0.5, top_k=3, min_p=0.5)):
        drawn_r = draw(logits_rv, [replace(row, repetition=1.2, banned=[2])] * 3)
        assert np.all((drawn_r >= 0) & (drawn_r < VOCAB)), row


def test_equal_logits_give_the_lowest_id_when_greedy_and_every_id_at_random():
    equal = np.full(VOCAB, 2.5)
    late = logits_of({130: 1.0, 131: 1.0, 200: 1.0}, 0.0)
    drawn_r = draw(np.stack([equal, late]), [Row(temperature=0.0)] * 2)
    assert drawn_r.tolist() == [0, 130]
    assert len(set(draw_many(equal, Row(top_p=0.5), 4000).tolist())) == VOCAB


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_the_ends_of_the_unit_interval_hit_the_first_and_last_kept_token(
    uniform: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        sampling, "_uniform", lambda batch: jnp.full(batch.slot.shape, uniform, jnp.float32)
    )
    rng = np.random.default_rng(8)
    logits_rv = rng.normal(0, 4, (32, 3001)).astype(np.float32)
    logits_rv[:, 2000:] = -np.inf
    rows = [Row(top_p=float(rng.uniform(0.2, 0.99))) for _ in range(32)]
    batch = make_batch(rows, 3001)
    drawn_r = np.asarray(jax.jit(lambda x, b: sample(x, b))(jnp.asarray(logits_rv), batch))
    for row, logits_v, token in zip(rows, logits_rv, drawn_r, strict=True):
        kept = np.flatnonzero(kept_tokens(logits_v, row))
        assert token == (kept[0] if uniform == 0 else kept[-1])


def test_rows_whose_token_nobody_wants_change_nothing():
    rng = np.random.default_rng(21)
    rows = random_rows(rng, 16, VOCAB)
    logits_rv = rng.normal(0, 2, (16, VOCAB)).astype(np.float32)
    together = draw(logits_rv, rows)
    mixed = [replace(row, active=i % 2 == 0) for i, row in enumerate(rows)]
    logits_rv[1::2] = np.nan
    some = draw(logits_rv, mixed)
    assert np.array_equal(some[::2], together[::2])
    assert np.all((some >= 0) & (some < VOCAB))


def test_one_shape_traces_once_whatever_its_rows_ask_for():
    traces = []

    @jax.jit
    def counted(logits_rv: jax.Array, batch: sampling.SamplingBatch) -> jax.Array:
        traces.append(logits_rv.shape)
        return sample(logits_rv, batch)

    rng = np.random.default_rng(2)
    logits_rv = jnp.asarray(rng.normal(0, 2, (4, VOCAB)), jnp.float32)
    for rows in ([Row(temperature=0.0)] * 4, [Row(top_p=0.5)] * 4, random_rows(rng, 4, VOCAB)):
        counted(logits_rv, make_batch(rows, VOCAB))
    assert traces == [(4, VOCAB)]


def test_logits_that_lie_across_devices_give_the_same_tokens():
    mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    by_vocab = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    rng = np.random.default_rng(31)
    rows = random_rows(rng, 64, 512)
    logits_rv = rng.normal(0, 2, (64, 512)).astype(np.float32)
    across = run(jax.device_put(logits_rv, by_vocab), make_batch(rows, 512))
    assert np.array_equal(across, draw(logits_rv, rows))
