"""The linear layer that a task puts behind a model, trained in float32 and saved with the adapter as PEFT saves it.

    logits = W pool(hidden) + b,  W [classes, hidden]        of each token's own hidden state where tokens have classes
    logits = W hidden_last                                   of a decoder, in the place of its head over the vocabulary

PEFT keeps such a layer whole beside the adapter (`modules_to_save`), under its name in Hugging Face's model:
`BertForTokenClassification` has `bert.encoder.layer.0. …` and `classifier`, `LlamaForSequenceClassification` has
`model.layers.0. …` and `score`. W starts normal with a deviation of 0.02,
as there, and b at zero. Pooled is by the mean or the first token, as `models.pooling` reads it from the model's folder.

Left out, of encoders: Hugging Face's tanh pooler between the first token and the layer, the second layer that RoBERTa
has there, and dropout. So PEFT reads the file of any head, but of Hugging Face's own encoders only those for tokens
compute the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapters.base import AROUND, CONFIG, MODEL, PREFIX, read_adapter, save_adapter
from edgetune.adapters.config import AdapterConfig
from edgetune.errors import AdapterError, ModelError
from edgetune.models import ModelConfig
from edgetune.models.encoder_config import EncoderConfig
from edgetune.weights import open_tensors

CLASSIFIER = "classifier"
WEIGHT, BIAS = f"{CLASSIFIER}.weight", f"{CLASSIFIER}.bias"
TENSORS = (WEIGHT, BIAS)
SCORE = "score.weight"  # of a decoder
_DEVIATION = 0.02
_INSIDE = {"bert": "bert.", "xlm-roberta": "roberta."}  # of Hugging Face's models with a head
_TASKS = {
    "classification": "SEQ_CLS", "regression": "SEQ_CLS", "reward": "SEQ_CLS", "token-classification": "TOKEN_CLS"
}  # fmt: skip


def head_shapes(objective: str, classes: tuple[str, ...], hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of an encoder's head; nothing for an objective without a head."""
    if objective not in _TASKS:
        return {}
    outputs = 1 if objective == "regression" else len(classes)
    return {WEIGHT: (outputs, hidden_size), BIAS: (outputs,)}


def score_shapes(objective: str, classes: tuple[str, ...], hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The same of a decoder's."""
    return {SCORE: (len(classes) if objective == "classification" else 1, hidden_size)}


def initialize(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Values before the first step, float32."""
    rng = np.random.default_rng([seed, len(shapes)])
    return {
        name: (rng.normal(0, _DEVIATION, shape) if len(shape) == 2 else np.zeros(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


@dataclass(frozen=True)
class Head:
    """A trained head: what it was trained for, the names of its outputs, and its tensors."""

    objective: str
    classes: tuple[str, ...]
    tensors: dict[str, np.ndarray]

    @property
    def of_tokens(self) -> bool:
        """Whether each token has outputs of its own."""
        return self.objective == "token-classification"

    @property
    def outputs(self) -> int:
        """How many it has, of a text or of a token."""
        return len(next(iter(self.tensors.values())))


def save_with_head(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, np.ndarray], model_type: str, objective: str,
    base_model: str,
) -> None:  # fmt: skip
    """Write `adapter_config.json` and `adapter_model.safetensors` as PEFT does of Hugging Face's model with a head.

    Without a head (the objective embedding) they are those of the model alone.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    inner = {name: value for name, value in tensors.items() if name not in (*TENSORS, SCORE)}
    if objective not in _TASKS:
        save_adapter(folder, config, inner, base_model, said={"task_type": "FEATURE_EXTRACTION"})
        return
    head = {name: tensors[name] for name in (*TENSORS, SCORE) if name in tensors}
    said = {"task_type": _TASKS[objective], "modules_to_save": [next(iter(head)).partition(".")[0]]}
    save_adapter(folder, config, inner, base_model, inside=_INSIDE.get(model_type, ""), beside=head, said=said)


def load_with_head(
    folder: Path, model: ModelConfig, said: Mapping[str, Any]
) -> tuple[AdapterConfig, dict[str, np.ndarray], Head | None]:
    """Config and tensors of an adapter, and its head where it has one.

    `said` is what a run says of itself (`summary.json`); of a folder that PEFT wrote it is empty, and the outputs are
    named as Hugging Face names them then.

    Raises:
        AdapterError: as `read_adapter`; the head does not fit the model; or it is Hugging Face's own for whole texts,
            behind a pooler that is not computed here.
    """
    try:
        weights = open_tensors(folder / MODEL)
        task = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("task_type")
    except (OSError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder} is no adapter folder: {error}. It needs {CONFIG} and {MODEL}.") from error
    except ModelError as error:
        raise AdapterError(str(error)) from error
    is_encoder = isinstance(model, EncoderConfig)
    names = {
        name: next((around + name for around in AROUND if around + name in weights), PREFIX + name)
        for name in (TENSORS if is_encoder else (SCORE,))
    }
    known = None if is_encoder else model
    if not any(name in weights for name in names.values()):
        return *read_adapter(folder, model.linears(), known), None
    if is_encoder and task == "SEQ_CLS" and "objective" not in said:
        raise AdapterError(
            f"{folder} has a head that Hugging Face puts behind a tanh pooler, which is not computed here. Train it "
            "with --objective classification, or classify tokens (TOKEN_CLS)."
        )
    found = {name: weights.float32(full) for name, full in names.items() if full in weights}
    outputs = len(next(iter(found.values())))
    kind = "token-classification" if is_encoder else "classification" if outputs > 1 else "regression"
    objective = str(said.get("objective", kind))
    names_of = (f"LABEL_{i}" for i in range(outputs if kind != "regression" else 0))
    classes = tuple(said.get("classes") or (() if "objective" in said else names_of))
    expected = (head_shapes if is_encoder else score_shapes)(objective, classes, model.hidden_size)
    shapes = {name: value.shape for name, value in found.items()}
    if shapes != expected or not all(np.isfinite(value).all() for value in found.values()):
        raise AdapterError(f"{folder / MODEL}: the head has {shapes}; finite numbers of {expected} were expected.")
    inside = _INSIDE.get(model.model_type, "")
    config, tensors = read_adapter(folder, model.linears(), known, inside=inside, beside=tuple(names))
    return config, tensors, Head(objective, classes, found)
