"""An adapter as a bundle carries it: the tensors as graph inputs, and what binds them to one base.

    NAME.safetensors     what edgetune reads, and any client that feeds graph inputs; the binding is in its metadata
    NAME.onnx_adapter    the same tensors for onnxruntime's own adapter API

An adapter of another base with the same shapes runs without an error and gives nonsense; onnxruntime stores versions in
its adapter files and never checks them. So each file says itself what it was trained on, and whoever loads it compares
that with the bundle (`bundle.check_adapter`). Torch, onnx and onnxruntime stay out, but for writing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from edgetune.errors import AdapterError, ModelError
from edgetune.schema import Key, Reader
from edgetune.weights import TensorInfo, open_tensors, write_safetensors

FORMAT_VERSION = 1
SUFFIXES = (".safetensors", ".onnx_adapter")
_METADATA = "edgetune"  # key in the safetensors header, whose values are strings
# Lower case: the file systems of phones and SD cards do not tell "Notes" from "notes".
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Binding:
    """What an adapter belongs to, and what it is. A base of another hash, grid or tokenizer is another base."""

    base_sha256: str
    grid: str | None
    tokenizer_sha256: str | None
    r: Annotated[int, Key("rank", low=1, high=1 << 20)]
    lora_alpha: Annotated[float, Key("strength that training used; it is folded into lora_B", low=0)]
    slots: tuple[str, ...]
    "the adapted linears, as the graph names them"


@dataclass(frozen=True)
class BoundAdapter:
    """`<slot>.lora_A` [in_features, r] and `<slot>.lora_B` [r, out_features], float32, scaling folded into lora_B."""

    binding: Binding
    tensors: dict[str, np.ndarray]


def is_name(text: str) -> bool:
    """Whether an adapter may be called so: lower-case letters, digits, _ and -; no path is ever a name."""
    return _NAME.fullmatch(text) is not None and text != "model"  # model.safetensors is what others take for weights


def write_adapter(folder: Path, name: str, adapter: BoundAdapter) -> None:
    """Write both files of an adapter; each appears under its name whole or not at all."""
    import onnxruntime

    infos = {key: TensorInfo("F32", value.shape) for key, value in adapter.tensors.items()}
    bound = json.dumps({"format_version": FORMAT_VERSION, **asdict(adapter.binding)})
    safetensors, native = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    write_safetensors(safetensors, infos, adapter.tensors.__getitem__, {_METADATA: bound})
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in adapter.tensors.items()}
    file.set_parameters(values)
    temporary = native.with_name(f".{native.name}.tmp")
    try:
        file.export_adapter(str(temporary))
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(native)
    finally:
        temporary.unlink(missing_ok=True)


def read_adapter(path: str | Path) -> BoundAdapter:
    """An adapter from its `.safetensors` file; the tensors are views into the mapped file.

    Raises:
        AdapterError: the file is missing or damaged, or does not say what it was trained on.
    """
    path = Path(path)
    try:
        weights = open_tensors(path)
    except ModelError as error:
        raise AdapterError(str(error)) from error
    return BoundAdapter(_read_binding(path, weights.metadata), {name: weights.array(name) for name in weights})


def _read_binding(path: Path, metadata: Mapping[str, str]) -> Binding:
    if _METADATA not in metadata:
        raise AdapterError(
            f"{path} does not say which base it was trained on, so it cannot be checked. "
            f"`edgetune adapter add` makes such a file from a run or a PEFT folder"
        )
    try:
        values = json.loads(metadata[_METADATA])
        version = values.pop("format_version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path}: what it says of its base is damaged ({error!r}). Make the file again") from error
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format_version {version!r}, this edgetune reads {FORMAT_VERSION}. Upgrade edgetune, or make "
            f"the file again"
        )
    reader = Reader()
    binding = reader.read(Binding, values)
    if binding is None:
        raise AdapterError(f"{path}: what it says of its base is wrong: {'; '.join(reader.problems)}")
    return binding
