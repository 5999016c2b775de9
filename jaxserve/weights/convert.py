"""Rewrites a checkpoint as an Orbax folder, which loads straight into any sharding and dtype."""

import shutil
from pathlib import Path

from jaxserve.errors import WeightsError
from jaxserve.models.registry import read_config
from jaxserve.weights import fingerprint, orbax_store
from jaxserve.weights.hub_tensors import HubTensors
from jaxserve.weights.loader import resolve_model
from jaxserve.weights.safetensors import INDEX_NAME, TensorFiles, read_json

_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt", "LICENSE*", "*.md")


def convert_checkpoint(
    src: str | Path, dst: str | Path, *, revision: str | None = None, progress: bool = True
) -> Path:
    """Write the model `src` (folder or hub name) to the new folder `dst`, in its own dtype.

    The folder appears complete or not at all.

    Raises:
        WeightsError: `src` cannot be loaded, or `dst` exists.
    """
    source, target = resolve_model(src, revision, progress=progress), Path(dst).expanduser()
    if target.exists():
        raise WeightsError(f"{target}: exists already; name a new folder")
    if orbax_store.is_store(source):
        raise WeightsError(f"{source}: is an Orbax folder already")
    config_path = source / "config.json"
    config = read_config(read_json(config_path), str(config_path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with TensorFiles(source) as files:
            tensors = HubTensors(files, config)
            digest = fingerprint.weights_digest(files, progress=progress)
            params = tensors.load(tensors.stored_dtype, None, progress)
        for pattern in _COPIED:
            for path in source.glob(pattern):
                if path.name not in (INDEX_NAME, fingerprint.CACHE_NAME):
                    shutil.copyfile(path, partial / path.name)
        orbax_store.save(
            partial,
            params,
            weights_digest=digest,
            dtype=tensors.stored_dtype,
            tied=tensors.config.tie_word_embeddings,
        )
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target
