"""XLM-RoBERTa (multilingual E5): BERT whose first position is the row after the one of padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetune.errors import ModelError
from edgetune.models.encoder_config import ENCODER_TARGET_MODULES, EncoderConfig, encoder_config

NAME = "xlm-roberta"
TARGET_MODULES = ENCODER_TARGET_MODULES


def config_from_hf(hf: Mapping[str, Any]) -> EncoderConfig:
    padding = hf.get("pad_token_id", 1)
    if type(padding) is not int or padding < 0:
        raise ModelError(f"config.json has pad_token_id = {padding!r}; a token's id was expected.")
    return encoder_config(hf, position_offset=padding + 1)
