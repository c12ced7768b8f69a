"""What a plan starts from: what the user set, what the rows need, and a default for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.lora import KAIMING, LOFTQ
from edgetune.data import Row, pack, units
from edgetune.errors import ConfigError
from edgetune.models import ModelConfig
from edgetune.planner.ladder import ADAPTER_SETTINGS, SETTINGS, Choice, Freedom
from edgetune.planner.plans import OBJECTIVE_SETTINGS, TrainConfig
from edgetune.products import are_offered

DEFAULT_OPTIMIZER = "adamw"
ORT_OPTIMIZERS = ("adamw", "sgd")  # those that training graphs are written for
DEFAULT_BATCH_SIZE = 8
DEFAULT_WINDOW = 512  # for texts, which can be cut; other rows get the window that they need
SHORTEST_WINDOW = 64
BESIDE_FIXED = frozenset({"recompute_layers", "activation_offloading"})
# What the ort engine does in one way: a matrix is dequantized whole, inputs stay in memory, products are its own.
ORT_FIXED = frozenset({"tile_weights", "activation_offloading", "fast_products", "step_rule"})
# Its graphs learn by sft from one file, know one rank and an adapter that does nothing at first, and have neither
# dropout nor a file for what a step keeps: settings that have these values there, and no others.
ORT_HAS: dict[str, tuple[Any, ...]] = {
    "lora_dropout": (None, 0), "rank_pattern": (None,), "adapter_budget": (None,), "init_from": (None,),
    "init_lora_weights": (None, KAIMING), "step_rule": (None, "backprop"), "objective": ("sft",),
    "activation_offloading": (None, False), "fast_products": (None, False),
    **dict.fromkeys(("retention_share", "kl_weight", *OBJECTIVE_SETTINGS), (None,)),
}  # fmt: skip
WINDOW_STEP = 16


class Windows(NamedTuple):
    """The rows of a file as windows."""

    learned: int
    held_out: int
    supervised: int
    """The most supervised positions of any window that is learned, retention rows among them."""
    length: int
    """The fullest one's tokens: all are as long as that."""
    rows: int
    """The most rows of any."""
    beside: int = 0
    """Windows of other rows, learned or held out."""
    anchored: int = 0
    """The most positions of a window on which the base holds the model."""


@dataclass(frozen=True, eq=False)
class RowFacts:
    """The rows of a file, as far as they matter to a plan; empty where there is none."""

    rows: tuple[Row, ...] = ()
    """Those to learn from."""
    held_out: tuple[Row, ...] = ()
    """Those to evaluate on: they are in memory too, and have to fit the window."""
    is_text: bool = False
    together: int = 1
    """How many rows in turn no window divides."""
    retention: RowFacts | None = None
    """Rows that are mixed in."""
    anchors: RowFacts | None = None
    """Texts on which the base holds the adapted model."""
    classes: tuple[str, ...] = ()
    """The names that labels have."""

    @property
    def _beside(self) -> list[RowFacts]:
        return [part for part in (self.retention, self.anchors) if part is not None]

    @property
    def can_be_cut(self) -> bool:
        """Whether all rows are texts."""
        return self.is_text and all(part.is_text for part in self._beside)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row, or of the longest that stay together; of rows beside, those that are no texts."""
        parts = (*units(self.rows, self.together), *units(self.held_out, self.together))
        others = (part.longest for part in self._beside if not part.is_text)
        return max((*(sum(map(len, part)) for part in parts), *others), default=0)

    @property
    def teacher_tokens(self) -> int:
        """Tokens that a teacher recorded for each position."""
        known = self.rows[0].teacher
        return 0 if known is None else int(known[0].shape[1])

    @cached_property
    def num_tokens(self) -> int:
        return sum(map(len, self.rows + self.held_out)) + sum(part.num_tokens for part in self._beside)

    @property
    def num_rows(self) -> int:
        return len(self.rows) + len(self.held_out) + sum(part.num_rows for part in self._beside)

    @lru_cache(maxsize=16)  # noqa: B019 - a plan asks for a handful of lengths, and its facts end with it
    def windows(self, length: int, virtual_tokens: int = 0) -> Windows:
        """What the rows fill where a window may have so many positions, and each row takes virtual tokens of them."""
        parts = (self._cut(rows, length - virtual_tokens) for rows in (self.rows, self.held_out))
        learned, held_out = (pack(rows, length, self.together, virtual_tokens) for rows in parts)
        supervised = max(window.num_supervised for window in learned)
        every = learned + held_out
        beside = [part.windows(length, virtual_tokens) for part in self._beside]
        mixed = [part.windows(length, virtual_tokens).supervised for part in [self.retention] if part is not None]
        return Windows(
            len(learned),
            len(held_out),
            max([supervised, *mixed]),
            max([window.length for window in every] + [part.length for part in beside]),
            max([len(window.rows) for window in every] + [part.rows for part in beside]),
            sum(part.learned + part.held_out for part in beside),
            0 if self.anchors is None else self.anchors.windows(length, virtual_tokens).supervised,
        )

    def _cut(self, rows: tuple[Row, ...], length: int) -> tuple[Row, ...]:
        """The rows as they will be read for this window: longer texts are cut."""
        if self.together > 1:
            return rows
        return tuple(
            row if len(row) <= length else Row(row.input_ids[at : at + length], row.labels[at : at + length], row.line)
            for row in rows
            for at in range(0, len(row), length)
        )


@dataclass(frozen=True)
class Wishes:
    """What the user asked for, of this model and these rows."""

    model: ModelConfig
    adapter: AdapterConfig
    config: TrainConfig
    facts: RowFacts
    engine: str = "torch"

    @property
    def fixed(self) -> tuple[str, ...]:
        """Settings of the ladder that the user set, in its order."""
        given = {**vars(self.config), **vars(self.adapter)}
        return tuple(name for name in SETTINGS if given.get(name) is not None)

    def without(self, names: Iterable[str]) -> Wishes:
        """The same with these settings left open."""
        of_config: dict[str, Any] = dict.fromkeys({field.name for field in fields(TrainConfig)}.intersection(names))
        of_adapter: dict[str, Any] = dict.fromkeys({field.name for field in fields(self.adapter)}.intersection(names))
        return replace(self, config=replace(self.config, **of_config), adapter=self.adapter.changed(**of_adapter))

    @property
    def freedom(self) -> Freedom:
        """What may be conceded. A window never gets shorter than a row that cannot be cut."""
        facts = self.facts
        virtual = self.virtual_tokens
        longest = max(facts.longest + virtual, SHORTEST_WINDOW)
        shortest = SHORTEST_WINDOW + virtual if facts.can_be_cut else longest
        accumulation = self.config.gradient_accumulation_steps is None
        rules = self.config.learning_rate is None
        free = frozenset(SETTINGS).difference(self.fixed) - (ADAPTER_SETTINGS - vars(self.adapter).keys())
        if self.config.step_rule == "mezo":
            free -= {"optimizer"}
        if self.config.kl_weight is not None:  # it needs gradients
            free -= {"step_rule"}
        if self.adapter.own:
            free -= {"target_modules"}  # vectors are hardly any bytes
        if self.adapter.resolved(self.model).side_group is not None:  # nothing is kept of a block, or computed again
            free -= BESIDE_FIXED
        if self.engine == "ort":
            return Freedom(free - ORT_FIXED, accumulation, shortest, rules, ORT_OPTIMIZERS)
        return Freedom(free, accumulation, shortest, rules)

    @property
    def virtual_tokens(self) -> int:
        """Positions of each row that the adapter takes."""
        return self.adapter.resolved(self.model).virtual_tokens

    def window(self) -> int:
        """The default window: what the longest row needs."""
        most = self.model.max_position_embeddings
        if not self.facts.rows:
            return min(DEFAULT_WINDOW, most)
        needed = -(-max(self.facts.longest + self.virtual_tokens, SHORTEST_WINDOW) // WINDOW_STEP) * WINDOW_STEP
        return min(needed, most, DEFAULT_WINDOW if self.facts.is_text else needed)

    def start(self) -> Choice:
        """The choice before any concession.

        Raises:
            ConfigError: a setting is out of its range or contradicts the model.
        """
        config, model = self.config, self.model
        length = config.max_seq_length or self.window()
        most = model.max_position_embeddings
        if length > most:
            raise ConfigError(f"max_seq_length = {length}; the model has {most} positions. Set it to at most that.")
        if length < self.virtual_tokens + 2:
            raise ConfigError(
                f"max_seq_length = {length}, of which num_virtual_tokens takes {self.virtual_tokens}; a row needs 2 "
                "more. Set it higher, or that lower."
            )
        if config.kl_weight is not None and self.virtual_tokens:
            raise ConfigError(
                f"kl_weight = {config.kl_weight:g}; {self.adapter.method} gives rows other positions than the base, "
                "so the two are not compared. Choose another adapter, or give rows to --retention-data."
            )
        if config.kl_weight is not None and getattr(self.adapter, "init_lora_weights", None) == LOFTQ:
            raise ConfigError(
                f"kl_weight = {config.kl_weight:g}; it holds the model to the quantized base, and init_lora_weights = "
                "'loftq' starts away from that to undo what quantization lost. Take kaiming or eva, or give rows to "
                "--retention-data."
            )
        if config.step_rule == "mezo" and config.optimizer not in (None, "sgd"):
            raise ConfigError(f"optimizer = {config.optimizer!r}; mezo is an SGD. Leave one of the two out.")
        beside = [name for name in sorted(BESIDE_FIXED) if getattr(config, name)]
        if beside and self.adapter.resolved(model).side_group is not None:
            raise ConfigError(
                f"{', '.join(beside)} cannot be set with {self.adapter.method}: nothing is kept of a block, and none "
                "runs again. Leave it out."
            )
        batch, steps = self._batch(length)
        choice = Choice(
            model=model,
            adapter=self.adapter,
            batch_size=batch,
            gradient_accumulation_steps=steps,
            max_seq_length=length,
            recompute_layers=config.recompute_layers or 0,
            tile_weights=model.largest_linear,
            activation_offloading=bool(config.activation_offloading),
            dequantized_layers=0,
            optimizer=config.optimizer or ("sgd" if config.step_rule == "mezo" else DEFAULT_OPTIMIZER),
            step_rule=config.step_rule or "backprop",
            fast_products=self._fast_products(),
        )
        if choice.recompute_layers > choice.path_layers:
            raise ConfigError(
                f"recompute_layers = {choice.recompute_layers}; the gradient passes {choice.path_layers} blocks. "
                "Set it to at most that."
            )
        return choice

    def _fast_products(self) -> bool:
        wanted, offered = self.config.fast_products, are_offered()
        if wanted and not offered:
            raise ConfigError("fast_products = True; this processor has no such kernels. Leave it out.")
        return self.engine != "ort" and (offered if wanted is None else wanted)

    def _batch(self, length: int) -> tuple[int, int]:
        """Windows of a micro-batch, and micro-batches of a step. The ort engine takes one window at a time."""
        config, most = (
            self.config,
            self.facts.windows(length, self.virtual_tokens).learned if self.facts.rows else DEFAULT_BATCH_SIZE,
        )
        if self.engine == "ort":
            batch = config.batch_size or 1
            at_once = max(1, min(DEFAULT_BATCH_SIZE, most) // batch)
            return batch, config.gradient_accumulation_steps or at_once
        steps = config.gradient_accumulation_steps or 1
        return config.batch_size or min(max(1, DEFAULT_BATCH_SIZE // steps), most), steps
