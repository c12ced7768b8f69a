"""The forward pass over one micro-batch, without gradients: what evaluation needs, and where every step rule starts."""

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


def start(decoder: Decoder, batch: Batch) -> BlockPass:
    """The pass over any block of this micro-batch."""
    positions, segments = (torch.from_numpy(batch[key]) for key in ("position_ids", "segment_ids"))
    count, length = positions.shape
    return BlockPass(decoder.workspace, decoder.context(length, positions, segments), count, length)


def targets(batch: Batch) -> torch.Tensor:
    """The target of every position, int64 [B * T]; -100 where there is none."""
    return torch.from_numpy(batch["labels"]).reshape(-1)


def num_supervised(batch: Batch) -> int:
    return int((batch["labels"] != sft.IGNORE_INDEX).sum())


def below(decoder: Decoder, walk: BlockPass, batch: Batch, stop: int, check: Check) -> torch.Tensor:
    """What block `stop` gets, [N, H]: embedding and the blocks below it by turns in two buffers, nothing kept."""
    x = decoder.workspace.take(walk.positions, decoder.config.hidden_size, f"input.{stop % 2}")
    decoder.embed(torch.from_numpy(batch["input_ids"]), out=x)
    for index, block in enumerate(decoder.blocks[:stop]):
        y = decoder.workspace.like(x, f"input.{(stop - index - 1) % 2}")  # the last one writes to input.0
        walk.forward(block, x, y, "slot.0")
        x = y
        check()
    return x


@torch.no_grad()
def evaluate(decoder: Decoder, batches: Iterable[Batch], *, check: Check) -> float:
    """Mean loss per supervised token, in nats; NaN where nothing is supervised."""
    set_dropout(decoder, None)
    loss_sum, supervised = 0.0, 0
    for batch in batches:
        x = below(decoder, start(decoder, batch), batch, len(decoder.layers), check)
        hidden = normalize(x, decoder.norm, decoder.workspace.like(x, "h"))
        loss_sum += sft.loss(hidden, targets(batch), decoder.lm_head, decoder.workspace)
        supervised += num_supervised(batch)
        check()
    return loss_sum / supervised if supervised else float("nan")
