"""Tensors of a model folder: read where they lie, written one at a time.

A safetensors file is a JSON header and raw bytes, so a tensor can be used straight from the page cache. `Weights` maps
each file once, read-only, and hands out views; nothing is copied unless a caller asks for `float32`. Writing streams
too: the header is known from the shapes alone, so only one tensor is ever in memory.

The safetensors library reads and writes whole files (numpy has no bfloat16 there, and its writer wants every tensor at
once); this module is the mapped, streaming remainder. The header rules checked here are those of the format's
specification: no overlap, no gap, nothing past the end of the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgetune.errors import ModelError

__all__ = [
    "Matrix", "StoredMatrix", "TensorInfo", "Weights", "open_tensors", "open_weights", "sha256_file", "write_atomic",
    "write_safetensors",
]  # fmt: skip

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors specification
# BF16 has no numpy type: its bits are handed out as uint16 and widened in `float32`.
_NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}  # fmt: skip


class TensorInfo(NamedTuple):
    """What a header says of one tensor; `dtype` is a safetensors name such as "F32"."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _NUMPY[self.dtype].itemsize * math.prod(self.shape)


class _File:
    """One mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                    raise ModelError(
                        f"{path} is not a safetensors file: its header claims {length} bytes in a file of {size}. "
                        "Download or convert it again; pickle files (.bin, .pt) are not read."
                    )
                header = file.read(length)
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                self.data = memoryview(self.map)[8 + length :]
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error
        self.entries, self.metadata = _parse_header(path, header, len(self.data))


def _parse_header(path: Path, header: bytes, size: int) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    try:
        raw: dict[str, Any] = json.loads(header)
        metadata = {str(key): str(value) for key, value in (raw.pop("__metadata__", None) or {}).items()}
        entries = {
            name: (TensorInfo(entry["dtype"], tuple(entry["shape"])), *entry["data_offsets"])
            for name, entry in raw.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a damaged header ({error}). Download or convert the file again.") from error
    end = 0
    for name, (info, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if info.dtype not in _NUMPY:
            raise ModelError(
                f"{path}: tensor {name} has dtype {info.dtype}; supported are {', '.join(_NUMPY)}. "
                "Convert the model to one of them."
            )
        if any(not isinstance(n, int) or n < 0 for n in (*info.shape, start, stop)):
            raise ModelError(
                f"{path}: tensor {name} has shape {info.shape}, which is no list of sizes. Fetch it again."
            )
        if start != end or stop - start != info.nbytes:
            raise ModelError(
                f"{path}: tensor {name} lies at bytes {start}..{stop}; {info.nbytes} bytes from {end} were expected. "
                "The file is damaged: fetch it again."
            )
        end = stop
    if end != size:
        raise ModelError(f"{path} holds {size} bytes of tensors where its header names {end}. Fetch the file again.")
    return {name: (info, start) for name, (info, start, _) in entries.items()}, metadata


class Weights(Mapping[str, TensorInfo]):
    """The tensors of a folder by name: `weights[name]` is its `TensorInfo`, the data is mapped and read on use."""

    def __init__(self, folder: Path, where: dict[str, _File]) -> None:
        self.folder, self._where = folder, where

    def __getitem__(self, name: str) -> TensorInfo:
        return self._find(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    @property
    def nbytes(self) -> int:
        return sum(self[name].nbytes for name in self)

    @property
    def metadata(self) -> dict[str, str]:
        """What the files say of themselves beside their tensors."""
        files = {id(file): file for file in self._where.values()}.values()
        return {key: value for file in files for key, value in file.metadata.items()}

    def _find(self, name: str) -> tuple[TensorInfo, int, _File]:
        file = self._where[name]
        info, start = file.entries[name]
        return info, start, file

    def array(self, name: str) -> np.ndarray:
        """A read-only view into the mapped file, of the tensor's shape; BF16 comes as uint16 bits. No copy."""
        info, start, file = self._find(name)
        flat = np.frombuffer(file.data, dtype=_NUMPY[info.dtype], count=math.prod(info.shape), offset=start)
        return flat.reshape(info.shape)

    def unmap(self) -> None:
        """Drop all pages from this process; what is used afterwards is mapped again, and nothing else."""
        for file in {id(file): file for file in self._where.values()}.values():
            file.map.madvise(mmap.MADV_DONTNEED)

    def read_on_demand(self) -> None:
        """Read no more than what is touched, or announced by `memory.read_ahead`.

        Left alone the system reads around each page that is missing, 8 MiB at once where a disk is set to that. They
        cannot be dropped while they are on their way, and a small cgroup has no room for them.
        """
        for file in {id(file): file for file in self._where.values()}.values():
            file.map.madvise(mmap.MADV_RANDOM)

    def float32(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A float32 copy of one tensor, or of a range of its rows."""
        view = self.array(name)
        if rows is not None:
            view = view[rows]
        if self[name].dtype == "BF16":
            return (view.astype(np.uint32) << 16).view(np.float32)
        return view.astype(np.float32)


class Matrix(Protocol):
    """A weight [N, K] that is read in ranges of rows: an array, or a `StoredMatrix` that converts them on the way."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class StoredMatrix:
    """The float32 rows of a stored matrix, converted as they are read.

    Raises:
        ModelError: rows that are read hold NaN or infinity.
    """

    def __init__(self, weights: Weights, name: str) -> None:
        self.weights, self.name, self.shape = weights, name, weights[name].shape

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        values = self.weights.float32(self.name, rows)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.weights.folder}: {self.name} holds NaN or infinity. Fetch the model again.")
        return values


def open_weights(folder: str | Path) -> Weights:
    """Map `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        ModelError: there is no such file, a shard is missing, or a header breaks the format.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return open_tensors(single)
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"{pickles[0]} is a pickle, which is never loaded; " if pickles else ""
        raise ModelError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json. "
            f"{hint}convert the model with save_pretrained(safe_serialization=True)."
        )
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged ({error}). Fetch it again.") from error
    files = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{index} names the shard {shard!r}; a file name without a folder was expected.")
        if not (folder / shard).is_file():
            raise ModelError(f"{folder} lacks {shard}, one of the {len(shards)} shards of its index. Fetch it again.")
        files[shard] = _File(folder / shard)
    missing = [name for name, shard in weight_map.items() if name not in files[shard].entries]
    if missing:
        raise ModelError(f"{index} places {missing[0]} in {weight_map[missing[0]]}, which lacks it. Fetch both again.")
    return Weights(folder, {name: files[shard] for name, shard in weight_map.items()})


def open_tensors(path: str | Path) -> Weights:
    """Map one safetensors file.

    Raises:
        ModelError: it cannot be read, or its header breaks the format.
    """
    file = _File(Path(path))
    return Weights(file.path.parent, dict.fromkeys(file.entries, file))


def safetensors_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str] | None = None) -> bytes:
    """What stands before the values of a safetensors file, its length included."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, info in infos.items():
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(
    path: Path,
    infos: Mapping[str, TensorInfo],
    produce: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, calling `produce(name)` once per tensor, in the order of `infos`.

    BF16 tensors are produced as their uint16 bits. The file appears under its name only when it is complete.
    """
    header = safetensors_header(infos, metadata)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(header)
            for name, info in infos.items():
                array = np.ascontiguousarray(produce(name))
                assert array.nbytes == info.nbytes, f"{name}: produced {array.nbytes} bytes, announced {info.nbytes}"
                file.write(array.data if array.ndim and array.size else array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it holds the old text or the new one, never part of either."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
