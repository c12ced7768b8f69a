"""BitFit: y = W x + b, with the biases of the linears trained in their place    (Ben Zaken et al., arXiv 2106.10199)

A base keeps biases dense, so there is nothing beside the model: a step costs the gradient of b alone, and the merged
model is exactly what was trained, whatever its matrices are stored in. Families differ in what has a bias: all linears
of an encoder, queries, keys and values of Qwen2, none of most decoders, which have their norms instead (`ln_tuning`).

PEFT has no such method: the files are in its layout, with the biases under the names that they have in the model.

Left out: the biases of norms; and biases as inputs of the graph, which has them as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import LinearsConfig, own_config, read_own_config
from edgetune.adapters.slot import Slot
from edgetune.errors import ConfigError
from edgetune.models import ModelConfig

NAME = "bitfit"
CAPABILITIES = Capabilities(
    train_ort="bitfit does not train on the ort engine: its graphs have LoRA alone. Take torch, or --adapter lora.",
    peft_file="PEFT has no BitFit. edgetune reads and exports the files; for PEFT train --adapter ln_tuning, or lora.",
    as_lora="A bias is no matrix, so no LoRA stands for its change: export it with --merge, or train --adapter lora.",
    own_inputs="The graphs of a bundle have biases as constants: export it with --merge, which is exact.",
)
PEFT_NAMES = {"bias": "bias"}
PEFT_SHARED = ()
_PEFT_TYPE = "BITFIT"


@dataclass(frozen=True)
class BitfitConfig(LinearsConfig):
    """What the user asks of BitFit."""

    method: ClassVar[str] = NAME
    own: ClassVar[bool] = True
    rate_factor: ClassVar[float] = 3

    def resolved(self, model: ModelConfig) -> BitfitConfig:
        """See `AdapterConfig`; all linears that have a bias, where nothing is set."""
        known = tuple(dict.fromkeys(place.rpartition(".")[2] for place in places(model)))
        if not known:
            raise ConfigError(
                f"adapter = 'bitfit'; no linear of this {model.model_type} has a bias to train. Take --adapter "
                "ln_tuning, which trains the weights of its norms."
            )
        targets = known if self.target_modules is None else tuple(self.target_modules)
        if without := [name for name in targets if name not in known]:
            raise ConfigError(f"target_modules has {without}; linears with a bias are {', '.join(known)}.")
        return super(BitfitConfig, replace(self, target_modules=targets)).resolved(model)


Config = BitfitConfig


def places(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The linears that have a bias, with their (out_features, in_features)."""
    vectors = model.vectors()
    return {place: shape for place, shape in model.linears().items() if f"{place}.bias" in vectors}


def slots(config: BitfitConfig, model: ModelConfig) -> list[Slot]:
    """The linears with a trained bias in the model's order, for a resolved config."""
    return [slot(place, shape, config) for place, shape in config.linears(model).items()]


def slot(place: str, shape: tuple[int, int], config: BitfitConfig) -> Slot:
    """The slot of one linear of shape (out_features, in_features), of which nothing that goes in is read."""
    return Slot(place, 0, shape[0], {"bias": shape[:1]})


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == _PEFT_TYPE


def config_to_peft(config: BitfitConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config."""
    return own_config(config, _PEFT_TYPE, base_model)


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], adapted: Mapping[str, tuple[int, int]]
) -> BitfitConfig:
    """A config from the keys of `config_to_peft`; raises as `read_own_config`."""
    return read_own_config(BitfitConfig, peft)
