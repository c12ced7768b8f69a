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
from pathlib import Path

import numpy as np

from edgetune.adapters.base import CONFIG, MODEL, PREFIX
from edgetune.adapters.lora import LoraConfig, config_to_peft
from edgetune.errors import AdapterError
from edgetune.weights import TensorInfo, write_atomic, write_safetensors

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


def save_with_head(
    folder: Path, config: LoraConfig, tensors: Mapping[str, np.ndarray], model_type: str, objective: str,
    classes: tuple[str, ...], base_model: str,
) -> None:  # fmt: skip
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does of Hugging Face's model with a head.

    Without a head (the objective embedding) they are those of the encoder alone.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise AdapterError(
                f"{name} holds NaN or infinity; such an adapter is never saved. Lower the learning rate."
            )
    task = _TASKS.get(objective, "FEATURE_EXTRACTION")
    inside = _INSIDE[model_type] if objective in _TASKS else ""
    files = {
        PREFIX + (name if name in (WEIGHT, BIAS) else f"{inside}{name}.weight"): value
        for name, value in tensors.items()
    }
    write_safetensors(folder / MODEL, {k: TensorInfo("F32", v.shape) for k, v in files.items()}, files.__getitem__)
    peft = config_to_peft(config, base_model) | {
        "task_type": task, "modules_to_save": [CLASSIFIER] if objective in _TASKS else None
    }  # fmt: skip
    write_atomic(folder / CONFIG, json.dumps(peft, indent=1))
