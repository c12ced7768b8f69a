"""Frozen linear layers over mapped weights: on a grid, or dense.

Neither class owns a copy of its weight. `forward` dequantizes the matrix into a buffer that all layers of a model
share, multiplies, and the next layer overwrites it; backward does the same again (`grad_x = grad_y @ W`). So the
float32 weights alive at any time are one matrix, whatever the model's size.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from edgetune.base import Base
from edgetune.grids import GRIDS

Rows = slice | np.ndarray | None


class Workspace:
    """Named float32 buffers, each as large as its largest request so far; a request overwrites the one before."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, rows: int, columns: int, name: str = "weight") -> torch.Tensor:
        """An uninitialized [rows, columns] view."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            self._buffers.pop(name, None)
            del buffer  # give the old one back before the new one is taken
            buffer = self._buffers[name] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)

    def like(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """As `take`, of x's shape."""
        return self.take(x.shape[0], x.shape[1], name)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every buffer."""
        return {name: buffer.numel() * buffer.element_size() for name, buffer in self._buffers.items()}


class FrozenLinear(nn.Module):
    """y = x W^T + bias with W [out_features, in_features] on a 4-bit grid."""

    def __init__(self, base: Base, module: str, workspace: Workspace) -> None:
        super().__init__()
        self.name = module
        self.out_features, self.in_features = base.shape(module)
        self.nbytes = base.nbytes(module)
        self.workspace = workspace
        self.bias = torch.from_numpy(base.vector(f"{module}.bias")) if f"{module}.bias" in base.weights else None
        self.grid = base.grid_of(module)
        self._load(base)

    def _load(self, base: Base) -> None:
        assert self.grid is not None
        self.codes = base.codes(self.name)

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _rows(self, rows: Rows, out: np.ndarray | None) -> np.ndarray:
        assert self.grid is not None
        weight: np.ndarray = GRIDS[self.grid].dequantize(self.codes, self.shape, rows, out)
        return weight

    def dequantize(self, rows: slice | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [rows, in_features]; into `out` where given, else into a new tensor."""
        return torch.from_numpy(self._rows(rows, None if out is None else out.numpy()))

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight as an embedding: ids [...] -> float32 [..., in_features]."""
        unique, inverse = np.unique(ids.numpy(), return_inverse=True)
        rows = torch.from_numpy(self._rows(unique, None))
        return rows[torch.from_numpy(inverse.reshape(ids.shape))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in_features] -> [..., out_features]. Gradients flow to x alone."""
        y: torch.Tensor = _FrozenMatmul.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}"


class DenseLinear(FrozenLinear):
    """The same over a weight in its stored dtype (float32, float16 or bfloat16)."""

    def _load(self, base: Base) -> None:
        view = base.weights.array(f"{self.name}.weight")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the map is read-only; nothing here writes to it
            weight = torch.from_numpy(view)
        self.weight = weight.view(torch.bfloat16) if base.weights[f"{self.name}.weight"].dtype == "BF16" else weight

    def _rows(self, rows: Rows, out: np.ndarray | None) -> np.ndarray:
        picked = self.weight if rows is None else self.weight[rows]
        if out is None:
            return picked.float().numpy()
        torch.from_numpy(out).copy_(picked)
        return out


class _FrozenMatmul(torch.autograd.Function):
    """y = x W^T; the weight is a constant that is dequantized again in backward rather than saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FrozenLinear) -> torch.Tensor:
        ctx.linear = linear
        weight = linear.dequantize(out=linear.workspace.take(*linear.shape))
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        linear = ctx.linear
        weight = linear.dequantize(out=linear.workspace.take(*linear.shape))
        return grads[0] @ weight, None


def frozen_linear(base: Base, module: str, workspace: Workspace) -> FrozenLinear:
    """The layer for a matrix of a base, on its grid or dense."""
    kind = DenseLinear if base.grid_of(module) is None else FrozenLinear
    return kind(base, module, workspace)
