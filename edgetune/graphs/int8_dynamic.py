"""Weights in 8 bits with one scale per row, activations in 8 bits with one scale per call, quantized as they come: for
processors without a 4-bit kernel, 32-bit ARM above all.

    weight[n, k] = (code[k, n] - 128) * scale[n]

`DynamicQuantizeMatMul` wants the transpose, uint8 [K, N]. The codes are unsigned around 128: the AVX2 kernel for signed
ones adds pairs of products in 16 bits and saturates, the one for unsigned does not. The single scale of the activations
is this format's larger error; the export measures it on the task. Not measured on ARM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetune.grids import row_tiles
from edgetune.grids.int4 import Fill
from edgetune.weights import Matrix

NAME = "int8-dynamic"
ROUNDS_ACTIVATIONS = True

_FLOAT = 1  # onnx.TensorProto.FLOAT
_ZERO = 128


def quantize(weight: Matrix) -> dict[str, np.ndarray]:
    """{"codes": uint8 [K, N], "scales": float32 [N]} of a float32 weight [N, K]."""
    rows, columns = weight.shape
    codes, scales = np.empty((columns, rows), np.uint8), np.empty(rows, np.float32)
    for at in row_tiles((rows, columns)):
        tile = weight[at]
        scales[at] = np.abs(tile).max(1) / np.float32(127)
        inverse = np.divide(1.0, scales[at], out=np.zeros_like(scales[at]), where=scales[at] != 0)
        codes[:, at] = (np.rint(tile * inverse[:, None]) + _ZERO).T
    return {"codes": codes, "scales": scales}


def row_unit(shape: tuple[int, int]) -> int:
    """Every row has bytes of its own."""
    return 1


def rows_of(codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice) -> dict[str, np.ndarray]:
    """The part of the arrays that holds a range of rows; views."""
    return {"codes": codes["codes"][:, rows], "scales": codes["scales"][rows]}


def dequantize(
    codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice | np.ndarray | None = None
) -> np.ndarray:
    """float32 [rows, K] = (code - 128) * scale; `rows` are a range or indices, None is all of them."""
    at = slice(None) if rows is None else rows
    weight = np.ascontiguousarray(codes["codes"][:, at].T, np.float32)
    weight -= _ZERO
    weight *= codes["scales"][at, None]
    return weight


# x [..., K] ── DynamicQuantizeMatMul(codes, scales, 128, bias) ── y [..., N]
def emit_linear(
    builder: Any, path: str, x: Any, name: str, shape: tuple[int, int], fill: Fill, *, bias: Any = None
) -> Any:
    """Gives x W^T + bias for the weight `name` [N, K]; `fill` writes its codes into the file."""
    operands = [x, *_initializers(builder, name, shape, fill), builder.constant("int8.zero", np.array(_ZERO, np.uint8))]
    return builder.op(
        f"{path}/DynamicQuantizeMatMul", "DynamicQuantizeMatMul", operands if bias is None else [*operands, bias],
        domain="com.microsoft",
    )  # fmt: skip


# ids [b, s] ─┬─ Gather(codes) [K, b, s] ── Transpose ── Cast ── Sub(128) ── Mul ── rows [b, s, K]
#             └─ Gather(scales) ── Unsqueeze [b, s, 1] ──────────────────────┘
def emit_embedding(builder: Any, path: str, ids: Any, name: str, shape: tuple[int, int], fill: Fill) -> Any:
    """Rows of the weight `name` [V, K] for ids [b, s] from the bytes that `emit_linear` multiplies with: exact."""
    codes, scales = _initializers(builder, name, shape, fill)
    found = builder.op(f"{path}/codes/Gather", "Gather", [codes, ids], axis=1)
    found = builder.op(f"{path}/codes/Transpose", "Transpose", [found], perm=[1, 2, 0])
    found = builder.op(f"{path}/codes/Cast", "Cast", [found], to=_FLOAT)
    levels = builder.op(f"{path}/Sub", "Sub", [found, builder.constant("int8.zero.float", np.array(_ZERO, np.float32))])
    scale = builder.op(f"{path}/scales/Gather", "Gather", [scales, ids], axis=0)
    last = builder.constant(f"{path}/last", np.array([-1], np.int64))
    return builder.op(
        f"{path}/Mul", "Mul", [levels, builder.op(f"{path}/scales/Unsqueeze", "Unsqueeze", [scale, last])]
    )


def _initializers(builder: Any, name: str, shape: tuple[int, int], fill: Fill) -> tuple[Any, Any]:
    """Codes and scales of a weight."""
    rows, columns = shape
    values = builder.weights(name, {"codes": ("uint8", (columns, rows)), "scales": ("float32", (rows,))}, fill)
    return values["codes"], values["scales"]
