"""Causal attention of one sequence without a cache: what models are tested with by themselves."""

import jax
import jax.numpy as jnp

from jaxserve.models.config import DecoderConfig


def dense_attend(config: DecoderConfig):
    """An `attend` for one sequence that is computed as a whole; the cache is not used."""

    def attend(cache, layer_index, q_tqh, k_tkh, v_tkh):
        layer = config.layers[layer_index]
        if layer.latent is not None:
            v_tkh = k_tkh[..., : layer.latent.rank]
        q, k, v = (x.astype(jnp.float32) for x in (q_tqh, k_tkh, v_tkh))
        group = layer.num_heads // layer.num_kv_heads
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("tqh,sqh->qts", q, k) * jnp.float32(layer.scale)
        if layer.logit_soft_cap is not None:
            cap = jnp.float32(layer.logit_soft_cap)
            scores = jnp.tanh(scores / cap) * cap
        t = jnp.arange(q.shape[0])
        distance = t[:, None] - t[None, :]
        visible = distance >= 0
        if layer.window is not None:
            visible &= distance < layer.window
        scores = jnp.where(visible[None], scores, -jnp.inf)
        out = jnp.einsum("qts,sqh->tqh", jax.nn.softmax(scores, axis=-1), v)
        return out.astype(q_tqh.dtype), cache

    return attend
