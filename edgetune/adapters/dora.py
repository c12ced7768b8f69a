"""DoRA: y = m * (W x + scaling * B (A dropout(x))) / ||W + scaling * B A||    (Liu et al., arXiv 2402.09353)

The magnitude m [out] starts as the norm of each row of W, so the adapted layer equals the base. The norm is a constant
in the backward pass (section 4.3 of the paper, and PEFT). A, B and `scaling` are LoRA's. Dropout is on the low-rank
branch alone, where PEFT drops the frozen weight's input too.

Left out: the adapter as inputs of the graph. Rows are scaled after the frozen product, which the slots of a bundle,
made for LoRA, have no node for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edgetune.adapters import lora
from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.slot import Slot
from edgetune.errors import ConfigError
from edgetune.models import ModelConfig

NAME = "dora"
CAPABILITIES = Capabilities(
    train_ort="dora does not train on the ort engine: training graphs scale no rows. Take --adapter lora, or torch.",
    as_lora="dora scales the rows of the frozen weight, which no LoRA does: export it with --merge, or train lora.",
    merge_share="A share of dora's change of the weights is no dora: merge it whole, or train lora.",
    own_inputs="The graphs of a bundle have no input for the magnitude: export it with --merge.",
)
PEFT_NAMES = lora.PEFT_NAMES | {"magnitude": "lora_magnitude_vector"}
PEFT_SHARED = ()
SCALES_BIAS = False
forward, add, add_gradients, changes = lora.forward, lora.add, lora.add_gradients, lora.changes
frozen_tensors = lora.frozen_tensors


@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    """LoRA's settings, but for those that are lora's alone."""

    method: ClassVar[str] = NAME

    adapter_budget: None = None
    init_from: None = None

    def _initialization(self) -> str:
        if self.init_lora_weights == lora.LOFTQ:
            raise ConfigError("init_lora_weights = 'loftq' is for lora: dora starts at the norms of the frozen rows.")
        return super()._initialization()


Config = DoraConfig


def slots(config: DoraConfig, model: ModelConfig) -> list[Slot]:
    """The adapted linears in the model's order, for a resolved config."""
    return [slot(place, shape, config) for place, shape in config.linears(model).items()]


def slot(place: str, shape: tuple[int, int], config: DoraConfig) -> Slot:
    """LoRA's, with a magnitude for each output; two norms of each row are kept beside it."""
    n, k = shape
    tensors = lora.slot(place, shape, config).tensors | {"magnitude": (n,)}
    return Slot(place, k, n, tensors, scales_output=True, kept_floats=2 * n)


def initialize(slot: Slot, config: DoraConfig, rng: np.random.Generator, frozen: Any) -> dict[str, np.ndarray]:
    """LoRA's start, and the norms of the frozen rows."""
    return lora.initialize(slot, config, rng, frozen) | {"magnitude": frozen.row_norms().numpy()}


def factors(tensors: Mapping[str, Any], config: DoraConfig, norms: Any) -> tuple[None, Any]:
    """Nothing for the inputs; m / ||W + scaling * B A|| [out] for the outputs, where `norms` are those [out]."""
    return None, tensors["magnitude"] / norms


def add_factor_gradient(
    d_factor: Any, tensors: Mapping[str, Any], gradients: Mapping[str, Any], config: DoraConfig, norms: Any
) -> None:
    """The gradient of the magnitude [out] from that of the factor."""
    gradients["magnitude"].addcdiv_(d_factor, norms)


def squared_norms(weight: Any, squares: Any, tensors: Mapping[str, Any], rows: slice, config: DoraConfig) -> Any:
    """||W + s B A||^2 of some rows [rows], from those of W [rows, in] and its own `squares`, without the sum itself.

    ||w||^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i
    """
    a, b, s = tensors["lora_A"], tensors["lora_B"][rows], config.scaling
    crossed = weight @ a.T + (b @ (a @ a.T)) * (s / 2)
    return squares + (crossed * b).sum(-1) * (2 * s)


def merge(weight: np.ndarray, tensors: Mapping[str, np.ndarray], rows: slice, config: DoraConfig) -> np.ndarray:
    """float32 [rows, in]: these rows of a frozen weight with the adapter folded in."""
    tuned = lora.merge(weight, tensors, rows, config)
    scaled: np.ndarray = tuned * (tensors["magnitude"][rows] / np.linalg.norm(tuned, axis=1))[:, None]
    return scaled


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == "LORA" and bool(peft.get("use_dora"))


def config_to_peft(config: DoraConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only."""
    return lora.config_to_peft(config, base_model) | {"use_dora": True}


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[int, int]]
) -> DoraConfig:
    """As LoRA's."""
    return DoraConfig(**vars(lora.config_from_peft({**peft, "use_dora": False}, tensors, places)))
