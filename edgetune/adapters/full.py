"""Full fine-tuning of blocks: every weight, bias and norm of them, in float32, trained in its place

    y = x (W + dW)^T + b + db    of all linears, and the norms as in `ln_tuning`; embedding, head and last norm stay

The baseline that adapters are held against. With `layers_to_transform` it is partial fine-tuning: the other blocks stay
on the grid, as with mlx-lm's `--fine-tune-type full --num-layers`. A block starts as the base has it, dequantized, so
what quantization lost is there to be learned again. A trained weight costs its own four bytes, four for its gradient,
and the optimizer's moments: the plan counts them, and refuses what does not fit.

PEFT has no such method: the file has the trained tensors alone, under Hugging Face's names for them.

No LoRA has the rank of these changes, and a graph has no place for other weights beside its own, so they are merged:
rounded to the format of the bundle, with what that costs, or exact as fp32.

Left out: what is not in a block; and weight decay, which is refused as for all of the model's own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from edgetune.adapters import ln_tuning
from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import BlocksConfig, own_config, read_own_config
from edgetune.adapters.slot import Slot
from edgetune.errors import ConfigError
from edgetune.models import ModelConfig
from edgetune.models.config import DecoderConfig

NAME = "full"
CAPABILITIES = Capabilities(
    train_ort="full does not train on the ort engine: its graphs have LoRA alone. Take torch, or --adapter lora.",
    peft_file="The file has the model's own tensors, which PEFT does not read: load it as weights, or train lora.",
    as_lora="No LoRA has the rank of a weight's whole change: export it with --merge, or train --adapter lora.",
    own_inputs="A graph has its weights as constants: export it with --merge, or train --adapter lora.",
)
PREFIX = ""
PEFT_NAMES = {"weight": "weight", "bias": "bias"}
PEFT_SHARED = ()
_PEFT_TYPE = "FULL"


@dataclass(frozen=True)
class FullConfig(BlocksConfig):
    """What the user asks of full fine-tuning."""

    method: ClassVar[str] = NAME
    own: ClassVar[bool] = True
    thaws: ClassVar[bool] = True
    rate_factor: ClassVar[float] = 0.3

    biases: tuple[str, ...] = ()
    """Linears of a block with a bias, of a resolved config."""

    def resolved(self, model: ModelConfig) -> FullConfig:
        """See `AdapterConfig`."""
        if not isinstance(model, DecoderConfig):
            raise ConfigError("full is for decoders. Take --adapter lora, or bitfit.")
        biases = tuple(path.rpartition(".")[2] for path in model.linear_shapes if model.has_bias(path))
        return replace(super().resolved(model), biases=biases)


Config = FullConfig


def places(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every linear with its (out_features, in_features), and every norm of the blocks as `ln_tuning.places` has it."""
    norms = ln_tuning.places(model)
    del norms[f"model.{ln_tuning.LAST}"]
    return model.linears() | norms


def slots(config: FullConfig, model: ModelConfig) -> list[Slot]:
    """What is trained, for a resolved config: the linears of the model in its order, then the norms."""
    blocks = tuple(f"{model.block(i)}." for i in config.blocks)
    return [slot(place, shape, config) for place, shape in places(model).items() if place.startswith(blocks)]


def slot(place: str, shape: tuple[int, int], config: FullConfig) -> Slot:
    """The slot of a linear or norm, of a shape as in `places`. Only what a vector's gradient needs goes in and out."""
    if place.endswith("norm"):
        return ln_tuning.slot(place, shape, ln_tuning.LnTuningConfig())
    if place.rpartition(".")[2] not in config.biases:
        return Slot(place, 0, 0, {"weight": shape})
    return Slot(place, 0, shape[0], {"weight": shape, "bias": shape[:1]})


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == _PEFT_TYPE


def config_to_peft(config: FullConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config."""
    return own_config(config, _PEFT_TYPE, base_model)


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], adapted: Mapping[str, tuple[int, int]]
) -> FullConfig:
    """A config from the keys of `config_to_peft`; raises as `read_own_config`."""
    return read_own_config(FullConfig, peft)
