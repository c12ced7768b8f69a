"""Qwen3: queries and keys pass an RMSNorm per head before the rotary embedding; head_dim stands on its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.models.config import DEFAULT_TARGET_MODULES, DecoderConfig, decoder_config

NAME = "qwen3"
TARGET_MODULES = DEFAULT_TARGET_MODULES


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(hf.get("attention_bias", False))
    return decoder_config({"head_dim": 128, **hf}, qkv_bias=bias, o_bias=bias, qk_norm=True)
