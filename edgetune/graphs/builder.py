"""A graph while it grows, and its weights on their way to disk.

Weights are announced with name, type, shape and a function that fills them; the function runs once, on arrays that are
mapped over their place in the data file, so it may work in ranges of rows and nothing of a matrix need be on the heap.
The layout of the file follows from the announcements, which is why this module places the tensors itself instead of
leaving it to `onnx_ir.save`: several initializers may then view the same bytes (a tied embedding, a head in row ranges,
later the training graphs) without a second copy.

Node names are paths. No Constant or ConstantOfShape node is ever made: a 32-bit ARM runtime was seen to crash on them.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx_ir as ir

from edgetune.errors import ExportError
from edgetune.memory import format_mib

OPSET, IR_VERSION = 23, 10
CONTRIB = "com.microsoft"
_PAGE_BYTES, _PAGE_THRESHOLD = 16384, 65536  # 16 KiB pages: Apple, and Android from 15 on
_ALIGNMENT = 64

Shape = Sequence[int | str]
Fill = Callable[[dict[str, np.ndarray]], None]


class Placed(NamedTuple):
    """Where a weight's bytes lie in the data file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class _Group:
    """Arrays that are filled together: key -> (initializer, numpy's name of the type, shape)."""

    arrays: dict[str, tuple[str, str, tuple[int, ...]]]
    fill: Fill


def part_name(name: str, key: str) -> str:
    """The initializer of one array of the weight `name`: the weight itself, or a part such as its codes."""
    return name if key == "weight" else f"{name}.{key}"


class Builder:
    """Collects inputs, nodes, outputs and weights; `save` writes `model.onnx` and its data file.

    Without `contrib` only standard operators may be added. `placed` tells where each weight lies; after `save`,
    `sha256` holds the digest of the bytes that were filled in.
    """

    def __init__(self, name: str, data_file: str, *, contrib: bool = True) -> None:
        self.name, self.data_file, self.contrib = name, data_file, contrib
        self.placed: dict[str, Placed] = {}
        self.sha256: dict[str, str] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._groups: list[_Group] = []
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

    def described(self) -> dict[str, dict[str, Any]]:
        """Where each weight lies in the data file, as JSON: dtype, shape, offset and bytes."""
        return {
            name: {"dtype": dtype, "shape": list(shape), **self.placed[name]._asdict()}
            for group in self._groups
            for name, dtype, shape in group.arrays.values()
        }

    def signature(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The graph's inputs and outputs as JSON: name, dtype and shape."""
        inputs, outputs = ([_described(value) for value in values] for values in (self._inputs, self._outputs))
        return inputs, outputs

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A small initializer inside the model file. The same name gives the same value again."""
        if name not in self._initializers:
            tensor = ir.tensor(array, name=name)
            self._initializers[name] = _initializer(name, tensor)
        return self._initializers[name]

    def weight(self, name: str, dtype: str, shape: Sequence[int], produce: Callable[[], np.ndarray]) -> ir.Value:
        """An initializer that `produce()` makes when the file is written. The same name gives the same value again."""

        def fill(arrays: dict[str, np.ndarray]) -> None:
            array = produce()
            assert array.shape == arrays["weight"].shape, f"{name}: {array.shape} produced for {tuple(shape)}"
            arrays["weight"][...] = array

        return self.weights(name, {"weight": (dtype, shape)}, fill)["weight"]

    def weights(self, name: str, arrays: Mapping[str, tuple[str, Sequence[int]]], fill: Fill) -> dict[str, ir.Value]:
        """The initializers of one matrix: key -> (type, shape), named by `part_name`.

        `fill({key: array})` writes all of them when the file is written: the arrays are the file's own bytes, mapped.
        The same name gives the same values again.
        """
        names = {key: part_name(name, key) for key in arrays}
        if all(part in self._initializers for part in names.values()):
            return {key: self._initializers[part] for key, part in names.items()}
        values = {key: self._place(names[key], dtype, shape) for key, (dtype, shape) in arrays.items()}
        announced = {key: (names[key], dtype, tuple(shape)) for key, (dtype, shape) in arrays.items()}
        self._groups.append(_Group(announced, fill))
        return values

    def _place(self, name: str, dtype: str, shape: Sequence[int]) -> ir.Value:
        nbytes = _nbytes(dtype, shape)
        alignment = _PAGE_BYTES if nbytes >= _PAGE_THRESHOLD else _ALIGNMENT
        offset = -(-self._end // alignment) * alignment
        self._end = offset + nbytes
        self.placed[name] = Placed(offset, nbytes)
        return self._external(name, dtype, shape, offset)

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
        """Write the data file, matrix by matrix, then `folder/filename`; both are on disk when this returns.

        Raises:
            ExportError: the disk has no room for the data file.
        """
        path = folder / self.data_file
        with path.open("wb") as file:
            _allocate(file, max(self._end, 1))  # an empty file cannot be mapped
            for group in self._groups:
                self._fill(path, group)
            os.fsync(file.fileno())
        self.save_graph(folder / filename, metadata)

    def save_graph(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the graph alone."""
        graph = ir.Graph(
            self._inputs, self._outputs, nodes=self._nodes, initializers=list(self._initializers.values()),
            opset_imports={"": OPSET} | ({CONTRIB: 1} if self.contrib else {}), name=self.name,
        )  # fmt: skip
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="edgetune")
        model.metadata_props.update(metadata or {})
        ir.save(model, path)

    def _fill(self, path: Path, group: _Group) -> None:
        arrays = {
            key: np.memmap(path, dtype, "r+", self.placed[name].offset, shape)
            for key, (name, dtype, shape) in group.arrays.items()
        }
        group.fill(dict(arrays))
        for key, (name, _, _) in group.arrays.items():
            self.sha256[name] = hashlib.sha256(arrays[key].reshape(-1).view(np.uint8).data).hexdigest()


def _allocate(file: BinaryIO, size: int) -> None:
    """Give the file its size, and where the system can, its blocks: a write into a map cannot report a full disk."""
    file.truncate(size)
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # a file system that cannot; its holes are filled as they are written
        raise ExportError(
            f"{Path(file.name).parent} cannot take {format_mib(size)} of weights: {error.strerror}. Free some "
            f"storage, choose another --out, or smaller --weights."
        ) from error


def _initializer(name: str, tensor: Any) -> ir.Value:
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)


def _described(value: ir.Value) -> dict[str, Any]:
    assert value.dtype is not None and value.shape is not None
    shape = [size if isinstance(size, int) else size.value for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape}


def _dtype(name: str) -> ir.DataType:
    """The type of numpy's name; "uint4" is two to a byte."""
    return ir.DataType.UINT4 if name == "uint4" else ir.DataType.from_numpy(np.dtype(name))


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    return -(-math.prod(shape) * _dtype(dtype).bitwidth // 8)
