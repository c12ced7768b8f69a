"""Llama: SmolLM2, TinyLlama, Llama 3.x (with its rope scaling). Biases only where the config asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.models.config import DEFAULT_TARGET_MODULES, DecoderConfig, decoder_config

NAME = "llama"
TARGET_MODULES = DEFAULT_TARGET_MODULES


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf.get("attention_bias", False))
    return decoder_config(hf, qkv_bias=bias, o_bias=bias, mlp_bias=bool(hf.get("mlp_bias", False)))
