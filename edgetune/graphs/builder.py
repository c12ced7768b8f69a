"""A graph while it grows, and its weights on their way to disk.

Weights are announced with name, type, shape and a function that produces the bytes; the function runs once, when its
tensor is written, so no more than one tensor is in memory. The layout of the data file follows from the announcements,
which is why this module places the tensors itself instead of leaving it to `onnx_ir.save`: several initializers may
then view the same bytes (a tied embedding, a head in row ranges, later the training graphs) without a second copy.

Node names are paths. No Constant or ConstantOfShape node is ever made: a 32-bit ARM runtime was seen to crash on them.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx_ir as ir

OPSET, IR_VERSION = 23, 10
CONTRIB = "com.microsoft"
_INLINE_BYTES = 1024  # smaller tensors travel inside model.onnx
_PAGE_BYTES, _PAGE_THRESHOLD = 16384, 65536  # 16 KiB pages: Apple, and Android from 15 on
_ALIGNMENT = 64

Shape = Sequence[int | str]


class Placed(NamedTuple):
    """Where a weight's bytes lie in the data file."""

    offset: int
    nbytes: int


@dataclass
class _Weight:
    value: ir.Value
    placed: Placed
    produce: Callable[[], np.ndarray]


class Builder:
    """Collects inputs, nodes, outputs and weights; `save` writes `model.onnx` and its data file.

    Without `contrib` only standard operators may be added. `placed` tells where each weight lies; after `save`,
    `sha256` holds the digest of the bytes produced for it.
    """

    def __init__(self, name: str, data_file: str, *, contrib: bool = True) -> None:
        self.name, self.data_file, self.contrib = name, data_file, contrib
        self.placed: dict[str, Placed] = {}
        self.sha256: dict[str, str] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._weights: dict[str, _Weight] = {}
        self._end = 0

    def input(self, name: str, dtype: str, shape: Shape) -> ir.Value:
        """A graph input; a string in `shape` is a symbolic dimension."""
        value = ir.Value(name=name, type=ir.TensorType(_dtype(dtype)), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def optional_input(self, name: str, shape: Shape, default: np.ndarray) -> ir.Value:
        """A graph input that a caller may leave out: an initializer of the same name holds `default`."""
        value = self.input(name, str(default.dtype), shape)
        value.const_value = ir.tensor(default, name=name)
        self._initializers[name] = value
        return value

    def output(self, value: ir.Value, name: str, dtype: str, shape: Shape) -> None:
        """Make `value` a graph output under this name."""
        value.name, value.type, value.shape = name, ir.TensorType(_dtype(dtype)), ir.Shape(shape)
        self._outputs.append(value)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initializer inside the model file. The same name gives the same value again."""
        if name not in self._initializers:
            tensor = ir.tensor(array, name=name)
            self._initializers[name] = _initializer(name, tensor)
        return self._initializers[name]

    def weight(self, name: str, dtype: str, shape: Sequence[int], produce: Callable[[], np.ndarray]) -> ir.Value:
        """An initializer whose bytes `produce()` makes when the file is written. The same name gives the same value."""
        if name in self._initializers:
            return self._initializers[name]
        nbytes = _nbytes(dtype, shape)
        alignment = _PAGE_BYTES if nbytes >= _PAGE_THRESHOLD else _ALIGNMENT
        offset = -(-self._end // alignment) * alignment
        self._end = offset + nbytes
        value = self._external(name, dtype, shape, offset)
        self.placed[name] = Placed(offset, nbytes)
        self._weights[name] = _Weight(value, self.placed[name], produce)
        return value

    def view(self, name: str, weight: str, dtype: str, shape: Sequence[int], *, start_byte: int = 0) -> ir.Value:
        """An initializer over bytes of a weight that exists already, in another shape or type. No copy on disk."""
        if name in self._initializers:
            return self._initializers[name]
        placed = self.placed[weight]
        nbytes = _nbytes(dtype, shape)
        assert start_byte + nbytes <= placed.nbytes, f"{name} reads past the end of {weight}"
        return self._external(name, dtype, shape, placed.offset + start_byte)

    def _external(self, name: str, dtype: str, shape: Sequence[int], offset: int) -> ir.Value:
        tensor = ir.ExternalTensor(
            self.data_file, offset, _nbytes(dtype, shape), _dtype(dtype), shape=ir.Shape(shape), name=name
        )  # fmt: skip
        self._initializers[name] = _initializer(name, tensor)
        return self._initializers[name]

    def op(
        self, path: str, op_type: str, inputs: Sequence[ir.Value | None], *, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """One node with one output. Its name is `path`, its output is `<path>/output`."""
        return self.op_many(path, op_type, inputs, ("output",), domain=domain, **attributes)[0]

    def op_many(
        self,
        path: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        """One node with several outputs, named `<path>/<output>`."""
        assert self.contrib or not domain, f"{path}: {domain} in a graph of standard operators"
        node = ir.node(op_type, inputs, attributes or None, domain=domain, num_outputs=len(outputs), name=path)
        self._nodes.append(node)
        for value, output in zip(node.outputs, outputs, strict=True):
            value.name = f"{path}/{output}"
        return node.outputs

    def save(self, folder: Path, filename: str, metadata: Mapping[str, str] | None = None) -> None:
        """Write the data file, tensor by tensor, then `folder/filename`; both are on disk when this returns."""
        with (folder / self.data_file).open("wb") as file:
            for name, weight in self._weights.items():
                self.sha256[name] = _write(file, name, weight)
            file.truncate(max(self._end, 1))  # an empty file cannot be mapped
            file.flush()
            os.fsync(file.fileno())
        graph = ir.Graph(
            self._inputs, self._outputs, nodes=self._nodes, initializers=list(self._initializers.values()),
            opset_imports={"": OPSET} | ({CONTRIB: 1} if self.contrib else {}), name=self.name,
        )  # fmt: skip
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="edgetune")
        model.metadata_props.update(metadata or {})
        ir.save(model, folder / filename)


def _write(file: BinaryIO, name: str, weight: _Weight) -> str:
    """Put one weight at its place; returns the SHA-256 of its bytes."""
    array = np.ascontiguousarray(weight.produce())
    expected = weight.value.shape
    assert array.nbytes == weight.placed.nbytes, f"{name}: {array.shape} {array.dtype} produced for {expected}"
    data = array.reshape(-1).view(np.uint8).data
    file.seek(weight.placed.offset)
    file.write(data)
    return hashlib.sha256(data).hexdigest()


def _initializer(name: str, tensor: Any) -> ir.Value:
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)


def _dtype(name: str) -> ir.DataType:
    """The type of numpy's name; "uint4" is two to a byte."""
    return ir.DataType.UINT4 if name == "uint4" else ir.DataType.from_numpy(np.dtype(name))


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return -(-math.prod(shape) * _dtype(dtype).bitwidth // 8)
