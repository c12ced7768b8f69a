"""Weights in 8 bits, symmetric, blocks of 32: weight = (code - 128) * scale. Near lossless, from whatever grid.

Codes lie as `MatMulNBits` with 8 bits wants them: uint8 [N, ceil(K/32), 32], padded with 128 (zero). A scale is the
block's extreme value / 127; with 255 levels a search would gain next to nothing. No base is stored this way, so this is
no grid, but it has a grid's functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from edgetune.grids import int4, row_tiles
from edgetune.grids.int4 import BLOCK
from edgetune.weights import Matrix

NAME = "int8"
ROUNDS_ACTIVATIONS = True

emit_linear = partial(int4.emit_linear, bits=8)
emit_embedding = partial(int4.emit_embedding, bits=8)
row_unit, rows_of = int4.row_unit, int4.rows_of


def quantize(weight: Matrix) -> dict[str, np.ndarray]:
    """{"codes": uint8 [N, blocks, 32], "scales": float32 [N, blocks]} of a float32 weight [N, K]."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    codes, scales = np.empty((rows, blocks, BLOCK), np.uint8), np.empty((rows, blocks), np.float32)
    for at in row_tiles((rows, columns)):
        padded = np.zeros((at.stop - at.start, blocks * BLOCK), np.float32)
        padded[:, :columns] = weight[at]
        by_block = padded.reshape(-1, blocks, BLOCK)
        scales[at] = np.abs(by_block).max(2) / np.float32(127)
        inverse = np.divide(1.0, scales[at], out=np.zeros_like(scales[at]), where=scales[at] != 0)
        by_block *= inverse[..., None]
        np.rint(by_block, out=by_block)
        by_block += 128
        codes[at] = by_block
    return {"codes": codes, "scales": scales}


def dequantize(
    codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice | np.ndarray | None = None
) -> np.ndarray:
    """float32 [rows, K] = (code - 128) * scale; `rows` are a range or indices, None is all of them."""
    picked = {key: value if rows is None else value[rows] for key, value in codes.items()}
    weight = picked["codes"].astype(np.float32)
    weight -= 128
    weight *= picked["scales"][..., None]
    result: np.ndarray = weight.reshape(len(weight), -1)[:, : shape[1]]
    return result
