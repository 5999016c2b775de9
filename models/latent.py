"""Multi-head latent attention (DeepSeek-V2, 2024), in its absorbed form.

A token leaves one vector behind: a normalised latent, from which each head could make its key and
value, and a rotated part that all heads share. Instead of making keys, queries are brought into the
latent's space (`k_up`), and so is undone afterwards what attention yields there (`v_up`): heads
differ in their queries alone, and nothing but latents is ever kept or read.

Knows nothing of pages. The widths are those of `LatentSpec`: C the latent, R the rotated part.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxserve.models import layers as nn
from jaxserve.models.config import LatentSpec, LayerSpec, NormSpec
from jaxserve.models.spec import Params, ParamSpec
from jaxserve.sharding import Axis

_NORM = NormSpec(1e-6)
"""Of latents: what models of this kind were trained with, whatever their config's epsilon."""

VectorAxes = dict[str, tuple[tuple[Axis, ...], str]]


def matrix_specs(layer: LayerSpec, spec: LatentSpec, embed: Axis) -> Params:
    """The matrices of one layer's attention."""
    rank = Axis("latent", spec.rank)
    heads = Axis("q_heads", layer.num_heads)
    queries = Axis("q_heads", layer.num_heads, spec.query_dim)
    specs: Params = {
        "kv_a": ParamSpec((Axis("latent", spec.rank + spec.rope_dim), embed)),
        "k_up": ParamSpec((heads, Axis("head_dim", spec.nope_dim), rank)),
        "v_up": ParamSpec((heads, Axis("head_dim", spec.value_dim), rank)),
        "o": ParamSpec((embed, Axis("q_heads", layer.num_heads, spec.value_dim))),
    }
    if spec.query_rank is None:
        return specs | {"q": ParamSpec((queries, embed))}
    squeezed = Axis("latent", spec.query_rank)
    return specs | {"q_a": ParamSpec((squeezed, embed)), "q_b": ParamSpec((queries, squeezed))}


def vector_axes(spec: LatentSpec) -> VectorAxes:
    """Axes and init of the one-dimensional weights of one layer's attention."""
    out: VectorAxes = {"kv_a_norm": ((Axis("latent", spec.rank),), "ones")}
    if spec.has_bias:
        out["kv_a_bias"] = ((Axis("latent", spec.rank + spec.rope_dim),), "zeros")
    if spec.query_rank is not None:
        out["q_a_norm"] = ((Axis("latent", spec.query_rank),), "ones")
        if spec.has_bias:
            out["q_a_bias"] = ((Axis("latent", spec.query_rank),), "zeros")
    return out


def queries_and_latents(
    w: Params,
    x_td: Float[Array, "T D"],
    table_t2r: Array | None,
    layer: LayerSpec,
    kernels: nn.Kernels,
) -> tuple[Float[Array, "T Q C+R"], Float[Array, "T 1 C+R"]]:
    """What attends, and what is kept of each token."""
    spec = layer.latent
    assert spec is not None
    num_tokens = x_td.shape[0]
    if spec.query_rank is None:
        q, kv = nn.linears(
            x_td, (w["q"], w["kv_a"]), (None, w.get("kv_a_bias")), products=kernels.products
        )
    else:
        biases = (w.get("q_a_bias"), w.get("kv_a_bias"))
        q_a, kv = nn.linears(x_td, (w["q_a"], w["kv_a"]), biases, products=kernels.products)
        q_a = nn.norm(q_a, w["q_a_norm"], _NORM)
        (q,) = nn.linears(q_a, (w["q_b"],), (None,), products=kernels.products)
    q_tqh = q.reshape(num_tokens, layer.num_heads, spec.query_dim)
    nope_tqn, rope_tqr = q_tqh[..., : spec.nope_dim], q_tqh[..., spec.nope_dim :]
    latent_tc = nn.norm(kv[:, : spec.rank], w["kv_a_norm"], _NORM)
    shared_t1r = kv[:, None, spec.rank :]
    if layer.rope is not None and table_t2r is not None:
        rope_tqr, shared_t1r = kernels.rotate((rope_tqr, shared_t1r), table_t2r, layer.rope)
    absorbed_tqc = jnp.einsum("tqn,qnc->tqc", nope_tqn, w["k_up"])
    return (
        jnp.concatenate([absorbed_tqc, rope_tqr], axis=-1),
        jnp.concatenate([latent_tc[:, None], shared_t1r], axis=-1),
    )


def values(w: Params, o_tqc: Float[Array, "T Q C"]) -> Float[Array, "T Q V"]:
    """From weighted latents to the values that the heads make of them."""
    return jnp.einsum("tqc,qvc->tqv", o_tqc, w["v_up"])
