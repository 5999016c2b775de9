"""What `serve` is about to do, before anything takes long: read from configs and file sizes alone.

Nothing here starts jax, so how many pages fit into a device that nobody has asked yet is said as a
bound. Knows nothing of engines.
"""

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import jaxserve
from jaxserve.cli.configure import PASSWORD, shown_value
from jaxserve.config import Config
from jaxserve.embedded import checkpoint_path
from jaxserve.errors import JaxserveError
from jaxserve.settings import Settings, all_settings
from jaxserve.types import group_layers

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
WEIGHT_SUFFIXES = (".safetensors",)


def plan(settings: Settings, url: str) -> list[str]:
    """The lines to print."""
    config = settings.config
    scheduler, parallel = config.scheduler, config.parallel
    num_devices = parallel.tensor_parallel_size
    lines = [
        f"jaxserve {jaxserve.__version__}",
        *_model(config),
        f"  mesh      {num_devices} device{'s share each layer' if num_devices > 1 else ''}",
        f"  at once   {scheduler.max_num_seqs} sequences, {scheduler.max_num_waiting:,} more may "
        f"wait; {scheduler.max_num_batched_tokens:,} tokens a step",
        f"  address   {url}" + (" (with API key)" if config.server.api_key else ""),
    ]
    if settings.origins:
        known = all_settings()
        changed = [f"{n} = {shown_value(settings, known[n])}" for n in settings.origins]
        lines.append("  settings  " + ", ".join(changed))
    return lines


def _model(config: Config) -> list[str]:
    """The model, its weights, and what the tiers will hold, as far as its files are here."""
    name = config.model.model or "the embedded model"
    folder = model_folder(config)
    if folder is None:
        where = f", revision {config.model.revision}" if config.model.revision else ""
        return [f"  model     {name}{where}: to be fetched from the hub", *_lower(config, None)]
    values = _config(folder)
    weights = sum(p.stat().st_size for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if (folder / "orbax").is_dir():
        weights = sum(p.stat().st_size for p in (folder / "orbax").rglob("*") if p.is_file())
    kind = (values.get("architectures") or [values.get("model_type", "?")])[0]
    stored = values.get("dtype") or values.get("torch_dtype") or "?"
    dtype = f"stored as {stored}"
    if config.model.dtype != "auto":
        dtype += f", computed as {config.model.dtype}"
    lines = [f"  model     {name}: {kind}, {_size(weights)} of weights, {dtype}"]
    token_bytes = bytes_per_token(values, config)
    return [*lines, *_device(config, values, token_bytes), *_lower(config, token_bytes)]


def model_folder(config: Config) -> Path | None:
    """Where the model's files are; None if they must be fetched first."""
    name = config.model.model
    if name is None:
        return checkpoint_path()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(name, "config.json", revision=config.model.revision)
    except HFValidationError:
        return None
    return Path(path).parent if isinstance(path, str) else None


def bytes_per_token(values: dict[str, Any], config: Config) -> int | None:
    """Bytes of one token's keys and values over all layers; None if the config cannot be read."""
    from jaxserve.models.registry import read_config

    try:
        groups = group_layers(read_config(values, "config.json").layer_caches)
    except (JaxserveError, KeyError, TypeError, ValueError):
        return None
    stored = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    dtype = stored if config.model.dtype == "auto" else config.model.dtype
    vectors = sum(
        len(g.layers) * g.cache.parts * g.cache.num_kv_heads * g.cache.head_dim for g in groups
    )
    return vectors * ITEM_BYTES.get(str(dtype), 2)


def _device(config: Config, values: dict[str, Any], token_bytes: int | None) -> list[str]:
    """Pages and tokens of the device, exactly where they are set, else what they are at most."""
    cache, page = config.cache, config.cache.page_size
    if token_bytes is None:
        return []
    each = f"pages of {page} tokens, {_size(page * token_bytes)} each"
    num_pages = cache.num_pages
    if num_pages is None and cache.kv_bytes is not None:
        num_pages = cache.kv_bytes // (page * token_bytes)
    if num_pages is not None:
        total = num_pages * page
        return [f"  KV cache  {num_pages:,} {each}: {total:,} tokens, {_size(total * token_bytes)}"]
    context = config.model.max_model_len or values.get("max_position_embeddings")
    if not isinstance(context, int):
        return [f"  KV cache  as many {each}, as the device has room for"]
    most = config.scheduler.max_num_seqs * -(-context // page)
    return [
        f"  KV cache  at most {most:,} {each}: {config.scheduler.max_num_seqs} contexts of "
        f"{context:,} tokens, {_size(most * page * token_bytes)}; fewer if memory is short"
    ]


def _lower(config: Config, token_bytes: int | None) -> list[str]:
    """A line for each tier below the device."""

    def holds(num_bytes: int) -> str:
        if token_bytes is None:
            return _size(num_bytes)
        return f"{_size(num_bytes)}, some {num_bytes // token_bytes:,} tokens"

    lines = []
    if config.cache.kv_host_bytes:
        lines.append(f"  KV host   {holds(config.cache.kv_host_bytes)}")
    for url in (config.cache.kv_store or "").split():
        parts = urlsplit(url)
        shown = PASSWORD.sub(r"//\1:(hidden)@", url.partition("?")[0])
        bound = parse_qs(parts.query).get("max_bytes", [""])[0]
        text = f"  KV store  {shown}" + (f", at most {bound}" if bound else "")
        if parts.scheme == "file" and (folder := Path(unquote(parts.path))).is_dir():
            text += f", {_size(_used(folder))} there already"
        lines.append(text)
    return lines


def _used(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:
        return 0


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} TiB"
