"""One parametrised decoder: its weights, and its forward pass over a flat token axis.

Tokens of many sequences lie side by side on one axis T; what a token may see is the business of
the `attend` callable. Knows nothing of the KV cache, batches, meshes or checkpoints.

Parameters: {"embed", "final_norm", ...,
             "vectors": {name: [L, n]}, "layers": ({name: matrix}, ...)}
All one-dimensional weights of a kind are stacked over the layers (each leaf costs time in every
call); matrices are per layer, because slicing a stack copies them on CPU. So is what only some
layers have: everything of a mixture of experts.

Latent attention and mixtures of experts are in `latent` and `experts`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxserve.models import experts, latent
from jaxserve.models import layers as nn
from jaxserve.models.config import DecoderConfig, ExpertsSpec, LatentSpec, LayerSpec, NormSpec
from jaxserve.models.spec import Params, ParamSpec
from jaxserve.sharding import Axis

Cache = TypeVar("Cache")

Attend = Callable[[Cache, int, Array, Array, Array | None], tuple[Array, Cache]]
"""attend(cache, layer_index, q_tqh, k_tkh, v_tkh) -> (o_tqh, cache)

Of latent attention, `k_tkh` are the latents, there are no `v_tkh`, and the result is latent, too.
"""


def param_specs(config: DecoderConfig) -> Params:
    """Every weight of the decoder, each declared here and nowhere else."""
    embed = Axis("embed", config.hidden_size)
    specs: Params = {
        "embed": ParamSpec((Axis("vocab", config.vocab_size), embed)),
        "layers": tuple(_matrix_specs(config, layer) for layer in config.layers),
        "vectors": {
            name: ParamSpec((Axis("layers", config.num_layers), *axes), init)
            for name, (axes, init) in _vector_axes(config).items()
        },
    }
    if config.final_norm.has_weight:
        specs["final_norm"] = ParamSpec((embed,), _weight_init(config.final_norm))
    if config.final_norm.has_bias:
        specs["final_norm_bias"] = ParamSpec((embed,), "zeros")
    if not config.tie_word_embeddings:
        specs["head"] = ParamSpec((Axis("vocab", config.vocab_size), embed))
    if config.head_bias:
        specs["head_bias"] = ParamSpec((Axis("vocab", config.vocab_size),), "zeros")
    return specs


def _matrix_specs(config: DecoderConfig, layer: LayerSpec) -> Params:
    embed, mlp = Axis("embed", config.hidden_size), Axis("mlp", config.intermediate_size)
    if layer.latent is not None:
        specs = latent.matrix_specs(layer, layer.latent, embed)
    else:
        q_heads = Axis("q_heads", layer.num_heads, layer.head_dim)
        kv_heads = Axis("kv_heads", layer.num_kv_heads, layer.head_dim)
        specs = {
            "q": ParamSpec((q_heads, embed)),
            "k": ParamSpec((kv_heads, embed)),
            "v": ParamSpec((kv_heads, embed)),
            "o": ParamSpec((embed, q_heads)),
        }
    if layer.experts is not None:
        return specs | experts.matrix_specs(layer.experts, embed)
    specs |= {"up": ParamSpec((mlp, embed)), "down": ParamSpec((embed, mlp))}
    if config.gated_mlp:
        specs["gate"] = ParamSpec((mlp, embed))
    return specs


def _vector_axes(config: DecoderConfig) -> dict[str, tuple[tuple[Axis, ...], str]]:
    """Axes (without the layer axis) and init of the weights that are stacked over layers."""
    layer = config.layers[0]
    embed, mlp = Axis("embed", config.hidden_size), Axis("mlp", config.intermediate_size)
    q_heads = Axis("q_heads", layer.num_heads, layer.head_dim)
    kv_heads = Axis("kv_heads", layer.num_kv_heads, layer.head_dim)
    out: dict[str, tuple[tuple[Axis, ...], str]] = {}

    def add_norm(name: str, spec: NormSpec, *axes: Axis) -> None:
        if spec.has_weight:
            out[name] = (axes, _weight_init(spec))
        if spec.has_bias:
            out[name + "_bias"] = (axes, "zeros")

    if config.pre_norm:
        add_norm("attn_norm", config.norm, embed)
        if not config.parallel:
            add_norm("mlp_norm", config.norm, embed)
    if config.post_norm:
        add_norm("post_attn_norm", config.norm, embed)
        add_norm("post_mlp_norm", config.norm, embed)
    if layer.latent is not None:
        out |= latent.vector_axes(layer.latent)
    if config.qk_norm is not None:
        one_head = Axis("head_dim", layer.head_dim)
        per_head = config.qk_norm_width == "head"
        add_norm("q_norm", config.qk_norm, one_head if per_head else q_heads)
        add_norm("k_norm", config.qk_norm, one_head if per_head else kv_heads)
    if config.qkv_bias:
        out |= {"q_bias": ((q_heads,), "zeros")}
        out |= {"k_bias": ((kv_heads,), "zeros"), "v_bias": ((kv_heads,), "zeros")}
    if config.o_bias:
        out["o_bias"] = ((embed,), "zeros")
    if config.mlp_bias:
        out |= {"up_bias": ((mlp,), "zeros"), "down_bias": ((embed,), "zeros")}
        if config.gated_mlp:
            out["gate_bias"] = ((mlp,), "zeros")
    return out


def _weight_init(spec: NormSpec) -> str:
    return "zeros" if spec.offset == 1.0 else "ones"


def forward(
    params: Params,
    config: DecoderConfig,
    tokens_t: Int[Array, " T"],
    positions_t: Int[Array, " T"],
    attend: Attend[Cache],
    cache: Cache,
    *,
    num_tokens: Array | None = None,
    kernels: nn.Kernels = nn.XLA,
) -> tuple[Float[Array, "T D"], Cache]:
    """Hidden states after the final norm, and the cache as `attend` left it.

    Only the first `num_tokens` are real, if that is given; for the others comes anything finite.
    `kernels` are pieces that the caller may know to do better than plain XLA.
    The loop is unrolled; the two halves of a layer are traced once per distinct layer spec.
    """
    x_td = nn.embed(params["embed"], tokens_t)
    if config.embedding_multiplier != 1.0:
        # In the compute dtype, as the models that do this were trained.
        x_td = x_td * jnp.asarray(config.embedding_multiplier, x_td.dtype)
    ropes = {layer.rope for layer in config.layers if layer.rope is not None}
    tables = {rope: nn.rotation(rope, positions_t) for rope in ropes}
    for i, layer in enumerate(config.layers):
        with jax.named_scope(f"layer{i}"):
            weights = params["layers"][i] | {
                name: lax.index_in_dim(stack, i, keepdims=False)
                for name, stack in params["vectors"].items()
            }
            table = None if layer.rope is None else tables[layer.rope]
            q_tqh, k_tkh, v_tkh = _before_attention(
                weights, x_td, positions_t, table, config=config, layer=layer, kernels=kernels
            )
            o_tqh, cache = attend(cache, i, q_tqh, k_tkh, v_tkh)
            x_td = _after_attention(
                weights,
                x_td,
                o_tqh,
                num_tokens,
                config=config,
                latent_spec=layer.latent,
                experts_spec=layer.experts,
                kernels=kernels,
            )
    x_td = nn.norm(x_td, params.get("final_norm"), config.final_norm, params.get("final_norm_bias"))
    return x_td, cache


def compute_logits(
    params: Params,
    config: DecoderConfig,
    hidden_td: Float[Array, "T D"],
    *,
    kernels: nn.Kernels = nn.XLA,
) -> Float[Array, "T V"]:
    """float32 logits of hidden states that `forward` returned."""
    head_vd = params["embed"] if config.tie_word_embeddings else params["head"]
    logits_tv = nn.logits(hidden_td, head_vd, products=kernels.products)
    if config.head_bias:
        logits_tv += params["head_bias"].astype(jnp.float32)[None, :]
    if config.logit_multiplier != 1.0:
        logits_tv *= jnp.float32(config.logit_multiplier)
    if config.final_logit_soft_cap is not None:
        logits_tv = nn.soft_cap(logits_tv, config.final_logit_soft_cap)
    return logits_tv


@partial(jax.jit, static_argnames=("config", "layer", "kernels"), inline=True)
def _before_attention(
    w: Params,
    x_td: Array,
    positions_t: Array,
    table_t2r: Array | None,
    *,
    config: DecoderConfig,
    layer: LayerSpec,
    kernels: nn.Kernels,
) -> tuple[Array, Array, Array | None]:
    """Queries, keys and values of one layer, normalised and rotated; or queries and latents."""
    x_td = _norm(w, "attn_norm", x_td, config.norm) if config.pre_norm else x_td
    if layer.latent is not None:
        q_tqh, k_t1h = latent.queries_and_latents(w, x_td, table_t2r, layer, kernels)
        if layer.query_scale is not None:
            q_tqh = nn.scale_queries(q_tqh, positions_t, layer.query_scale)
        return q_tqh, k_t1h, None
    q, k, v = _linears(w, ("q", "k", "v"), x_td, kernels.products)
    if not config.clip_after_norm:
        q, k, v = _clip((q, k, v), config)
    if config.qk_norm is not None and config.qk_norm_width == "full":
        q = _norm(w, "q_norm", q, config.qk_norm)
        k = _norm(w, "k_norm", k, config.qk_norm)
    if config.clip_after_norm:
        q, k, v = _clip((q, k, v), config)
    q_tqh = q.reshape(-1, layer.num_heads, layer.head_dim)
    k_tkh = k.reshape(-1, layer.num_kv_heads, layer.head_dim)
    v_tkh = v.reshape(-1, layer.num_kv_heads, layer.head_dim)
    norm_heads = config.qk_norm is not None and config.qk_norm_width != "full"
    if norm_heads and not config.qk_norm_after_rope:
        q_tqh, k_tkh = _norm_heads(w, q_tqh, k_tkh, config)
    if layer.rope is not None and table_t2r is not None:
        q_tqh, k_tkh = kernels.rotate((q_tqh, k_tkh), table_t2r, layer.rope)
    if norm_heads and config.qk_norm_after_rope:
        q_tqh, k_tkh = _norm_heads(w, q_tqh, k_tkh, config)
    if layer.query_scale is not None:
        q_tqh = nn.scale_queries(q_tqh, positions_t, layer.query_scale)
    return q_tqh, k_tkh, v_tkh


def _clip(xs: tuple[Array, ...], config: DecoderConfig) -> tuple[Array, ...]:
    clip = config.clip_qkv
    return xs if clip is None else tuple(jnp.clip(x, -clip, clip) for x in xs)


def _norm_heads(w: Params, q_tqh: Array, k_tkh: Array, config: DecoderConfig) -> Any:
    """Normalise each head on its own; the weight is shared by the heads or not."""
    assert config.qk_norm is not None
    out = []
    for name, x in (("q_norm", q_tqh), ("k_norm", k_tkh)):
        shape = x.shape[1:] if config.qk_norm_width == "heads" else x.shape[2:]
        weight, bias = (
            None if v is None else v.reshape(shape) for v in (w.get(name), w.get(name + "_bias"))
        )
        out.append(nn.norm(x, weight, config.qk_norm, bias))
    return out


@partial(jax.jit, static_argnames=("config", "latent_spec", "experts_spec", "kernels"), inline=True)
def _after_attention(
    w: Params,
    x_td: Array,
    o_tqh: Array,
    num_tokens: Array | None,
    *,
    config: DecoderConfig,
    latent_spec: LatentSpec | None,
    experts_spec: ExpertsSpec | None,
    kernels: nn.Kernels,
) -> Array:
    """The residual stream after output projection and MLP of one layer."""
    if latent_spec is not None:
        o_tqh = latent.values(w, o_tqh)
    (y_td,) = _linears(w, ("o",), o_tqh.reshape(o_tqh.shape[0], -1), kernels.products)
    if config.post_norm:
        y_td = _norm(w, "post_attn_norm", y_td, config.norm)
    h_td = _add(x_td, y_td, config)
    if config.parallel:
        m_td = _norm(w, "attn_norm", x_td, config.norm)
    else:
        m_td = _norm(w, "mlp_norm", h_td, config.norm) if config.pre_norm else h_td
    if experts_spec is not None:
        m_td = experts.mixture(w, m_td, experts_spec, config.activation, kernels, num_tokens)
    else:
        m_td = _mlp(w, m_td, config, kernels)
    if config.post_norm:
        m_td = _norm(w, "post_mlp_norm", m_td, config.norm)
    return _add(h_td, m_td, config)


def _mlp(w: Params, x_td: Array, config: DecoderConfig, kernels: nn.Kernels) -> Array:
    if config.gated_mlp and not config.mlp_bias:
        h_tf = kernels.gated(x_td, w["up"], w["gate"], config.activation, kernels.products)
    elif config.gated_mlp:
        h_tf, gate_tf = _linears(w, ("up", "gate"), x_td, kernels.products)
        h_tf = nn.activate(gate_tf, config.activation) * h_tf
    else:
        (h_tf,) = _linears(w, ("up",), x_td, kernels.products)
        h_tf = nn.activate(h_tf, config.activation)
    return _linears(w, ("down",), h_tf, kernels.products)[0]


def _linears(w: Params, names: tuple[str, ...], x_td: Array, products: nn.Products) -> list[Array]:
    """x @ w.T + bias for several weights that read the same input."""
    biases = tuple(w.get(name + "_bias") for name in names)
    return nn.linears(x_td, tuple(w[name] for name in names), biases, products=products)


def _add(x_td: Array, y_td: Array, config: DecoderConfig) -> Array:
    if config.residual_multiplier != 1.0:
        y_td = y_td * jnp.asarray(config.residual_multiplier, y_td.dtype)
    return x_td + y_td


def _norm(w: Params, name: str, x: Array, spec: NormSpec) -> Array:
    return nn.norm(x, w.get(name), spec, w.get(name + "_bias"))
