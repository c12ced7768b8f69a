"""Prompt tuning: trained vectors in the place of the first embeddings of every row  (Lester et al., arXiv 2104.08691)

    x = [P; E(ids)],   P [p, hidden]

P starts as the embeddings of p random tokens of the vocabulary, as in the paper: a model learns little from vectors
that look like none of its own. So no start equals the base. Each row of a window has its own p positions, which count
as its context. The file is PEFT's, `prompt_embeddings`; that of P-tuning (`adapters.p_tuning`) is the same, since
it holds what the encoder gives and not the encoder, and is read here.

The virtual tokens come before all others, so what attention sees of them never changes. An export computes their keys
and values once, and ships it as the prefix that it is (`adapters.prefix`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np

from edgetune.adapters.capabilities import Capabilities
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError, ConfigError
from edgetune.models import ModelConfig
from edgetune.schema import Key

NAME = "prompt_tuning"
CAPABILITIES = Capabilities(
    train_ort="The training graphs of a bundle know LoRA alone. Train with --engine torch, or --adapter lora.",
    as_lora="Virtual tokens change no weight: no LoRA computes that. It is exported as the prefix of a cache.",
    merge="Virtual tokens change no weight. Export it without --merge, or train --adapter lora.",
    merge_share="It cannot be merged, nor can a share of it. Export it without --merge, or train --adapter lora.",
)
PEFT_SHARED = ()
PEFT_NAMES = {"prompt_embeddings": "prompt_embeddings"}
DEFAULT_VIRTUAL_TOKENS = 20


@dataclass(frozen=True)
class PromptConfig(AdapterConfig):
    """What the user asks of prompt tuning. None means "not set"."""

    method: ClassVar[str] = NAME
    rate_factor: ClassVar[float] = 10

    num_virtual_tokens: Annotated[
        int | None, Key("Positions that a trained prompt or prefix takes from the context. (default: 20)")
    ] = None

    def resolved(self: PromptT, model: ModelConfig) -> PromptT:
        """See `AdapterConfig`."""
        count = DEFAULT_VIRTUAL_TOKENS if self.num_virtual_tokens is None else self.num_virtual_tokens
        most = model.max_position_embeddings - 2
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise ConfigError(
                f"num_virtual_tokens = {count!r}; an integer from 1 to {most}, what the model's positions leave, was "
                "expected."
            )
        return replace(super().resolved(model), num_virtual_tokens=count)

    @property
    def virtual_tokens(self) -> int:
        """See `AdapterConfig`."""
        assert self.num_virtual_tokens is not None, "resolve the config first"
        return self.num_virtual_tokens

    @property
    def brief(self) -> str:
        """See `AdapterConfig`."""
        return f"{self.num_virtual_tokens} virtual tokens"


PromptT = TypeVar("PromptT", bound=PromptConfig)
Config = PromptConfig


def places(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The model as a whole, of (hidden, 0)."""
    return {"": (model.hidden_size, 0)}


def slots(config: PromptConfig, model: ModelConfig) -> list[Slot]:
    """The one tensor, which is the model's as a whole."""
    return [slot(place, shape, config) for place, shape in places(model).items()]


def slot(place: str, shape: tuple[int, int], config: PromptConfig) -> Slot:
    """The slot of that; nothing is computed with it."""
    return Slot(place, 0, 0, {"prompt_embeddings": (config.virtual_tokens, shape[0])})


def changes(tensors: Mapping[str, np.ndarray]) -> bool:
    """Virtual tokens always do, by being there."""
    return True


def config_to_peft(config: PromptConfig, base_model: str) -> dict[str, Any]:
    """The `adapter_config.json` of a resolved config, PEFT's keys only."""
    return {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model,
        "num_virtual_tokens": config.num_virtual_tokens, "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM", "inference_mode": True,
    }  # fmt: skip


def reads_peft(peft: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is of this method, or of P-tuning, whose file is the same."""
    return peft.get("peft_type") in ("PROMPT_TUNING", "P_TUNING")


def config_from_peft(
    peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], adapted: Mapping[str, tuple[int, int]]
) -> PromptConfig:
    """A config from the shape of its tensor.

    Raises:
        AdapterError: there is none, or it belongs to an encoder with a decoder.
    """
    return PromptConfig(num_virtual_tokens=virtual_tokens_of(peft, tensors))


def virtual_tokens_of(peft: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> int:
    """The number of virtual tokens, by the tensor and by PEFT's keys.

    Raises:
        AdapterError: they differ, or PEFT's keys say that it is of another kind.
    """
    shape, said = tensors.get("prompt_embeddings", ()), peft.get("num_virtual_tokens")
    if len(shape) != 2 or shape[0] != said or peft.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError(
            f"adapter_config.json has num_virtual_tokens = {said!r}, num_transformer_submodules = "
            f"{peft.get('num_transformer_submodules')!r}, and prompt_embeddings has shape {list(shape)}; that many "
            f"rows, and one model, were expected."
        )
    return shape[0]
