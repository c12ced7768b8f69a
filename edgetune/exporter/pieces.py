"""A written model in pieces that run one after the other, so that onnxruntime never holds the whole model.

    what comes before the blocks │ block 0 │ … │ the last norm │ the head, in ranges of rows

onnxruntime packs weights anew on its heap when it loads a graph: 0.8 GB for a billion in int4, twice the file in fp16.
A piece is a model of its own over the same data file. Together the pieces hold every node of the written graph once, as
it stands there, but for the head: its products are cut along the vocabulary where their layout allows it. An encoder
has no head; its last piece is the pooling.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

_BLOCK = re.compile(r"/(model/layers|encoder/layer)\.\d+/")
_HEAD = "/lm_head/"


@dataclass(frozen=True)
class Piece:
    """Nodes that run together; `needed` are the values that later pieces take from this one or from earlier ones."""

    nodes: Sequence[onnx.NodeProto]
    initializers: Mapping[str, onnx.TensorProto]
    inputs: Mapping[str, onnx.ValueInfoProto]  # of the whole graph
    crossing: Sequence[str]  # inputs that earlier pieces compute
    outputs: Sequence[str]
    needed: frozenset[str]


def cut(model: onnx.ModelProto) -> list[Piece]:
    """The pieces of a graph in order; a decoder's last one is the head."""
    nodes = list(model.graph.node)
    head = next((index for index, node in enumerate(nodes) if node.name.startswith(_HEAD)), len(nodes))
    groups = [list(group) for _, group in itertools.groupby(nodes[:head], key=_block_of)]
    groups += [nodes[head:]] if nodes[head:] else []
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input}
    results = {value.name for value in model.graph.output}
    pieces = []
    for index, group in enumerate(groups):
        made = {name for node in group for name in node.output}
        used = list(dict.fromkeys(name for node in group for name in node.input if name and name not in made))
        later = frozenset(name for rest in groups[index + 1 :] for node in rest for name in node.input)
        pieces.append(
            Piece(
                group,
                {name: initializers[name] for name in used if name in initializers},
                {name: inputs[name] for name in used if name in inputs},
                [name for name in used if name not in initializers and name not in inputs],
                [name for node in group for name in node.output if name in later or name in results],
                later,
            )
        )
    return pieces


def _block_of(node: onnx.NodeProto) -> str:
    found = _BLOCK.match(node.name)
    return found[0] if found else ""


def serialized(piece: Piece, known: Mapping[str, np.ndarray], whole: onnx.ModelProto) -> bytes:
    """The piece as a model file for onnxruntime; `known` has the crossing values, which give their types."""
    graph = onnx.GraphProto(name="piece", node=piece.nodes, initializer=piece.initializers.values())
    graph.input.extend(piece.inputs.values())
    for name in piece.crossing:
        value = known[name]
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        graph.input.append(helper.make_tensor_value_info(name, kind, [None] * value.ndim))
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in piece.outputs)
    model = onnx.ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import, graph=graph)
    content: bytes = model.SerializeToString()
    return content


def row_ranges(head: Piece, folder: Path, vocab_size: int, step: int) -> Iterator[tuple[slice, Piece]]:
    """The head for `step` rows of the vocabulary at a time, or whole where the layout of a weight does not allow it."""
    start = 0
    for count, product in _products(head, vocab_size):
        for rows, piece in _ranges(product, folder, count, step):
            yield slice(start + rows.start, start + rows.stop), piece
        start += count


def _products(head: Piece, vocab_size: int) -> Iterator[tuple[int, Piece]]:
    """The products side by side that a head may be, each with its number of rows; else the head."""
    joined = head.nodes[-1]
    if joined.op_type != "Concat":
        yield vocab_size, head
        return
    made = {output: node for node in head.nodes for output in node.output}
    products = [made[name] for name in joined.input]
    others = [node for node in head.nodes[:-1] if node not in products]
    for product in products:
        alone = onnx.NodeProto()
        alone.CopyFrom(product)
        alone.output[:] = joined.output
        nodes = [*others, alone]
        used = {name for node in nodes for name in node.input}
        initializers = {name: tensor for name, tensor in head.initializers.items() if name in used}
        count = initializers[product.input[1]].dims[0]
        yield count, Piece(nodes, initializers, head.inputs, head.crossing, head.outputs, head.needed)


def _ranges(head: Piece, folder: Path, vocab_size: int, step: int) -> Iterator[tuple[slice, Piece]]:
    axes = {
        name: list(tensor.dims).index(vocab_size)
        for name, tensor in head.initializers.items()
        if vocab_size in tensor.dims
    }
    step = step // 8 * 8
    tensors = [head.initializers[name] for name in axes]
    whole = slice(0, vocab_size)
    if not axes or not 0 < step < vocab_size or not all(_can_cut(tensor, vocab_size) for tensor in tensors):
        yield whole, head
        return
    for start in range(0, vocab_size, step):
        rows = slice(start, min(start + step, vocab_size))
        part = {name: _rows(head.initializers[name], axis, rows, folder) for name, axis in axes.items()}
        nodes = [_with_rows(node, vocab_size, rows.stop - rows.start) for node in head.nodes]
        initializers = {**head.initializers, **part}
        yield rows, Piece(nodes, initializers, head.inputs, head.crossing, head.outputs, head.needed)


def _can_cut(tensor: onnx.TensorProto, vocab_size: int) -> bool:
    """Whether ranges of its rows or columns are whole bytes."""
    dims = list(tensor.dims)
    at = dims.index(vocab_size)
    return dims.count(vocab_size) == 1 and (at == 0 or (len(dims) == 2 and vocab_size * _bits(tensor) % 8 == 0))


def _rows(tensor: onnx.TensorProto, axis: int, rows: slice, folder: Path) -> onnx.TensorProto:
    """A range of an initializer's first or second dimension: another range of the file, or a copy of the columns."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    dims = list(tensor.dims)
    dims[axis] = rows.stop - rows.start
    part = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=dims)
    if not place:
        return numpy_helper.from_array(numpy_helper.to_array(tensor)[rows], tensor.name)
    if axis == 0:
        row_bytes = math.prod(dims[1:]) * _bits(tensor) // 8
        offset, length = int(place["offset"]) + rows.start * row_bytes, dims[0] * row_bytes
        part.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", place["location"]), ("offset", offset), ("length", length)):
            part.external_data.add(key=key, value=str(value))
        return part
    bits = _bits(tensor)
    shape = dims[0], tensor.dims[1] * bits // 8
    columns = np.memmap(folder / place["location"], np.uint8, "r", int(place["offset"]), shape)
    part.raw_data = columns[:, rows.start * bits // 8 : rows.stop * bits // 8].tobytes()
    return part


def _bits(tensor: onnx.TensorProto) -> int:
    if tensor.data_type == onnx.TensorProto.UINT4:
        return 4
    return 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _with_rows(node: onnx.NodeProto, vocab_size: int, count: int) -> onnx.NodeProto:
    """The node with its attribute N, which names the rows of a weight, changed from all of them to so many."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if attribute.name == "N" and attribute.i == vocab_size:
            attribute.i = count
    return copy
