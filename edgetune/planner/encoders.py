"""What differs where an encoder is planned for: its rows are texts without padding, and a head is trained with it.

A micro-batch has as many tokens as its rows, so what a step needs depends on which rows meet. Their order is a function
of the seed alone: the plan walks through the batches of the run as training will, and counts the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from edgetune.adapters.config import AdapterConfig, LinearsConfig
from edgetune.adapters.head import head_shapes
from edgetune.data import epoch_order, split_eval
from edgetune.data.labeled import KIND_OF, LabeledRow, LabeledRows, labeled, read_labeled_rows
from edgetune.errors import ConfigError
from edgetune.memory import give_back
from edgetune.models.encoder_config import EncoderConfig
from edgetune.objectives import ENCODER_OBJECTIVES
from edgetune.planner.job import Job
from edgetune.planner.ladder import Choice, Freedom
from edgetune.planner.plans import TrainConfig
from edgetune.planner.wishes import RowFacts, Windows, Wishes
from edgetune.tokenizer import load_tokenizer

DEFAULT_ROWS = 16  # of a micro-batch
_WALKED = 1 << 22  # rows of a run whose batches are counted; of a longer run the largest possible one is
# What the ladder may not touch here, and what may not be asked for.
_FIXED = frozenset({"max_seq_length", "activation_offloading", "fast_products", "step_rule"})


@dataclass(frozen=True, eq=False)
class TextFacts(RowFacts):
    """The rows of a file for an encoder."""

    rows: tuple[LabeledRow, ...] = ()
    held_out: tuple[LabeledRow, ...] = ()

    def windows(self, length: int, virtual_tokens: int = 0) -> Windows:  # type: ignore[override]  # not cached
        """Each row for itself; no method of virtual tokens is one for encoders."""
        return Windows(len(self.rows), len(self.held_out), 1, min(length, self.longest), 1)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text; a row may have several."""
        return max((length for row in (*self.rows, *self.held_out) for length in row.lengths), default=0)

    @lru_cache(maxsize=64)  # noqa: B019 - a plan asks for a handful of sizes, and its facts end with it
    def most_positions(self, batch_size: int, num_rows: int, seed: int) -> int:
        """Tokens of the largest micro-batch of a run that sees so many rows."""
        lengths = np.array([len(row) for row in self.rows])
        held_out = max(map(len, self.held_out), default=0)
        if num_rows > _WALKED:
            repeated = np.repeat(np.sort(lengths)[::-1], 2)  # two epochs may meet in a batch
            return max(int(repeated[:batch_size].sum()), held_out)
        epochs = range(-(-num_rows // len(lengths)))
        seen = np.concatenate([lengths[epoch_order(len(lengths), seed, epoch)] for epoch in epochs])[:num_rows]
        return max(int(np.add.reduceat(seen, np.arange(0, len(seen), batch_size)).max()), held_out)


def read_text_facts(
    data: str | Path | LabeledRows, eval_data: str | Path | LabeledRows | None, folder: Path, model: EncoderConfig,
    config: TrainConfig, skip_bad: bool,
) -> TextFacts:  # fmt: skip
    """The rows to learn from and those held out, divided as training will divide them."""
    objective, length = config.objective, config.max_seq_length or model.max_position_embeddings
    length = min(length, model.max_position_embeddings)

    def read(file: str | Path | LabeledRows, classes: tuple[str, ...] | None = None) -> LabeledRows:
        if isinstance(file, LabeledRows):
            return file
        return read_labeled_rows(file, load_tokenizer(folder), length, objective, classes=classes, skip_bad=skip_bad)

    found = read(data)
    rows, held_out = split_eval(found, config.eval_fraction, config.seed)
    if eval_data is not None:
        held_out = read(eval_data, found.classes or None)
    give_back()
    return TextFacts(labeled(rows), labeled(held_out), classes=found.classes)


def check_encoder(config: TrainConfig, adapter: AdapterConfig, engine: str | None, has_data: bool) -> None:
    """Raises ConfigError for what encoders do not have."""
    if not isinstance(adapter, LinearsConfig):
        raise ConfigError(
            f"adapter = {adapter.method!r}; encoders take the methods that stand at linears. Use --adapter lora."
        )
    if config.objective not in ENCODER_OBJECTIVES:
        known = ", ".join(f"{name} ({KIND_OF[name]} rows)" for name in ENCODER_OBJECTIVES)
        raise ConfigError(f"objective = {config.objective}; an encoder has {known}. Set --objective.")
    if not has_data:
        raise ConfigError(
            "the plan of an encoder needs rows: its classes and the tokens of its steps come from them. Give --data."
        )
    if engine == "ort":
        raise ConfigError("engine = 'ort'; there are no training graphs of encoders. Leave --engine out.")
    if config.step_rule not in (None, "backprop"):
        raise ConfigError(f"step_rule = {config.step_rule!r}; encoders have backprop alone. Leave it out.")
    if config.fast_products:
        raise ConfigError(
            "fast_products = True; they keep code for each shape, and each batch of an encoder has one of its own. "
            "Leave it out."
        )
    if config.activation_offloading:
        raise ConfigError(
            "activation_offloading = True; encoders keep the inputs of their blocks in memory. Leave it out: "
            "recompute_layers and batch_size save more."
        )


@dataclass(frozen=True)
class TextWishes(Wishes):
    """What the user asked for, of an encoder."""

    @property
    def freedom(self) -> Freedom:
        """As of a decoder, but for what `check_encoder` refuses; the rows of a contrastive batch are its task."""
        freedom = super().freedom
        fixed = _FIXED | ({"batch_size"} if self.config.objective == "embedding" else set())
        return replace(freedom, settings=freedom.settings - fixed)

    def _fast_products(self) -> bool:
        return False

    def window(self) -> int:
        """Tokens that a text may have: as many as the longest has."""
        return min(self.facts.longest, self.model.max_position_embeddings)

    def _batch(self, length: int) -> tuple[int, int]:
        """Rows of a micro-batch, and micro-batches of a step."""
        steps = self.config.gradient_accumulation_steps or 1
        return self.config.batch_size or min(max(1, DEFAULT_ROWS // steps), len(self.facts.rows)), steps

    def fitted(self, job: Job, choice: Choice, epochs: float) -> Job:
        """The job with what this one's rows and head cost."""
        facts, config = self.facts, self.config
        assert isinstance(facts, TextFacts)
        per_step = choice.batch_size * choice.gradient_accumulation_steps
        steps = config.max_steps or max(1, math.ceil(epochs * len(facts.rows) / per_step))
        positions = facts.most_positions(choice.batch_size, steps * per_step, config.seed)
        shapes = head_shapes(config.objective, facts.classes, self.model.hidden_size)
        texts = choice.batch_size * max(len(row.lengths) for row in facts.rows)
        pooled = ENCODER_OBJECTIVES[config.objective].POOLED
        outputs = len(facts.classes) if shapes else texts
        floats = texts * (6 * self.model.hidden_size + 3 * outputs) if pooled else 3 * positions * outputs
        return replace(
            job, positions=positions, head_sizes=tuple(math.prod(shape) for shape in shapes.values()),
            head_floats=floats,
        )  # fmt: skip
