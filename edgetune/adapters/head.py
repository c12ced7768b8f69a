"""The linear layer that a task puts behind an encoder, trained in float32 and saved with the adapter as PEFT saves it.

    logits = W pool(hidden) + b,  W [classes, hidden]        of each token's own hidden state where tokens have classes

PEFT keeps such a layer whole beside the adapter (`modules_to_save`), under its name in Hugging Face's model:
`BertForTokenClassification` has `bert.encoder.layer.0. …` and `classifier`. W starts normal with a deviation of 0.02,
as there, and b at zero. Pooled is by the mean or the first token, as `models.pooling` reads it from the model's folder.

Left out: Hugging Face's tanh pooler between the first token and the layer, and dropout before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapters.base import CONFIG, MODEL, PREFIX, read_adapter
from edgetune.adapters.lora import LoraConfig, config_to_peft
from edgetune.errors import AdapterError, ModelError
from edgetune.models.encoder_config import EncoderConfig
from edgetune.weights import TensorInfo, open_tensors, write_atomic, write_safetensors

CLASSIFIER = "classifier"
WEIGHT, BIAS = f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"
_DEVIATION = 0.02
_INSIDE = {"bert": "bert.", "xlm-roberta": "roberta."}  # of Hugging Face's models with a head
_TASKS = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "token-classification": "TOKEN_CLS"}


def head_shapes(objective: str, classes: tuple[str, ...], hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the head's tensors; nothing for an objective without a head."""
    if objective not in _TASKS:
        return {}
    outputs = 1 if objective == "regression" else len(classes)
    return {WEIGHT: (outputs, hidden_size), BIAS: (outputs,)}


def initialize(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Values before the first step, float32."""
    rng = np.random.default_rng([seed, len(shapes)])
    return {
        name: (rng.normal(0, _DEVIATION, shape) if name == WEIGHT else np.zeros(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }
