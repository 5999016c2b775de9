"""A whole step of DeepSeek-V2-Lite's shape on H200: latent pages and a mixture of experts.

The engine's own step, as `engine_step` compiles it for Llama-3.1-8B, with the first 4 of 27 layers:
the others are like the last of these. Nothing may copy the pool, nor the matrices of experts.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.batch import StateShape, create_state, packed_size
from jaxserve.kv.pool import KVPool, page_bytes, page_shape
from jaxserve.mixtures import build_experts
from jaxserve.models import layers as nn
from jaxserve.models.decoder import param_specs
from jaxserve.models.registry import read_config
from jaxserve.models.spec import abstract_params
from jaxserve.pallas_kernels.grouped_matmul.api import get_grouped_matmul
from jaxserve.pallas_kernels.paged_attention.api import Machine, get_backend
from jaxserve.pallas_kernels.paged_attention.reference import table_width
from jaxserve.plan import Bucket
from jaxserve.runner import StepProgram
from jaxserve.types import group_layers
from tests.aot.jobs import Job

MACHINE = Machine("gpu", "9.0")
POOL_BYTES = 512 << 20
"""Smaller than the matrices of one layer's experts, so that a copy of these is found, too."""

PAGE_SIZE = 64
NUM_SLOTS = 64
MAX_LEN = 8192

DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 4,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "v_head_dim": 128,
    "vocab_size": 102400,
}

BUCKETS = {"decode 64 rows": Bucket(64, 64, True)}


def latent_step_jobs(target: str) -> Iterator[Job]:
    """The steps, on H200."""
    if target != "h200":
        return
    config = read_config(DEEPSEEK_V2_LITE)
    groups = group_layers(config.layer_caches)
    shape = StateShape(
        num_slots=NUM_SLOTS,
        num_groups=len(groups),
        max_len=MAX_LEN,
        table_width=table_width(MAX_LEN, PAGE_SIZE),
        vocab_size=config.vocab_size,
        page_size=PAGE_SIZE,
    )
    dtype = jnp.dtype(jnp.bfloat16)
    num_pages = POOL_BYTES // page_bytes(groups[0], PAGE_SIZE, dtype)
    pages: Any = jax.ShapeDtypeStruct((num_pages, *page_shape(groups[0], PAGE_SIZE)), dtype)
    pool = KVPool((pages,))
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    state = jax.eval_shape(lambda: create_state(shape, cpu))
    params = abstract_params(param_specs(config), dtype)
    kernels = nn.XLA._replace(experts=build_experts(get_grouped_matmul(MACHINE), None))
    backend = get_backend("auto", MACHINE)
    program = StepProgram(config, groups, shape, backend, None, kernels)
    num_weights = sum(x.size for x in jax.tree.leaves(params["layers"])) + params["head"].size
    for name, bucket in BUCKETS.items():

        def step(params: Any, pool: Any, state: Any, packed: Any, bucket: Bucket = bucket) -> Any:
            return program(params, pool, state, packed, bucket=bucket)

        packed = jax.ShapeDtypeStruct((packed_size(bucket, shape),), jnp.int32)
        yield Job(
            name=f"step DeepSeek-V2-Lite, 4 layers, {name} P{PAGE_SIZE}",
            backend="engine",
            function=step,
            args=(params, pool, state, packed),
            pool=pool,
            # All weights but the embedding (64 tokens reach about every expert), and a full pool.
            bytes_moved=num_weights * dtype.itemsize + POOL_BYTES,
            donate=(1, 2),
            facts={"layers": len(config.layers), "pool_bytes": POOL_BYTES, "dtype": dtype.name},
        )
