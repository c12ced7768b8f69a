"""Weights in float16: half the file of fp32, and on a CPU the same speed and memory, since stock onnxruntime has no
float16 product there and widens the weights when it loads them. For runtimes and providers that compute in half.

The matrix stays [out, in] as in `dense`; an embedding widens only the rows that it looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetune.errors import ExportError
from edgetune.grids import int4, row_tiles
from edgetune.grids.int4 import Fill
from edgetune.weights import Matrix

NAME = "fp16"
ROUNDS_ACTIVATIONS = False

row_unit, rows_of = int4.row_unit, int4.rows_of  # every row has bytes of its own there too

_FLOAT = 1  # onnx.TensorProto.FLOAT


def quantize(weight: Matrix) -> dict[str, np.ndarray]:
    """{"weight": float16 [N, K]} of a float32 weight [N, K].

    Raises:
        ExportError: a weight is too large for float16.
    """
    half = np.empty(weight.shape, np.float16)
    with np.errstate(over="ignore"):
        for rows in row_tiles(weight.shape):
            half[rows] = weight[rows]
    if not np.isfinite(half).all():
        raise ExportError(f"A weight is larger than float16's {np.finfo(np.float16).max:,.0f}. Use --weights fp32.")
    return {"weight": half}


def dequantize(
    codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice | np.ndarray | None = None
) -> np.ndarray:
    """float32 [rows, K]; `rows` are a range or indices, None is all of them."""
    picked: np.ndarray = codes["weight"] if rows is None else codes["weight"][rows]
    return picked.astype(np.float32)


# weight [N, K] ── Cast(float32) ─┐
# x [..., K] ─────────────────────┴─ FusedMatMul(transB) ── Add(bias) ── y [..., N]
def emit_linear(
    builder: Any, path: str, x: Any, name: str, shape: tuple[int, int], fill: Fill, *, bias: Any = None
) -> Any:
    """Gives x W^T + bias for the weight `name` [N, K]; `fill` writes it into the file."""
    weight = builder.weights(name, {"weight": ("float16", shape)}, fill)["weight"]
    widened = builder.op(f"{path}/Cast", "Cast", [weight], to=_FLOAT)
    y = builder.op(f"{path}/FusedMatMul", "FusedMatMul", [x, widened], domain="com.microsoft", transB=1)
    return y if bias is None else builder.op(f"{path}/bias/Add", "Add", [y, bias])


def emit_embedding(builder: Any, path: str, ids: Any, name: str, shape: tuple[int, int], fill: Fill) -> Any:
    """Rows of the weight `name` [V, K] for ids [b, s]."""
    weight = builder.weights(name, {"weight": ("float16", shape)}, fill)["weight"]
    return builder.op(
        f"{path}/Cast", "Cast", [builder.op(f"{path}/Gather", "Gather", [weight, ids], axis=0)], to=_FLOAT
    )
