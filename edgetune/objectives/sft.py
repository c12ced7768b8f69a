"""Next-token cross-entropy over tiles of the vocabulary; the logits never exist whole.

    loss = sum_m  logsumexp_v(h_m . w_v) - h_m . w_{t_m}          gradient_m = sum_v softmax_v(h_m . w_v) w_v - w_{t_m}

One pass over the head: the sum in the gradient is attention with the head as keys and values, so it is kept as flash
attention keeps its output (arXiv 2205.14135): unnormalized beside a running maximum and a running sum of exponentials
(arXiv 1805.02867), rescaled where the maximum grows and divided by the sum at the end. Cut Cross-Entropy
(arXiv 2411.09009) makes the logits of each tile twice; here they are made once: two matrix products instead of three.
Memory does not depend on vocabulary times window, and the buffers are those of the blocks, which are free meanwhile.

Only supervised positions are computed. Left out: label smoothing, z-loss, a head with a bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from edgetune.products import fast_products

if TYPE_CHECKING:
    import torch

NAME = "sft"
KINDS = ("text", "prompt", "chat", "instruction")
SETTINGS: dict[str, float] = {}
IGNORE_INDEX = -100
TILE_TOKENS = 256  # positions per logits tile: enough rows for the matrix product to run at full speed


class Head(Protocol):
    """The part of a frozen linear that the loss needs."""

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor]]: ...

    def subtract_rows(self, ids: torch.Tensor, out: torch.Tensor) -> None: ...


class Buffers(Protocol):
    """Named buffers that are used again: `linear.Workspace`."""

    fast_loss_rows: int

    def take(self, rows: int, columns: int, name: str = ...) -> torch.Tensor: ...


@dataclass(frozen=True)
class Measured:
    """Sums over the units of a micro-batch: of a loss, and of figures that are told beside it."""

    loss: float
    figures: Mapping[str, float] = field(default_factory=dict)


class Finish(Protocol):
    """Gets the supervised hidden states [M, H], their targets and cross-entropies, and, where a gradient is wanted,
    the head's rows in the mean of the predicted distribution [M, H], in whose place it puts its gradient.
    """

    def __call__(
        self, rows: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, found: torch.Tensor | None
    ) -> None: ...


class Objective:
    """See `objectives.base`; a unit is a token."""

    needs_reference: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    def units(self, batch: Mapping[str, Any]) -> int:
        return int(np.count_nonzero(batch["labels"] != IGNORE_INDEX))

    def loss(self, hidden: torch.Tensor, batch: Mapping[str, Any], head: Head, buffers: Buffers) -> Measured:
        return Measured(loss(hidden, targets(batch), head, buffers))

    def loss_and_gradient(
        self, hidden: torch.Tensor, batch: Mapping[str, Any], head: Head, buffers: Buffers, row_step: int = 1
    ) -> Measured:
        return Measured(loss_and_gradient(hidden, targets(batch), head, buffers, row_step))


def targets(batch: Mapping[str, Any]) -> torch.Tensor:
    """The target of every position of a micro-batch, int64 [B * T]; -100 where there is none."""
    import torch

    return torch.from_numpy(batch["labels"]).reshape(-1)


def loss(hidden: torch.Tensor, targets: torch.Tensor, head: Head, buffers: Buffers) -> float:
    """Sum of the cross-entropy over the supervised positions, in nats.

    hidden fp32 [M, H]; targets int64 [M], -100 where a position is not supervised; head: V x H.
    """
    return _sum(token_losses(hidden, targets, head, buffers))


def token_losses(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, buffers: Buffers, finish: Finish | None = None
) -> torch.Tensor:
    """The cross-entropy of each supervised position, float32, of the arguments of `loss`."""
    kept = supervised(targets)
    if not len(kept):
        return hidden.new_zeros(0)
    rows = supervised_rows(hidden, kept, buffers, len(kept))
    losses = _one_pass(rows, targets[kept], head, buffers, None)[0]
    if finish is not None:
        finish(rows, targets[kept], losses, None)
    return losses


def loss_and_gradient(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    buffers: Buffers,
    row_step: int = 1,
    finish: Finish | None = None,
) -> float:
    """The sum of `loss`; its gradient takes the place of `hidden`, zero where not supervised.

    Rows of zeros fill up to a multiple of `row_step`, so that parts of the logits end where whole vectors end. Another
    loss that starts from this pass has a `finish` that makes its gradient.
    """
    kept = supervised(targets)
    if not len(kept):
        hidden.zero_()
        return 0.0
    count = -(-len(kept) // row_step) * row_step
    rows = supervised_rows(hidden, kept, buffers, count)
    gradient = buffers.take(count, rows.shape[1], "d").zero_()
    losses, total = _one_pass(rows, targets[kept], head, buffers, gradient)
    found = gradient.div_(total[:, None])[: len(kept)]
    if finish is None:
        head.subtract_rows(targets[kept], found)
    else:
        finish(rows[: len(kept)], targets[kept], losses, found)
    if len(kept) == len(hidden):
        hidden.copy_(found)
    else:
        hidden.zero_().index_copy_(0, kept, found)
    return _sum(losses)


def _sum(losses: torch.Tensor) -> float:
    import torch

    return float(losses.sum(dtype=torch.float64))


def supervised(targets: torch.Tensor) -> torch.Tensor:
    """Indices of the supervised positions."""
    return (targets != IGNORE_INDEX).nonzero()[:, 0]


def supervised_rows(hidden: torch.Tensor, kept: torch.Tensor, buffers: Buffers, count: int) -> torch.Tensor:
    """The supervised rows of hidden, and zeros up to `count` rows: [count, H]."""
    import torch

    if len(kept) == len(hidden) == count:
        return hidden
    rows = buffers.take(count, hidden.shape[1], "d_h")
    torch.index_select(hidden, 0, kept, out=rows[: len(kept)])
    rows[len(kept) :].zero_()
    return rows


def _one_pass(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, buffers: Buffers, weighted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row that has a target, and per row of hidden the sum of exp(logit - its largest logit); the last
    rows may have no target.

    `weighted`, of hidden's shape, zero at first, becomes the sum over the vocabulary of exp(logit - largest) times the
    head's row.
    """
    import torch

    size, learned = len(hidden), len(targets)
    highest, total, of_target = torch.full((size,), -torch.inf), torch.zeros(size), torch.zeros(learned)
    for rows, weight in head.tiles():
        for start in range(0, size, TILE_TOKENS):
            at = slice(start, min(start + TILE_TOKENS, size))
            tile = buffers.take(at.stop - start, len(weight), "inner")
            with fast_products(len(tile) == buffers.fast_loss_rows):
                logits = torch.mm(hidden[at], weight.T, out=tile)
            wanted = targets[at]
            here = ((wanted >= rows.start) & (wanted < rows.stop)).nonzero()[:, 0]
            of_target[at].index_copy_(0, here, logits[here, wanted[here] - rows.start])
            raised = torch.maximum(highest[at], logits.amax(dim=1))
            shrunk = highest[at].sub_(raised).exp_()
            total[at].mul_(shrunk).add_(logits.sub_(raised[:, None]).exp_().sum(dim=1))
            if weighted is not None:
                weighted[at].mul_(shrunk[:, None])
                with fast_products(len(tile) == buffers.fast_loss_rows):
                    weighted[at].addmm_(logits, weight)
            highest[at] = raised
    return highest[:learned] + total[:learned].log() - of_target, total
