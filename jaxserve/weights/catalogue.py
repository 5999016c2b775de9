"""The models on this machine: snapshots in the Hugging Face cache, and converted Orbax folders.

Orbax folders may lie anywhere, so `convert` notes where it wrote; a folder that has gone is
forgotten silently. Reads configs and headers, never weights. Knows nothing of jax.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.errors import WeightsError
from jaxserve.folders import user_cache_folder
from jaxserve.models.registry import read_config

NOTES_NAME = "conversions"
ORBAX_NAME = "jaxserve.json"
UNKNOWN = "?"


@dataclass(frozen=True, slots=True)
class LocalModel:
    """One model as it lies on a disk.

    Attributes:
        name: how `serve` is told to use it.
        kind: "hub" or "orbax".
        num_bytes: on disk, of all its revisions.
        problem: why it cannot be served; "" if it can.
        revisions: commits of a snapshot in the hub's cache.
    """

    name: str
    kind: str
    folder: Path
    num_bytes: int
    architecture: str
    dtype: str
    problem: str
    revisions: tuple[str, ...] = ()
    modified_s: float = 0.0


def local_models() -> list[LocalModel]:
    """Everything that is here, by name."""
    return sorted([*hub_models(), *orbax_models()], key=lambda model: model.name.lower())


def hub_models() -> list[LocalModel]:
    """The models of the hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir().repos
    except CacheNotFound:
        return []
    models = []
    for repo in found:
        if repo.repo_type != "model" or not repo.revisions:
            continue
        latest = max(repo.revisions, key=lambda revision: revision.last_modified)
        main = next((r for r in repo.revisions if "main" in r.refs), latest)
        hashes = tuple(sorted(revision.commit_hash for revision in repo.revisions))
        models.append(
            describe(
                repo.repo_id,
                "hub",
                main.snapshot_path,
                repo.size_on_disk,
                hashes,
                latest.last_modified,
            )
        )
    return models


def orbax_models() -> list[LocalModel]:
    """The folders that `convert` has written and that are still there."""
    models = []
    for folder in _noted():
        if (folder / ORBAX_NAME).is_file():
            num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            modified_s = (folder / ORBAX_NAME).stat().st_mtime
            models.append(describe(str(folder), "orbax", folder, num_bytes, (), modified_s))
    return models


def note_conversion(folder: Path) -> None:
    """Remember a folder for `orbax_models`; nothing is wrong if that cannot be."""
    root = user_cache_folder()
    path = folder.resolve()
    if root is None or path in _noted():
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / NOTES_NAME).open("a", encoding="utf-8") as file:
            file.write(f"{path}\n")
    except OSError:
        return


def describe(
    name: str,
    kind: str,
    folder: Path,
    num_bytes: int,
    revisions: Sequence[str] = (),
    modified_s: float = 0.0,
) -> LocalModel:
    """What the files of a folder say."""
    values, problem = _config(folder), ""
    if values is None:
        values, problem = {}, "no config.json"
    else:
        problem = _problem(values, folder)
    names = values.get("architectures")
    architecture = names[0] if isinstance(names, list) and names else values.get("model_type")
    return LocalModel(
        name=name,
        kind=kind,
        folder=folder,
        num_bytes=num_bytes,
        architecture=str(architecture or UNKNOWN),
        dtype=_dtype(values, folder),
        problem=problem,
        revisions=tuple(revisions),
        modified_s=modified_s,
    )


def remove(model: LocalModel) -> int:
    """Delete a model from the disk; returns the bytes that were freed.

    Raises:
        WeightsError: it cannot be deleted.
    """
    try:
        if model.kind == "orbax":
            shutil.rmtree(model.folder)
            return model.num_bytes
        from huggingface_hub import scan_cache_dir

        strategy = scan_cache_dir().delete_revisions(*model.revisions)
        strategy.execute()
        return strategy.expected_freed_size
    except OSError as error:
        raise WeightsError(f"{model.folder}: cannot be deleted: {error.strerror}") from error


def _problem(values: dict[str, Any], folder: Path) -> str:
    try:
        read_config(values, "config.json")
    except WeightsError as error:
        return " ".join(str(error).split()).removeprefix("config.json: ")
    if (folder / ORBAX_NAME).is_file():
        return ""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return f"{index.name} is broken"
        missing = [name for name in sorted(shards) if not (folder / name).is_file()]
        return f"{len(missing)} of {len(shards)} shards are missing" if missing else ""
    return "" if any(folder.glob("*.safetensors")) else "no safetensors weights"


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _dtype(values: dict[str, Any], folder: Path) -> str:
    try:
        stored = json.loads((folder / ORBAX_NAME).read_text(encoding="utf-8")).get("dtype")
    except (OSError, ValueError, AttributeError):
        stored = None
    text = values.get("text_config")
    inner = text if isinstance(text, dict) else {}
    for value in (stored, values.get("dtype"), values.get("torch_dtype"), inner.get("dtype")):
        if isinstance(value, str):
            return value
    return UNKNOWN


def _noted() -> list[Path]:
    root = user_cache_folder()
    if root is None:
        return []
    try:
        lines = (root / NOTES_NAME).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return list(dict.fromkeys(Path(line) for line in lines if line.startswith("/")))
