"""What an adapter method puts at a place that is no linear's (`models.places`), as modules of a torch model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from edgetune.adapters import METHODS, p_tuning
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.p_tuning import PTuningConfig
from edgetune.adapters.prefix import PrefixConfig
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError
from edgetune.models.decoder import Decoder
from edgetune.models.encoder import Encoder
from edgetune.models.places import Prefix, StateAdapter, VirtualTokens


class AdaptedState(StateAdapter):
    """A method's tensors on hidden states."""

    def __init__(self, slot: Slot, config: AdapterConfig) -> None:
        super().__init__()
        self.slot, self.config, self.method = slot, config, METHODS[config.method]
        self.tensors = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape)) for name, shape in slot.tensors.items()}
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `StateAdapter`."""
        result: torch.Tensor = self.method.forward(x, y, self.tensors, self.config)
        return result

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """See `StateAdapter`."""
        self.method.add(x, y, self.tensors, self.config)

    def add_gradients(self, x: torch.Tensor, d_y: torch.Tensor, d_x: torch.Tensor) -> None:
        """See `StateAdapter`."""
        self.method.add_gradients(x, d_y, d_x, self.tensors, gradients_of(self.tensors), self.config)


class EncodedTokens(VirtualTokens):
    """A prompt that a network makes of the first of these tensors (`adapters.p_tuning`), anew in every pass."""

    def __init__(self, tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__(tensors["embedding"], slice(None))
        self.tensors = nn.ParameterDict(tensors)

    @property
    def values(self) -> torch.Tensor:
        """See `VirtualTokens`."""
        made: torch.Tensor = p_tuning.encode(dict(self.tensors))
        return made

    def add_gradients(self, tokens: torch.Tensor, d: torch.Tensor) -> None:
        """See `VirtualTokens`."""
        d_values = torch.zeros_like(self.weight).index_add_(0, tokens, d)
        p_tuning.add_gradients(d_values, dict(self.tensors), gradients_of(self.tensors))


def gradients_of(tensors: nn.ParameterDict) -> dict[str, torch.Tensor]:
    """`.grad` of the tensors, which is made where it is missing."""
    for value in tensors.values():
        if value.grad is None:
            value.grad = torch.zeros_like(value)
    return {name: value.grad for name, value in tensors.items()}


def put_virtual_tokens(
    model: Decoder | Encoder, slot: Slot, config: AdapterConfig, rng: np.random.Generator
) -> dict[str, nn.Parameter]:
    """Give a decoder the one tensor of a prompt, or of the prefix of all its layers, which is zero until it is started,
    or the network that makes a prompt, with its first values.

    Raises:
        AdapterError: the model is an encoder.
    """
    if not isinstance(model, Decoder):
        raise AdapterError(f"{config.method} needs a decoder: its virtual tokens come before those that see them.")
    model.virtual_tokens = config.virtual_tokens
    if isinstance(config, PTuningConfig):
        made = p_tuning.initialize(slot, config, rng)
        tensors = {name: nn.Parameter(torch.from_numpy(value)) for name, value in made.items()}
        model.prompt = EncodedTokens(tensors)
        return tensors
    ((name, shape),) = slot.names.items()
    weight = nn.Parameter(torch.zeros(shape))
    if isinstance(config, PrefixConfig):
        width = model.config.num_key_value_heads * model.config.head_dim
        parts = [VirtualTokens(weight, slice(at, at + width)) for at in range(0, shape[1], width)]
        for block, key, value in zip(model.blocks, parts[::2], parts[1::2], strict=True):
            block.self_attn.prefix = Prefix(key, value)
    else:
        model.prompt = VirtualTokens(weight, slice(None))
    return {name: weight}
