"""What the configs of all adapter methods share. A method derives its own from the one whose places it adapts.

    AdapterConfig    any place
    BlocksConfig     in some of the blocks
    LinearsConfig    at some of the linears of those

None means "not set": the plan chooses, and may concede it to the budget where its ladder has a rung for the field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from edgetune.errors import AdapterError, ConfigError, DataError
from edgetune.models import ModelConfig
from edgetune.schema import Key, Reader

Config = TypeVar("Config", bound="AdapterConfig")


@dataclass(frozen=True)
class AdapterConfig:
    """What the user asks of an adapter method."""

    method: ClassVar[str]
    """Its key in `METHODS`."""
    own: ClassVar[bool] = False
    """Whether its tensors are the model's own, trained in their place; see `adapters`."""
    thaws: ClassVar[bool] = False
    """Whether matrices are among these, not vectors alone."""
    rate_factor: ClassVar[float] = 1.0
    """Its learning rate over LoRA's where none is set: the ratio of the best ones in `benchmarks/methods.py`, rounded.

    On instructions and on the packaged sample; bitfit's on banking77 and MiniLM, whose linears have biases.
    """

    def resolved(self: Config, model: ModelConfig) -> Config:
        """The same with every field filled.

        Raises:
            ConfigError: a value is out of its range or names nothing in this model.
        """
        return self

    def changed(self: Config, **settings: Any) -> Config:
        """The same with other values in some of its fields."""
        return replace(self, **settings)

    @property
    def first_block(self) -> int:
        """The lowest block that a resolved config changes: below it no gradient is asked for."""
        return 0

    @property
    def virtual_tokens(self) -> int:
        """Positions of a resolved config that every row gives to it, from the context."""
        return 0

    @property
    def prompt_positions(self) -> tuple[int, int] | None:
        """How many first and last positions of a row's prompt a resolved config changes; None where it changes all."""
        return None

    @property
    def side_group(self) -> int | None:
        """Hidden size over the width of a network beside the blocks, whose gradients are all that is asked for; None
        where the adapter stands inside of them.
        """
        return None

    @property
    def dropout(self) -> float:
        """Share of the adapter's inputs that training zeroes."""
        return 0.0

    def check_rows(self, kind: str, path: str | Path) -> None:
        """Raises DataError for rows of a file that a resolved config cannot learn from."""
        if self.prompt_positions is not None and kind == "text":
            raise DataError(
                f"{path} has text rows, and {self.method} changes positions of a prompt, which these do not have. "
                'Write rows with "prompt" and "completion", or train with --adapter bottleneck or lora.'
            )

    def lr_ratio(self, tensor: str) -> float:
        """The learning rate of a tensor, by its short name, over the plan's."""
        return 1.0

    @property
    def brief(self) -> str:
        """The settings of a resolved config in a few words, such as `r 8, alpha 16`."""
        return ""

    def where(self, model: ModelConfig) -> str:
        """The places of a resolved config in a few words."""
        return "the model's input"


@dataclass(frozen=True)
class BlocksConfig(AdapterConfig):
    """That of a method inside the blocks."""

    layers_to_transform: Annotated[
        tuple[int, ...] | None, Key("Blocks to adapt, counted from 0, such as 0,2,5-8. (default: all)")
    ] = None

    def resolved(self: BlocksT, model: ModelConfig) -> BlocksT:
        """See `AdapterConfig`."""
        every = range(model.num_hidden_layers)
        layers = tuple(every) if self.layers_to_transform is None else self.layers_to_transform
        wrong = [i for i in layers if i not in every]
        if wrong or not layers:
            raise ConfigError(
                f"layers_to_transform has {wrong or 'nothing'}; choose from 0 to {model.num_hidden_layers - 1}."
            )
        return replace(super().resolved(model), layers_to_transform=layers)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Those of a resolved config, from the lowest."""
        assert self.layers_to_transform is not None, "resolve the config first"
        return tuple(sorted(self.layers_to_transform))

    @property
    def first_block(self) -> int:
        """See `AdapterConfig`."""
        return self.blocks[0]

    def where(self, model: ModelConfig) -> str:
        """See `AdapterConfig`."""
        return f"{len(self.blocks)} of {model.num_hidden_layers} blocks"


@dataclass(frozen=True)
class LinearsConfig(BlocksConfig):
    """That of a method at linears of the blocks."""

    target_modules: Annotated[
        tuple[str, ...] | None, Key("Linears to adapt, such as q_proj,v_proj. (default: all of a block)")
    ] = None

    def resolved(self: LinearsT, model: ModelConfig) -> LinearsT:
        """See `AdapterConfig`."""
        known = tuple(dict.fromkeys(path.rpartition(".")[2] for path in model.linear_shapes))
        targets = known if self.target_modules is None else tuple(self.target_modules)
        unknown = [name for name in targets if name not in known]
        if unknown or not targets:
            raise ConfigError(f"target_modules has {unknown or 'nothing'}; choose from {', '.join(known)}.")
        return replace(super().resolved(model), target_modules=targets)

    def linears(self, model: ModelConfig) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of the adapted linears of a resolved config, in the model's order."""
        assert self.target_modules is not None, "resolve the config first"
        return {
            f"{model.block(i)}.{path}": shape
            for i in self.blocks
            for path, shape in model.linear_shapes.items()
            if path.rpartition(".")[2] in self.target_modules
        }

    def where(self, model: ModelConfig) -> str:
        """See `AdapterConfig`."""
        return f"{', '.join(self.target_modules or ())} in {super().where(model)}"


def own_config(config: AdapterConfig, peft_type: str, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config of a method that PEFT has not: each field under its own name."""
    return {
        "peft_type": peft_type, "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, **asdict(config),
        "inference_mode": True,
    }  # fmt: skip


def read_own_config(made: type[Config], peft: Mapping[str, Any]) -> Config:
    """The config again.

    Raises:
        AdapterError: a key is missing, or its value is none that edgetune writes.
    """
    names, reader = [field.name for field in fields(made)], Reader()
    config = reader.read(made, {name: peft[name] for name in names if peft.get(name) is not None})
    problems = [*(f"{name}: missing" for name in names if peft.get(name) is None), *reader.problems]
    if config is None or problems:
        raise AdapterError(f"adapter_config.json is not as edgetune writes it: {'; '.join(problems)}. Train again.")
    return config


BlocksT = TypeVar("BlocksT", bound=BlocksConfig)
LinearsT = TypeVar("LinearsT", bound=LinearsConfig)
