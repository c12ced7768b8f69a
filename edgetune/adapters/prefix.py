"""Prefix tuning: trained keys and values before those of every row, in each layer  (Li and Liang, arXiv 2101.00190)

    attention(q, [P_k; k], [P_v; v]),   P_k, P_v [p, kv_heads * head_dim] of each layer

Keys are as the rotary embedding leaves them, and the row's own positions begin at p. There is one tensor, laid out as
PEFT's PrefixEncoder without projection: [p, layers * 2 * kv_heads * head_dim], key and value of each layer in turn. The
paper trains it through an MLP and throws that away; here, as there without one, it starts from what the model computes
for p random tokens, so there is no start that equals the base.

Each row of a window has its own p positions, which count as its context; what the block computes there is overwritten.
In an exported graph it is the past that the cache begins with: any client that passes `past_key_values` can use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgetune.adapters.prompt import (
    CAPABILITIES,
    PEFT_NAMES,
    PEFT_SHARED,
    PromptConfig,
    changes,
    slot,
    virtual_tokens_of,
)
from edgetune.adapters.slot import Slot
from edgetune.models import ModelConfig
from edgetune.models.config import DecoderConfig

__all__ = [
    "CAPABILITIES", "NAME", "PEFT_NAMES", "PEFT_SHARED", "Config", "PrefixConfig", "changes", "config_from_peft",
    "config_to_peft", "onnx_tensors", "places", "reads_peft", "slot", "slots",
]  # fmt: skip

NAME = "prefix_tuning"


@dataclass(frozen=True)
class PrefixConfig(PromptConfig):
    """What the user asks of prefix tuning. None means "not set"."""

    method: ClassVar[str] = NAME
    rate_factor: ClassVar[float] = 30

    def where(self, model: ModelConfig) -> str:
        """See `AdapterConfig`."""
        return f"keys and values of {model.num_hidden_layers} blocks"


Config = PrefixConfig


def places(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The model as a whole, of (keys and values of a position in all layers, 0)."""
    assert isinstance(model, DecoderConfig), "an encoder has no cache"
    return {"": (2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim, 0)}


def slots(config: PrefixConfig, model: ModelConfig) -> list[Slot]:
    """The one tensor, which is the model's as a whole."""
    return [slot(place, shape, config) for place, shape in places(model).items()]


def onnx_tensors(tensors: Mapping[str, np.ndarray], layers: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Graph inputs: `past_key_values.%d.key` and `.value` [1, kv_heads, p, head_dim]."""
    weight = tensors["prompt_embeddings"]
    parts = weight.reshape(len(weight), layers, 2, kv_heads, -1).transpose(1, 2, 3, 0, 4)
    return {
        f"past_key_values.{index}.{kind}": np.ascontiguousarray(part[None])
        for index, layer in enumerate(parts)
        for kind, part in zip(("key", "value"), layer, strict=True)
    }


def config_to_peft(config: PrefixConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only."""
    return {
        "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "num_virtual_tokens": config.num_virtual_tokens, "num_transformer_submodules": 1,
        "prefix_projection": False, "inference_mode": True,
    }  # fmt: skip


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == "PREFIX_TUNING"


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], adapted: Mapping[str, tuple[int, int]]
) -> PrefixConfig:
    """A config from the shape of its tensor; with a projection, PEFT saves what that gives.

    Raises:
        AdapterError: see `virtual_tokens_of`.
    """
    return PrefixConfig(num_virtual_tokens=virtual_tokens_of(peft, tensors))
