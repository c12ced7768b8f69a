"""Ladder side-tuning: a narrow network beside the frozen blocks, so that no gradient ever passes them.

    p_i = sqrt(c) * the means of c neighbours of norm(x_i)            x_i [hidden] is what block i gives, s = hidden / c
    a_i = z_(i-1) + p_i                                               z_i [s]; below the lowest rung z is zero
    z_i = a_i + W_up relu(W_down a_i)                                 W_down [32, s], W_up [s, 32]
    y   = x_L + U z_L / sqrt(n),   U [hidden, s], n rungs             before the last norm and the head

LST (Sung et al., arXiv 2206.06522) over a 4-bit base, which is QST's way (Zhang et al., arXiv 2401.07004). The norm is
that of the block above, frozen. Going down is an average, one of QST's choices: a learned projection would need every
x_i whole for its gradient, and a_i [s] is all that is kept of a block and position here. Rungs have no attention of
their own, as the papers' have: what stands at other positions is in x_i already. By sqrt(n), z_L stays as long where
there are many rungs.

The papers mix z_(i-1) and p_i through a learned gate, whose gradient needs both; without it a rung keeps half as much.
What counts is the width of z, more than that of the rungs. Held-out loss of stories260k (hidden 64) after 60 steps, at
each one's best of three rates, mean of two seeds, on instructions and on tinyshakespeare:

    gate, c = 8, s units in a rung      3.995, 3.587
    none, c = 8, s units                3.947, 3.560
    none, c = 4, s units                3.888, 3.483
    none, c = 2, 32 units               3.719, 3.357

On instructions within 0.05 of the same without, or worse: fixed random projections in the place of the means, W_up that
starts at random, gates of another start or temperature, rungs that start as pruned MLPs of their blocks, attention.

W_down starts uniform in ±1/sqrt(s), W_up and U at zero, so the model equals the base. PEFT has no such method: the
files are in its layout, and edgetune alone reads them. A graph has slots of its own for it (`graphs.ops.rung`), which
add nothing where an adapter has no rung: sqrt(c) is one of their inputs, and zero where it is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import BlocksConfig, own_config, read_own_config
from edgetune.adapters.slot import Slot
from edgetune.errors import ConfigError
from edgetune.models import ModelConfig
from edgetune.schema import Key

NAME = "lst"
RUNG, OUTPUT = "side", "side_output"  # attributes of `models.decoder.Block` and `Decoder`
CAPABILITIES = Capabilities(
    train_ort="The training graphs of a bundle know LoRA alone. Train with --engine torch, or --adapter lora.",
    peft_file="PEFT has no LST. edgetune reads and exports the files; for PEFT train --adapter lora.",
    as_lora="It stands beside the weights, and no LoRA does. Its own inputs are exported.",
    merge="lst stands beside the weights and folds into none. To merge, train --adapter lora.",
    merge_share="It cannot be merged, nor can a share of it. To merge, train --adapter lora.",
)
PEFT_SHARED = ()
PEFT_NAMES = {
    "side_down": "side_down.weight", "side_up": "side_up.weight", "side_upsample": "side_upsample.weight",
}  # fmt: skip
_PEFT_TYPE = "LST"
DEFAULT_REDUCTION = 2
UNITS = 32  # of a rung


@dataclass(frozen=True)
class LstConfig(BlocksConfig):
    """What the user asks of LST. None means "not set": the plan chooses, and may concede it."""

    method: ClassVar[str] = NAME
    rate_factor: ClassVar[float] = 3

    reduction: Annotated[
        int | None, Key("Hidden size over the width beside the blocks, a divisor of it. (default: 2)", low=1)
    ] = None

    def resolved(self: LstT, model: ModelConfig) -> LstT:
        """See `AdapterConfig`."""
        chosen, hidden = DEFAULT_REDUCTION if self.reduction is None else self.reduction, model.hidden_size
        fitting = [size for size in range(1, hidden + 1) if hidden % size == 0]
        if self.reduction is None:  # where it does not divide, the largest that does
            chosen = max(size for size in fitting if size <= chosen)
        if isinstance(chosen, bool) or chosen not in fitting:
            raise ConfigError(
                f"reduction = {chosen!r}; a divisor of the hidden size {hidden} was expected: "
                f"{', '.join(map(str, fitting))}."
            )
        return replace(super().resolved(model), reduction=chosen)

    @property
    def side_group(self) -> int:
        """See `AdapterConfig`."""
        assert self.reduction is not None, "resolve the config first"
        return self.reduction

    @property
    def brief(self) -> str:
        """See `AdapterConfig`."""
        return f"reduction {self.reduction}"


LstT = TypeVar("LstT", bound=LstConfig)
Config = LstConfig


def places(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """All places that a model has for it, with their (out_features, in_features) as `slot` takes them."""
    size = model.hidden_size, model.hidden_size
    return {f"{model.block(i)}.{RUNG}": size for i in range(model.num_hidden_layers)} | {f"model.{OUTPUT}": size}


def slots(config: LstConfig, model: ModelConfig) -> list[Slot]:
    """The rungs in the model's order, then the way back to its width, for a resolved config."""
    size = model.hidden_size, model.hidden_size
    return [slot(f"{model.block(i)}.{RUNG}", size, config) for i in config.blocks] + [
        slot(f"model.{OUTPUT}", size, config)
    ]


def slot(place: str, shape: tuple[int, int], config: LstConfig) -> Slot:
    """The slot of a place in a model of shape (hidden, hidden), for a resolved config."""
    hidden = shape[0]
    width = hidden // config.side_group
    if place.endswith(f".{OUTPUT}"):
        return Slot(place, width, hidden, {"side_upsample": (hidden, width)})
    return Slot(place, width, width, {"side_down": (UNITS, width), "side_up": (width, UNITS)})


def initialize(slot: Slot, config: LstConfig, rng: np.random.Generator, frozen: Any = None) -> dict[str, np.ndarray]:
    """W_down uniform in ±1/sqrt(s), the others zero; float32."""
    found = {name: np.zeros(shape, np.float32) for name, shape in slot.tensors.items()}
    if "side_down" in found:
        bound = 1 / math.sqrt(slot.out_features)
        found["side_down"] = rng.uniform(-bound, bound, slot.tensors["side_down"]).astype(np.float32)
    return found


def forward(x: Any, y: Any, tensors: Mapping[str, Any], config: LstConfig) -> Any:
    """Of a rung, z_i [..., s] from x = y = a_i; of the output y + U x / sqrt(n) [..., hidden]."""
    if "side_upsample" in tensors:
        return y + x @ tensors["side_upsample"].T * _share(config)
    return y + (x @ tensors["side_down"].T).relu() @ tensors["side_up"].T


def add(x: Any, y: Any, tensors: Mapping[str, Any], config: LstConfig) -> None:
    """`forward` into y itself."""
    if "side_upsample" in tensors:
        y.addmm_(x, tensors["side_upsample"].T, alpha=_share(config))
        return
    y.addmm_((x @ tensors["side_down"].T).relu_(), tensors["side_up"].T)


def add_gradients(
    x: Any, d_y: Any, d_x: Any, tensors: Mapping[str, Any], gradients: Mapping[str, Any], config: LstConfig
) -> None:
    """Backward of `add`: adds to the gradients of the tensors and to d_x, which of a rung is d_y itself.

    With h = relu(W_down a) and d = d_z W_up where h > 0:    d_up = d_z^T h,   d_down = d^T a,   d_a = d_z + d W_down
    """
    if "side_upsample" in tensors:
        gradients["side_upsample"].addmm_(d_y.T, x, alpha=_share(config))
        d_x.addmm_(d_y, tensors["side_upsample"], alpha=_share(config))
        return
    h = (x @ tensors["side_down"].T).relu_()
    gradients["side_up"].addmm_(d_y.T, h)
    d_h = (d_y @ tensors["side_up"]).mul_(h > 0)
    gradients["side_down"].addmm_(d_h.T, x)
    d_x.addmm_(d_h, tensors["side_down"])


def _share(config: LstConfig) -> float:
    """What the output is multiplied by."""
    return 1 / math.sqrt(len(config.blocks))


def changes(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these tensors of a slot do anything: a rung does where the output does."""
    return "side_upsample" in tensors and bool(tensors["side_upsample"].any())


def onnx_tensors(config: LstConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Graph inputs: of a rung `side_scale` [1], `side_down` [s, units] and `side_up` [units, s]; of the output
    `side_upsample` [s, hidden], which holds what it is multiplied by.
    """
    made = {}
    for name, value in tensors.items():
        place, _, short = name.rpartition(".")
        made[name] = np.ascontiguousarray(value.T * np.float32(_share(config) if short == "side_upsample" else 1))
        if short == "side_down":
            made[f"{place}.side_scale"] = np.array([math.sqrt(config.side_group)], np.float32)
    return made


def config_to_peft(config: LstConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config."""
    return own_config(config, _PEFT_TYPE, base_model)


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == _PEFT_TYPE


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], adapted: Mapping[str, tuple[int, int]]
) -> LstConfig:
    """A config from the keys of `config_to_peft`; raises as `read_own_config`."""
    return read_own_config(LstConfig, peft)
