"""Next-token cross-entropy over tiles of the vocabulary; the logits never exist whole.

    loss = sum_m  logsumexp_v(h_m . w_v) - h_m . w_{t_m}          gradient_m = sum_v softmax_v(h_m . w_v) w_v - w_{t_m}

Two passes over the head: the first finds the log-sum-exp of every position, keeping a running maximum (the online
softmax of Milakov and Gimelshein, arXiv 1805.02867); the second forms the probabilities of a tile and multiplies them
with that tile's weights (Cut Cross-Entropy, arXiv 2411.09009). A tile of the head is dequantized into one buffer that
is used again, so memory does not depend on vocabulary times window. The second pass goes backwards over the tiles,
because the buffer still holds the last one: a vocabulary that fits one tile is dequantized once.

Only supervised positions are computed. Left out: label smoothing, z-loss, a head with a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

NAME = "sft"
IGNORE_INDEX = -100
TILE_TOKENS = 256  # positions per logits tile: enough rows for the matrix product to run at full speed


class Head(Protocol):
    """The part of a frozen linear that the loss needs."""

    out_features: int

    def dequantize(self, rows: slice | None = None, out: torch.Tensor | None = None) -> torch.Tensor: ...


def loss(hidden: torch.Tensor, targets: torch.Tensor, head: Head, *, tile_rows: int) -> float:
    """Sum of the cross-entropy over the supervised positions, in nats.

    hidden fp32 [M, H]; targets int64 [M], -100 where a position is not supervised; head: V x H; tile_rows: rows of the
    head per tile.
    """
    return _Tiles(hidden, targets, head, tile_rows).loss_sum()


def loss_and_gradient(
    hidden: torch.Tensor, targets: torch.Tensor, head: Head, *, tile_rows: int
) -> tuple[float, torch.Tensor]:
    """The sum of `loss`, and its gradient with respect to `hidden`, fp32 [M, H], zero where not supervised."""
    tiles = _Tiles(hidden, targets, head, tile_rows)
    loss_sum = tiles.loss_sum()
    return loss_sum, tiles.gradient()


class _Tiles:
    """The buffers of one call, shared by its two passes."""

    def __init__(self, hidden: torch.Tensor, targets: torch.Tensor, head: Head, tile_rows: int) -> None:
        import torch

        self.head, self.num_positions = head, len(hidden)
        supervised = targets != IGNORE_INDEX
        self.everything = bool(supervised.all())
        self.kept = supervised.nonzero()[:, 0]
        self.hidden = hidden.detach() if self.everything else hidden.detach()[self.kept]  # [S, H]
        self.targets = targets if self.everything else targets[self.kept]  # [S]
        size, width = self.hidden.shape
        rows = min(tile_rows, head.out_features)
        self.weight_buffer = torch.empty(rows, width)
        self.logits_buffer = torch.empty(min(TILE_TOKENS, size) * rows)
        starts = range(0, head.out_features, rows)
        self.vocabulary = [slice(start, min(start + rows, head.out_features)) for start in starts]
        self.positions = [slice(start, min(start + TILE_TOKENS, size)) for start in range(0, size, TILE_TOKENS)]
        self.log_sum = torch.empty(size)  # [S], set by the first pass
        self.in_buffer: slice | None = None

    def weight(self, rows: slice) -> torch.Tensor:
        """These rows of the head, fp32, in the one buffer."""
        buffer = self.weight_buffer[: rows.stop - rows.start]
        if rows != self.in_buffer:
            self.head.dequantize(rows=rows, out=buffer)
            self.in_buffer = rows
        return buffer

    def logits(self, weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The logits of every tile of positions in turn, [positions, rows], each in the same memory."""
        import torch

        for at in self.positions:
            shape = (at.stop - at.start, len(weight))
            tile = self.logits_buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(self.hidden[at], weight.T, out=tile)
            yield at, tile

    def inside(self, at: slice, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of these positions have their target in these rows: (position in the tile, column in the tile)."""
        targets = self.targets[at]
        here = ((targets >= rows.start) & (targets < rows.stop)).nonzero()[:, 0]
        return here, targets[here] - rows.start

    def loss_sum(self) -> float:
        import torch

        size = len(self.hidden)
        highest, total, of_target = torch.full((size,), -torch.inf), torch.zeros(size), torch.zeros(size)
        for rows in self.vocabulary:
            for at, logits in self.logits(self.weight(rows)):
                here, column = self.inside(at, rows)
                of_target[at].index_copy_(0, here, logits[here, column])
                raised = torch.maximum(highest[at], logits.amax(dim=1))
                total[at] *= highest[at].sub_(raised).exp_()
                total[at] += logits.sub_(raised[:, None]).exp_().sum(dim=1)
                highest[at] = raised
        torch.add(highest, total.log_(), out=self.log_sum)
        return float((self.log_sum - of_target).sum(dtype=torch.float64))

    def gradient(self) -> torch.Tensor:
        import torch

        gradient = torch.zeros_like(self.hidden)
        for rows in reversed(self.vocabulary):
            weight = self.weight(rows)
            for at, logits in self.logits(weight):
                probability = logits.sub_(self.log_sum[at, None]).exp_()
                here, column = self.inside(at, rows)
                probability[here, column] -= 1.0
                gradient[at].addmm_(probability, weight)
        if self.everything:
            return gradient
        return torch.zeros(self.num_positions, gradient.shape[1]).index_copy_(0, self.kept, gradient)
