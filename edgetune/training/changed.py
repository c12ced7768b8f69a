"""Adapters that change the stream after a block at some positions of every row's prompt: a pass by hand, and back.

What stood there before is kept for backward, block by block, also of blocks that run again: these few vectors are less
than what computing them a second time would need.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from edgetune.data import IGNORED
from edgetune.linear import Workspace
from edgetune.models.places import StateAdapter


def prompt_lengths(batch: Mapping[str, np.ndarray]) -> npt.NDArray[np.int64]:
    """The tokens of the prompt that the row of each position begins with, [B, T], as `Decoder.context` takes them.

    They are those before the first that is learned, where the rows do not say; all, where none is.
    """
    if "prompt_lengths" in batch:
        return batch["prompt_lengths"]
    learned, segments = batch["labels"] != IGNORED, batch["segment_ids"]
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=segments.size)
    first = np.minimum.reduceat(np.where(learned.reshape(-1), np.arange(segments.size), segments.size), starts)
    found = np.where(first < segments.size, first - starts + 1, lengths)  # what position t predicts stands at t + 1
    return np.repeat(found, lengths).reshape(segments.shape)


def changed_rows(changed: torch.Tensor | None) -> torch.Tensor:
    """The rows of a pass that are changed, int64 [M], from `Context.changed` [B, T]."""
    return torch.empty(0, dtype=torch.int64) if changed is None else changed.reshape(-1).nonzero()[:, 0]


def change(place: StateAdapter, index: int, y: torch.Tensor, rows: torch.Tensor, workspace: Workspace) -> None:
    """Changes these rows of y [N, hidden], what block `index` gives; what they were stays in "before"."""
    before = _before(index, y, rows, workspace)
    torch.index_select(y, 0, rows, out=before)
    after = workspace.like(before, "h").copy_(before)
    place.add(before, after)
    y.index_copy_(0, rows, after)


def change_backward(place: StateAdapter, index: int, d: torch.Tensor, rows: torch.Tensor, workspace: Workspace) -> None:
    """Backward of `change`: turns d [N, hidden] into the gradient of what the block gave, and fills the adapter's."""
    before = _before(index, d, rows, workspace)
    d_after = torch.index_select(d, 0, rows, out=workspace.like(before, "h"))
    d_before = workspace.like(before, "d_h").copy_(d_after)
    place.add_gradients(before, d_after, d_before)
    d.index_copy_(0, rows, d_before)


def _before(index: int, x: torch.Tensor, rows: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    return workspace.take(len(rows), x.shape[1], f"before.{index}")
