"""The int4 grid in standard operators alone, for runtimes without com.microsoft: weight = (code - 8) * scale.

Codes lie as `DequantizeLinear` (opset 21 and later) wants them along axis 0: UINT4 [K, N], flat, the low nibble first;
scales are float32 [ceil(K/32), N]. That is the transpose of the grid's own bytes with every code and scale unchanged,
so it is exact on an int4 base. Onnxruntime fuses the product into `MatMulNBits` when it loads the graph (as fast, at
twice the load time, with a copy on the heap); along axis 1 or with its optimizations off it would not, and takes
milliseconds for each matrix. A graph of these weights uses no contrib operator anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetune.grids import int4, row_tiles
from edgetune.grids.int4 import BLOCK, Fill
from edgetune.weights import Matrix

NAME = "standard"
ROUNDS_ACTIVATIONS = True

_INT32 = 6  # onnx.TensorProto.INT32
_ZEROS = 0x88  # two codes of 8
# Index 2 * byte + parity -> level of the byte's low (even) or high (odd) nibble.
_LEVELS = np.array([[byte & 15, byte >> 4] for byte in range(256)], np.float32).reshape(-1) - 8


def quantize(weight: Matrix) -> dict[str, np.ndarray]:
    """{"codes": uint8 [ceil(K * N / 2)], "scales": float32 [ceil(K/32), N]} of a float32 weight [N, K]."""
    rows, columns = weight.shape
    return from_int4(int4.load(int4.quantize(weight).__getitem__), (rows, columns))


def from_int4(codes: Mapping[str, np.ndarray], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """The same, exactly, of a weight [N, K] that is on the int4 grid."""
    rows, columns = shape
    nibbles = np.zeros(rows * columns + rows * columns % 2, np.uint8)
    by_column = nibbles[: rows * columns].reshape(columns, rows)
    for at in row_tiles(shape):
        packed = codes["codes"][at].reshape(at.stop - at.start, -1)
        by_column[0::2, at] = (packed & 15).T[: -(-columns // 2)]
        by_column[1::2, at] = (packed >> 4).T[: columns // 2]
    pairs = nibbles.reshape(-1, 2)
    scales = np.ascontiguousarray(codes["scales"].T, np.float32)
    return {"codes": pairs[:, 0] | pairs[:, 1] << 4, "scales": scales}


def row_unit(shape: tuple[int, int]) -> int:
    """Two rows share the bytes of a column; where their number is odd, all of them do."""
    return shape[0] if shape[0] % 2 else 2


def rows_of(codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice) -> dict[str, np.ndarray]:
    """The part of the arrays that holds a range of rows; views."""
    if rows == slice(0, shape[0]):
        return dict(codes)
    by_column = codes["codes"].reshape(shape[1], shape[0] // 2)
    return {"codes": by_column[:, rows.start // 2 : -(-rows.stop // 2)], "scales": codes["scales"][:, rows]}


def dequantize(
    codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice | np.ndarray | None = None
) -> np.ndarray:
    """float32 [rows, K] = (code - 8) * scale; `rows` are a range or indices, None is all of them."""
    count, columns = shape
    picked = np.arange(count)[slice(None) if rows is None else rows]
    weight = np.empty((len(picked), columns), np.float32)
    for at in row_tiles(weight.shape):
        element = picked[at, None] + np.arange(columns) * count
        weight[at] = _LEVELS[2 * codes["codes"][element >> 1].astype(np.int32) + (element & 1)]
        weight[at] *= codes["scales"].T[picked[at]].repeat(BLOCK, 1)[:, :columns]
    return weight


# codes, scales ── DequantizeLinear(axis 0, block 32) [K, N] ─┐
# x [..., K] ─────────────────────────────────────────────────┴─ MatMul ── Add(bias) ── y [..., N]
def emit_linear(
    builder: Any, path: str, x: Any, name: str, shape: tuple[int, int], fill: Fill, *, bias: Any = None
) -> Any:
    """Gives x W^T + bias for the weight `name` [N, K]; `fill` writes its codes into the file."""
    rows, columns = shape
    _, scales = _initializers(builder, name, shape, fill)
    codes = builder.view(f"{name}.codes.columns", f"{name}.codes", "uint4", (columns, rows))
    weight = builder.op(
        f"{path}/DequantizeLinear", "DequantizeLinear", [codes, scales, _zero_points(builder, scales)],
        axis=0, block_size=BLOCK,
    )  # fmt: skip
    y = builder.op(f"{path}/MatMul", "MatMul", [x, weight])
    return y if bias is None else builder.op(f"{path}/bias/Add", "Add", [y, bias])


# ids [b, s] ─ Unsqueeze ─ Add(k * V) ─┬─ Div(2) ─ Gather(bytes) ─ Cast ─ Mul(2) ─┐
#                                      └─ Mod(2) ─ Cast ──────────────────────────┴─ Add ─ Gather(levels) ─ Mul ─ rows
# ids ─ Gather(scales) [blocks, b, s] ─ Transpose ─ Gather(k / 32) [b, s, K] ─────────────────────────────────┘
def emit_embedding(builder: Any, path: str, ids: Any, name: str, shape: tuple[int, int], fill: Fill) -> Any:
    """Rows of the weight `name` [V, K] for ids [b, s] from the bytes that `emit_linear` multiplies with: exact.

    `DequantizeLinear` before `Gather` would dequantize the whole table for every token.
    """
    rows, columns = shape
    codes, _ = _initializers(builder, name, shape, fill)
    # Under a name of their own: scales that another node reads too keep onnxruntime from fusing a tied head.
    scales = builder.view(f"{name}.scales.rows", f"{name}.scales", "float32", (-(-columns // BLOCK), rows))

    def op(key: str, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        return builder.op(f"{path}/{key}/{op_type}", op_type, inputs, **attributes)

    def number(key: str, value: Any, dtype: Any = np.int64) -> Any:
        return builder.constant(f"{path}/{key}", np.array(value, dtype))

    two = number("two", 2)
    column = op("element", "Unsqueeze", ids, number("last", [-1]))
    element = op("element", "Add", column, number("offsets", np.arange(columns) * rows))
    byte = op("byte", "Gather", codes, op("byte", "Div", element, two), axis=0)
    index = op("byte", "Mul", op("byte", "Cast", byte, to=_INT32), number("two.int32", 2, np.int32))
    parity = op("parity", "Cast", op("parity", "Mod", element, two), to=_INT32)
    table = builder.constant("standard.levels", _LEVELS)
    levels = op("levels", "Gather", table, op("levels", "Add", index, parity), axis=0)
    scale = op("scale", "Transpose", op("scale/ids", "Gather", scales, ids, axis=1), perm=[1, 2, 0])
    scale = op("scale", "Gather", scale, number("blocks", np.arange(columns) // BLOCK), axis=2)
    return builder.op(f"{path}/Mul", "Mul", [levels, scale])


def _initializers(builder: Any, name: str, shape: tuple[int, int], fill: Fill) -> tuple[Any, Any]:
    """Bytes of the codes, flat, and scales of a weight."""
    rows, columns = shape
    arrays = {
        "codes": ("uint8", (-(-rows * columns // 2),)), "scales": ("float32", (-(-columns // BLOCK), rows))
    }  # fmt: skip
    values = builder.weights(name, arrays, fill)
    return values["codes"], values["scales"]


def _zero_points(builder: Any, scales: Any) -> Any:
    """UINT4 of the scales' shape, all 8; matrices of one shape share it."""
    blocks, rows = scales.shape
    nbytes = -(-blocks * rows // 2)
    name = f"standard.zero_points.{blocks}x{rows}"
    builder.weight(f"{name}.bytes", "uint8", (nbytes,), lambda: np.full(nbytes, _ZEROS, np.uint8))
    return builder.view(name, f"{name}.bytes", "uint4", (blocks, rows))
