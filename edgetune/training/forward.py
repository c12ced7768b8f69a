"""The forward pass over one micro-batch, without gradients: what evaluation needs, and where every step rule starts.

The blocks below the lowest adapter are frozen, so what they make of a window never changes and may be cached (see
`features`). They run on one window at a time, cache or none. In a micro-batch the last bits of a window would depend on
the place where it lies: torch computes the end of an array, where no whole vector is left, with another `exp` than the
rest. Alone, a window meets the same shapes in the same memory every time. A weight is then decoded once for each
window; the cache makes that once in a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgetune.adapters.attach import set_dropout
from edgetune.adapters.states import EncodedTokens
from edgetune.models.decoder import Decoder
from edgetune.objectives import Objective, sft
from edgetune.objectives.sft import Measured
from edgetune.training.blocks import BlockPass, normalize
from edgetune.training.changed import prompt_lengths
from edgetune.training.side import SidePass
from edgetune.training.virtual import Virtual, put_virtual, virtual_rows

Batch = Mapping[str, np.ndarray]  # input_ids, labels (shifted), position_ids, segment_ids: int64 [B, T]; see data.stack
SFT = sft.Objective()
Check = Callable[[], None]  # called between blocks; raises to leave a step unfinished
# Fills [T, H] with what the blocks below the lowest adapter make of a micro-batch of one window; False if unknown.
Features = Callable[[Batch, torch.Tensor], bool]


def start(decoder: Decoder, batch: Batch) -> BlockPass:
    """The pass over any block of this micro-batch."""
    positions, segments = (torch.from_numpy(batch[key]) for key in ("position_ids", "segment_ids"))
    count, length = positions.shape
    prompts = None if decoder.prompt_positions is None else torch.from_numpy(prompt_lengths(batch))
    return BlockPass(decoder.workspace, decoder.context(length, positions, segments, prompts), count, length)


def num_supervised(batch: Batch) -> int:
    return int(np.count_nonzero(batch["labels"] != sft.IGNORE_INDEX))


class Tally:
    """Sums over micro-batches, and the means over an objective's units that they give."""

    def __init__(self) -> None:
        self.num_units = 0
        self._loss, self._figures = 0.0, dict[str, float]()

    def add(self, measured: Measured, num_units: int) -> None:
        self.num_units += num_units
        self._loss += measured.loss
        for name, value in measured.figures.items():
            self._figures[name] = self._figures.get(name, 0.0) + value

    @property
    def loss(self) -> float:
        """NaN where there is no unit."""
        return self._loss / self.num_units if self.num_units else math.nan

    @property
    def figures(self) -> dict[str, float]:
        """What the objective tells beside its loss."""
        return {name: value / self.num_units for name, value in self._figures.items()}


def below(
    decoder: Decoder, batch: Batch, first_block: int, check: Check, features: Features | None = None
) -> torch.Tensor:
    """What block `first_block` gets, [N, H] in "input.0": from `features` where they know it, else computed."""
    count, length = batch["input_ids"].shape
    x = decoder.workspace.take(count * length, decoder.config.hidden_size, "input.0")
    if not first_block:
        return _embed(decoder, batch, x)
    for index in range(count):
        window = {key: value[index : index + 1] for key, value in batch.items()}
        rows = x[index * length : (index + 1) * length]
        if features is None or not features(window, rows):
            rows.copy_(lower_blocks(decoder, window, first_block, check))
    return x


def _embed(decoder: Decoder, batch: Batch, out: torch.Tensor) -> torch.Tensor:
    """`Decoder.embed` into `out` [N, H], with a trained prompt at its positions."""
    ids = torch.from_numpy(batch["input_ids"])
    decoder.embed_tokens.lookup(ids, out).mul_(decoder.config.embedding_scale)
    if decoder.prompt is not None:
        put_virtual(decoder.prompt, out, virtual_of(decoder, batch), decoder.workspace)
    return out


def virtual_of(decoder: Decoder, batch: Batch) -> Virtual:
    """Where virtual tokens stand in a micro-batch."""
    positions, segments = (torch.from_numpy(batch[key]) for key in ("position_ids", "segment_ids"))
    return virtual_rows(decoder.virtual(positions.shape[1], positions, segments))


def lower_blocks(decoder: Decoder, window: Batch, stop: int, check: Check) -> torch.Tensor:
    """What block `stop` gets of a micro-batch of one window, [T, H]: by turns in two buffers, nothing kept."""
    walk = start(decoder, window)
    x = decoder.workspace.take(walk.positions, decoder.config.hidden_size, "input.1")
    y = decoder.workspace.like(x, "d")
    _embed(decoder, window, x)
    for block in decoder.blocks[:stop]:
        walk.forward(block, x, y, "slot.0")
        x, y = y, x
        check()
    return x


@torch.no_grad()
def keys_values(decoder: Decoder, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each block, [T, kv_heads * head_dim] each, for one row of embeddings x [T, hidden] alone.

    Where the decoder has virtual tokens, T is their number. Both are overwritten by the next block.
    """
    count = len(x)
    positions = torch.arange(count)[None]
    context = decoder.context(count, positions, torch.zeros_like(positions))
    walk = BlockPass(decoder.workspace, context, 1, count)
    x = decoder.workspace.like(x, "input.0").copy_(x)
    for index, block in enumerate(decoder.blocks):
        y = decoder.workspace.like(x, f"input.{(index + 1) % 2}")
        made = walk.forward(block, x, y, "slot.0")
        yield made.k, made.v
        x = y


@torch.no_grad()
def start_virtual_tokens(decoder: Decoder, seed: int) -> None:
    """The first values of a prompt, embeddings of random tokens, or of a prefix, what the model computes for these. A
    prompt that a network makes has its own.
    """
    if isinstance(decoder.prompt, EncodedTokens):
        return
    count = decoder.virtual_tokens
    ids = np.random.default_rng([seed]).integers(0, decoder.config.vocab_size, count)
    x = decoder.embed(torch.from_numpy(ids))
    if decoder.prompt is not None:
        decoder.prompt.values.copy_(x)
        return
    decoder.virtual_tokens = 0  # the values that are there are nothing yet
    for block, (key, value) in zip(decoder.blocks, keys_values(decoder, x), strict=True):
        prefix = block.self_attn.prefix
        assert prefix is not None, "a decoder with virtual tokens has a prompt, or a prefix in each block"
        prefix.key.values.copy_(key)
        prefix.value.values.copy_(value)
    decoder.virtual_tokens = count


@torch.no_grad()
def last_hidden(
    decoder: Decoder, batch: Batch, check: Check, first_block: int = 0, features: Features | None = None
) -> torch.Tensor:
    """What the head gets of every position, [N, H] in "h"; `features` are of `first_block`."""
    x, _ = last_states(decoder, batch, check, first_block, features)
    return normalize(x, decoder.norm, decoder.workspace.like(x, "h"))


def last_states(
    decoder: Decoder, batch: Batch, check: Check, first_block: int = 0, features: Features | None = None
) -> tuple[torch.Tensor, SidePass | None]:
    """What the last norm gets, [N, H], and the pass of a network beside the blocks, which is in that already.

    The blocks from `first_block` on run by turns in two buffers and one slot, so nothing can go back through them.
    """
    x = below(decoder, batch, first_block, check, features)
    walk = start(decoder, batch)
    side = None if decoder.side_output is None else SidePass(decoder, walk.positions)
    for index, block in enumerate(decoder.blocks[first_block:]):
        y = decoder.workspace.like(x, f"input.{(index + 1) % 2}")
        walk.forward(block, x, y, "slot.0")
        if side is not None:
            side.rung(first_block + index, y)
        x = y
        check()
    if side is not None:
        side.add(x)
    return x, side


def head_of(decoder: Decoder, scale: float = 1.0) -> Any:
    """What an objective multiplies hidden states by: the head over the vocabulary, or the trained one in its place,
    whose own gradient gets that scale.
    """
    return decoder.lm_head if decoder.score is None else replace(decoder.score, scale=scale)


@torch.no_grad()
def measure(
    decoder: Decoder, batch: Batch, objective: Objective, check: Check,
    first_block: int = 0, features: Features | None = None,
) -> Measured:  # fmt: skip
    """The objective's sums over a micro-batch; `features` are of `first_block`."""
    hidden = last_hidden(decoder, batch, check, first_block, features)
    measured = objective.loss(hidden, batch, head_of(decoder), decoder.workspace)
    check()
    return measured


@torch.no_grad()
def evaluate(
    decoder: Decoder, batches: Iterable[Batch], *, check: Check, first_block: int = 0,
    features: Features | None = None, objective: Objective = SFT, tally: Tally | None = None,
) -> float:  # fmt: skip
    """Mean loss of the objective's units; NaN where there is none. `features` as above; `tally` gets the figures."""
    set_dropout(decoder, None)
    tally = tally or Tally()
    for batch in batches:
        tally.add(measure(decoder, batch, objective, check, first_block, features), objective.units(batch))
    return tally.loss
