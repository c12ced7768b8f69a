"""Frozen layers as ONNX nodes, while torch.onnx.export traces the network around them.

    linear, int4        x ── MatMulNBits(codes, scales, bias) ── y
    linear, nf4         x ── MatMulBnb4(codes, absmax) ── Add(bias) ── y
    convolution, int4   codes ── GatherBlockQuantized ── Reshape ── W;   x ── Conv(W, bias) ── y
    anything dense      Gemm or Conv in float32; so are convolutions on nf4, which no operator reads but MatMulBnb4

The codes in the file are those of training. A convolution's are decoded by onnxruntime when it loads the graph (they
are constants), so a call costs what a dense one costs and the file holds 4 bits.

With an adapter as inputs, A [in, r] and B [r, out] are such for every layer, with the scaling in B:

    linear              y + (x A) B
    convolution         W + (A B)^T in the place of W, A [in * k…, r]

which is LoRA's convolution merged on the fly: its product is as large as the weight, and not as the signal is long.
Without them `merged` layers compute in float32, with the adapter in the weight.
"""

from __future__ import annotations

import math
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
    rows: torch.Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, layer: FrozenLayer, *, merge: bool) -> None:
        super().__init__()
        self.frozen, self.pads, self.geometry = layer.frozen.shape, layer.pads, layer.geometry
        self.padded = layer.padded
        grid = None if merge and layer.adapted else layer.frozen.grid
        self.grid = "" if grid is None or (grid == nf4.NAME and self.geometry) else grid
        if not self.grid:
            weight = layer.weight if merge else layer.frozen.dense()
            self.register_buffer("weight", weight.detach().clone())
        for key, array in layer.frozen.arrays().items() if self.grid else ():
            widened = array.astype("float32") if array.dtype == "float16" else array
            by_row = self.geometry and key == "scales"
            self.register_buffer(key, torch.from_numpy(widened[..., None] if by_row else widened))
        self.register_buffer("rows", torch.arange(self.frozen[0]) if self.grid and self.geometry else None)
        self.register_buffer("bias", layer.bias)
        self.takes_adapter = layer.adapted and not merge
        if self.takes_adapter:
            for name, value in feeds_of(layer).items():
                self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, in operators that the exporter writes as they stand."""
        if self.geometry:
            convolve, _ = CONVOLUTIONS[len(self.frozen) - 2]
            y: torch.Tensor = convolve(self.padded(x), self._filters(), self.bias, **self.geometry)
            return y
        y = self._product(x)
        return y + _matmul(_matmul(x, self.lora_A), self.lora_B) if self.takes_adapter else y

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self.frozen
        if not self.grid:
            return functional.linear(x, self.weight, self.bias)
        sizes = {"K": columns, "N": rows}
        shape = (*x.shape[:-1], rows)
        if self.grid == int4.NAME:
            attributes = sizes | {"bits": 4, "block_size": int4.BLOCK, "accuracy_level": 4}
            inputs: list[Any] = [x, self.codes, self.scales] + ([] if self.bias is None else [None, None, self.bias])
            return _operator("MatMulNBits", inputs, attributes, shape)
        attributes = sizes | {"block_size": nf4.BLOCK, "quant_type": 1}
        y = _operator("MatMulBnb4", [x, self.codes, self.absmax], attributes, shape)
        return y if self.bias is None else y + self.bias

    def _filters(self) -> torch.Tensor:
        """The weight of a convolution."""
        rows, columns = self.frozen[0], math.prod(self.frozen[1:])
        if not self.grid:
            weight = self.weight
        else:
            blocks = -(-columns // int4.BLOCK)
            attributes = {"bits": 4, "block_size": int4.BLOCK, "gather_axis": 0, "quantize_axis": 2}
            inputs = [self.codes, self.rows, self.scales]
            weight = _operator("GatherBlockQuantized", inputs, attributes, (rows, blocks, int4.BLOCK))
            weight = weight.reshape(rows, -1)
            weight = weight if columns == blocks * int4.BLOCK else weight[:, :columns]
        if self.takes_adapter:
            weight = weight.reshape(rows, columns) + _matmul(self.lora_A, self.lora_B).T
        return weight.reshape(self.frozen)


def feeds_of(layer: FrozenLayer) -> dict[str, torch.Tensor]:
    """`lora_A` [inputs of an output, r] and `lora_B` [r, out] with the scaling, of an adapted layer."""
    assert layer.lora_A is not None and layer.lora_B is not None
    a, b = layer.lora_A.detach().flatten(1).T, layer.lora_B.detach().flatten(1).T * layer.scaling
    return {"lora_A": a.contiguous(), "lora_B": b.contiguous()}


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product that is one node, whatever the rank: torch's own is written with reshapes by the rank of the example."""
    return _operator("MatMul", [a, b], {}, (*a.shape[:-1], b.shape[-1]))


def _operator(name: str, inputs: list[Any], attributes: dict[str, Any], shape: tuple[Any, ...]) -> torch.Tensor:
    """A float32 result of an ONNX operator: of onnxruntime's own where it has attributes, else a standard one."""
    domain, version = (f"{CONTRIB}::", 1) if attributes else ("", OPSET)
    return torch.onnx.ops.symbolic(
        f"{domain}{name}", inputs, attributes, dtype=torch.float32, shape=shape, version=version
    )
