"""VeRA: y = W x + b * (B (d * (A dropout(x))))      (Kopiczko et al., arXiv 2310.11454)

One pair of random matrices A [r, in] and B [out, r], frozen and shared by all linears, each of which takes their first
columns and rows; trained are d [r] and b [out] alone. d starts at `d_initial`, b at zero, so the adapted layer equals
the base.

A and B are functions of `projection_prng_key` and are never written: `projections` gives the numbers that PEFT draws
for that key (torch's Mersenne Twister, which numpy has too). An adapter that brings others is refused. It folds into
LoRA: (b * B) (d * A).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import numpy as np

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import LinearsConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError, ConfigError
from edgetune.models import ModelConfig
from edgetune.schema import Key

NAME = "vera"
CAPABILITIES = Capabilities(
    train_ort="vera does not train on the ort engine: training graphs have no frozen projection. Take --adapter lora.",
    own_inputs="Its inputs are those of LoRA, into which it folds: export it without --merge.",
)
PEFT_NAMES = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}
PEFT_SHARED = ("base_model.vera_A", "base_model.vera_B")
SCALES_BIAS = False


@dataclass(frozen=True)
class VeraConfig(LinearsConfig):
    """What the user asks of VeRA."""

    method: ClassVar[str] = NAME
    rate_factor: ClassVar[float] = 10

    r: Annotated[int | None, Key("Rank: a higher one can learn more and costs more memory. (default: 256)")] = None
    vera_dropout: Annotated[
        float | None, Key("Share of the adapter's inputs set to zero in training. (default: 0)")
    ] = None
    d_initial: Annotated[float | None, Key("What the factors of the rank begin with. (default: 0.1)")] = None
    projection_prng_key: Annotated[int | None, Key("Fixes the shared random matrices. (default: 0)")] = None
    widths: tuple[int, ...] | None = None
    """Inputs and outputs of the shared matrices: the most of any adapted linear. Follows from the model."""

    def resolved(self, model: ModelConfig) -> VeraConfig:
        """See `AdapterConfig`."""
        config = replace(
            super().resolved(model),
            r=256 if self.r is None else self.r,
            vera_dropout=self.vera_dropout or 0.0,
            d_initial=0.1 if self.d_initial is None else self.d_initial,
            projection_prng_key=self.projection_prng_key or 0,
        )
        shapes = config.linears(model).values()
        config = replace(config, widths=(max(k for _, k in shapes), max(n for n, _ in shapes)))
        if isinstance(config.r, bool) or not isinstance(config.r, int) or not 1 <= config.r <= 1 << 16:
            raise ConfigError(f"r = {config.r!r}; an integer from 1 to {1 << 16} was expected.")
        if not 0 <= config.dropout < 1:
            raise ConfigError(f"vera_dropout = {config.vera_dropout!r}; a number from 0 to below 1 was expected.")
        if not 0 < abs(config.d_initial or 0) < math.inf:
            raise ConfigError(f"d_initial = {config.d_initial!r}; a number other than 0 was expected.")
        if not 0 <= (config.projection_prng_key or 0) < 1 << 32:
            raise ConfigError(
                f"projection_prng_key = {config.projection_prng_key!r}; an integer from 0 to {(1 << 32) - 1:,} was "
                "expected."
            )
        return config

    @property
    def dropout(self) -> float:
        """See `AdapterConfig`."""
        return self.vera_dropout or 0.0

    @property
    def rank(self) -> int:
        """R of a resolved config."""
        assert self.r is not None, "resolve the config first"
        return self.r

    @property
    def brief(self) -> str:
        """See `AdapterConfig`."""
        return f"r {self.r}"


Config = VeraConfig


@lru_cache(maxsize=2)
def projections(key: int, r: int, widths: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The shared A [r, in] and B [out, r], float32: PEFT's Kaiming-uniform, of bounds sqrt(6 / fan_in).

    torch takes 24 bits of each number of the generator, and rounds once where it scales them.
    """
    rng = np.random.RandomState(key)

    def drawn(rows: int, columns: int) -> np.ndarray:
        bits = rng.randint(0, 1 << 32, size=rows * columns, dtype=np.uint32) & 0xFFFFFF
        bound = float(np.float32(math.sqrt(3) * math.sqrt(2) / math.sqrt(columns)))
        return (bits * (2 * bound / (1 << 24)) - bound).astype(np.float32).reshape(rows, columns)

    return drawn(r, widths[0]), drawn(widths[1], r)


def slots(config: VeraConfig, model: ModelConfig) -> list[Slot]:
    """The adapted linears in the model's order, for a resolved config; the shared matrices lie beside the first."""
    found = [slot(place, shape, config) for place, shape in config.linears(model).items()]
    return [replace(found[0], kept_floats=config.rank * sum(config.widths or ())), *found[1:]]


def slot(place: str, shape: tuple[int, int], config: VeraConfig) -> Slot:
    """The slot of one linear of shape (out_features, in_features), for a resolved config."""
    n, k = shape
    return Slot(place, k, n, {"vera_lambda_b": (n,), "vera_lambda_d": (config.rank,)})


def initialize(slot: Slot, config: VeraConfig, rng: np.random.Generator, frozen: Any) -> dict[str, np.ndarray]:
    """B zero, d `d_initial`; float32."""
    d = np.full(slot.tensors["vera_lambda_d"], config.d_initial, np.float32)
    return {"vera_lambda_b": np.zeros(slot.tensors["vera_lambda_b"], np.float32), "vera_lambda_d": d}


def frozen_tensors(config: VeraConfig, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Of a linear of shape (out_features, in_features): views of the shared A [r, in] and B [out, r]."""
    assert config.widths is not None, "resolve the config first"
    a, b = projections(config.projection_prng_key or 0, config.rank, config.widths)
    return {"vera_A": a[:, : shape[1]], "vera_B": b[: shape[0]]}


def forward(x: Any, y: Any, tensors: Mapping[str, Any], config: VeraConfig) -> Any:
    """Output [..., out] of the adapted layer from its (dropped) input x [..., in] and the frozen output y."""
    z = (x @ tensors["vera_A"].T) * tensors["vera_lambda_d"]
    return y + (z @ tensors["vera_B"].T) * tensors["vera_lambda_b"]


def add(x: Any, y: Any, tensors: Mapping[str, Any], config: VeraConfig) -> None:
    """`forward` into y [N, out] itself, for torch tensors: x [N, in]."""
    z = (tensors["vera_A"] @ x.T).mul_(tensors["vera_lambda_d"][:, None])
    y.addmm_(z.T, (tensors["vera_lambda_b"][:, None] * tensors["vera_B"]).T)


def add_gradients(
    x: Any, d_y: Any, d_x: Any | None, tensors: Mapping[str, Any], gradients: Mapping[str, Any], config: VeraConfig
) -> None:
    """Backward of `add`, added to what is there: d_x [N, in] and the gradients of b and d, from d_y [N, out].

    With z = A x^T [r, N]:  d_b = rows of B . ((d z) d_y)^T,  d_dz = (b B)^T d_y^T,  d_d = rows of d_dz . z,
    d_x = (d d_dz)^T A
    """
    a, b, factors = tensors["vera_A"], tensors["vera_B"], tensors["vera_lambda_d"][:, None]
    z = a @ x.T
    gradients["vera_lambda_b"].add_((((z * factors) @ d_y).T * b).sum(1))
    d_z = (tensors["vera_lambda_b"][:, None] * b).T @ d_y.T
    gradients["vera_lambda_d"].add_(z.mul_(d_z).sum(1))
    if d_x is not None:
        d_x.addmm_(d_z.mul_(factors).T, a)


def merge(weight: np.ndarray, tensors: Mapping[str, np.ndarray], rows: slice, config: VeraConfig) -> np.ndarray:
    """float32 [rows, in]: these rows of a frozen weight with the adapter folded in."""
    b = tensors["vera_lambda_b"][rows, None] * tensors["vera_B"][rows]
    merged: np.ndarray = weight + b @ (tensors["vera_lambda_d"][:, None] * tensors["vera_A"])
    return merged


def changes(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a slot does anything."""
    return bool(tensors["vera_lambda_b"].any())


def weakened(
    config: VeraConfig, tensors: dict[str, np.ndarray], alpha: float
) -> tuple[VeraConfig, dict[str, np.ndarray]]:
    """The adapter whose change of the weights is `alpha` times this one's."""
    return config, {
        name: value * np.float32(alpha) if name.endswith("vera_lambda_b") else value for name, value in tensors.items()
    }


def as_lora(
    config: VeraConfig, tensors: dict[str, np.ndarray], linears: Mapping[str, tuple[int, int]]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The same as LoRA of this rank, with a scaling of 1."""
    made: dict[str, np.ndarray] = {}
    for place in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
        shared = frozen_tensors(config, linears[place])
        made[f"{place}.lora_A"] = tensors[f"{place}.vera_lambda_d"][:, None] * shared["vera_A"]
        made[f"{place}.lora_B"] = tensors[f"{place}.vera_lambda_b"][:, None] * shared["vera_B"]
    same = LoraConfig(
        layers_to_transform=config.layers_to_transform, target_modules=config.target_modules,
        r=config.rank, lora_alpha=float(config.rank), lora_dropout=config.dropout,
    )  # fmt: skip
    return same, made


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == "VERA"


def config_to_peft(config: VeraConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only."""
    return {
        "peft_type": "VERA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": config.r, "vera_dropout": config.vera_dropout, "d_initial": config.d_initial,
        "projection_prng_key": config.projection_prng_key, "save_projection": False,
        "target_modules": list(config.target_modules or ()),
        "layers_to_transform": list(config.layers_to_transform or ()),
        "bias": "none", "fan_in_fan_out": False, "init_weights": True, "inference_mode": True, "modules_to_save": None,
    }  # fmt: skip


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[int, int]]
) -> VeraConfig:
    """A config from PEFT's keys, the shapes of its tensors, and those of the places that it adapts.

    Raises:
        AdapterError: the adapter uses what VeRA here does not compute.
    """
    unsupported = [f"{key} = {peft[key]!r}" for key in ("fan_in_fan_out", "modules_to_save") if peft.get(key)]
    if peft.get("bias", "none") != "none":
        unsupported.append(f"bias = {peft['bias']!r}")
    if unsupported:
        raise AdapterError(f"adapter_config.json sets {', '.join(unsupported)}, which VeRA here does not compute.")
    try:
        return VeraConfig(
            r=int(peft["r"]),
            vera_dropout=float(peft.get("vera_dropout") or 0.0),
            d_initial=float(peft.get("d_initial", 0.1)),
            projection_prng_key=int(peft.get("projection_prng_key", 0)),
            target_modules=tuple(dict.fromkeys(place.rpartition(".")[2] for place in places)),
            layers_to_transform=tuple(sorted({int(place.split(".")[2]) for place in places})),
            widths=(max(k for _, k in places.values()), max(n for n, _ in places.values())),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise AdapterError(f"adapter_config.json or a tensor name is not as PEFT writes it ({error!r}).") from error


def check_shared(config: VeraConfig, shared: Mapping[str, np.ndarray]) -> None:
    """Raises AdapterError where an adapter file brings other matrices than those of its key."""
    assert config.widths is not None
    a, b = projections(config.projection_prng_key or 0, config.rank, config.widths)
    for name, wanted in zip(PEFT_SHARED, (a, b), strict=True):
        if name in shared and (shared[name].shape != wanted.shape or np.abs(shared[name] - wanted).max() > 1e-6):
            raise AdapterError(
                f"{name} is not what projection_prng_key = {config.projection_prng_key} gives for these linears; only "
                "such adapters are read. Train it again in edgetune, or with PEFT on the CPU."
            )
