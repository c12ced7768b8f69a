"""Frozen layers as ONNX nodes, while torch.onnx.export traces the network around them.

    linear, int4       x ── MatMulNBits(codes, scales, bias) ── y
    linear, nf4        x ── MatMulBnb4(codes, absmax) ── Add(bias) ── y
    convolution        codes ── BitwiseAnd, BitShift ── … ── Mul(scales) ── Reshape ── W;   x ── Conv(W, bias) ── y
    anything dense     Gemm or Conv in float32

The codes in the file are those of training. No kernel convolves with 4 bits, so a convolution's are decoded in standard
operators of constants, which onnxruntime computes once, when it loads the graph: the file holds 4 bits, a call costs
what a dense one does. (Operators that decode in one node, DequantizeLinear and GatherBlockQuantized, are not folded and
run in every call; measured on onnxruntime 1.31.)

With an adapter as inputs, A [in, r] and B [r, out] are such for every layer, with the scaling in B:

    linear             y + (x A) B
    convolution        W + (A B)^T in the place of W, A [in * k…, r]

which is LoRA's convolution merged on the fly: its product is as large as the weight, and not as the signal is long.
Adapted layers that are merged compute in float32, with the adapter in the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgetune.graphs.builder import CONTRIB, OPSET
from edgetune.grids import int4, nf4
from edgetune.modules.frozen import CONVOLUTIONS
from edgetune.modules.layers import FrozenLayer


class TracedLayer(nn.Module):
    """A frozen layer in the form that is exported; `lora_A` and `lora_B` are parameters where they become inputs."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    codes: torch.Tensor
    scales: torch.Tensor
    absmax: torch.Tensor
    levels: torch.Tensor

    def __init__(self, layer: FrozenLayer, *, merge: bool) -> None:
        super().__init__()
        self.shape, self.matrix, self.geometry = layer.frozen.shape, layer.frozen.matrix, layer.geometry
        self.padded, self.takes_adapter = layer.padded, layer.adapted and not merge
        self.grid = None if merge and layer.adapted else layer.frozen.grid
        if self.grid is None:
            self.register_buffer("weight", layer.weight.detach() if merge else layer.frozen.dense())
        else:
            for key, array in layer.frozen.arrays().items():
                widened = array.astype("float32") if array.dtype == "float16" else array
                self.register_buffer(key, torch.from_numpy(widened))
            if self.geometry and self.grid == nf4.NAME:
                self.register_buffer("levels", torch.from_numpy(nf4.LEVELS))
        self.register_buffer("bias", layer.bias)
        if self.takes_adapter:
            for name, value in feeds_of(layer).items():
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, in operators that the exporter writes as they stand."""
        y: torch.Tensor
        if self.geometry:
            convolve, _ = CONVOLUTIONS[len(self.shape) - 2]
            y = convolve(self.padded(x), self._filters(), self.bias, **self.geometry)
            return y
        y = self._product(x)
        return y + _matmul(_matmul(x, self.get_parameter("lora_A")), self._lora_b()) if self.takes_adapter else y

    def _lora_b(self) -> torch.Tensor:
        return self.get_parameter("lora_B")

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.grid is None:
            return functional.linear(x, self.weight, self.bias)
        rows, columns = self.matrix
        attributes, shape = {"K": columns, "N": rows}, (*x.shape[:-1], rows)
        if self.grid == int4.NAME:
            attributes |= {"bits": 4, "block_size": int4.BLOCK, "accuracy_level": 4}
            inputs: list[Any] = [x, self.codes, self.scales, *([] if self.bias is None else [None, None, self.bias])]
            return _operator(f"{CONTRIB}::MatMulNBits", inputs, attributes, shape)
        attributes |= {"block_size": nf4.BLOCK, "quant_type": 1}
        y = _operator(f"{CONTRIB}::MatMulBnb4", [x, self.codes, self.absmax], attributes, shape)
        return y if self.bias is None else y + self.bias

    def _filters(self) -> torch.Tensor:
        """The weight of a convolution."""
        weight = self.weight if self.grid is None else self._decoded()
        if self.takes_adapter:
            weight = weight.reshape(self.matrix) + _matmul(self.get_parameter("lora_A"), self._lora_b()).T
        return weight.reshape(self.shape)

    def _decoded(self) -> torch.Tensor:
        """The matrix [out, in * k…] of codes, as the grid's `dequantize` computes it."""
        # Not `>>`, which torch's exporter (2.13) takes for that of int8.
        four = torch.full((), 4, dtype=torch.uint8)
        high = _operator("BitShift", [self.codes, four], {"direction": "RIGHT"}, self.codes.shape, torch.uint8)
        low = self.codes & 15
        if self.grid == int4.NAME:
            levels = torch.stack([low, high], -1).reshape(*self.scales.shape, int4.BLOCK).to(torch.float32) - 8
            return (levels * self.scales[..., None]).reshape(self.matrix[0], -1)[:, : self.matrix[1]]
        indices = torch.stack([high, low], -1).reshape(-1).to(torch.int32)
        levels = _operator("Gather", [self.levels, indices], {"axis": 0}, indices.shape)
        levels = functional.pad(levels, (0, len(self.absmax) * nf4.BLOCK - len(levels)))
        flat = (levels.reshape(-1, nf4.BLOCK) * self.absmax[:, None]).reshape(-1)
        return flat[: math.prod(self.matrix)].reshape(self.matrix)


def feeds_of(layer: FrozenLayer) -> dict[str, torch.Tensor]:
    """`lora_A` [inputs of an output, r] and `lora_B` [r, out] with the scaling, of an adapted layer."""
    assert layer.lora_A is not None and layer.lora_B is not None
    a, b = layer.lora_A.detach().flatten(1).T, layer.lora_B.detach().flatten(1).T * layer.scaling
    return {"lora_A": a.contiguous(), "lora_B": b.contiguous()}


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product that is one node whatever the rank: torch's own may be written with the rank of the example."""
    return _operator("MatMul", [a, b], {}, (*a.shape[:-1], b.shape[-1]))


def _operator(
    name: str, inputs: list[Any], attributes: dict[str, Any], shape: Sequence[Any], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The result of one ONNX operator; `name` is of ONNX itself, or `domain::name`."""
    version = 1 if "::" in name else OPSET
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=version)
