"""A frozen weight of a user's own layer: on a 4-bit grid, or dense where that is no use.

A convolution's weight [out, in, k…] lies on the grid as the matrix [out, in * k…]: blocks run along a filter. It is
dequantized for every product and again in backward, so what a layer keeps is its codes; autograd would save the dense
weight of every layer until its backward.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv1d_input, conv2d_input

from edgetune.grids import GRIDS

CONVOLUTIONS = {1: (functional.conv1d, conv1d_input), 2: (functional.conv2d, conv2d_input)}


class FrozenWeight(nn.Module):
    """A weight [out, …] as buffers: the grid's arrays, or `weight` itself where `grid` is None."""

    def __init__(self, weight: torch.Tensor, grid: str | None) -> None:
        super().__init__()
        self.shape, self.grid = tuple(weight.shape), grid
        arrays = {"weight": weight.detach().numpy()}
        if grid is not None:
            arrays = GRIDS[grid].load(GRIDS[grid].quantize(arrays["weight"].reshape(self.matrix)).__getitem__)
        for key, array in arrays.items():
            self.register_buffer(key, torch.from_numpy(np.ascontiguousarray(array)))

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, weights of an output)."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def arrays(self) -> dict[str, np.ndarray]:
        """The buffers as numpy views."""
        return {name: buffer.numpy() for name, buffer in self.named_buffers()}

    def dense(self) -> torch.Tensor:
        """float32, of the layer's own shape."""
        if self.grid is None:
            return self.get_buffer("weight")
        return torch.from_numpy(GRIDS[self.grid].dequantize(self.arrays(), self.matrix)).view(self.shape)


class LinearProduct(torch.autograd.Function):
    """x [..., in] -> x W^T [..., out]; gradients go to x alone: d_x = d_y W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        ctx.weight = weight
        return x @ weight.dense().T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] @ ctx.weight.dense(), None


class ConvProduct(torch.autograd.Function):
    """x [N, in, …] -> its convolution with W [N, out, …]; gradients go to x alone, by the transposed convolution."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight, geometry: dict[str, Any]) -> torch.Tensor:
        ctx.weight, ctx.geometry, ctx.size = weight, geometry, x.shape
        forward, _ = CONVOLUTIONS[len(weight.shape) - 2]
        return forward(x, weight.dense(), **geometry)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        _, backward = CONVOLUTIONS[len(ctx.weight.shape) - 2]
        return backward(ctx.size, ctx.weight.dense(), grads[0], **ctx.geometry), None, None  # type: ignore[no-untyped-call]
