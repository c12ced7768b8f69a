"""Losses of what a trained head says of whole sequences: a linear layer on the hidden state of the last token of each.

    z = W h_last,  W [outputs, hidden]

It stands in the place of the model's own head, as in Hugging Face's `*ForSequenceClassification`, so no logit of the
vocabulary is made. Sequences lie side by side in a window, apart by their segments. Rows bring "target": a number for
each sequence of a window, NaN beyond the last one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from edgetune.objectives.base import Batch, Floats
from edgetune.objectives.outputs import Scored
from edgetune.objectives.sft import Buffers, Measured

if TYPE_CHECKING:
    import torch

    from edgetune.models.places import Score


class ScoreObjective(ABC):
    """An `Objective` of such a head; its unit is `together` sequences, which stand side by side."""

    needs_reference: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    together: ClassVar[int] = 1

    @abstractmethod
    def score(self, outputs: torch.Tensor, targets: Floats) -> Scored:
        """Sums over sequences, of outputs [S, outputs], which may become the gradient, and targets [S]."""

    def units(self, batch: Batch) -> int:
        return int(np.isfinite(batch["target"]).sum()) // self.together

    def loss(self, hidden: torch.Tensor, batch: Batch, head: Score, buffers: Buffers) -> Measured:
        rows = self._last(hidden, batch, buffers)[1]
        made = self.score(rows @ head.weight.T, _targets(batch))
        return Measured(made.loss, made.figures)

    def loss_and_gradient(
        self, hidden: torch.Tensor, batch: Batch, head: Score, buffers: Buffers, row_step: int = 1
    ) -> Measured:
        """As `Objective`; adds the head's own gradient to its weight's, times its scale."""
        import torch

        at, rows = self._last(hidden, batch, buffers)
        made = self.score(rows @ head.weight.T, _targets(batch))
        if head.weight.grad is None:
            head.weight.grad = torch.zeros_like(head.weight)
        head.weight.grad.addmm_(made.gradient.T, rows, alpha=head.scale)
        d_rows = torch.mm(made.gradient, head.weight, out=buffers.take(len(rows), rows.shape[1], "d"))
        hidden.zero_().index_copy_(0, at, d_rows)
        return Measured(made.loss, made.figures)

    def _last(self, hidden: torch.Tensor, batch: Batch, buffers: Buffers) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the sequences end [S], and the hidden states there [S, H]."""
        import torch

        at = torch.from_numpy(last_positions(batch["segment_ids"]))
        rows = buffers.take(len(at), hidden.shape[1], "d_h")
        return at, torch.index_select(hidden, 0, at, out=rows)


def last_positions(segments: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """The last position of each segment, of [B, T] laid out as [B * T]; padding is -1."""
    ends = np.ones(segments.shape, bool)
    ends[:, :-1] = segments[:, :-1] != segments[:, 1:]
    ends &= segments != -1
    return np.flatnonzero(ends)


def _targets(batch: Batch) -> Floats:
    targets: Floats = batch["target"][np.isfinite(batch["target"])].astype(np.float64)
    return targets
