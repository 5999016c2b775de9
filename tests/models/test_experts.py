"""Mixtures of experts: who is chosen, with which weight, and that nothing else is computed."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.mixtures import build_experts
from jaxserve.models import experts
from jaxserve.models import layers as nn
from jaxserve.models.config import ExpertsSpec
from jaxserve.models.spec import init_params
from jaxserve.pallas_kernels.grouped_matmul.api import get_grouped_matmul
from jaxserve.pallas_kernels.paged_attention.api import Machine
from jaxserve.sharding import Axis, make_mesh

LOGITS = jnp.asarray([[0.0, 3.0, 1.0, 2.0, -1.0, 2.5], [4.0, 0.5, 0.0, 3.5, 3.0, -2.0]])


def route(logits=LOGITS, bias=None, **facts) -> SimpleNamespace:
    spec = ExpertsSpec(num_experts=logits.shape[1], intermediate_size=8, **facts)
    found = experts.route(logits, spec, bias)
    return SimpleNamespace(expert=np.asarray(found.expert_tk), weight=np.asarray(found.weight_tk))


def test_softmax_over_all_equals_softmax_over_the_chosen_if_renormalised():
    found = route(top_k=2)
    np.testing.assert_array_equal(found.expert, [[1, 5], [0, 3]])
    chosen = np.take_along_axis(np.asarray(LOGITS), found.expert, axis=1)
    wanted = np.exp(chosen) / np.exp(chosen).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.weight, wanted, rtol=1e-6)


def test_weights_that_are_not_renormalised_leave_room_for_the_others():
    found = route(top_k=2, renormalise=False, weight_scale=2.0)
    probability = np.asarray(jax.nn.softmax(LOGITS, axis=-1))
    wanted = 2 * np.take_along_axis(probability, found.expert, axis=1)
    np.testing.assert_allclose(found.weight, wanted, rtol=1e-6)


def test_choice_bias_decides_who_is_chosen_and_not_with_which_weight():
    bias = jnp.asarray([0.0, -9.0, 0.0, 0.0, 9.0, 0.0])
    found = route(top_k=2, scoring="sigmoid", has_choice_bias=True, renormalise=False, bias=bias)
    np.testing.assert_array_equal(found.expert, [[4, 5], [4, 0]])
    score = 1 / (1 + np.exp(-np.asarray(LOGITS)))
    np.testing.assert_allclose(
        found.weight, np.take_along_axis(score, found.expert, axis=1), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("group_score", "wanted"),
    [
        ("max", [[1, 0], [0, 1]]),  # the best groups are those of the best experts
        ("top2", [[5, 4], [3, 2]]),  # those of the best pair
    ],
)
def test_experts_outside_the_best_group_are_not_chosen(group_score, wanted):
    logits = jnp.asarray([[0.0, 3.0, 1.0, 2.0, 2.4, 2.5], [4.0, 0.5, 3.0, 3.5, -1.0, -2.0]])
    groups = {"num_groups": 3, "top_groups": 1, "group_score": group_score}
    found = route(logits, top_k=2, scoring="sigmoid", **groups)
    np.testing.assert_array_equal(found.expert, wanted)


def make(spec: ExpertsSpec, hidden: int = 16):
    weights = init_params(experts.matrix_specs(spec, Axis("embed", hidden)), jax.random.key(0))
    x_td = jax.random.normal(jax.random.key(1), (7, hidden))
    return weights, x_td


def by_hand(w, x_td: jax.Array, routing) -> np.ndarray:
    """Token by token, expert by expert, in float64."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    out_td = np.zeros(x_td.shape)
    for token, x_d in enumerate(np.asarray(x_td, np.float64)):
        for e, weight in zip(routing.expert_tk[token], routing.weight_tk[token], strict=True):
            gate, up = w["experts_gate"][e] @ x_d, w["experts_up"][e] @ x_d
            h_f = gate / (1 + np.exp(-gate)) * up
            out_td[token] += float(weight) * (w["experts_down"][e] @ h_f)
    return out_td


SPEC = ExpertsSpec(num_experts=6, top_k=2, intermediate_size=24)


@pytest.mark.parametrize("devices", [None, 2, 4])
def test_mixture_is_the_weighted_sum_of_the_chosen_experts(devices):
    w, x_td = make(SPEC)
    (logits_te,) = nn.products(x_td, (w["router"],), jnp.dtype(jnp.float32))
    wanted_td = by_hand(w, x_td, experts.route(logits_te, SPEC))
    mesh = None if devices is None else make_mesh(devices)
    chosen = build_experts(get_grouped_matmul(Machine("cpu")), mesh)
    for kernels in (nn.XLA, nn.XLA._replace(experts=chosen)):
        out_td = jax.jit(lambda w, x: experts.mixture(w, x, SPEC, "silu", kernels))(w, x_td)  # noqa: B023
        np.testing.assert_allclose(out_td, wanted_td, rtol=1e-5, atol=1e-5)


def test_padding_tokens_reach_no_expert_and_change_no_other_token():
    w, x_td = make(SPEC)
    seen = []

    def watched(x_md, sizes_e, *args):
        seen.append(sizes_e)
        return nn.experts(x_md, sizes_e, *args)

    kernels = nn.XLA._replace(experts=watched)
    whole_td = experts.mixture(w, x_td, SPEC, "silu", kernels)
    x_td = x_td.at[4:].set(50.0)
    part_td = experts.mixture(w, x_td, SPEC, "silu", kernels, jnp.int32(4))
    assert [int(sizes.sum()) for sizes in seen] == [14, 8]
    np.testing.assert_allclose(part_td[:4], whole_td[:4], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(part_td[4:], 0.0)


def test_shared_expert_is_added_with_its_switch():
    spec = ExpertsSpec(4, 1, 8, shared_size=12, shared_gate=True)
    w, x_td = make(spec)
    shared = nn.gated(x_td, w["shared_up"], w["shared_gate"], "silu", nn.products)
    switch_t1 = jax.nn.sigmoid(x_td @ w["shared_switch"].T)
    wanted_td = experts.mixture(w, x_td, ExpertsSpec(4, 1, 8), "silu", nn.XLA) + switch_t1 * (
        shared @ w["shared_down"].T
    )
    out_td = experts.mixture(w, x_td, spec, "silu", nn.XLA)
    np.testing.assert_allclose(out_td, wanted_td, rtol=1e-5, atol=1e-5)
