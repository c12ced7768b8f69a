"""4-bit grids: how a frozen weight matrix is stored, read back and put into a graph.

A grid is one file of pure functions over numpy arrays:

    NAME, BLOCK
    stored(shape, **options)  -> {suffix: TensorInfo}   what a base folder holds for a weight [N, K]; the suffix follows
                                                        "<module>.weight"
    quantize(weight, **options) -> {suffix: array}      the same, filled from a float32 weight [N, K]
    load(read)                -> codes                  the arrays that everything else works on, mapped where possible
    dequantize(codes, shape, rows=None, out=None)       float32 [rows, K]; rows is a slice, an index array or None
    nbytes(shape, **options)  -> int                    bytes of all that is stored
    MARK                                                the suffix by which a stored weight is recognised as this grid's
    emit_linear, emit_embedding                         the same weight as ONNX nodes, by a builder handed in
"""

from __future__ import annotations

from types import ModuleType

from edgetune.grids import int4, nf4

GRIDS: dict[str, ModuleType] = {"nf4": nf4, "int4": int4}
