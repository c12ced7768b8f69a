"""LoRA: y = W x + scaling * B (A dropout(x)),  A [r, in], B [out, r]        (Hu et al., arXiv 2106.09685)

LoRA+ lets B learn faster than A, which costs nothing (arXiv 2402.12354): `loraplus_lr_ratio`, of the optimizer alone.

`scaling` is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). A starts uniform in
±1/sqrt(in) (PEFT's Kaiming initialization), B starts at zero, so the adapted layer equals the base. Names and meaning
follow PEFT. Where linears have ranks of their own (`rank_pattern`), `scaling` is still one for all: r divides every
rank, and PEFT's `alpha_pattern` follows. No torch here: `forward` uses only operators that torch tensors and numpy
arrays share.

`init_lora_weights` has other starts, which `training.initialization` computes: `eva` changes A alone, and `loftq` both,
so that the adapted model starts nearer to the original one than the base is. PiSSA is refused: it trains the principal
part of each weight and freezes the rest, so the frozen part would be no base that was quantized before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import LinearsConfig
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError, ConfigError
from edgetune.models import ModelConfig
from edgetune.schema import Key

NAME = "lora"


CAPABILITIES = Capabilities(own_inputs="Its inputs are those of LoRA: export it without --merge.")
SCALES_BIAS = False
KAIMING, LOFTQ, EVA = "kaiming", "loftq", "eva"
INITIALIZATIONS = (KAIMING, LOFTQ, EVA)
# Short name of a tensor -> how its name ends in a PEFT file.
PEFT_NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
PEFT_SHARED = ()
_PLAIN = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class LoraConfig(LinearsConfig):
    """What the user asks of LoRA. None means "not set": the plan chooses, and may concede it to the budget."""

    method: ClassVar[str] = NAME

    r: Annotated[int | None, Key("Rank: a higher one can learn more and costs more memory. (default: 8)")] = None
    lora_alpha: Annotated[
        float | None, Key("Strength: the adapter's output is scaled by alpha / r. (default: 2 r)")
    ] = None
    lora_dropout: Annotated[
        float | None, Key("Share of the adapter's inputs set to zero in training. (default: 0)")
    ] = None
    use_rslora: Annotated[bool | None, Key("Scale by alpha / sqrt(r), for high ranks. (default: off)")] = None
    loraplus_lr_ratio: Annotated[
        float | None, Key("LoRA+: B learns at so many times the learning rate of A. (default: 1)")
    ] = None
    adapter_budget: Annotated[
        int | None,
        Key("Bytes of the adapter's file, such as 2MiB: a short pass over the rows chooses linears and ranks."),
    ] = None
    rank_pattern: dict[str, int] | None = None
    """Place -> rank, where ranks differ: these places are adapted and no others."""
    init_lora_weights: Annotated[
        str | None,
        Key(
            "First values: kaiming, where the adapter does nothing yet; loftq, which recovers what quantization lost; "
            "or eva, from the rows' activations. (default: kaiming)"
        ),
    ] = None
    init_from: Annotated[
        str | None,
        Key("For loftq the original model, which the base was quantized from. (default: MODEL, if it is that)"),
    ] = None

    def resolved(self: LoraT, model: ModelConfig) -> LoraT:
        """See `AdapterConfig`."""
        if self.rank_pattern is not None:
            return self._of_pattern(model)._resolved(model)
        if self.adapter_budget is not None:
            raise ConfigError(
                f"adapter_budget = {self.adapter_budget}; ranks within it are chosen by the torch engine, on rows: use "
                "`edgetune train`, `edgetune plan` with --data, or edgetune.allocate_ranks()."
            )
        return self._resolved(model)

    def _of_pattern(self: LoraT, model: ModelConfig) -> LoraT:
        """What the ranks of single places say of all the rest."""
        shapes, pattern = model.linears(), self.rank_pattern or {}
        wrong = [
            f"{place}: {r!r}"
            for place, r in pattern.items()
            if place not in shapes or type(r) is not int or not 1 <= r <= model.hidden_size
        ]
        if wrong or not pattern:
            raise ConfigError(
                f"rank_pattern has {', '.join(wrong[:5]) or 'nothing'}; full names of linears with ranks from 1 to the "
                f"hidden size {model.hidden_size} were expected, such as {next(iter(shapes))}: 4."
            )
        ranks = {place: pattern[place] for place in shapes if place in pattern}
        blocks = [f"{model.block(index)}." for index in range(model.num_hidden_layers)]
        return replace(
            self,
            r=math.gcd(*ranks.values()),
            rank_pattern=ranks,
            target_modules=tuple(dict.fromkeys(place.rpartition(".")[2] for place in ranks)),
            layers_to_transform=tuple(i for i, block in enumerate(blocks) if any(p.startswith(block) for p in ranks)),
        )

    def _resolved(self: LoraT, model: ModelConfig) -> LoraT:
        r = 8 if self.r is None else self.r
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= model.hidden_size:
            raise ConfigError(f"r = {r!r}; an integer from 1 to the hidden size {model.hidden_size} was expected.")
        config = replace(
            super().resolved(model),
            r=r,
            lora_alpha=2 * r if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout or 0.0,
            use_rslora=bool(self.use_rslora),
            loraplus_lr_ratio=1.0 if self.loraplus_lr_ratio is None else self.loraplus_lr_ratio,
            init_lora_weights=self._initialization(),
        )
        if not 0 < config._alpha < math.inf:
            raise ConfigError(f"lora_alpha = {config.lora_alpha!r}; a positive number was expected.")
        if not 0 <= config.dropout < 1:
            raise ConfigError(f"lora_dropout = {config.lora_dropout!r}; a number from 0 to below 1 was expected.")
        if not 1 <= config.lr_ratio("lora_B") < math.inf:
            raise ConfigError(f"loraplus_lr_ratio = {config.loraplus_lr_ratio!r}; a number from 1 up was expected.")
        return config

    def _initialization(self) -> str:
        name = self.init_lora_weights or KAIMING
        if name == "pissa" or name.startswith("pissa_niter_"):
            raise ConfigError(
                f"init_lora_weights = {name!r} freezes what is left of each weight without its principal part, which "
                "is another base than this one. Take loftq: it starts at what quantization lost, on the same base."
            )
        if name not in INITIALIZATIONS:
            raise ConfigError(f"init_lora_weights = {name!r}; choose from {', '.join(INITIALIZATIONS)}.")
        if self.init_from is not None and name != LOFTQ:
            raise ConfigError(f"init_from is for init_lora_weights = 'loftq', and that is {name!r}. Leave it out.")
        return name

    @property
    def _alpha(self) -> float:
        assert self.lora_alpha is not None, "resolve the config first"
        return self.lora_alpha

    @property
    def dropout(self) -> float:
        """See `AdapterConfig`."""
        return self.lora_dropout or 0.0

    def lr_ratio(self, tensor: str) -> float:
        """See `AdapterConfig`."""
        return self.loraplus_lr_ratio or 1.0 if tensor == "lora_B" else 1.0

    @property
    def brief(self) -> str:
        """See `AdapterConfig`."""
        if self.rank_pattern is not None:
            lowest, highest, count = min(self.ranks), max(self.ranks), len(self.rank_pattern)
            return f"r {lowest} to {highest} at {count} linears, scaling {self.scaling:g}"
        return f"r {self.r}, alpha {self._alpha:g}"

    @property
    def rank(self) -> int:
        """R of a resolved config: every rank, or where they differ what divides them all."""
        assert self.r is not None, "resolve the config first"
        return self.r

    @property
    def ranks(self) -> frozenset[int]:
        """Those that occur in a resolved config."""
        return frozenset((self.rank_pattern or {"": self.rank}).values())

    def rank_at(self, place: str) -> int:
        """That of one of a resolved config's places."""
        return self.rank if self.rank_pattern is None else self.rank_pattern[place]

    def linears(self, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """See `LinearsConfig`."""
        found = super().linears(model)
        pattern = found if self.rank_pattern is None else self.rank_pattern
        return {place: shape for place, shape in found.items() if place in pattern}

    @property
    def scaling(self) -> float:
        """The factor on B A, of a resolved config."""
        return self._alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


LoraT = TypeVar("LoraT", bound=LoraConfig)
Config = LoraConfig


def slots(config: LoraConfig, model: ModelConfig) -> list[Slot]:
    """The adapted linears in the model's order, for a resolved config."""
    return [slot(place, shape, config) for place, shape in config.linears(model).items()]


def slot(place: str, shape: tuple[int, int], config: LoraConfig) -> Slot:
    """The slot of one linear of shape (out_features, in_features), for a resolved config."""
    (n, k), r = shape, config.rank_at(place)
    return Slot(place, k, n, {"lora_A": (r, k), "lora_B": (n, r)})


def initialize(slot: Slot, config: LoraConfig, rng: np.random.Generator, frozen: Any) -> dict[str, np.ndarray]:
    """A uniform in ±1/sqrt(in), B zero; float32."""
    bound = 1 / math.sqrt(slot.in_features)
    a = rng.uniform(-bound, bound, slot.tensors["lora_A"]).astype(np.float32)
    return {"lora_A": a, "lora_B": np.zeros(slot.tensors["lora_B"], np.float32)}


def frozen_tensors(config: LoraConfig, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """None."""
    return {}


def forward(x: Any, y: Any, tensors: Mapping[str, Any], config: LoraConfig) -> Any:
    """Output [..., out] of the adapted layer from its (dropped) input x [..., in] and the frozen output y."""
    return y + (x @ tensors["lora_A"].T) @ tensors["lora_B"].T * config.scaling


def add(x: Any, y: Any, tensors: Mapping[str, Any], config: LoraConfig) -> None:
    """`forward` into y [N, out] itself, for torch tensors: x [N, in].

    The rank is the rows of every thin product, here and in `add_gradients`: at r = 8 that is up to four times as fast
    as having it as the columns.
    """
    y.addmm_((tensors["lora_A"] @ x.T).T, tensors["lora_B"].T, alpha=config.scaling)


def add_gradients(
    x: Any, d_y: Any, d_x: Any | None, tensors: Mapping[str, Any], gradients: Mapping[str, Any], config: LoraConfig
) -> None:
    """Backward of `add`, added to what is there: d_x [N, in] and the gradients of A and B, from d_y [N, out].

    With z = A x^T [r, N]:    d_B^T = s z d_y,   d_z = s B^T d_y^T,   d_A = d_z x,   d_x = d_z^T A
    """
    a, b = tensors["lora_A"], tensors["lora_B"]
    gradients["lora_B"].add_(((a @ x.T) @ d_y).T, alpha=config.scaling)
    d_z = (b.T.contiguous() @ d_y.T).mul_(config.scaling)
    gradients["lora_A"].addmm_(d_z, x)
    if d_x is not None:
        d_x.addmm_(d_z.T, a)


def merge(weight: np.ndarray, tensors: Mapping[str, np.ndarray], rows: slice, config: LoraConfig) -> np.ndarray:
    """float32 [rows, in]: these rows of a frozen weight with the adapter folded in."""
    product: np.ndarray = tensors["lora_B"][rows] @ tensors["lora_A"]
    return weight + product * np.float32(config.scaling)


def changes(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether a slot does anything."""
    return bool(tensors["lora_B"].any())


def weakened(
    config: LoraConfig, tensors: dict[str, np.ndarray], alpha: float
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The adapter whose change of the weights is `alpha` times this one's."""
    return replace(config, lora_alpha=alpha * config._alpha), tensors


def as_lora(
    config: LoraConfig, tensors: dict[str, np.ndarray], linears: Mapping[str, tuple[int, int]]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The adapter itself: LoRA is what graphs and bundles know."""
    return config, tensors


def onnx_tensors(config: LoraConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Graph inputs: `<linear>.lora_A` [in, r] and `<linear>.lora_B` [r, out] with the scaling folded into B."""
    return {
        name: np.ascontiguousarray(value.T * np.float32(config.scaling if name.endswith("lora_B") else 1))
        for name, value in tensors.items()
    }


def config_to_peft(config: LoraConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only."""
    ranks = config.rank_pattern or {}
    alphas = {place: config.scaling * (math.sqrt(r) if config.use_rslora else r) for place, r in ranks.items()}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
        "target_modules": list(ranks or config.target_modules or ()), "use_rslora": config.use_rslora,
        "rank_pattern": ranks, "alpha_pattern": alphas,
        "layers_to_transform": list(config.layers_to_transform or ()),
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
        "modules_to_save": None,
    }  # fmt: skip


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method."""
    return peft.get("peft_type") == "LORA" and not peft.get("use_dora")


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], places: Mapping[str, tuple[int, int]]
) -> LoraConfig:
    """A config from PEFT's keys and the shapes of its tensors, by their full names.

    PEFT's `target_modules` may be a pattern, so what is adapted is read from the tensors themselves.

    Raises:
        AdapterError: the adapter uses what LoRA here does not compute.
    """
    unsupported = [
        f"{key} = {peft[key]!r}" for key in ("fan_in_fan_out", "modules_to_save", "lora_bias") if peft.get(key)
    ]
    if peft.get("bias", "none") != "none":
        unsupported.append(f"bias = {peft['bias']!r}")
    if unsupported:
        raise AdapterError(f"adapter_config.json sets {', '.join(unsupported)}, which LoRA here does not compute.")
    ranks = {name.rpartition(".")[0]: shape[0] for name, shape in tensors.items() if name.endswith(".lora_A")}
    said = {place: _by_pattern(peft, "rank_pattern", place, peft.get("r")) for place in ranks}
    if ranks != said or not ranks:
        place = next((place for place in ranks if ranks[place] != said[place]), "")
        raise AdapterError(
            f"adapter_config.json has r = {said.get(place, peft.get('r'))!r}"
            + (f" for {place}" if peft.get("rank_pattern") else "")
            + f"; its tensors have rank {sorted(set(ranks.values()))}."
        )
    mixed = {place: ranks[place] for place in places if place in ranks} if len(set(ranks.values())) > 1 else None
    r = math.gcd(*ranks.values())
    try:
        scalings = [_scaling(peft, place, ranks) for place in ranks]
        if not all(0 < scaling < math.inf for scaling in scalings):
            raise ValueError(f"scaling {min(scalings)}")
        layers = {int(place.split(".")[2]) for place in places}
        return LoraConfig(
            r=r,
            lora_alpha=scalings[0] * _unit(peft, r)
            if mixed or peft.get("alpha_pattern")
            else float(peft["lora_alpha"]),
            rank_pattern=mixed,
            lora_dropout=float(peft.get("lora_dropout") or 0.0),
            target_modules=tuple(dict.fromkeys(place.rpartition(".")[2] for place in places)),
            use_rslora=bool(peft.get("use_rslora", False)),
            loraplus_lr_ratio=1.0,
            init_lora_weights=KAIMING,
            layers_to_transform=tuple(sorted(layers)),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise AdapterError(f"adapter_config.json or a tensor name is not as PEFT writes it ({error!r}).") from error


def at_one_scaling(
    config: LoraConfig, peft: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors that are with the config's one scaling what PEFT computes: it has one for each alpha and rank."""
    ranks = {name.rpartition(".")[0]: len(value) for name, value in tensors.items() if name.endswith(".lora_A")}
    shares = {place: _scaling(peft, place, ranks) / config.scaling for place in ranks}
    return {
        name: value * np.float32(shares[place]) if kind == "lora_B" and shares[place] != 1 else value
        for name, value in tensors.items()
        for place, _, kind in [name.rpartition(".")]
    }


def _scaling(peft: Mapping[str, Any], place: str, ranks: Mapping[str, int]) -> float:
    return float(_by_pattern(peft, "alpha_pattern", place, peft["lora_alpha"])) / _unit(peft, ranks[place])


def _unit(peft: Mapping[str, Any], r: int) -> float:
    """What alpha is divided by at a rank."""
    return math.sqrt(r) if peft.get("use_rslora") else r


def _by_pattern(peft: Mapping[str, Any], key: str, place: str, default: Any) -> Any:
    """A place's value in PEFT's `rank_pattern` or `alpha_pattern`: of the first name that it is, or ends with.

    PEFT takes any regular expression there. One of a stranger's file may run for ever, so only names are read.
    """
    pattern = peft.get(key) or {}
    if not isinstance(pattern, Mapping) or (wrong := [name for name in pattern if not _PLAIN.fullmatch(name)]):
        shown = repr(wrong[0]) if isinstance(pattern, Mapping) else "no table"
        raise AdapterError(f"adapter_config.json has {shown} in {key}; names of linears were expected.")
    return next((value for name, value in pattern.items() if f".{place}".endswith(f".{name}")), default)
