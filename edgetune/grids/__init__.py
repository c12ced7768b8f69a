"""4-bit grids: how a frozen weight matrix is stored, read back and put into a graph.

A grid is one file of pure functions over numpy arrays:

    NAME, BLOCK
    stored(shape, **options)  -> {suffix: TensorInfo}   what a base folder holds for a weight [N, K]; the suffix follows
                                                        "<module>.weight"
    quantize(weight, **options) -> {suffix: array}      the same, filled from a float32 weight [N, K]
    load(read)                -> codes                  the arrays that everything else works on, mapped where possible
    dequantize(codes, shape, rows=None, out=None)       float32 [rows, K]; rows is a slice, an index array or None
    PAIRS, flat(codes, shape) the same as one flat run of blocks, for whoever decodes with something faster than numpy:
                              weight[2i, 2i + 1] = PAIRS[packed[i]] * scales[2i // BLOCK]; None where K is no
                              multiple of BLOCK
    row_unit(shape), rows_of(codes, shape, rows)        rows from a multiple of `row_unit` on have bytes of their own:
                              views of these in the arrays, to read or to write
    nbytes(shape, **options)  -> int                    bytes of all that is stored
    MARK                                                the suffix by which a stored weight is recognised as this grid's
    emit_linear, emit_embedding                         the same weight as ONNX nodes, by a builder handed in
    ROUNDS_ACTIVATIONS                                  whether their kernels compute on activations rounded to int8
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from edgetune.grids import int4, nf4

LOOKUP_ROWS = 16  # rows of an embedding read at once
PIECE_CODES = 1 << 18  # bytes of codes that torch decodes at once: their indices, as int32, stay in the cache

GRIDS: dict[str, ModuleType] = {"nf4": nf4, "int4": int4}


def tile_rows(shape: tuple[int, int], tile_weights: int) -> int:
    """Rows of a weight [N, K] that are dequantized at once where so many weights may be."""
    return max(1, min(shape[0], tile_weights // shape[1]))


def row_tiles(shape: tuple[int, ...], tile_weights: int = 1 << 20, unit: int = 1) -> Iterator[slice]:
    """The rows of a weight [N, K] in ranges of that many weights, which start at multiples of `unit` rows."""
    step = max(unit, tile_rows((shape[0], shape[1]), tile_weights) // unit * unit)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))
