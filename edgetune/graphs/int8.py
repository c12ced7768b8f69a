"""Weights in 8 bits, symmetric, blocks of 32: weight = (code - 128) * scale. A target for merged exports.

Codes lie as `MatMulNBits` with 8 bits wants them: uint8 [N, ceil(K/32), 32], padded with 128 (zero). A scale is the
block's extreme value / 127; with 255 levels a search would gain next to nothing. No base is stored this way, so this is
no grid, but it has a grid's functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from edgetune.grids import int4
from edgetune.grids.int4 import BLOCK

NAME = "int8"

emit_linear = partial(int4.emit_linear, bits=8)
emit_embedding = partial(int4.emit_embedding, bits=8)


def quantize(weight: np.ndarray) -> dict[str, np.ndarray]:
    """{"codes": uint8 [N, blocks, 32], "scales": float32 [N, blocks]} of a float32 weight [N, K]."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :columns] = weight
    by_block = padded.reshape(rows, blocks, BLOCK)
    scales = np.abs(by_block).max(2) / np.float32(127)
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    by_block *= inverse[..., None]
    np.rint(by_block, out=by_block)
    by_block += 128
    return {"codes": by_block.astype(np.uint8), "scales": scales}


def dequantize(codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: np.ndarray | None = None) -> np.ndarray:
    """float32 [rows, K] = (code - 128) * scale; `rows` are indices, None is all of them."""
    picked = {key: value if rows is None else value[rows] for key, value in codes.items()}
    weight = picked["codes"].astype(np.float32)
    weight -= 128
    weight *= picked["scales"][..., None]
    result: np.ndarray = weight.reshape(len(weight), -1)[:, : shape[1]]
    return result
