"""LoRA: y = W x + scaling * B (A dropout(x)),  A [r, in], B [out, r]        (Hu et al., arXiv 2106.09685)

`scaling` is lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732). A starts uniform in
±1/sqrt(in) (PEFT's Kaiming initialization), B starts at zero, so the adapted layer equals the base. Names and meaning
follow PEFT. No torch here: `forward` uses only operators that torch tensors and numpy arrays share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError, ConfigError
from edgetune.models import ModelConfig

NAME = "lora"


@dataclass(frozen=True)
class LoraConfig:
    """What the user asks of LoRA. None means "not set": the plan chooses, and may concede it to the budget."""

    r: int | None = None
    """Rank of the update; 8 where nothing is set."""
    lora_alpha: float | None = None
    """Strength of the update; 2 r where nothing is set."""
    lora_dropout: float | None = None
    """Share of the adapter's inputs that are zeroed in training; 0 where nothing is set."""
    target_modules: tuple[str, ...] | None = None
    """Short names of the linears that get an adapter; all of a block where nothing is set."""
    use_rslora: bool | None = None
    """Scale by 1/sqrt(r) rather than 1/r."""
    layers_to_transform: tuple[int, ...] | None = None
    """Blocks that get an adapter; all where nothing is set."""

    def resolved(self, model: ModelConfig) -> LoraConfig:
        """The same with every field filled.

        Raises:
            ConfigError: a value is out of its range or names nothing in this model.
        """
        r = 8 if self.r is None else self.r
        layers = tuple(range(model.num_hidden_layers)) if self.layers_to_transform is None else self.layers_to_transform
        known = tuple(dict.fromkeys(path.rpartition(".")[2] for path in model.linear_shapes))
        targets = known if self.target_modules is None else tuple(self.target_modules)
        config = replace(
            self,
            r=r,
            lora_alpha=2 * r if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout or 0.0,
            target_modules=targets,
            use_rslora=bool(self.use_rslora),
            layers_to_transform=layers,
        )
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= model.hidden_size:
            raise ConfigError(f"r = {r!r}; an integer from 1 to the hidden size {model.hidden_size} was expected.")
        if not 0 < config._alpha < math.inf:
            raise ConfigError(f"lora_alpha = {config.lora_alpha!r}; a positive number was expected.")
        if not 0 <= (config.lora_dropout or 0.0) < 1:
            raise ConfigError(f"lora_dropout = {config.lora_dropout!r}; a number from 0 to below 1 was expected.")
        unknown = [name for name in targets if name not in known]
        if unknown or not targets:
            raise ConfigError(f"target_modules has {unknown or 'nothing'}; choose from {', '.join(known)}.")
        wrong = [i for i in layers if not 0 <= i < model.num_hidden_layers]
        if wrong or not layers:
            raise ConfigError(
                f"layers_to_transform has {wrong or 'nothing'}; choose from 0 to {model.num_hidden_layers - 1}."
            )
        return config

    @property
    def _alpha(self) -> float:
        assert self.lora_alpha is not None, "resolve the config first"
        return self.lora_alpha

    @property
    def first_block(self) -> int:
        """The lowest adapted block of a resolved config: below it no gradient is asked for."""
        return min(self.layers_to_transform or (0,))

    @property
    def rank(self) -> int:
        """R of a resolved config."""
        assert self.r is not None, "resolve the config first"
        return self.r

    @property
    def scaling(self) -> float:
        """The factor on B A, of a resolved config."""
        return self._alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


Config = LoraConfig


def slots(config: LoraConfig, model: ModelConfig) -> list[Slot]:
    """The adapted linears in the model's order, for a resolved config."""
    assert config.target_modules is not None and config.layers_to_transform is not None
    return [
        slot(f"{model.block(i)}.{path}", shape, config)
        for i in sorted(config.layers_to_transform)
        for path, shape in model.linear_shapes.items()
        if path.rpartition(".")[2] in config.target_modules
    ]


def slot(linear: str, shape: tuple[int, int], config: LoraConfig) -> Slot:
    """The slot of one linear of shape (out_features, in_features), for a resolved config."""
    n, k = shape
    return Slot(linear, k, n, {"lora_A": (config.rank, k), "lora_B": (n, config.rank)})


def initialize(slot: Slot, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A uniform in ±1/sqrt(in), B zero; float32."""
    bound = 1 / math.sqrt(slot.in_features)
    a = rng.uniform(-bound, bound, slot.tensors["lora_A"]).astype(np.float32)
    return {"lora_A": a, "lora_B": np.zeros(slot.tensors["lora_B"], np.float32)}


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


def delta(tensors: Mapping[str, np.ndarray], config: LoraConfig) -> np.ndarray:
    """float32 [out, in]: what merging adds to the frozen weight."""
    product: np.ndarray = tensors["lora_B"] @ tensors["lora_A"]
    return product * np.float32(config.scaling)


def onnx_tensors(config: LoraConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Graph inputs: `<linear>.lora_A` [in, r] and `<linear>.lora_B` [r, out] with the scaling folded into B."""
    return {
        name: np.ascontiguousarray(value.T * np.float32(config.scaling if name.endswith("lora_B") else 1))
        for name, value in tensors.items()
    }


def config_to_peft(config: LoraConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules or ()), "use_rslora": config.use_rslora,
        "layers_to_transform": list(config.layers_to_transform or ()),
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
        "modules_to_save": None,
    }  # fmt: skip


def config_from_peft(peft: Mapping[str, Any], slots_found: Mapping[str, int]) -> LoraConfig:
    """A config from PEFT's keys and the linears (name -> rank) that its tensors name.

    PEFT's `target_modules` may be a pattern, so what is adapted is read from the tensors themselves.

    Raises:
        AdapterError: the adapter uses what LoRA here does not compute.
    """
    if peft.get("peft_type") != "LORA":
        raise AdapterError(f"adapter_config.json has peft_type {peft.get('peft_type')!r}; supported is 'LORA'.")
    unsupported = [
        f"{key} = {peft[key]!r}"
        for key in ("use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")
        if peft.get(key)
    ]
    if peft.get("bias", "none") != "none":
        unsupported.append(f"bias = {peft['bias']!r}")
    if unsupported:
        raise AdapterError(f"adapter_config.json sets {', '.join(unsupported)}, which LoRA here does not compute.")
    ranks = set(slots_found.values())
    if ranks != {peft.get("r")}:
        raise AdapterError(f"adapter_config.json has r = {peft.get('r')!r}; its tensors have rank {sorted(ranks)}.")
    try:
        layers = {int(name.split(".")[2]) for name in slots_found}
        return LoraConfig(
            r=int(peft["r"]),
            lora_alpha=float(peft["lora_alpha"]),
            lora_dropout=float(peft.get("lora_dropout") or 0.0),
            target_modules=tuple(dict.fromkeys(name.rpartition(".")[2] for name in slots_found)),
            use_rslora=bool(peft.get("use_rslora", False)),
            layers_to_transform=tuple(sorted(layers)),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise AdapterError(f"adapter_config.json or a tensor name is not as PEFT writes it ({error!r}).") from error
