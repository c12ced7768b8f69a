"""ONNX graphs, built node by node: `builder` holds a graph while it grows, `ops` has one rule per operation,
`decoder` puts them together. Nothing is traced from torch, so names, byte layouts and adapter inputs are ours.

`FORMATS` is what weights can be exported to: the grids, and those that no base is stored in. Each is a module with

    NAME, ROUNDS_ACTIVATIONS
    quantize(weight) -> arrays, dequantize(arrays, shape, rows=None)        (a grid's stored names differ, see `grids`)
    row_unit(shape), rows_of(arrays, shape, rows)
    emit_linear(builder, path, x, name, shape, fill, *, bias=None)
    emit_embedding(builder, path, ids, name, shape, fill)
"""

from __future__ import annotations

from edgetune.graphs import dense, half, int8, int8_dynamic, standard
from edgetune.grids import GRIDS

FORMATS = {
    "fp32": dense, "fp16": half, "int8": int8, "int8-dynamic": int8_dynamic, "standard": standard, **GRIDS
}  # fmt: skip
