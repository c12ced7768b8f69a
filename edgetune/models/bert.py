"""BERT as `BertModel` stores it: MiniLM, BGE, E5 and most sentence-transformers up to a few hundred million weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.models.encoder_config import ENCODER_TARGET_MODULES, EncoderConfig, encoder_config

NAME = "bert"
TARGET_MODULES = ENCODER_TARGET_MODULES


def config_from_hf(hf: Mapping[str, Any]) -> EncoderConfig:
    return encoder_config(hf)
