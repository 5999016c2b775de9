"""What XLA makes of norms and rotations between the products: is there anything left to fuse?

The pieces of Llama-3.1-8B and Qwen3-8B, as the decoder calls them. A launch that reads everything
once and writes it once leaves nothing; the lines say how many launches there are.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models import layers as nn
from jaxserve.models.config import NormSpec, RopeSpec
from tests.aot.jobs import Job

HIDDEN, NUM_Q, NUM_KV, HEAD_DIM = 4096, 32, 8, 128
ROPE = RopeSpec(tuple(5e5 ** (-i / 64) for i in range(HEAD_DIM // 2)))
NORM = NormSpec(1e-6)


def fusion_jobs(target: str) -> Iterator[Job]:
    """Norms and rotations, on GPU: the compilers of others do not say how much they launch."""
    if target != "h200":
        return
    for num_tokens in (64, 4096):

        def array(*shape: int, dtype: Any = jnp.bfloat16, num_tokens: int = num_tokens) -> Any:
            return jax.ShapeDtypeStruct((num_tokens, *shape), dtype)

        x_td, weight_d = array(HIDDEN), jax.ShapeDtypeStruct((HIDDEN,), jnp.bfloat16)
        q_tqh, k_tkh = array(NUM_Q, HEAD_DIM), array(NUM_KV, HEAD_DIM)
        table = array(2, HEAD_DIM // 2, dtype=jnp.float32)
        head_h = jax.ShapeDtypeStruct((HEAD_DIM,), jnp.bfloat16)
        yield _job("residual and norm", num_tokens, _residual_and_norm, x_td, x_td, weight_d)
        yield _job("rotation", num_tokens, _rotation, q_tqh, k_tkh, table)
        args = (q_tqh, k_tkh, head_h, head_h, table)
        yield _job("norm of heads and rotation", num_tokens, _norms_and_rotation, *args)


def _residual_and_norm(x_td: Any, y_td: Any, weight_d: Any) -> Any:
    h_td = x_td + y_td
    return h_td, nn.norm(h_td, weight_d, NORM)


def _rotation(q_tqh: Any, k_tkh: Any, table_t2r: Any) -> Any:
    return nn.rotate((q_tqh, k_tkh), table_t2r, ROPE)


def _norms_and_rotation(q_tqh: Any, k_tkh: Any, q_norm_h: Any, k_norm_h: Any, table: Any) -> Any:
    q_tqh, k_tkh = nn.norm(q_tqh, q_norm_h, NORM), nn.norm(k_tkh, k_norm_h, NORM)
    return nn.rotate((q_tqh, k_tkh), table, ROPE)


def _job(name: str, num_tokens: int, function: Callable[..., Any], *args: Any) -> Job:
    inputs, outputs = jax.tree.leaves(args), jax.tree.leaves(jax.eval_shape(function, *args))
    sizes = [x.size * x.dtype.itemsize for x in (*inputs, *outputs)]
    return Job(
        name=f"{name} {num_tokens} tokens",
        backend="xla",
        function=function,
        args=args,
        # None here: nothing between the products may need as much memory again.
        pool=jax.ShapeDtypeStruct((8 * sum(sizes),), jnp.uint8),
        bytes_moved=sum(sizes),
        facts={"tokens": num_tokens},
    )
