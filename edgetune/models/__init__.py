"""Model families: what differs between them is a config reading; the decoder is shared.

A family is one file with `NAME` (the HF `model_type`), `config_from_hf(dict) -> DecoderConfig` and `TARGET_MODULES`.
Nothing here imports torch; `models.decoder` does.
"""

from __future__ import annotations

from pathlib import Path

from edgetune.errors import ModelError
from edgetune.models import gemma3_text, llama, qwen2, qwen3, smollm3
from edgetune.models.config import DecoderConfig, read_hf_config

FAMILIES = {"llama": llama, "qwen2": qwen2, "qwen3": qwen3, "smollm3": smollm3, "gemma3_text": gemma3_text}


def load_config(folder: str | Path) -> DecoderConfig:
    """The decoder's shape from the `config.json` of a model or base folder.

    Raises:
        ModelError: the file is missing, damaged, or of a family that is not supported.
    """
    hf = read_hf_config(folder)
    family = FAMILIES.get(str(hf.get("model_type")))
    if family is None:
        raise ModelError(
            f"{Path(folder) / 'config.json'} has model_type {hf.get('model_type')!r}; "
            f"supported are {', '.join(FAMILIES)}."
        )
    config: DecoderConfig = family.config_from_hf(hf)
    return config
