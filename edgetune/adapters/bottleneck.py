"""Bottleneck adapters: y + W_up act(W_down x),   W_down [r, hidden], W_up [hidden, r]

    houlsby     x = y, what attention adds to the stream, then what the MLP does    (Houlsby et al., arXiv 1902.00751)
    pfeiffer    x = y, what the MLP adds                                            (Pfeiffer et al., arXiv 2005.00247)
    parallel    x = norm(x2), what the MLP takes, and y what it adds                (He et al., arXiv 2110.04366)

W_down starts uniform in ±1/sqrt(hidden) and W_up at zero, so the adapted block equals the base. There are no biases, as
in LLM-Adapters (arXiv 2304.01933), whose names the tensors have; He's factor on the sum is left to the learning rate.
Where a family norms what is added, the adapter comes after that norm. PEFT has no such method: the files are in its
layout, and edgetune alone reads them.

The activation keeps it from being folded into a weight, so it cannot be merged. The graph gets slots of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import BlocksConfig, own_config, read_own_config
from edgetune.adapters.slot import Slot
from edgetune.errors import ConfigError
from edgetune.models import ModelConfig
from edgetune.schema import Key

NAME = "bottleneck"
# Placement -> its places in a block: attributes of `models.decoder.Block`.
PLACEMENTS = {
    "houlsby": ("attention_output", "mlp_output"),
    "pfeiffer": ("mlp_output",),
    "parallel": ("mlp_parallel",),
}


def _silu_slope(z: Any) -> Any:
    gate = z.sigmoid()
    return gate * (1 + z * (1 - gate))


# Of each non-linearity: act(z) and its derivative, for torch tensors.
ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "relu": (lambda z: z.relu(), lambda z: (z > 0).to(z.dtype)),
    "silu": (lambda z: z * z.sigmoid(), _silu_slope),
    "tanh": (lambda z: z.tanh(), lambda z: 1 - z.tanh() ** 2),
}


CAPABILITIES = Capabilities(
    train_ort="The training graphs of a bundle know LoRA alone. Train with --engine torch, or --adapter lora.",
    peft_file="PEFT has no bottleneck adapters. edgetune reads and exports the files; for PEFT train --adapter lora.",
    as_lora="An activation stands between its two matrices: no LoRA computes that. Its own inputs are exported.",
    merge="An activation keeps it from being folded into a weight. Export it without --merge, or train --adapter lora.",
    merge_share="It cannot be merged, nor can a share of it. Export it without --merge, or train --adapter lora.",
)
PEFT_SHARED = ()
PEFT_NAMES = {"adapter_down": "adapter_down.weight", "adapter_up": "adapter_up.weight"}
_PEFT_TYPE = "BOTTLENECK"  # that of LLM-Adapters' own PEFT


@dataclass(frozen=True)
class BottleneckConfig(BlocksConfig):
    """What the user asks of bottleneck adapters. None means "not set": the plan chooses, and may concede it."""

    method: ClassVar[str] = NAME
    rate_factor: ClassVar[float] = 3

    r: Annotated[int | None, Key("Rank: a higher one can learn more and costs more memory. (default: 8)")] = None
    placement: Annotated[
        str | None,
        Key(f"Where a block has adapters: {', '.join(PLACEMENTS)}. (default: pfeiffer)", choices=tuple(PLACEMENTS)),
    ] = None
    non_linearity: Annotated[
        str | None,
        Key(f"Between down and up: {', '.join(ACTIVATIONS)}. (default: relu)", choices=tuple(ACTIVATIONS)),
    ] = None

    def resolved(self: BottleneckT, model: ModelConfig) -> BottleneckT:
        """See `AdapterConfig`."""
        r = 8 if self.r is None else self.r
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= model.hidden_size:
            raise ConfigError(f"r = {r!r}; an integer from 1 to the hidden size {model.hidden_size} was expected.")
        placement, non_linearity = self.placement or "pfeiffer", self.non_linearity or "relu"
        if placement not in PLACEMENTS:
            raise ConfigError(f"placement = {placement!r}; choose from {', '.join(PLACEMENTS)}.")
        if non_linearity not in ACTIVATIONS:
            raise ConfigError(f"non_linearity = {non_linearity!r}; choose from {', '.join(ACTIVATIONS)}.")
        return replace(super().resolved(model), r=r, placement=placement, non_linearity=non_linearity)

    @property
    def rank(self) -> int:
        """R of a resolved config."""
        assert self.r is not None, "resolve the config first"
        return self.r

    @property
    def activation(self) -> str:
        """The non-linearity of a resolved config."""
        assert self.non_linearity is not None, "resolve the config first"
        return self.non_linearity

    @property
    def places(self) -> tuple[str, ...]:
        """Those in a block, of a resolved config."""
        return PLACEMENTS[str(self.placement)]

    @property
    def brief(self) -> str:
        """See `AdapterConfig`."""
        return f"r {self.r}, {self.placement}, {self.non_linearity}"


BottleneckT = TypeVar("BottleneckT", bound=BottleneckConfig)
Config = BottleneckConfig


def places(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """All places that a model has for bottlenecks, with their (out_features, in_features)."""
    names = dict.fromkeys(name for placement in PLACEMENTS.values() for name in placement)
    size = model.hidden_size, model.hidden_size
    return {f"{model.block(i)}.{name}": size for i in range(model.num_hidden_layers) for name in names}


def slots(config: BottleneckConfig, model: ModelConfig) -> list[Slot]:
    """The places of the adapters in the model's order, for a resolved config."""
    size = model.hidden_size, model.hidden_size
    return [slot(f"{model.block(i)}.{place}", size, config) for i in config.blocks for place in config.places]


def slot(place: str, shape: tuple[int, int], config: BottleneckConfig) -> Slot:
    """The slot of a place of shape (out_features, in_features), for a resolved config."""
    n, k = shape
    return Slot(place, k, n, {"adapter_down": (config.rank, k), "adapter_up": (n, config.rank)})


def initialize(
    slot: Slot, config: BottleneckConfig, rng: np.random.Generator, frozen: Any = None
) -> dict[str, np.ndarray]:
    """W_down uniform in ±1/sqrt(hidden), W_up zero; float32."""
    bound = 1 / math.sqrt(slot.in_features)
    down = rng.uniform(-bound, bound, slot.tensors["adapter_down"]).astype(np.float32)
    return {"adapter_down": down, "adapter_up": np.zeros(slot.tensors["adapter_up"], np.float32)}


def forward(x: Any, y: Any, tensors: Mapping[str, Any], config: BottleneckConfig) -> Any:
    """The sum y + W_up act(W_down x) of x and y [..., hidden]."""
    act, _ = ACTIVATIONS[config.activation]
    return y + act(x @ tensors["adapter_down"].T) @ tensors["adapter_up"].T


def add(x: Any, y: Any, tensors: Mapping[str, Any], config: BottleneckConfig) -> None:
    """`forward` into y [N, hidden] itself, which may be x [N, hidden]."""
    act, _ = ACTIVATIONS[config.activation]
    y.addmm_(act(tensors["adapter_down"] @ x.T).T, tensors["adapter_up"].T)


def add_gradients(
    x: Any, d_y: Any, d_x: Any, tensors: Mapping[str, Any], gradients: Mapping[str, Any], config: BottleneckConfig
) -> None:
    """Backward of `add`, added to what is there: d_x [N, hidden] and the gradients of both tensors.

    With z = W_down x^T [r, N]:    d_up^T = act(z) d_y,   d_z = act'(z) * W_up^T d_y^T,   d_down = d_z x,
    d_x = d_z^T W_down
    """
    act, slope = ACTIVATIONS[config.activation]
    down, up = tensors["adapter_down"], tensors["adapter_up"]
    z = down @ x.T
    gradients["adapter_up"].add_((act(z) @ d_y).T)
    d_z = (up.T.contiguous() @ d_y.T).mul_(slope(z))
    gradients["adapter_down"].addmm_(d_z, x)
    d_x.addmm_(d_z.T, down)


def changes(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these tensors of a slot do anything."""
    return bool(tensors["adapter_down"].any() and tensors["adapter_up"].any())


def onnx_tensors(config: BottleneckConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Graph inputs: `<place>.adapter_down` [hidden, r] and `<place>.adapter_up` [r, hidden]."""
    return {name: np.ascontiguousarray(value.T) for name, value in tensors.items()}


def config_to_peft(config: BottleneckConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config."""
    return own_config(config, _PEFT_TYPE, base_model)


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == _PEFT_TYPE


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], adapted: Mapping[str, tuple[int, int]]
) -> BottleneckConfig:
    """A config from the keys of `config_to_peft`; raises as `read_own_config`."""
    return read_own_config(BottleneckConfig, peft)
