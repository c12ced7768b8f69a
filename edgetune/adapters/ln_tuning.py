"""LN tuning: the weights of the norms, trained in their place    (Zhao et al., arXiv 2312.11420)

    y = x / rms(x) * (w + offset)    with w trained; the offset is 1 in Gemma, else 0

A base keeps norms dense, so there is nothing beside the model: a step costs the gradient of w alone, and the merged
model is exactly what was trained, whatever its matrices are stored in. The norms of the hidden states are trained by
default, as in PEFT, also the last one; those of queries and keys, where a family has them, by name.

Left out: encoders; and the weights as inputs of the graph, which has them as constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import BlocksConfig
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError, ConfigError
from edgetune.models import ModelConfig
from edgetune.models.config import DecoderConfig
from edgetune.schema import Key

NAME = "ln_tuning"
CAPABILITIES = Capabilities(
    train_ort="ln_tuning does not train on the ort engine: its graphs have LoRA alone. Take torch, or --adapter lora.",
    as_lora="The weights of norms are no matrices, so no LoRA stands for them: export it with --merge, or train lora.",
    own_inputs="The graphs of a bundle have the weights of norms as constants: export it with --merge, which is exact.",
)
PEFT_NAMES = {"weight": "ln_tuning_layers.weight"}
PEFT_SHARED = ()
LAST = "norm"  # the one after all blocks


@dataclass(frozen=True)
class LnTuningConfig(BlocksConfig):
    """What the user asks of LN tuning."""

    method: ClassVar[str] = NAME
    own: ClassVar[bool] = True
    rate_factor: ClassVar[float] = 10

    target_modules: Annotated[
        tuple[str, ...] | None, Key("Norms to train, such as input_layernorm,norm. (default: those of hidden states)")
    ] = None

    def resolved(self, model: ModelConfig) -> LnTuningConfig:
        """See `AdapterConfig`."""
        if not isinstance(model, DecoderConfig):
            raise ConfigError("ln_tuning is for decoders. Take --adapter lora, or bitfit.")
        known = dict.fromkeys(place.rpartition(".")[2] for place in places(model))
        wanted = (*model.block_norms.names, LAST) if self.target_modules is None else self.target_modules
        unknown = [name for name in wanted if name not in known]
        if unknown or not wanted:
            raise ConfigError(f"target_modules has {unknown or 'nothing'}; choose from {', '.join(known)}.")
        return replace(super().resolved(model), target_modules=tuple(name for name in known if name in wanted))

    def where(self, model: ModelConfig) -> str:
        """See `AdapterConfig`."""
        return f"{', '.join(self.target_modules or ())} in {super().where(model)}"


Config = LnTuningConfig


def places(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every norm of a decoder: features of its weight, and of the states that it norms, those of all heads."""
    assert isinstance(model, DecoderConfig)
    heads = {"q_norm": model.num_attention_heads, "k_norm": model.num_key_value_heads}
    norms = {name.removesuffix(".weight"): size for name, (size,) in model.vectors().items() if _is_norm(name)}
    return {place: (size, size * heads.get(place.rpartition(".")[2], 1)) for place, size in norms.items()}


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def slots(config: LnTuningConfig, model: ModelConfig) -> list[Slot]:
    """The trained norms in the model's order, for a resolved config."""
    blocks = tuple(f"{model.block(i)}." for i in config.blocks)
    return [
        slot(place, shape, config)
        for place, shape in places(model).items()
        if place.rpartition(".")[2] in (config.target_modules or ()) and place.startswith((*blocks, f"model.{LAST}"))
    ]


def slot(place: str, shape: tuple[int, int], config: LnTuningConfig) -> Slot:
    """The slot of one norm, of a shape as in `places`."""
    size, width = shape
    return Slot(place, width, width, {"weight": (size,)})


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == "LN_TUNING"


def config_to_peft(config: LnTuningConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only; PEFT names blocks in its pattern of modules."""
    blocks, targets = "|".join(map(str, config.blocks)), config.target_modules or ()
    names = "|".join(name for name in targets if name != LAST)
    patterns = [rf".*layers\.({blocks})\.(.*\.)?({names})"] if names else []
    patterns += [rf"(.*\.)?model\.{LAST}"] if LAST in targets else []
    return {
        "peft_type": "LN_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "target_modules": "|".join(patterns), "exclude_modules": None, "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], adapted: Mapping[str, tuple[int, int]]
) -> LnTuningConfig:
    """A config from the places of PEFT's tensors.

    Raises:
        AdapterError: the adapter has more than norms, or other norms in one block than in another.
    """
    if peft.get("modules_to_save"):
        raise AdapterError("adapter_config.json sets modules_to_save, which LN tuning here does not compute.")
    blocks: dict[int, list[str]] = {}
    for place in adapted:
        if place != f"model.{LAST}":
            blocks.setdefault(int(place.split(".")[2]), []).append(place.rpartition(".")[2])
    targets = next(iter(blocks.values()), [])
    if any(names != targets for names in blocks.values()):
        raise AdapterError("the adapter has other norms in one block than in another. Train the same in each.")
    last = (LAST,) if f"model.{LAST}" in adapted else ()
    return LnTuningConfig(layers_to_transform=tuple(sorted(blocks)) or (0,), target_modules=(*targets, *last))
