"""What holds an adapted model to its base on rows that nobody labelled: the divergence of the two distributions.

    KL(p || q) = sum_v p_v (log p_v - log q_v) = sum_v p_v (z_v - y_v) - logsumexp(z) + logsumexp(y)
    dKL/dh = sum_v (q_v - p_v) w_v              p = softmax(z) of the base, q = softmax(y) of the adapted model

exactly, over the whole vocabulary, at each position of a text that has a next token. It is learning without forgetting
(arXiv 1606.09282) with the base as its teacher: asked anew in every step, so no outputs are recorded, and k of them do
not stand for all. One pass over the head, as `sft` does: both logits of a tile, the sums of both softmaxes beside their
running maxima, and for each the sum of the head's rows. Its tiles have fewer positions than those of `sft`, so that
three of them (both logits, and their difference) lie where one of `sft` does.

It is no objective of its own (`OBJECTIVES`): its rows are micro-batches beside those of the task's: `training.anchor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from edgetune.objectives import sft
from edgetune.objectives.sft import Measured

if TYPE_CHECKING:
    import torch

KINDS = ("text",)
TILE_TOKENS = 64  # positions per tile


@dataclass(frozen=True)
class Objective:
    """See the module and `objectives.base`; a unit is a token."""

    base: torch.Tensor
    """What the head gets from the base at the supervised positions, [M, H], and rows of zeros."""
    needs_reference: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    def units(self, batch: Mapping[str, Any]) -> int:
        return sft.Objective().units(batch)

    def loss(self, hidden: torch.Tensor, batch: Mapping[str, Any], head: sft.Head, buffers: sft.Buffers) -> Measured:
        kept = sft.supervised(sft.targets(batch))
        rows = sft.supervised_rows(hidden, kept, buffers, len(self.base))
        return _measured(divergences(rows, self.base, head, buffers), len(kept))

    def loss_and_gradient(
        self, hidden: torch.Tensor, batch: Mapping[str, Any], head: sft.Head, buffers: sft.Buffers, row_step: int = 1
    ) -> Measured:
        """As `sft`; rows are those of `base`, so it is that which has the `row_step`."""
        kept = sft.supervised(sft.targets(batch))
        rows = sft.supervised_rows(hidden, kept, buffers, len(self.base))
        gradient = buffers.take(len(rows), rows.shape[1], "d").zero_()
        found = divergences(rows, self.base, head, buffers, gradient)
        hidden.zero_().index_copy_(0, kept, gradient[: len(kept)])
        return _measured(found, len(kept))


def _measured(found: torch.Tensor, count: int) -> Measured:
    import torch

    return Measured(float(found[:count].sum(dtype=torch.float64)))


def divergences(
    rows: torch.Tensor, base: torch.Tensor, head: sft.Head, buffers: sft.Buffers, gradient: torch.Tensor | None = None
) -> torch.Tensor:
    """KL of each row, float32 [M] in nats, of the hidden states [M, H] of the adapted model and the base.

    `gradient` [M, H], zero at first, becomes that by `rows`.
    """
    import torch

    size, width = rows.shape
    ours, theirs = _Softmax(size), _Softmax(size)
    gap = torch.zeros(size)  # sum over the vocabulary of exp(z - largest z) (z - y)
    mean = None if gradient is None else buffers.take(size, width, "kl.mean").zero_()
    for vocabulary, weight in head.tiles():
        columns = vocabulary.stop - vocabulary.start
        for start in range(0, size, TILE_TOKENS):
            at = slice(start, min(start + TILE_TOKENS, size))
            count = at.stop - start
            space = buffers.take(3 * count, columns, "inner")
            y = torch.mm(rows[at], weight.T, out=space[:count])
            z = torch.mm(base[at], weight.T, out=space[count : 2 * count])
            apart = torch.sub(z, y, out=space[2 * count :])
            shrunk = theirs.add(at, z)
            gap[at] = gap[at].mul_(shrunk).add_(apart.mul_(z).sum(dim=1))
            if mean is not None:
                mean[at].mul_(shrunk[:, None]).addmm_(z, weight)
            shrunk = ours.add(at, y)
            if gradient is not None:
                gradient[at].mul_(shrunk[:, None]).addmm_(y, weight)
    if gradient is not None and mean is not None:
        gradient.div_(ours.total[:, None]).sub_(mean.div_(theirs.total[:, None]))
    return gap.div_(theirs.total).sub_(theirs.log_sum()).add_(ours.log_sum())


class _Softmax:
    """The running maximum of each row's logits, and the sum of exp(logit - maximum)."""

    def __init__(self, size: int) -> None:
        import torch

        self.highest, self.total = torch.full((size,), -torch.inf), torch.zeros(size)

    def add(self, at: slice, logits: torch.Tensor) -> torch.Tensor:
        """Turns logits [n, V] into exp(logit - maximum); what sums from before are multiplied by [n] is returned."""
        import torch

        raised = torch.maximum(self.highest[at], logits.amax(dim=1))
        shrunk = (self.highest[at] - raised).exp_()
        self.highest[at] = raised
        self.total[at] = self.total[at].mul_(shrunk).add_(logits.sub_(raised[:, None]).exp_().sum(dim=1))
        return shrunk

    def log_sum(self) -> torch.Tensor:
        """Logsumexp of all that was added."""
        return self.highest + self.total.log()
