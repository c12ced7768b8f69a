"""IA3: y = l * (W x + b), or y = W (l * x) + b where the linear is a feed-forward one    (Liu et al., arXiv 2205.05638)

One factor for each output of an attention's key and value, and for each input of the MLP's last linear; all start at
one, so the adapted layer equals the base. `feedforward_modules` says which linears are scaled at their inputs, as in
PEFT, whose choice of linears is the default here: the fewest parameters of all methods.

Left out: the factors as inputs of the graph, which has no node for them; they fold into the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import LinearsConfig
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError, ConfigError
from edgetune.models import ModelConfig
from edgetune.schema import Key

NAME = "ia3"
CAPABILITIES = Capabilities(
    train_ort="ia3 does not train on the ort engine: training graphs scale no rows. Take --adapter lora, or torch.",
    as_lora="ia3 scales whole rows and columns, which no LoRA does: export it with --merge, or train lora.",
    own_inputs="The graphs of a bundle have no input for the factors: export it with --merge.",
)
PEFT_NAMES = {"ia3_l": "ia3_l"}
PEFT_SHARED = ()
SCALES_BIAS = True
FEEDFORWARD = {"down_proj": ("k_proj", "v_proj"), "dense": ("key", "value")}  # of decoders, of encoders; as in PEFT


@dataclass(frozen=True)
class Ia3Config(LinearsConfig):
    """What the user asks of IA3."""

    method: ClassVar[str] = NAME
    rate_factor: ClassVar[float] = 10

    feedforward_modules: Annotated[
        tuple[str, ...] | None, Key("Of the adapted linears those scaled at their inputs. (default: down_proj)")
    ] = None

    def resolved(self, model: ModelConfig) -> Ia3Config:
        """See `AdapterConfig`; the attention's keys and values, and the MLP's last linear, where nothing is set."""
        known = {path.rpartition(".")[2] for path in model.linear_shapes}
        feedforward, attention = next(item for item in FEEDFORWARD.items() if item[0] in known)
        wanted = (*attention, feedforward) if self.target_modules is None else self.target_modules
        config = super(Ia3Config, replace(self, target_modules=wanted)).resolved(model)
        at_inputs = self.feedforward_modules
        if at_inputs is None:
            at_inputs = tuple(name for name in wanted if name == feedforward)
        if unknown := [name for name in at_inputs if name not in wanted]:
            raise ConfigError(f"feedforward_modules has {unknown}; choose from target_modules: {', '.join(wanted)}.")
        return replace(config, feedforward_modules=at_inputs)


Config = Ia3Config


def slots(config: Ia3Config, model: ModelConfig) -> list[Slot]:
    """The adapted linears in the model's order, for a resolved config."""
    return [slot(place, shape, config) for place, shape in config.linears(model).items()]


def slot(place: str, shape: tuple[int, int], config: Ia3Config) -> Slot:
    """The slot of one linear of shape (out_features, in_features): a row of factors, of inputs, or a column."""
    n, k = shape
    at_inputs = place.rpartition(".")[2] in (config.feedforward_modules or ())
    factors = (1, k) if at_inputs else (n, 1)
    return Slot(place, k, n, {"ia3_l": factors}, scales_input=at_inputs, scales_output=not at_inputs)


def initialize(slot: Slot, config: Ia3Config, rng: np.random.Generator, frozen: Any) -> dict[str, np.ndarray]:
    """All one."""
    return {"ia3_l": np.ones(slot.tensors["ia3_l"], np.float32)}


def frozen_tensors(config: Ia3Config, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """None."""
    return {}


def factors(tensors: Mapping[str, Any], config: Ia3Config, norms: Any) -> tuple[Any | None, Any | None]:
    """Of the inputs [in], or of the outputs [out]."""
    factor = tensors["ia3_l"]
    return (factor.reshape(-1), None) if factor.shape[0] == 1 else (None, factor.reshape(-1))


def forward(x: Any, y: Any, tensors: Mapping[str, Any], config: Ia3Config) -> Any:
    """Nothing is added beside the factors."""
    return y


def add(x: Any, y: Any, tensors: Mapping[str, Any], config: Ia3Config) -> None:
    """See `forward`."""


def add_gradients(
    x: Any, d_y: Any, d_x: Any | None, tensors: Mapping[str, Any], gradients: Mapping[str, Any], config: Ia3Config
) -> None:
    """See `forward`."""


def add_factor_gradient(
    d_factor: Any, tensors: Mapping[str, Any], gradients: Mapping[str, Any], config: Ia3Config, norms: Any
) -> None:
    """The factors are the parameters."""
    gradients["ia3_l"].view(-1).add_(d_factor)


def merge(weight: np.ndarray, tensors: Mapping[str, np.ndarray], rows: slice, config: Ia3Config) -> np.ndarray:
    """float32 [rows, in]: these rows of a frozen weight with the adapter folded in."""
    factor = tensors["ia3_l"]
    scaled: np.ndarray = weight * (factor if factor.shape[0] == 1 else factor[rows])
    return scaled


def merge_bias(bias: np.ndarray, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 [out]: the linear's bias, which factors of its outputs scale too."""
    factor = tensors["ia3_l"]
    scaled: np.ndarray = bias if factor.shape[0] == 1 else bias * factor.reshape(-1)
    return scaled


def changes(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a slot does anything."""
    return bool((tensors["ia3_l"] != 1).any())


def weakened(
    config: Ia3Config, tensors: dict[str, np.ndarray], alpha: float
) -> tuple[Ia3Config, dict[str, np.ndarray]]:
    """The adapter whose change of the weights is `alpha` times this one's."""
    return config, {name: 1 + np.float32(alpha) * (value - 1) for name, value in tensors.items()}


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == "IA3"


def config_to_peft(config: Ia3Config, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only; PEFT names blocks in its pattern of modules."""
    blocks = "|".join(map(str, config.blocks))

    def pattern(names: tuple[str, ...]) -> str:
        return rf".*layers?\.({blocks})\..*\.({'|'.join(names)})"

    feedforward = config.feedforward_modules or ()
    return {
        "peft_type": "IA3", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "target_modules": pattern(config.target_modules or ()),
        "feedforward_modules": pattern(feedforward) if feedforward else [],
        "fan_in_fan_out": False, "init_ia3_weights": True, "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[int, int]]
) -> Ia3Config:
    """A config from PEFT's keys and the shapes of its tensors: a row of factors is of inputs.

    Raises:
        AdapterError: the adapter uses what IA3 here does not compute, or a linear's name is scaled in both ways.
    """
    if unsupported := [key for key in ("fan_in_fan_out", "modules_to_save") if peft.get(key)]:
        raise AdapterError(f"adapter_config.json sets {', '.join(unsupported)}, which IA3 here does not compute.")
    found = {name.rpartition(".")[0]: shape[0] == 1 for name, shape in tensors.items()}
    inputs = dict.fromkeys(place.rpartition(".")[2] for place, at_inputs in found.items() if at_inputs)
    outputs = dict.fromkeys(place.rpartition(".")[2] for place, at_inputs in found.items() if not at_inputs)
    if both := inputs.keys() & outputs.keys():
        raise AdapterError(f"{', '.join(both)} is scaled at its inputs in one block and at its outputs in another.")
    try:
        layers = {int(place.split(".")[2]) for place in places}
    except (ValueError, IndexError) as error:
        raise AdapterError(f"a tensor name is not as PEFT writes it ({error!r}).") from error
    names = tuple(dict.fromkeys(place.rpartition(".")[2] for place in places))
    return Ia3Config(target_modules=names, layers_to_transform=tuple(sorted(layers)), feedforward_modules=tuple(inputs))
