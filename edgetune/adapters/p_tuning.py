"""P-tuning: a prompt that a small network makes while it is trained  (Liu et al., arXiv 2103.10385)

    P = W_2 relu(W_1 relu(W_0 E + b_0) + b_1) + b_2,   E [p, hidden],  W_0 [e, hidden],  W_1 [e, e],  W_2 [hidden, e]

E and the network are trained, and P is put where `adapters.prompt` puts its own: vectors that share a network move
together. The network is PEFT's, an MLP, with the start that torch gives one: random, so no start equals the base.

It is gone once training ends. Checkpoints hold E and the network; the adapter's file, as PEFT's, holds P alone, and
whoever reads it finds a `prompt_tuning`. Left out: the paper's LSTM before the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np

from edgetune.adapters.prompt import CAPABILITIES, PEFT_NAMES, PEFT_SHARED, PromptConfig, places
from edgetune.adapters.slot import Slot
from edgetune.errors import ConfigError
from edgetune.models import ModelConfig
from edgetune.schema import Key

__all__ = [
    "CAPABILITIES", "NAME", "PEFT_NAMES", "PEFT_SHARED", "Config", "PTuningConfig", "add_gradients", "config_to_peft",
    "encode", "fold", "initialize", "places", "reads_peft", "slot", "slots",
]  # fmt: skip

NAME = "p_tuning"
LAYERS = range(3)
DEFAULT_ENCODER_HIDDEN_SIZE = 128


@dataclass(frozen=True)
class PTuningConfig(PromptConfig):
    """What the user asks of P-tuning. None means "not set"."""

    method: ClassVar[str] = NAME
    rate_factor: ClassVar[float] = 3

    encoder_hidden_size: Annotated[
        int | None, Key("Width of the network that makes a prompt while it is trained. (default: 128)")
    ] = None

    def resolved(self, model: ModelConfig) -> PTuningConfig:
        """See `AdapterConfig`."""
        width = DEFAULT_ENCODER_HIDDEN_SIZE if self.encoder_hidden_size is None else self.encoder_hidden_size
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ConfigError(f"encoder_hidden_size = {width!r}; an integer of 1 or more was expected.")
        return replace(super().resolved(model), encoder_hidden_size=width)

    @property
    def brief(self) -> str:
        """See `AdapterConfig`."""
        return f"{super().brief} from a network {self.encoder_hidden_size} wide"


Config = PTuningConfig


def slots(config: PTuningConfig, model: ModelConfig) -> list[Slot]:
    """All tensors, which are the model's as a whole."""
    return [slot(place, shape, config) for place, shape in places(model).items()]


def slot(place: str, shape: tuple[int, int], config: PTuningConfig) -> Slot:
    """The slot of that."""
    count, hidden, width = config.virtual_tokens, shape[0], config.encoder_hidden_size
    assert width is not None, "resolve the config first"
    widths = (hidden, width, width, hidden)
    tensors: dict[str, tuple[int, ...]] = {"embedding": (count, hidden)}
    for i in LAYERS:
        tensors |= {f"weight_{i}": (widths[i + 1], widths[i]), f"bias_{i}": (widths[i + 1],)}
    # P and what lies between the layers, and going back the gradient of P and of two of those at a time.
    return Slot(place, 0, 0, tensors, kept_floats=count * (2 * hidden + 4 * width))


def initialize(
    slot: Slot, config: PTuningConfig, rng: np.random.Generator, frozen: object = None
) -> dict[str, np.ndarray]:
    """Normal vectors, and of each layer uniform values in ±1/sqrt(inputs)."""
    made = {"embedding": rng.standard_normal(slot.tensors["embedding"])}
    for i in LAYERS:
        most = slot.tensors[f"weight_{i}"][1] ** -0.5
        made |= {name: rng.uniform(-most, most, slot.tensors[name]) for name in (f"weight_{i}", f"bias_{i}")}
    return {name: value.astype(np.float32) for name, value in made.items()}


def encode(tensors: Mapping[str, Any]) -> Any:
    """P [p, hidden], of numpy arrays or torch tensors."""
    return _encoded(tensors)[-1]


def _encoded(tensors: Mapping[str, Any]) -> list[Any]:
    """What each layer takes, and P."""
    found = [tensors["embedding"]]
    for i in LAYERS:
        x = found[-1] @ tensors[f"weight_{i}"].T + tensors[f"bias_{i}"]
        found.append(x if i == LAYERS[-1] else x.clip(min=0))
    return found


def add_gradients(d: Any, tensors: Mapping[str, Any], gradients: Mapping[str, Any]) -> None:
    """Backward of `encode` for d [p, hidden], of torch tensors: adds to the gradients."""
    taken = _encoded(tensors)
    for i in reversed(LAYERS):
        gradients[f"weight_{i}"].addmm_(d.T, taken[i])
        gradients[f"bias_{i}"].add_(d.sum(0))
        d = d @ tensors[f"weight_{i}"]
        if i:
            d.mul_(taken[i] > 0)
    gradients["embedding"].add_(d)


def fold(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the adapter's file holds of what is trained."""
    return {"prompt_embeddings": encode(tensors)}


def config_to_peft(config: PTuningConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only."""
    return {
        "peft_type": "P_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "num_virtual_tokens": config.num_virtual_tokens, "num_transformer_submodules": 1,
        "encoder_reparameterization_type": "MLP", "encoder_hidden_size": config.encoder_hidden_size,
        "inference_mode": True,
    }  # fmt: skip


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """No file: they hold a prompt, which `adapters.prompt` reads."""
    return False
