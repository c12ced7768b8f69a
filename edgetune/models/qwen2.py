"""Qwen2 and Qwen2.5: q, k and v add a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.models.config import DEFAULT_TARGET_MODULES, DecoderConfig, decoder_config

NAME = "qwen2"
TARGET_MODULES = DEFAULT_TARGET_MODULES


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    return decoder_config(hf, qkv_bias=True)
