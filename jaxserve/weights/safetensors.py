"""Reads safetensors files, one or sharded, without ever holding more than what is asked for.

Reads with `pread` into aligned buffers instead of mapping the files: a mapped file counts as
resident memory beside the copy on the device, and a truncated one would kill the process. Aligned
buffers become device arrays on CPU without another copy.
Knows nothing of models. Errors name the file and the tensor.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxserve.errors import WeightsError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

_MAX_HEADER_BYTES = 100 << 20
_CHUNK_BYTES = 8 << 20
_ALIGNMENT = 64


class TensorInfo(NamedTuple):
    """Where one tensor lies; `dtype` is spelt as in the file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def __str__(self) -> str:
        return f"tensor {self.name!r} in {self.path}"


class TensorFiles:
    """The tensors of a checkpoint folder, by name. Close it, or use it as a context."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.paths = _shard_paths(folder)
        self._files: dict[Path, int] = {}
        self.infos: dict[str, TensorInfo] = {}
        try:
            for path in self.paths:
                self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
                for info in _read_header(path, self._files[path]):
                    if info.name in self.infos:
                        raise WeightsError(f"{info}: also in {self.infos[info.name].path}")
                    self.infos[info.name] = info
            self._check_index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def info(self, name: str) -> TensorInfo:
        if name not in self.infos:
            raise WeightsError(f"{self.folder}: tensor {name!r} is missing from the checkpoint")
        return self.infos[name]

    def read(self, name: str, dtype: Any = None, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or rows of it, in `dtype` (default: its own), in a fresh aligned buffer."""
        info = self.info(name)
        out = aligned_empty(self._sub_shape(info, rows), dtype or self.dtype(name))
        self.read_into(name, out, rows)
        return out

    def read_into(self, name: str, out: np.ndarray, rows: slice = slice(None)) -> None:
        """Fill `out`, which is contiguous, with rows of a tensor, converting chunk by chunk."""
        info = self.info(name)
        if self._sub_shape(info, rows) != out.shape:
            raise ValueError(f"{info}: cannot read {rows} of {info.shape} into {out.shape}")
        first = rows.indices(info.shape[0])[0] if info.shape else 0
        self.read_run(name, first * math.prod(info.shape[1:]), out)

    def read_run(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill `out`, which is contiguous, with the numbers of a tensor from number `first` on."""
        info, stored = self.info(name), self.dtype(name)
        position = first * stored.itemsize
        target = out.reshape(-1)
        if stored == out.dtype:
            self._fill(info, position, target.view(np.uint8))
            return
        step = _CHUNK_BYTES // stored.itemsize
        chunk = np.empty(min(step, target.size), stored)
        for start in range(0, target.size, step):
            part = chunk[: target.size - start]
            self._fill(info, position + start * stored.itemsize, part.view(np.uint8))
            target[start : start + len(part)] = part.astype(out.dtype)

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The raw bytes of a tensor, in pieces that share one buffer."""
        info = self.info(name)
        buffer = np.empty(min(_CHUNK_BYTES, info.num_bytes), np.uint8)
        for start in range(0, info.num_bytes, _CHUNK_BYTES):
            part = buffer[: info.num_bytes - start]
            self._fill(info, start, part)
            yield part

    def dtype(self, name: str) -> np.dtype:
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise WeightsError(
                f"{info}: dtype {info.dtype} is not supported; supported are {', '.join(DTYPES)}"
            )
        return DTYPES[info.dtype]

    def _fill(self, info: TensorInfo, position: int, target: np.ndarray) -> None:
        view, done = target.data, 0
        while done < len(view):
            offset = info.offset + position + done
            count = os.preadv(self._files[info.path], [view[done:]], offset)
            if count == 0:
                raise WeightsError(f"{info}: the file ends before the tensor does")
            done += count

    def _sub_shape(self, info: TensorInfo, rows: slice) -> tuple[int, ...]:
        if rows == slice(None):
            return info.shape
        start, stop, step = rows.indices(info.shape[0])
        assert step == 1
        return (stop - start, *info.shape[1:])

    def _check_index(self) -> None:
        index = self.folder / INDEX_NAME
        if (self.folder / SINGLE_NAME) in self.paths:
            return
        for name, file in _weight_map(index).items():
            if name not in self.infos or self.infos[name].path.name != file:
                raise WeightsError(
                    f"{index}: tensor {name!r} is listed in {file}, which does not hold it"
                )


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array whose memory a CPU device can take over as it is."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise WeightsError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise WeightsError(f"{index}: field 'weight_map' must map tensor names to file names")
    for file in names.values():
        if Path(file).name != file:
            raise WeightsError(f"{index}: {file!r} is not the name of a file in the same folder")
    return names


def _shard_paths(folder: Path) -> list[Path]:
    """The files that hold the tensors; all of them exist."""
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file() and not index.is_file():
        return [single]
    if index.is_file():
        paths = [folder / file for file in sorted(set(_weight_map(index).values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise WeightsError(
                f"{folder}: {len(missing)} of {len(paths)} weight files named in {INDEX_NAME} "
                f"are missing, first {missing[0]}"
            )
        return paths
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return loose
    others = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
    hint = f"; {others[0]} is a pickle, which is never loaded" if others else ""
    raise WeightsError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}{hint}")


def _read_header(path: Path, fd: int) -> list[TensorInfo]:
    """The tensors of one file; checks that the file holds what its header says."""
    file_bytes = os.fstat(fd).st_size
    prefix = os.pread(fd, 8, 0)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or header_bytes > min(_MAX_HEADER_BYTES, file_bytes - 8):
        raise WeightsError(f"{path}: truncated, or not a safetensors file ({file_bytes} bytes)")
    try:
        header = json.loads(os.pread(fd, header_bytes, 8))
    except ValueError as error:
        raise WeightsError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + header_bytes
    return [_tensor_info(path, name, x, data_start, file_bytes) for name, x in header.items()]


def _tensor_info(path: Path, name: str, entry: Any, start: int, file_bytes: int) -> TensorInfo:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(x) for x in entry["shape"])
        begin, end = (int(x) for x in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: the header entry of tensor {name!r} is malformed") from error
    info = TensorInfo(name, path, dtype, shape, start + begin, end - begin)
    if begin < 0 or end < begin or min(shape, default=0) < 0:
        raise WeightsError(f"{info}: impossible offsets {begin}..{end} for shape {shape}")
    if start + end > file_bytes:
        raise WeightsError(
            f"{info}: the file is truncated: {file_bytes} bytes, the tensor ends at {start + end}"
        )
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise WeightsError(f"{info}: {end - begin} bytes do not make shape {shape} of {dtype}")
    return info
