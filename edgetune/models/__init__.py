"""Model families: what differs between them is a config reading; one decoder and one encoder are shared.

A family is one file with `NAME` (the HF `model_type`), `config_from_hf(dict) -> DecoderConfig` and `TARGET_MODULES`.
One of an encoder gives an `EncoderConfig` and stands in `ENCODERS`.
Nothing here imports torch; `models.decoder` and `models.encoder` do.
"""

from __future__ import annotations

from pathlib import Path

from edgetune.errors import ModelError
from edgetune.models import bert, gemma3_text, llama, qwen2, qwen3, smollm3, xlm_roberta
from edgetune.models.config import DecoderConfig, read_hf_config
from edgetune.models.encoder_config import EncoderConfig
from edgetune.models.pooling import read_pooling

FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "smollm3": smollm3, "gemma3_text": gemma3_text}
ENCODERS = {"bert": bert, "xlm-roberta": xlm_roberta}

ModelConfig = DecoderConfig | EncoderConfig


def load_config(folder: str | Path) -> ModelConfig:
    """The model's shape from the `config.json` of a model or base folder, an encoder's with its pooling.

    Raises:
        ModelError: the file is missing, damaged, or of a family that is not supported.
    """
    hf = read_hf_config(folder)
    known = {**FAMILIES, **ENCODERS}
    family = known.get(str(hf.get("model_type")))
    if family is None:
        raise ModelError(
            f"{Path(folder) / 'config.json'} has model_type {hf.get('model_type')!r}; supported are {', '.join(known)}."
        )
    config: ModelConfig = family.config_from_hf(hf)
    return (
        config.pooled(read_pooling(Path(folder), config.hidden_size)) if isinstance(config, EncoderConfig) else config
    )
