"""SmolLM3: Llama whose every fourth layer, or those that `no_rope_layers` says, leaves the rotary embedding out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.errors import ModelError
from edgetune.models.config import (
    DEFAULT_TARGET_MODULES,
    AttentionKind,
    DecoderConfig,
    decoder_config,
    integer,
    rotary,
)

NAME = "smollm3"
TARGET_MODULES = DEFAULT_TARGET_MODULES

_DEFAULT_THETA = 2e6
_NOPE = AttentionKind(rope_theta=None)


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    hf = {"tie_word_embeddings": True, **hf}
    bias = bool(hf.get("attention_bias", False))
    layers = [rotary(hf, _DEFAULT_THETA) if rotates else _NOPE for rotates in _rotates(hf)]
    return decoder_config(hf, layers=layers, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))


def _rotates(hf: Mapping[str, Any]) -> list[int]:
    """For each layer 1 where it rotates, as `no_rope_layers` has it in spite of its name, and 0 where not."""
    count = integer(hf, "num_hidden_layers")
    found = hf.get("no_rope_layers")
    if found is None:
        interval = integer(hf, "no_rope_layer_interval", 4)
        return [int((index + 1) % interval != 0) for index in range(count)]
    if not isinstance(found, list) or len(found) < count or any(rotates not in (0, 1) for rotates in found):
        raise ModelError(
            f"config.json has no_rope_layers = {found!r:.80}; 0 or 1 for each of {count} layers was expected."
        )
    return found[:count]
