"""The forward pass over one micro-batch, without gradients: what evaluation needs, and where every step rule starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from edgetune.adapters.attach import set_dropout
from edgetune.models.decoder import Context, Decoder
from edgetune.objectives import sft

Batch = Mapping[str, np.ndarray]  # input_ids, labels (shifted), position_ids, segment_ids: int64 [B, T]
Check = Callable[[], None]  # called between blocks; raises to leave a step unfinished


def start(decoder: Decoder, batch: Batch) -> tuple[torch.Tensor, Context]:
    """The embedded micro-batch [B, T, H] and what its blocks share."""
    ids, positions, segments = (torch.from_numpy(batch[key]) for key in ("input_ids", "position_ids", "segment_ids"))
    return decoder.embed(ids), decoder.context(ids.shape[1], positions, segments)


def targets(batch: Batch) -> torch.Tensor:
    """The target of every position, int64 [B * T]; -100 where there is none."""
    return torch.from_numpy(batch["labels"]).reshape(-1)


def num_supervised(batch: Batch) -> int:
    return int((batch["labels"] != sft.IGNORE_INDEX).sum())


@torch.no_grad()
def evaluate(decoder: Decoder, batches: Iterable[Batch], *, tile_rows: int, check: Check) -> float:
    """Mean loss per supervised token, in nats; NaN where nothing is supervised."""
    set_dropout(decoder, None)
    loss_sum, supervised = 0.0, 0
    for batch in batches:
        x, context = start(decoder, batch)
        for layer in decoder.layers:
            x = layer(x, context)
            check()
        hidden = decoder.norm(x).reshape(-1, x.shape[-1])
        loss_sum += sft.loss(hidden, targets(batch), decoder.lm_head, tile_rows=tile_rows)
        supervised += num_supervised(batch)
        check()
    return loss_sum / supervised if supervised else float("nan")
