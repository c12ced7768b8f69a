"""The forward pass over one micro-batch, without gradients: what evaluation needs, and where every step rule starts.

The blocks below the lowest adapter are frozen, so what they make of a window never changes and may be cached (see
`features`). They run on one window at a time, cache or none. In a micro-batch the last bits of a window would depend on
the place where it lies: torch computes the end of an array, where no whole vector is left, with another `exp` than the
rest. Alone, a window meets the same shapes in the same memory every time. A weight is then decoded once for each
window; the cache makes that once in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from edgetune.adapters.attach import set_dropout
from edgetune.models.decoder import Decoder
from edgetune.objectives import sft
from edgetune.training.blocks import BlockPass, normalize

Batch = Mapping[str, np.ndarray]  # input_ids, labels (shifted), position_ids, segment_ids: int64 [B, T]
Check = Callable[[], None]  # called between blocks; raises to leave a step unfinished
# Fills [T, H] with what the blocks below the lowest adapter make of a micro-batch of one window; False if unknown.
Features = Callable[[Batch, torch.Tensor], bool]


def start(decoder: Decoder, batch: Batch) -> BlockPass:
    """The pass over any block of this micro-batch."""
    positions, segments = (torch.from_numpy(batch[key]) for key in ("position_ids", "segment_ids"))
    count, length = positions.shape
    return BlockPass(decoder.workspace, decoder.context(length, positions, segments), count, length)


def targets(batch: Batch) -> torch.Tensor:
    """The target of every position, int64 [B * T]; -100 where there is none."""
    return torch.from_numpy(batch["labels"]).reshape(-1)


def num_supervised(batch: Batch) -> int:
    return int(np.count_nonzero(batch["labels"] != sft.IGNORE_INDEX))


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
    """`Decoder.embed` into `out` [N, H]."""
    ids = torch.from_numpy(batch["input_ids"])
    return decoder.embed_tokens.lookup(ids, out).mul_(decoder.config.embedding_scale)


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
def loss_sum(
    decoder: Decoder, batch: Batch, check: Check, first_block: int = 0, features: Features | None = None
) -> float:
    """Sum of the loss over the supervised tokens, in nats; `features` are of `first_block`.

    The blocks from there on run by turns in two buffers and one slot.
    """
    x = below(decoder, batch, first_block, check, features)
    walk = start(decoder, batch)
    for index, block in enumerate(decoder.blocks[first_block:]):
        y = decoder.workspace.like(x, f"input.{(index + 1) % 2}")
        walk.forward(block, x, y, "slot.0")
        x = y
        check()
    hidden = normalize(x, decoder.norm, decoder.workspace.like(x, "h"))
    total = sft.loss(hidden, targets(batch), decoder.lm_head, decoder.workspace)
    check()
    return total


@torch.no_grad()
def evaluate(
    decoder: Decoder, batches: Iterable[Batch], *, check: Check, first_block: int = 0, features: Features | None = None
) -> float:
    """Mean loss per supervised token, in nats; NaN where nothing is supervised. `features` are of `first_block`."""
    set_dropout(decoder, None)
    total, supervised = 0.0, 0
    for batch in batches:
        total += loss_sum(decoder, batch, check, first_block, features)
        supervised += num_supervised(batch)
    return total / supervised if supervised else float("nan")
