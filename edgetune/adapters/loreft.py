"""LoReFT: h + R^T (W h + b - R h),   R, W [r, hidden], b [r], the rows of R orthonormal  (Wu et al., arXiv 2404.03592)

Here h is what a block gives at the first f and the last l positions of a row's prompt, and nowhere else: what it has in
the r directions of R is replaced by W h + b. The same R, W and b serve all positions of a layer (the paper ties them
too). A shorter prompt has all of its positions changed, each once; pyreft gives each end at most half of it. The prompt
is what comes before the first token that is learned, and in a bundle what comes before the first that is generated.
Text rows have none and are refused.

R is what a QR decomposition makes of a free tensor A [r, hidden]: A^T = R^T U, the diagonal of U positive. So any step
rule may move A as it likes, MeZO too, and no step has to come back to the manifold; the gradient of A has a closed form
(`add_gradients`), and a decomposition of r columns is little beside a block. pyreft uses torch's orthogonal
parametrization, products of Householder reflections: the same R by other coordinates.

A starts as an orthonormal basis of random directions, W as R and b as zero, so the adapted block equals the base but
for rounding (pyreft's identity start; its usual one is random in W and b). PEFT has no such method: the files are in
its layout with pyreft's names, A in the place of R, and edgetune alone reads them.

What it does depends on the position, so it folds into no weight. A graph has slots of its own (`graphs.ops.loreft`) and
an optional input `prompt_length`; without that the prompt is what the first call gives. Decoding changes nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import BlocksConfig, own_config, read_own_config
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError, ConfigError
from edgetune.models import ModelConfig
from edgetune.schema import Key

NAME = "loreft"
PLACE = "block_output"  # an attribute of `models.decoder.Block`
CAPABILITIES = Capabilities(
    train_ort="The training graphs of a bundle know LoRA alone. Train with --engine torch, or --adapter lora.",
    peft_file="PEFT has no ReFT. edgetune reads and exports the files; for PEFT train --adapter lora.",
    as_lora="It changes some positions alone: no LoRA does that. Its own inputs are exported.",
    merge="It changes some positions alone, and no weight does. Export it without --merge, or train --adapter lora.",
    merge_share="It cannot be merged, nor can a share of it. Export it without --merge, or train --adapter lora.",
)
PEFT_SHARED = ()
PEFT_NAMES = {
    "rotate_layer": "rotate_layer.weight", "learned_source": "learned_source.weight",
    "learned_bias": "learned_source.bias",
}  # fmt: skip
_PEFT_TYPE = "LOREFT"
DEFAULT_POSITIONS, DEFAULT_RANK = "f7+l7", 8  # of the paper's runs on commonsense reasoning, in all layers
_POSITIONS = re.compile(r"(?:f([1-9]\d{0,3}))?(?:(?:^|(?<=\d)\+)l([1-9]\d{0,3}))?")
_LEAST_CHANGE = 1e-5  # of W - R, beyond what the decomposition rounds


@dataclass(frozen=True)
class LoreftConfig(BlocksConfig):
    """What the user asks of LoReFT. None means "not set": the plan chooses, and may concede it."""

    method: ClassVar[str] = NAME
    rate_factor: ClassVar[float] = 3

    r: Annotated[int | None, Key("Rank: a higher one can learn more and costs more memory. (default: 8)")] = None
    positions: Annotated[
        str | None, Key("First and last positions of a prompt that are changed: f7, l7 or f7+l7. (default: f7+l7)")
    ] = None

    def resolved(self: LoreftT, model: ModelConfig) -> LoreftT:
        """See `AdapterConfig`."""
        r = DEFAULT_RANK if self.r is None else self.r
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= model.hidden_size:
            raise ConfigError(f"r = {r!r}; an integer from 1 to the hidden size {model.hidden_size} was expected.")
        positions = DEFAULT_POSITIONS if self.positions is None else self.positions
        parse_positions(positions)
        return replace(super().resolved(model), r=r, positions=positions)

    @property
    def rank(self) -> int:
        """R of a resolved config."""
        assert self.r is not None, "resolve the config first"
        return self.r

    @property
    def prompt_positions(self) -> tuple[int, int]:
        """See `AdapterConfig`."""
        assert self.positions is not None, "resolve the config first"
        return parse_positions(self.positions)

    @property
    def brief(self) -> str:
        """See `AdapterConfig`."""
        return f"r {self.r}, {self.positions}"


LoreftT = TypeVar("LoreftT", bound=LoreftConfig)
Config = LoreftConfig


def parse_positions(text: str) -> tuple[int, int]:
    """How many first and last positions of a prompt `f7+l7`, `f7` or `l7` names.

    Raises:
        ConfigError: it is none of these.
    """
    found = _POSITIONS.fullmatch(text) if isinstance(text, str) and text else None
    if found is None:
        raise ConfigError(f"positions = {text!r}; such as f7+l7, f7 or l7 was expected, each from 1 to 9999.")
    return int(found[1] or 0), int(found[2] or 0)


def places(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """All places that a model has for it, with their (out_features, in_features)."""
    size = model.hidden_size, model.hidden_size
    return {f"{model.block(i)}.{PLACE}": size for i in range(model.num_hidden_layers)}


def slots(config: LoreftConfig, model: ModelConfig) -> list[Slot]:
    """The places of a resolved config in the model's order."""
    size = model.hidden_size, model.hidden_size
    return [slot(f"{model.block(i)}.{PLACE}", size, config) for i in config.blocks]


def slot(place: str, shape: tuple[int, int], config: LoreftConfig) -> Slot:
    """The slot of a place of shape (out_features, in_features), for a resolved config."""
    n, k = shape
    matrix = config.rank, k
    tensors = {"rotate_layer": matrix, "learned_source": matrix, "learned_bias": (config.rank,)}
    return Slot(place, k, n, tensors)


def initialize(slot: Slot, config: LoreftConfig, rng: np.random.Generator, frozen: Any = None) -> dict[str, np.ndarray]:
    """A orthonormal rows of random directions, W the same, b zero; float32."""
    shape = slot.tensors["rotate_layer"]
    rotation, _ = _decomposed(rng.standard_normal(shape))
    rotation = np.ascontiguousarray(rotation, np.float32)
    return {
        "rotate_layer": rotation, "learned_source": rotation.copy(),
        "learned_bias": np.zeros(slot.tensors["learned_bias"], np.float32),
    }  # fmt: skip


def forward(x: Any, y: Any, tensors: Mapping[str, Any], config: LoreftConfig) -> Any:
    """The sum y + R^T (W x + b - R x) of x and y [..., hidden], at every position that it is given."""
    rotation, _ = _decomposed(tensors["rotate_layer"])
    return y + (x @ (tensors["learned_source"] - rotation).T + tensors["learned_bias"]) @ rotation


def add(x: Any, y: Any, tensors: Mapping[str, Any], config: LoreftConfig) -> None:
    """`forward` into y [N, hidden] itself, which may be x [N, hidden]."""
    rotation, _ = _decomposed(tensors["rotate_layer"])
    y.addmm_(x @ (tensors["learned_source"] - rotation).T + tensors["learned_bias"], rotation)


def add_gradients(
    x: Any, d_y: Any, d_x: Any, tensors: Mapping[str, Any], gradients: Mapping[str, Any], config: LoreftConfig
) -> None:
    """Backward of `add`, added to what is there: d_x [N, hidden] and the gradients of the tensors.

    With e = x (W - R)^T + b and g = d_y R^T, [N, r] both:    d_W = g^T x,   d_b = sum(g),   d_R = e^T d_y - g^T x,
    d_x = g (W - R)

    and of A^T = R^T U:    U d_A = d_R - S R,   where S is symmetric and has the lower triangle of d_R R^T
    (that of an LQ decomposition in Seeger et al., arXiv 1710.08717).
    """
    rotation, upper = _decomposed(tensors["rotate_layer"])
    difference = tensors["learned_source"] - rotation
    error, d_error = x @ difference.T + tensors["learned_bias"], d_y @ rotation.T
    d_source = d_error.T @ x
    gradients["learned_source"].add_(d_source)
    gradients["learned_bias"].add_(d_error.sum(0))
    d_x.addmm_(d_error, difference)
    d_rotation = error.T @ d_y - d_source
    lower = (d_rotation @ rotation.T).tril()
    symmetric = lower + lower.tril(-1).T
    d_free = _namespace(upper).linalg.solve_triangular(upper, d_rotation - symmetric @ rotation, upper=True)
    gradients["rotate_layer"].add_(d_free)


def changes(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these tensors of a slot do anything."""
    rotation, _ = _decomposed(tensors["rotate_layer"])
    return bool(tensors["learned_bias"].any() or np.abs(tensors["learned_source"] - rotation).max() > _LEAST_CHANGE)


def onnx_tensors(config: LoreftConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Graph inputs: `<place>.reft_down` [hidden, r], (W - R)^T, `.reft_bias` [r] and `.reft_up` [r, hidden], R."""
    made = {}
    for name, value in tensors.items():
        place, _, short = name.rpartition(".")
        if short != "rotate_layer":
            continue
        rotation = np.ascontiguousarray(_decomposed(value)[0])
        source = tensors[f"{place}.learned_source"]
        made[f"{place}.reft_down"] = np.ascontiguousarray((source - rotation).T)
        made[f"{place}.reft_bias"] = tensors[f"{place}.learned_bias"]
        made[f"{place}.reft_up"] = rotation
    return made


def _decomposed(free: Any) -> tuple[Any, Any]:
    """R [r, hidden] and U [r, r] of a tensor A [r, hidden]."""
    library = _namespace(free)
    columns, upper = library.linalg.qr(free.T)
    sign = library.sign(upper.diagonal())
    return (columns * sign).T, sign[:, None] * upper


def _namespace(array: Any) -> Any:
    """The library of an array: numpy, or the torch that made it, which no method file imports."""
    return sys.modules[type(array).__module__.partition(".")[0]]


def config_to_peft(config: LoreftConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config."""
    return own_config(config, _PEFT_TYPE, base_model)


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == _PEFT_TYPE


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], adapted: Mapping[str, tuple[int, int]]
) -> LoreftConfig:
    """A config from the keys of `config_to_peft`.

    Raises:
        AdapterError: as `read_own_config`, or there are no such positions.
    """
    config = read_own_config(LoreftConfig, peft)
    try:
        parse_positions(config.positions or "")
    except ConfigError as error:
        raise AdapterError(f"adapter_config.json is not as edgetune writes it: {error} Train again.") from error
    return config
