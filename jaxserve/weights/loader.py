"""From a checkpoint folder or hub name to parameters on devices.

Finds the folder, reads what describes the model, and leaves the weights to `hub_tensors` or
`orbax_store`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3
from jax.sharding import Mesh

from jaxserve.errors import WeightsError
from jaxserve.models.config import DecoderConfig
from jaxserve.models.decoder import param_specs
from jaxserve.models.registry import read_config
from jaxserve.models.spec import Params, random_params
from jaxserve.weights import fingerprint, orbax_store
from jaxserve.weights.hub_tensors import HubTensors
from jaxserve.weights.safetensors import TensorFiles, read_json

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")

HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
HUB_NOT_NEEDED = ("consolidated*", "*/*.safetensors")
"""The same weights again in their makers' format, and checkpoints of the training run."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        params: the tree that `models.decoder` takes, on its devices, in `dtype`.
        fingerprint: hex digest of the weights' content and of everything in the config that
            decides what the model computes; does not depend on `dtype` or file layout.
        path: the folder (tokenizer and chat template lie there too).
        generation_config: the parsed generation_config.json, or {}.
    """

    params: Params
    config: DecoderConfig
    fingerprint: str
    path: Path
    dtype: str
    generation_config: dict[str, Any]


def load_checkpoint(
    model: str | Path,
    dtype: str = "auto",
    *,
    mesh: Mesh | None = None,
    revision: str | None = None,
    context_len: int | None = None,
    load_format: str = "auto",
    progress: bool = True,
) -> LoadedModel:
    """Load a Hugging Face folder, an Orbax folder written by `convert_checkpoint`, or a hub name.

    Args:
        dtype: compute dtype; "auto" is the checkpoint's.
        mesh: where the weights go, split by `sharding.RULES`; None is the default device.
        context_len: longest sequence that will be served, if shorter than the model allows.
        load_format: "dummy" makes random weights on the devices and reads config.json only.
        progress: show bars on stderr.

    Raises:
        WeightsError: names the file, tensor or field that is missing, broken or unsupported.
    """
    folder = resolve_model(model, revision, progress=progress)
    config_path = folder / "config.json"
    values = read_json(config_path)
    config = read_config(values, str(config_path), context_len)
    generation = _generation_config(folder)
    config = _with_end_ids(config, generation, folder)
    if load_format == "dummy":
        dtype = _compute_dtype(dtype, values, COMPUTE_DTYPES[0])
        params = random_params(param_specs(config), dtype, mesh)
        digest = "dummy"
    elif orbax_store.is_store(folder):
        stored = orbax_store.read_metadata(folder)
        config = dataclasses.replace(config, tie_word_embeddings=stored.tied)
        dtype = _compute_dtype(dtype, values, stored.dtype)
        params = orbax_store.restore(
            folder, param_specs(config), stored, dtype, mesh, progress=progress
        )
        digest = stored.weights_digest
    else:
        with TensorFiles(folder) as files:
            tensors = HubTensors(files, config)
            config = tensors.config
            dtype = _compute_dtype(dtype, values, tensors.stored_dtype)
            digest = fingerprint.weights_digest(files, progress=progress)
            params = tensors.load(dtype, mesh, progress)
    identity = blake3.blake3(f"{digest}/{config.digest}".encode()).hexdigest()
    return LoadedModel(params, config, identity, folder, dtype, generation)


def resolve_model(model: str | Path, revision: str | None = None, *, progress: bool = True) -> Path:
    """The folder of a model: itself, or a snapshot from the Hugging Face hub (never a pickle)."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    text = str(model)
    if folder.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise WeightsError(f"{text}: is not a folder, and not a hub name such as org/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not progress:
        disable_progress_bars()
    try:
        path = snapshot_download(
            text,
            revision=revision,
            allow_patterns=[*HUB_PATTERNS],
            ignore_patterns=[*HUB_NOT_NEEDED],
        )
        return Path(path)
    except Exception as error:  # the hub client raises many kinds, from network to permission
        reason = str(error).strip().splitlines()
        raise WeightsError(
            f"{text}: is not a folder, and fetching it from the Hugging Face hub failed: "
            f"{type(error).__name__}: {reason[0] if reason else ''}"
        ) from error


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _with_end_ids(config: DecoderConfig, generation: dict[str, Any], folder: Path) -> DecoderConfig:
    """generation_config.json has the last word on what ends a sequence."""
    value = generation.get("eos_token_id")
    if value is None:
        return config
    ids = value if isinstance(value, list) else [value]
    if not all(type(x) is int and x >= 0 for x in ids):
        raise WeightsError(
            f"{folder / 'generation_config.json'}: field 'eos_token_id' is {value!r}; "
            "expected an id or a list of ids"
        )
    return dataclasses.replace(config, eos_token_ids=tuple(ids))


def _compute_dtype(wanted: str, values: dict[str, Any], stored: str) -> str:
    """Resolve "auto": the config's dtype, else that of the stored embedding."""
    if wanted != "auto":
        if wanted not in COMPUTE_DTYPES:
            raise WeightsError(
                f"dtype {wanted!r} is not supported; supported are {', '.join(COMPUTE_DTYPES)}"
            )
        return wanted
    text = values.get("text_config")
    inner = text if isinstance(text, dict) else {}
    for place in (values, inner):
        for name in ("dtype", "torch_dtype"):
            if place.get(name) in COMPUTE_DTYPES:
                return str(place[name])
    return stored
