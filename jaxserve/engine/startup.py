"""From a config to a running engine: resolves every "auto", loads, sizes the cache, compiles.

Knows nothing of text or HTTP. What was chosen is logged, and is in the engine's own config.
"""

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxserve.attend import head_axis
from jaxserve.batch import StateShape, create_state
from jaxserve.config import Config
from jaxserve.embedded import EMBEDDED_MODEL_NAME, checkpoint_path
from jaxserve.engine.core import Engine
from jaxserve.engine.host_memory import available_bytes, give_back_freed, share_arenas
from jaxserve.engine.tiers import build_tiers, tenant_secret
from jaxserve.errors import ConfigError
from jaxserve.folders import user_cache_folder
from jaxserve.kv.blocks import Namespace
from jaxserve.kv.planner import LoadPlanner
from jaxserve.kv.pool import KVPool, create_pool, page_bytes, storage_dtype
from jaxserve.mixtures import build_experts
from jaxserve.models import layers as nn
from jaxserve.pallas_kernels.cpu import ops as native
from jaxserve.pallas_kernels.cpu.build import load as load_native
from jaxserve.pallas_kernels.grouped_matmul.api import get_grouped_matmul
from jaxserve.pallas_kernels.paged_attention.api import get_backend, this_machine
from jaxserve.pallas_kernels.paged_attention.reference import table_width
from jaxserve.plan import Bucket
from jaxserve.programs import ProgramStore
from jaxserve.runner import Runner, StepProgram
from jaxserve.scheduler import BucketChooser, Scheduler, default_buckets
from jaxserve.sharding import Axis, make_mesh, partition_spec
from jaxserve.tokenizer import Tokenizer
from jaxserve.types import KVGroup, Progress, StartupReport, group_layers, no_progress
from jaxserve.weights import LoadedModel, load_checkpoint

logger = logging.getLogger(__name__)

MIN_CONTEXT_TOKENS = 256
"""A context that memory cuts below this is an error, not a warning."""

MAX_TIMED_TOKENS = 512
"""Of the steps that are timed at start, where lower tiers want to know what computing costs."""

LAYOUT_VERSION = 1
"""Changes when the bytes of a block change meaning; part of every block's namespace."""

NATIVE_NUMERICS = "native 3"
"""Changes when the native kernels round differently, and with them the keys and values."""

CPU_KV_BYTES = 4 << 30
CPU_MEMORY_FRACTION = 0.25
DEVICE_MEMORY_FRACTION = 0.9


def build_engine(
    config: Config,
    progress: Progress = no_progress,
    *,
    buckets: tuple[Bucket, ...] | None = None,
) -> Engine:
    """Load the model that `config` names and make it ready to serve.

    Args:
        buckets: shapes of steps to compile, where the defaults are more than is needed.

    Raises:
        ConfigError: the settings do not fit the model or the machine.
        WeightsError: the checkpoint is broken or not supported.
    """
    share_arenas()
    cache_dir = compile_cache_dir(config.runtime.compile_cache_dir)
    if cache_dir is not None:
        use_compile_cache(cache_dir)
    mesh = _mesh(config.parallel.tensor_parallel_size)
    start = time.perf_counter()
    path = config.model.model or str(checkpoint_path())
    model = load_checkpoint(
        path,
        config.model.dtype,
        mesh=mesh,
        revision=config.model.revision,
        context_len=config.model.max_model_len,
        load_format=config.model.load_format,
        progress=progress is not no_progress,
    )
    tokenizer = Tokenizer.from_folder(model.path)
    load_s = time.perf_counter() - start

    groups = group_layers(model.config.layer_caches)
    dtype = storage_dtype(jnp.dtype(model.dtype), jax.default_backend())
    config = _resolve(config, model, groups, dtype, name=config.model.model or EMBEDDED_MODEL_NAME)
    max_len, pages_per_group = config.model.max_model_len, config.cache.num_pages
    assert max_len is not None and pages_per_group is not None, "resolved just now"
    num_pages = (pages_per_group,) * len(groups)
    shape = StateShape(
        num_slots=config.scheduler.max_num_seqs,
        num_groups=len(groups),
        max_len=max_len,
        table_width=table_width(max_len, config.cache.page_size),
        vocab_size=model.config.vocab_size,
        page_size=config.cache.page_size,
    )
    if buckets is None:
        buckets = default_buckets(shape.num_slots, config.scheduler.max_num_batched_tokens)
    native_cpu = _use_native_cpu(config, mesh)
    try:
        machine = this_machine(native_cpu=native_cpu)
        backend = get_backend(config.runtime.attention_backend, machine)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    attention = backend.names[0]
    config = replace(config, runtime=replace(config.runtime, attention_backend=attention))
    kernels = _native_kernels() if native_cpu else nn.XLA
    kernels = kernels._replace(experts=build_experts(get_grouped_matmul(machine), mesh))
    program = StepProgram(model.config, groups, shape, backend, mesh, kernels)
    instructions = load_native().detail if native_cpu else None
    identity = repr((model.config, groups, shape, machine, attention, instructions))
    runner = Runner(
        program,
        model.params,
        _create_pool(groups, num_pages, shape.page_size, dtype, mesh),
        create_state(shape, _replicated(mesh), _logits_sharding(mesh, shape.vocab_size)),
        buckets,
        ProgramStore(cache_dir / "traced" if cache_dir and mesh is None else None, identity),
    )
    root = _namespace(model, groups, dtype, shape.page_size, native_cpu, attention).root()
    lower = build_tiers(config.cache, runner.pool, root, backend)
    runner.transfers = lower and lower.transfers
    start = time.perf_counter()
    if config.runtime.warmup:
        runner.compile(progress)
    compile_s = time.perf_counter() - start
    chooser = BucketChooser(buckets, shape.num_slots, config.scheduler.max_num_batched_tokens)
    load_planner = LoadPlanner(shape.page_size, config.cache.kv_load, chooser.steps)
    if lower is not None and config.runtime.warmup:
        for bucket in _timed(buckets):
            # All of it counts as tokens: of two steps, one that was held up would count as pairs,
            # and make long prompts look many times as dear as they are.
            load_planner.prefill.observe(bucket.num_tokens, 0.0, runner.time_prefill(bucket))
        lower.try_out()
    scheduler = Scheduler(
        scheduler_config=config.scheduler,
        kv_groups=groups,
        num_pages=num_pages,
        page_size=shape.page_size,
        max_model_len=shape.max_len,
        namespace_root=root,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        buckets=buckets,
        tiers=lower and lower.tiers,
        load_planner=load_planner,
        tenant_secret=tenant_secret(config.cache),
    )
    report = StartupReport(
        num_params=sum(leaf.size for leaf in jax.tree.leaves(model.params)),
        load_s=load_s,
        num_pages=num_pages,
        num_cache_tokens=num_pages[0] * shape.page_size,
        kv_bytes=_bytes_per_page(groups, shape.page_size, dtype) * num_pages[0],
        num_graphs=runner.num_graphs,
        num_kept_graphs=runner.num_kept_graphs,
        compile_s=compile_s,
    )
    give_back_freed()
    logger.info("ready: %s; %s", report, config)
    engine = Engine(
        config=config,
        model=model,
        tokenizer=tokenizer,
        runner=runner,
        scheduler=scheduler,
        report=report,
        lower=lower,
    )
    engine.grammars.warm_up()
    return engine


def compile_cache_dir(folder: str | None) -> Path | None:
    """Where compiled programs are kept: `jaxserve/xla` in the user's cache folder if None is given.

    "" turns it off, and so does having no home: the result is None.
    """
    if folder is not None:
        return Path(folder) if folder else None
    root = user_cache_folder()
    return root and root / "xla"


def use_compile_cache(folder: Path) -> None:
    """Point XLA's persistent compile cache at `folder`, unless the process already has one."""
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _use_native_cpu(config: Config, mesh: Mesh | None) -> bool:
    """Whether the step calls the C++ kernels; XLA cannot partition such calls over a mesh."""
    wanted = config.runtime.native_cpu and jax.default_backend() == "cpu" and mesh is None
    return wanted and load_native().available


def _mesh(tensor_parallel_size: int) -> Mesh | None:
    """The mesh, or None for one device. Asks for virtual CPU devices if it is not too late."""
    if tensor_parallel_size == 1:
        _check_backend()
        return None
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", tensor_parallel_size)
        except RuntimeError:
            pass  # the backend is already up with the devices it has; make_mesh says if too few
    _check_backend()
    return make_mesh(tensor_parallel_size)


def _check_backend() -> None:
    """Start JAX's backend; ConfigError if JAX_PLATFORMS asks for what is not here."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter: no plugin for the platform
        platforms = jax.config.values["jax_platforms"]
        reason = str(error).strip() or "no such device"
        raise ConfigError(
            f"JAX cannot start on {platforms or 'any platform'!r} (JAX_PLATFORMS): {reason}"
        ) from error


def _replicated(mesh: Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, PartitionSpec())


def _logits_sharding(mesh: Mesh | None, vocab_size: int) -> jax.sharding.Sharding:
    """The columns are split like the rows of the output layer."""
    if mesh is None:
        return _replicated(None)
    return NamedSharding(
        mesh, PartitionSpec(None, *partition_spec((Axis("vocab", vocab_size),), mesh))
    )


def _pool_shardings(
    groups: tuple[KVGroup, ...], mesh: Mesh | None
) -> tuple[jax.sharding.Sharding, ...]:
    """KV heads are split like `attend` expects them; everything else is whole on each device."""
    if mesh is None:
        return (_replicated(None),) * len(groups)
    return tuple(
        NamedSharding(
            mesh, PartitionSpec(None, None, None, head_axis(mesh, group.cache.num_kv_heads))
        )
        for group in groups
    )


def _create_pool(
    groups: tuple[KVGroup, ...],
    num_pages: tuple[int, ...],
    page_size: int,
    dtype: np.dtype,
    mesh: Mesh | None,
) -> KVPool:
    try:
        pool = create_pool(groups, num_pages, page_size, dtype, _pool_shardings(groups, mesh))
        return jax.block_until_ready(pool)
    except jax.errors.JaxRuntimeError as error:
        num_bytes = num_pages[0] * _bytes_per_page(groups, page_size, dtype)
        raise ConfigError(
            f"{num_pages[0]} KV pages of {num_bytes} bytes do not fit into the device's memory: "
            f"lower num_pages or kv_bytes ({str(error).splitlines()[0][:200]})"
        ) from error


def _native_kernels() -> nn.Kernels:
    return nn.Kernels(
        products=native.products_or(nn.products),
        gated=native.gated_or(nn.gated),
        rotate=native.rotate_or(nn.rotate),
    )


def _namespace(
    model: LoadedModel,
    groups: tuple[KVGroup, ...],
    dtype: np.dtype,
    page_size: int,
    native_cpu: bool,
    attention: str,
) -> Namespace:
    products = f"{NATIVE_NUMERICS} {load_native().detail}" if native_cpu else "xla"
    return Namespace(
        weights_fingerprint=model.fingerprint,
        model_config_digest=model.config.digest,
        kv_dtype=f"{model.dtype} as {dtype.name}",
        layout_version=LAYOUT_VERSION,
        page_size=page_size,
        kv_groups=groups,
        numerics=f"{jax.default_backend()} {products} {attention}",
    )


def _resolve(
    config: Config, model: LoadedModel, groups: tuple[KVGroup, ...], dtype: np.dtype, name: str
) -> Config:
    """A new config in which nothing is left to choose."""
    page_size = config.cache.page_size
    max_len = config.model.max_model_len or model.config.max_position_embeddings
    if max_len > model.config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {max_len}, but {name} was made for "
            f"{model.config.max_position_embeddings} positions: use at most that"
        )
    bytes_per_page = _bytes_per_page(groups, page_size, dtype)
    num_pages = config.cache.num_pages
    if num_pages is None:
        most_useful = config.scheduler.max_num_seqs * -(-max_len // page_size)
        kv_bytes = config.cache.kv_bytes or _free_kv_bytes()
        num_pages = max(0, kv_bytes // bytes_per_page)
        if config.cache.kv_bytes is None:
            num_pages = min(num_pages, most_useful)
    capacity = num_pages * page_size
    num_rows = num_pages * max(len(g.layers) * g.cache.parts * g.cache.num_kv_heads for g in groups)
    if num_rows >= 2**31:
        raise ConfigError(
            f"{num_pages} KV pages of {page_size} tokens make {num_rows} rows, more than an int32 "
            "can index: use a larger page_size or fewer pages"
        )
    if capacity < max_len:
        if config.model.max_model_len is not None or capacity < MIN_CONTEXT_TOKENS:
            raise ConfigError(
                f"max_model_len {max_len} needs {-(-max_len // page_size)} KV pages of {page_size} "
                f"tokens ({bytes_per_page} bytes each); there are {num_pages}: lower "
                f"max_model_len to {max(capacity, 1)}, or give more memory (kv_bytes, num_pages)"
            )
        logger.warning("max_model_len lowered from %d to %d: KV pages", max_len, capacity)
        max_len = capacity
    return replace(
        config,
        model=replace(
            config.model,
            dtype=model.dtype,
            max_model_len=max_len,
            served_model_name=config.model.served_model_name or name,
        ),
        cache=replace(config.cache, num_pages=num_pages, kv_bytes=num_pages * bytes_per_page),
    )


def _timed(buckets: tuple[Bucket, ...]) -> tuple[Bucket, Bucket]:
    """A small and a larger step to time: the first decision to load shall know what computing
    costs, and the steps of cached prompts alone would not tell what long ones take."""
    mixed = sorted(bucket for bucket in buckets if not bucket.is_decode)
    quick = [bucket for bucket in mixed if bucket.num_tokens <= MAX_TIMED_TOKENS]
    return mixed[0], (quick or mixed)[-1]


def _bytes_per_page(groups: tuple[KVGroup, ...], page_size: int, dtype: np.dtype) -> int:
    """Bytes of one page in every group: groups have equally many pages."""
    return sum(page_bytes(group, page_size, dtype) for group in groups)


def _free_kv_bytes() -> int:
    """Bytes to spend on KV pages when nobody says: what is free, less a reserve."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return min(CPU_KV_BYTES, int(available_bytes() * CPU_MEMORY_FRACTION))
    stats: dict[str, Any] = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError(
            f"{device.device_kind} does not say how much memory it has: set kv_bytes or num_pages"
        )
    return int(stats["bytes_limit"] * DEVICE_MEMORY_FRACTION) - stats["bytes_in_use"]
