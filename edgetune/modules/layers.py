"""Linear, Conv1d and Conv2d over a frozen weight, with LoRA; and which layers of a network cannot become that.

    linear        y = W x + b + s B A x                    A [r, in],       B [out, r]
    convolution   y = W * x + b + s B * (A * x)            A [r, in, k…],   B [out, r, 1…]

The convolution's form is PEFT's: A has the layer's kernel, stride and padding and gives r channels, B mixes them with a
1 x 1 kernel. A convolution after another with a 1 x 1 kernel is one convolution, so it merges: W + s B A, with A as a
matrix [r, in * k…]. A is dilated as its layer is, which PEFT's (0.21) is not; everything else is computed as PEFT does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized

from edgetune.grids import GRIDS
from edgetune.modules.frozen import CONVOLUTIONS, ConvProduct, FrozenWeight, LinearProduct

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)
MIN_WEIGHTS = 1024  # of a layer on a grid: below, 4 bits save 3 KiB at most


class FrozenLayer(nn.Module):
    """A layer of the network, frozen; `lora_A` and `lora_B` are None until `adapt` makes them.

    `weight` and `bias` are what code that reads them expects, the adapter included.
    """

    bias: torch.Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d, grid: str | None) -> None:
        super().__init__()
        self.kind = type(layer).__name__
        self.frozen = FrozenWeight(layer.weight, grid)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.pads: tuple[int, ...] = ()
        self.geometry: dict[str, Any] = {}
        if isinstance(layer, nn.Linear):
            self.in_features, self.out_features = layer.in_features, layer.out_features
        else:
            self.in_channels, self.out_channels, self.kernel_size = (
                layer.in_channels, layer.out_channels, layer.kernel_size
            )  # fmt: skip
            self.pads, padding = _padding(layer)
            self.geometry = {
                "stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups
            }  # fmt: skip
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling, self.dropout = 1.0, 0.0

    def adapt(self, r: int, scaling: float, dropout: float, generator: torch.Generator) -> None:
        """Add LoRA: A uniform in ±1/sqrt(inputs of an output), B zero, as PEFT begins."""
        out, *rest = self.frozen.shape
        bound = 1 / math.sqrt(math.prod(rest))
        a = torch.empty(r, *rest).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(out, r, *(1 for _ in rest[1:])))
        self.scaling, self.dropout = scaling, dropout

    @property
    def adapted(self) -> bool:
        """Whether it has an adapter."""
        return self.lora_A is not None

    @property
    def weight(self) -> torch.Tensor:
        """The merged weight, float32 in the layer's own shape; a new tensor where there is something to merge."""
        if self.lora_A is None or self.lora_B is None:
            return self.frozen.dense()
        product = self.lora_B.flatten(1) @ self.lora_A.flatten(1)
        return self.frozen.dense() + product.view(self.frozen.shape) * self.scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer computed, plus its adapter's contribution."""
        y: torch.Tensor
        if not self.geometry:
            y = LinearProduct.apply(x, self.frozen)  # type: ignore[no-untyped-call]
            y = y if self.bias is None else y + self.bias
            if self.lora_A is None or self.lora_B is None:
                return y
            return y + (self._dropped(x) @ self.lora_A.T) @ self.lora_B.T * self.scaling
        if x.dim() < len(self.frozen.shape):  # one example without a batch
            return self.forward(x[None])[0]
        x = self.padded(x)
        y = ConvProduct.apply(x, self.frozen, self.geometry)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias.view(-1, *(1 for _ in self.frozen.shape[2:]))
        if self.lora_A is None or self.lora_B is None:
            return y
        convolve, _ = CONVOLUTIONS[len(self.frozen.shape) - 2]
        return y + convolve(convolve(self._dropped(x), self.lora_A, **self.geometry), self.lora_B) * self.scaling

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """The input with the zeros that `padding="same"` puts at one side more than at the other."""
        return functional.pad(x, self.pads) if self.pads else x

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def extra_repr(self) -> str:
        adapter = "" if self.lora_A is None else f", r={self.lora_A.shape[0]}"
        return f"{self.kind}, shape={list(self.frozen.shape)}, grid={self.frozen.grid}{adapter}"


def _padding(layer: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(zeros to put around the input first, last dimension first; padding of the convolution itself)."""
    if layer.padding == "valid":
        return (), (0,) * len(layer.kernel_size)
    if layer.padding != "same":
        return (), tuple(int(size) for size in layer.padding)
    totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return (), tuple(total // 2 for total in totals)
    pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return tuple(pads), (0,) * len(totals)


def untouched_reason(layer: nn.Module) -> str | None:
    """Why a module that has parameters of its own is not replaced; None where it is."""
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent, stays dense: its kernel reads all its weights at once"
    if isinstance(layer, nn.MultiheadAttention):
        return "stays dense: it multiplies with in_proj_weight itself, and so with out_proj"
    if not isinstance(layer, KINDS):
        return "stays dense: neither Linear nor Conv1d nor Conv2d"
    if is_parametrized(layer) or layer._forward_pre_hooks or layer._forward_hooks:
        return "stays dense: a parametrization or a hook takes part in what it computes"
    if type(layer) not in KINDS:
        return f"stays dense: {type(layer).__name__} may compute something else than its parent class"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"stays dense: padding_mode {layer.padding_mode!r}, and LoRA's convolution pads with zeros"
    return None


def no_adapter_reason(layer: nn.Module) -> str | None:
    """Why a layer that is replaced can have no adapter; None where it can."""
    groups = getattr(layer, "groups", 1)
    return f"no adapter: {groups} groups, and LoRA's form of that does not merge" if groups > 1 else None


def dense_reason(shape: tuple[int, ...], grid: str) -> str | None:
    """Why a weight of this shape stays dense; None where the grid takes it.

    Kernels read whole blocks, so short rows are filled up; nf4's blocks cross rows, but a layer is padded to a block.
    """
    weights = math.prod(shape)
    if weights < MIN_WEIGHTS:
        return f"dense: {weights:,} weights, fewer than {MIN_WEIGHTS:,}"
    stored = GRIDS[grid].nbytes((shape[0], weights // shape[0]))
    if 2 * stored > 4 * weights:
        return f"dense: rows of {weights // shape[0]} are filled up to {GRIDS[grid].BLOCK}, which saves less than half"
    return None
