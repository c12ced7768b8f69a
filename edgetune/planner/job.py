"""One training as the planner sees it: what decides its cost in bytes (`costs`) and in time (`work`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgetune.adapters import METHODS
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.slot import Slot
from edgetune.models import ModelConfig
from edgetune.models.config import DecoderConfig
from edgetune.objectives import has_head

FLOAT_BYTES, INDEX_BYTES = 4, 8
VECTOR = 16  # float32 values of the widest vectors: 512 bits
TILE_QUERIES = 64  # queries of a tile of attention


@dataclass(frozen=True)
class Job:
    """What decides the cost of a step. `adapter` is resolved; `supervised_per_window` is the most of any window."""

    model: ModelConfig
    adapter: AdapterConfig
    optimizer: str
    grid: str
    batch_size: int
    gradient_accumulation_steps: int
    max_seq_length: int
    recompute_layers: int
    tile_weights: int
    activation_offloading: bool
    dequantized_layers: int
    step_rule: str
    threads: int
    supervised_per_window: int
    anchored_per_window: int = 0  # positions of a window on which the base holds the model; 0 without such windows
    num_tokens: int = 0
    num_rows: int = 0
    tokenizer_file_bytes: int = 0
    base_copy_bytes: int = 0
    active_adapter_bytes: int = 0  # to load and split that which the bundle uses; of the ort engine
    objective: str = "sft"
    teacher_tokens: int = 0  # those that are recorded for each learned position, where the objective is distill
    cached_windows: int = 0  # those whose way through the frozen lower blocks is cached: all, or none
    fast_products: bool = False
    positions: int = 0  # of rows without padding: the most tokens of any micro-batch
    head_sizes: tuple[int, ...] = ()  # parameters of each tensor of a trained head
    head_floats: int = 0  # what pooling, head and objective compute with
    rows_per_window: int | None = None  # the most of any window; None: not known

    @property
    def decoder(self) -> DecoderConfig:
        """The model, where it is a decoder."""
        assert isinstance(self.model, DecoderConfig)
        return self.model

    @property
    def has_gradients(self) -> bool:
        """Whether a step goes backward."""
        return self.step_rule == "backprop"

    @property
    def goes_through_blocks(self) -> bool:
        """Whether that goes back through blocks, not beside them alone."""
        return self.has_gradients and self.adapter.side_group is None

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch, padding included."""
        return self.positions or self.batch_size * self.max_seq_length

    @property
    def first_block(self) -> int:
        """The lowest block with an adapter: below it nothing is stored and no gradient is asked for."""
        return self.adapter.first_block

    @property
    def path_layers(self) -> int:
        """Blocks that the gradient passes through."""
        return self.model.num_hidden_layers - self.first_block

    @property
    def repeated_layers(self) -> int:
        """Blocks that run forward twice: the last one never does, its activations are still there."""
        return min(self.recompute_layers, self.path_layers - 1)

    @property
    def slots(self) -> list[Slot]:
        slots: list[Slot] = METHODS[self.adapter.method].slots(self.adapter, self.model)
        return slots

    @property
    def tensor_sizes(self) -> list[int]:
        """Parameters of each tensor of the adapter, and of a head."""
        sizes = [math.prod(shape) for slot in self.slots for shape in slot.tensors.values()]
        return [*sizes, *self.head_sizes]

    @property
    def block_weights(self) -> int:
        """Weights of a block's linears."""
        return sum(n * k for n, k in self.model.linear_shapes.values())

    @property
    def thawed(self) -> int:
        """Weights of the model's own matrices that are trained."""
        if not self.adapter.thaws:
            return 0
        return sum(math.prod(shape) for slot in self.slots for shape in slot.tensors.values() if len(shape) == 2)

    @property
    def supervised(self) -> int:
        """Positions of a micro-batch that the loss computes, at most."""
        return min(self.supervised_per_window * self.batch_size, self.tokens)

    @property
    def anchored(self) -> int:
        """Positions where the divergence from the base is computed, at most, with what fills them up."""
        return filled(min(self.anchored_per_window * self.batch_size, self.tokens), self.threads)

    @property
    def micro_batches(self) -> int:
        """Of a step, the one that holds the model to its base included."""
        return self.gradient_accumulation_steps + (1 if self.anchored else 0)

    @property
    def changed(self) -> int:
        """Positions of a micro-batch that an adapter of some positions changes, at most."""
        counts = self.adapter.prompt_positions
        if counts is None:
            return self.tokens
        rows = self.tokens if self.rows_per_window is None else self.rows_per_window * self.batch_size * sum(counts)
        return min(rows, self.tokens)

    @property
    def taught(self) -> int:
        """Tokens of the teacher for each learned position."""
        return self.teacher_tokens if self.objective == "distill" else 0

    @property
    def scores(self) -> bool:
        """Whether a trained head stands in the place of that over the vocabulary."""
        return isinstance(self.model, DecoderConfig) and has_head(self.objective)

    @property
    def may_come_down(self) -> bool:
        """Whether fewer threads may go on with the run."""
        if not isinstance(self.model, DecoderConfig):
            return False
        return may_come_down(
            self.adapter, self.step_rule, self.objective, self.threads, self.tokens, self.model.head_dim
        )

    @property
    def loss_rows(self) -> int:
        """The same with what fills them up; a trained head has none of that."""
        if self.scores:
            return self.supervised
        return filled(self.supervised, self.threads) if self.has_gradients else self.supervised


def row_step(threads: int) -> int:
    """The rows of a loss with its gradient are a multiple of this: whole vectors for each thread (see `training.crew`).

    1 where the number of threads never changes.
    """
    return VECTOR * threads if threads in (2, 4, 8) else 1


def keeps_bits(threads: int, positions: int, head_dim: int) -> bool:
    """Whether half as many threads, and half of those, compute the same bits in blocks of B * T `positions`.

    Measured with torch on MKL and oneDNN with AVX-512; the tests hold it for 1 to 8 threads where they run.
    """
    return row_step(threads) > 1 and positions % row_step(threads) == 0 and head_dim % (2 * VECTOR) == 0


def may_come_down(
    adapter: AdapterConfig, step_rule: str, objective: str, threads: int, positions: int, head_dim: int
) -> bool:
    """Whether fewer threads may go on with a decoder's run: `keeps_bits`, and no products of other rows.

    Such are those of a prompt's positions, of trained weights, of a network beside the blocks, and of a head's few.
    """
    others = adapter.prompt_positions or adapter.thaws or adapter.side_group is not None or has_head(objective)
    return step_rule == "backprop" and not others and keeps_bits(threads, positions, head_dim)


def filled(supervised: int, threads: int) -> int:
    """The rows of a loss with its gradient: those that are supervised, and what fills them up."""
    step = row_step(threads)
    return -(-supervised // step) * step
