"""Weights in float32: what a dense model or `--weights fp32` exports to. Same functions as a grid's, nothing rounded.

The matrix stays [out, in], as it is stored, so a tied head and the embedding read one table; `FusedMatMul` transposes
while it packs. Half-precision weights are widened: the CPU kernels would do so at load, on the heap.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetune.grids import int4
from edgetune.grids.int4 import Fill
from edgetune.weights import Matrix

NAME = "fp32"
ROUNDS_ACTIVATIONS = False

row_unit, rows_of = int4.row_unit, int4.rows_of  # every row has bytes of its own there too


def quantize(weight: Matrix) -> dict[str, np.ndarray]:
    """{"weight": the float32 weight [N, K] itself}."""
    return {"weight": weight[:]}


def dequantize(
    codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice | np.ndarray | None = None
) -> np.ndarray:
    """The float32 weight [rows, K]; `rows` are a range or indices, None is all of them."""
    return codes["weight"] if rows is None else codes["weight"][rows]


def emit_linear(
    builder: Any, path: str, x: Any, name: str, shape: tuple[int, int], fill: Fill, *, bias: Any = None
) -> Any:
    """Gives x W^T + bias for the weight `name` [N, K]; `fill` writes it into the file."""
    weight = builder.weights(name, {"weight": ("float32", shape)}, fill)["weight"]
    y = builder.op(f"{path}/FusedMatMul", "FusedMatMul", [x, weight], domain="com.microsoft", transB=1)
    return y if bias is None else builder.op(f"{path}/bias/Add", "Add", [y, bias])


def operands(rows: int | str, columns: int) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """What `emit_rows` takes of a weight [rows, K], as inputs of a graph: key -> (type, shape)."""
    return {"weight": ("float32", (rows, columns))}


def emit_rows(builder: Any, path: str, values: Mapping[str, Any], ids: Any, columns: int) -> Any:
    """Rows [n, K] of a weight for ids of any shape."""
    rows = builder.op(f"{path}/Gather", "Gather", [values["weight"], ids], axis=0)
    shape = builder.constant(f"{path}/shape", np.array([-1, columns], np.int64))
    return builder.op(f"{path}/Reshape", "Reshape", [rows, shape])


def emit_embedding(builder: Any, path: str, ids: Any, name: str, shape: tuple[int, int], fill: Fill) -> Any:
    """Rows of the weight `name` [V, K] for ids [b, s]."""
    weight = builder.weights(name, {"weight": ("float32", shape)}, fill)["weight"]
    return builder.op(f"{path}/Gather", "Gather", [weight, ids], axis=0)
