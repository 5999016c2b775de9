"""A whole step of the engine, as it would be compiled to serve: Llama-3.1-8B, a pool of 4 GiB.

The engine's own step function, with shapes in the place of weights, pool and state. Between the
kernels lies what makes or breaks serving: nothing there may copy the pool.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bench.model_shapes import LLAMA_31_8B
from jaxserve.batch import StateShape, create_state, packed_size
from jaxserve.kv.pool import KVPool, page_bytes, page_shape
from jaxserve.models.decoder import param_specs
from jaxserve.models.registry import read_config
from jaxserve.models.spec import abstract_params
from jaxserve.pallas_kernels.paged_attention.api import Machine, get_backend
from jaxserve.pallas_kernels.paged_attention.reference import table_width
from jaxserve.plan import Bucket
from jaxserve.runner import StepProgram
from jaxserve.types import group_layers
from tests.aot.jobs import Job

MACHINES = {"h200": Machine("gpu", "9.0"), "v6e": Machine("tpu")}
"""Not v5e: the weights fill its memory."""

POOL_BYTES = 4 << 30
PAGE_SIZE = {"h200": 16, "v6e": 128}
NUM_SLOTS = 64
MAX_LEN = 8192

BUCKETS = {
    "decode 64 rows": Bucket(64, 64, True),
    "mixed 512 tokens 64 rows": Bucket(512, 64, False),
}


def step_jobs(target: str) -> Iterator[Job]:
    """The steps of a device, if the model fits into it."""
    if target not in MACHINES:
        return
    config = read_config(LLAMA_31_8B)
    groups = group_layers(config.layer_caches)
    page_size = PAGE_SIZE[target]
    shape = StateShape(
        num_slots=NUM_SLOTS,
        num_groups=len(groups),
        max_len=MAX_LEN,
        table_width=table_width(MAX_LEN, page_size),
        vocab_size=config.vocab_size,
        page_size=page_size,
    )
    dtype = jnp.dtype(jnp.bfloat16)
    num_pages = POOL_BYTES // page_bytes(groups[0], page_size, dtype)
    pages: Any = jax.ShapeDtypeStruct((num_pages, *page_shape(groups[0], page_size)), dtype)
    pool = KVPool((pages,))
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    state = jax.eval_shape(lambda: create_state(shape, cpu))
    params = abstract_params(param_specs(config), dtype)
    backend = get_backend("auto", MACHINES[target])
    program = StepProgram(config, groups, shape, backend, None)
    num_weights = sum(x.size for x in jax.tree.leaves(params["layers"]))
    num_head_weights = params["head"].size
    for name, bucket in BUCKETS.items():

        def step(params: Any, pool: Any, state: Any, packed: Any, bucket: Bucket = bucket) -> Any:
            return program(params, pool, state, packed, bucket=bucket)

        packed = jax.ShapeDtypeStruct((packed_size(bucket, shape),), jnp.int32)
        yield Job(
            name=f"step Llama-3.1-8B {name} P{page_size}",
            backend="engine",
            function=step,
            args=(params, pool, state, packed),
            pool=pool,
            # All weights but the embedding, and a full pool. The products with weights; those of
            # attention are 2 % of them here.
            bytes_moved=(num_weights + num_head_weights) * dtype.itemsize + POOL_BYTES,
            flops=2 * (bucket.num_tokens * num_weights + bucket.num_rows * num_head_weights),
            donate=(1, 2),
            facts={"layers": len(config.layers), "pool_bytes": POOL_BYTES, "dtype": dtype.name},
        )
