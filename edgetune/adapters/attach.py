"""An adapter method around the frozen linears of a torch model.

`AdaptedLinear` holds the frozen layer and the method's tensors and knows neither: no class per combination of method
and grid. Dropout masks come from counters (seed, step, micro-batch, slot), so a recomputed block sees the mask of its
first pass and a resumed run sees those of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from edgetune.adapters import METHODS
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError
from edgetune.linear import FrozenLinear
from edgetune.models.decoder import Decoder
from edgetune.models.encoder import Encoder


class AdaptedLinear(nn.Module):
    """`base_layer` plus a method's contribution from the same input."""

    def __init__(self, base_layer: FrozenLinear, slot: Slot, index: int, config: AdapterConfig) -> None:
        super().__init__()
        self.base_layer, self.slot, self.index, self.config = base_layer, slot, index, config
        self.method = METHODS[config.method]
        self.tensors = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape)) for name, shape in slot.tensors.items()}
        )
        self.dropout_key: tuple[int, ...] | None = None  # None: no dropout, as in evaluation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in_features] -> [..., out_features]."""
        y = self.base_layer(x)
        result: torch.Tensor = self.method.forward(self._dropped(x), y, self.tensors, self.config)
        return result

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds the method's contribution for x [N, in_features] to y [N, out_features]."""
        self.method.add(self._dropped(x), y, self.tensors, self.config)

    def add_gradients(self, x: torch.Tensor, d_y: torch.Tensor, d_x: torch.Tensor | None) -> None:
        """Backward of `add` for d_y [N, out_features]: adds to d_x [N, in_features] and to `.grad` of the tensors."""
        for value in self.tensors.values():
            if value.grad is None:
                value.grad = torch.zeros_like(value)
        gradients = {name: value.grad for name, value in self.tensors.items()}
        keep = self._keep(x.shape)
        if keep is None:
            self.method.add_gradients(x, d_y, d_x, self.tensors, gradients, self.config)
            return
        d_dropped = None if d_x is None else torch.zeros_like(x)
        self.method.add_gradients(x * keep, d_y, d_dropped, self.tensors, gradients, self.config)
        if d_x is not None and d_dropped is not None:
            d_x.addcmul_(d_dropped, keep)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        keep = self._keep(x.shape)
        return x if keep is None else x * keep

    def _keep(self, shape: torch.Size) -> torch.Tensor | None:
        """0 where dropout takes a value and 1 / (1 - p) elsewhere; None where nothing is dropped."""
        p = self.config.dropout
        if p == 0 or self.dropout_key is None:
            return None
        seed = int(np.random.SeedSequence([*self.dropout_key, self.index]).generate_state(1, np.uint64)[0] >> 1)
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= p
        return keep.float().div_(1 - p)

    def merged_weight(self) -> torch.Tensor:
        """float32 [out_features, in_features]: the frozen weight with the adapter folded in, as a new tensor."""
        tensors = {name: value.detach().numpy() for name, value in self.tensors.items()}
        weight = self.base_layer.dequantize().numpy()
        return torch.from_numpy(self.method.merge(weight, tensors, slice(None), self.config))


def attach(model: Decoder | Encoder, config: AdapterConfig, seed: int = 0) -> dict[str, nn.Parameter]:
    """Wrap the linears that a resolved config names; return the trainable tensors by full name.

    The values are initialized from `seed` alone; the adapted model computes what the base computes.
    """
    method = METHODS[config.method]
    parameters: dict[str, nn.Parameter] = {}
    for index, slot in enumerate(method.slots(config, model.config)):
        path, _, name = slot.place.removeprefix("model.").rpartition(".")
        parent = model.get_submodule(path)
        layer = AdaptedLinear(getattr(parent, name), slot, index, config)
        for key, value in method.initialize(slot, config, np.random.default_rng([seed, index])).items():
            layer.tensors[key].data.copy_(torch.from_numpy(value))
            parameters[f"{slot.place}.{key}"] = layer.tensors[key]
        setattr(parent, name, layer)
    return parameters


def load_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, np.ndarray]) -> None:
    """Copy adapter tensors into attached parameters.

    Raises:
        AdapterError: a tensor is missing, extra or of another shape.
    """
    problems = [f"{name} is missing" for name in parameters if name not in tensors]
    problems += [f"{name} has no place" for name in tensors if name not in parameters]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}; {list(value.shape)} was expected"
        for name, value in parameters.items()
        if name in tensors and tensors[name].shape != tuple(value.shape)
    ]
    if problems:
        raise AdapterError("The adapter does not fit: " + "; ".join(problems[:10]))
    for name, value in parameters.items():
        value.data.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))


def set_dropout(decoder: Decoder, key: tuple[int, ...] | None) -> None:
    """Choose the dropout masks of every adapted linear by counters such as (seed, step, micro-batch); None: none."""
    for module in decoder.modules():
        if isinstance(module, AdaptedLinear):
            module.dropout_key = key
