"""A mixture of experts in the place of an MLP: each token goes through the few that a router picks.

Tokens are sorted by expert, so that each expert meets its own as one run of rows; what becomes of
the runs is the business of `Kernels.experts`. Knows nothing of meshes or of how products are done.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.models import layers as nn
from jaxserve.models.config import ExpertsSpec
from jaxserve.models.spec import Params, ParamSpec
from jaxserve.sharding import Axis


def matrix_specs(spec: ExpertsSpec, embed: Axis) -> Params:
    """The weights of one layer's mixture."""
    experts, mlp = Axis("experts", spec.num_experts), Axis("mlp", spec.intermediate_size)
    specs: Params = {
        "router": ParamSpec((experts, embed)),
        "experts_gate": ParamSpec((experts, mlp, embed)),
        "experts_up": ParamSpec((experts, mlp, embed)),
        "experts_down": ParamSpec((experts, embed, mlp)),
    }
    if spec.has_choice_bias:
        specs["choice_bias"] = ParamSpec((experts,), "zeros", dtype="float32")
    if spec.shared_size is not None:
        shared = Axis("mlp", spec.shared_size)
        specs["shared_gate"] = ParamSpec((shared, embed))
        specs["shared_up"] = ParamSpec((shared, embed))
        specs["shared_down"] = ParamSpec((embed, shared))
        if spec.shared_gate:
            specs["shared_switch"] = ParamSpec((Axis("experts", 1), embed))
    return specs


class Routing(NamedTuple):
    """Where each token goes."""

    expert_tk: Int[Array, "T k"]
    weight_tk: Float[Array, "T k"]  # float32


def route(
    logits_te: Float[Array, "T E"], spec: ExpertsSpec, choice_bias_e: Array | None = None
) -> Routing:
    """Choose and weigh the experts of each token, from float32 logits of the router."""
    if spec.scoring == "sigmoid":
        score_te = jax.nn.sigmoid(logits_te)
    else:
        score_te = jax.nn.softmax(logits_te, axis=-1)
    choice_te = score_te
    if choice_bias_e is not None:
        choice_te = choice_te + choice_bias_e.astype(jnp.float32)[None, :]
    if spec.num_groups > 1:
        choice_te = _best_groups(choice_te, spec)
    _, expert_tk = lax.top_k(choice_te, spec.top_k)
    weight_tk = jnp.take_along_axis(score_te, expert_tk, axis=-1)
    if spec.renormalise:
        weight_tk /= weight_tk.sum(axis=-1, keepdims=True) + jnp.float32(1e-20)
    return Routing(expert_tk, weight_tk * jnp.float32(spec.weight_scale))


def _best_groups(choice_te: Array, spec: ExpertsSpec) -> Array:
    """-inf outside the best groups of experts."""
    num_tokens, num_experts = choice_te.shape
    choice_tgx = choice_te.reshape(num_tokens, spec.num_groups, -1)
    if spec.group_score == "top2":
        group_tg = lax.top_k(choice_tgx, 2)[0].sum(axis=-1)
    else:
        group_tg = choice_tgx.max(axis=-1)
    _, best_tb = lax.top_k(group_tg, spec.top_groups)
    kept_tg = (best_tb[:, :, None] == jnp.arange(spec.num_groups)[None, None, :]).any(axis=1)
    return jnp.where(kept_tg[:, :, None], choice_tgx, -jnp.inf).reshape(num_tokens, num_experts)


def mixture(
    w: Params,
    x_td: Float[Array, "T D"],
    spec: ExpertsSpec,
    activation: str,
    kernels: nn.Kernels,
    num_tokens: Array | None = None,
) -> Float[Array, "T D"]:
    """The mixture's output for each token.

    Args:
        num_tokens: only the first so many are real; others cost nothing and yield zeros, but for
            the shared expert.
    """
    (logits_te,) = kernels.products(x_td, (w["router"],), jnp.dtype(jnp.float32))
    routing = route(logits_te, spec, w.get("choice_bias"))
    y_td = _through_experts(w, x_td, routing, spec, activation, kernels, num_tokens)
    if spec.shared_size is None:
        return y_td
    h_tf = kernels.gated(x_td, w["shared_up"], w["shared_gate"], activation, kernels.products)
    (shared_td,) = kernels.products(h_tf, (w["shared_down"],), x_td.dtype)
    if spec.shared_gate:
        (switch_t1,) = kernels.products(x_td, (w["shared_switch"],), jnp.dtype(jnp.float32))
        shared_td *= jax.nn.sigmoid(switch_t1).astype(shared_td.dtype)
    return y_td + shared_td


def _through_experts(
    w: Params,
    x_td: Array,
    routing: Routing,
    spec: ExpertsSpec,
    activation: str,
    kernels: nn.Kernels,
    num_tokens: Array | None,
) -> Array:
    """Rows sorted by expert, through their experts, and back to their tokens with their weights."""
    expert_m = routing.expert_tk.reshape(-1)
    if num_tokens is not None:
        token_m = jnp.arange(expert_m.shape[0], dtype=jnp.int32) // spec.top_k
        expert_m = jnp.where(token_m < num_tokens, expert_m, spec.num_experts)
    order_m = jnp.argsort(expert_m, stable=True).astype(jnp.int32)
    sizes_e = jnp.zeros(spec.num_experts, jnp.int32).at[expert_m].add(1, mode="drop")
    rows_md = x_td[order_m // spec.top_k]
    weights = (w["experts_up"], w["experts_gate"], w["experts_down"])
    y_md = kernels.experts(rows_md, sizes_e, *weights, activation)
    place_m = (
        jnp.zeros_like(order_m)
        .at[order_m]
        .set(jnp.arange(order_m.shape[0], dtype=jnp.int32), unique_indices=True)
    )
    y_tkd = y_md[place_m].reshape(-1, spec.top_k, y_md.shape[-1])
    y_td = jnp.einsum("tkd,tk->td", y_tkd.astype(jnp.float32), routing.weight_tk)
    return y_td.astype(x_td.dtype)
