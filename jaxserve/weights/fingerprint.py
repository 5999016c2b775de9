"""The content digest of a checkpoint's weights: equal tensors, equal digest.

It covers name, dtype, shape and bytes of every tensor, in order of name, so it does not depend on
how the tensors are spread over files. It is computed once and kept beside the weights (or, if that
folder cannot be written, under the user's cache folder) together with size and modification time
of each file; a change of either computes it again.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import blake3
from tqdm import tqdm

from jaxserve.folders import user_cache_folder
from jaxserve.weights.safetensors import TensorFiles

CACHE_NAME = ".jaxserve-fingerprint.json"
_FORMAT = 1
_CHUNK_BYTES = 8 << 20


def weights_digest(files: TensorFiles, *, progress: bool = False) -> str:
    """Hex digest of all tensors of a checkpoint, from the cache if its files are unchanged."""
    return _cached(files.folder, files.paths, lambda: _hash_tensors(files, progress))


def files_digest(folder: Path, paths: Sequence[Path], *, progress: bool = False) -> str:
    """Hex digest of names and bytes of files below `folder`, from the cache if unchanged."""
    return _cached(folder, paths, lambda: _hash_files(folder, paths, progress))


def _cached(folder: Path, paths: Sequence[Path], compute: Callable[[], str]) -> str:
    stamps = {path.relative_to(folder).as_posix(): _stamp(path) for path in paths}
    places = _cache_paths(folder)
    for place in places:
        cached = _read_cache(place)
        if cached.get("format") == _FORMAT and cached.get("files") == stamps:
            return str(cached["digest"])
    digest = compute()
    entry = {"format": _FORMAT, "digest": digest, "files": stamps}
    for place in places:
        if _write_cache(place, entry):
            break
    return digest


def _hash_tensors(files: TensorFiles, progress: bool) -> str:
    whole = blake3.blake3()
    with _bar(sum(info.num_bytes for info in files.infos.values()), progress) as bar:
        for name in sorted(files.infos):
            info = files.infos[name]
            one = blake3.blake3(max_threads=blake3.blake3.AUTO)
            for chunk in files.chunks(name):
                one.update(chunk.data)
                bar.update(len(chunk))
            about = json.dumps([name, info.dtype, info.shape]).encode()
            whole.update(len(about).to_bytes(8, "little") + about + one.digest())
    return whole.hexdigest()


def _hash_files(folder: Path, paths: Sequence[Path], progress: bool) -> str:
    whole, buffer = blake3.blake3(), bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with _bar(sum(path.stat().st_size for path in paths), progress) as bar:
        for path in sorted(paths):
            one = blake3.blake3(max_threads=blake3.blake3.AUTO)
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    one.update(view[:count])
                    bar.update(count)
            about = path.relative_to(folder).as_posix().encode()
            whole.update(len(about).to_bytes(8, "little") + about + one.digest())
    return whole.hexdigest()


def _bar(total: int, progress: bool) -> Any:
    return tqdm(
        total=total,
        desc="Hashing weights",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
    )


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _cache_paths(folder: Path) -> list[Path]:
    """Beside the weights, and in the user's cache folder."""
    beside, root = folder / CACHE_NAME, user_cache_folder()
    if root is None:
        return [beside]
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    return [beside, root / "fingerprints" / f"{key}.json"]


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write_cache(path: Path, entry: dict[str, Any]) -> bool:
    """Replace the file as a whole; false if the place cannot be written."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        os.replace(temporary, path)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        return False
    return True
