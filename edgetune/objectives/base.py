"""What an objective is to the engine: a loss over a micro-batch, from the last hidden states and the head.

An objective's module has `NAME`, the `KINDS` of rows that it learns from, the `SETTINGS` that it takes with their
defaults, and a class `Objective(**settings)` that follows the protocol here. Whatever it does, the logits never exist
whole: it goes through the one pass over the head of `sft`.

Losses of whole sequences (`SequenceObjective`) need no second pass for it. Such a loss is a function of the
log-probabilities of the micro-batch's sequences, so its gradient is that of the cross-entropy of each token times a
weight that all tokens of a sequence share,

    dL/dh_t = (dL/d log p(y)) (d log p(y)/dh_t) = -(dL/d log p(y)) d nll_t/dh_t        log p(y) = -sum_t nll_t

and the pass yields every nll before the gradients leave it. Sequences that need each other lie in one window, apart by
their segments: one forward, one pass over the head, one backward, exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from edgetune.objectives import sft
from edgetune.objectives.sft import Measured

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float64]
Batch = Mapping[str, npt.NDArray[np.generic]]  # as `data.stack` makes it


class Objective(Protocol):
    """A loss is told as its mean over units: tokens, pairs, or whatever the objective counts."""

    needs_reference: ClassVar[bool]
    """Whether rows carry what the base makes of them."""
    needs_teacher: ClassVar[bool]
    """Whether rows carry what a teacher said of them: see `data.teacher`."""

    def units(self, batch: Batch) -> int:
        """How many there are in a micro-batch."""
        ...

    def loss(self, hidden: torch.Tensor, batch: Batch, head: sft.Head, buffers: sft.Buffers) -> Measured:
        """Of normalized hidden states [N, H]."""
        ...

    def loss_and_gradient(
        self, hidden: torch.Tensor, batch: Batch, head: sft.Head, buffers: sft.Buffers, row_step: int = 1
    ) -> Measured:
        """The same; the gradient of the sum takes the place of `hidden`. `row_step` as in `sft`."""
        ...


@dataclass(frozen=True)
class Sequences:
    """The sequences of a micro-batch in their order, float64 [S] each; the members of a unit stand side by side."""

    logps: Floats
    """The log-probability of what is learned of each, in nats."""
    lengths: Floats
    """How many tokens that is."""
    reference: Floats
    """`logps` of the reference model; NaN without one."""
    desirable: Floats
    """1, 0, or NaN where the data does not say."""


class SequenceObjective(ABC):
    """An `Objective` whose loss is a function of the log-probabilities of sequences; its unit is two of them."""

    needs_reference: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    @abstractmethod
    def measure(self, found: Sequences) -> tuple[Floats, Floats, dict[str, Floats]]:
        """The loss of each unit [U], the derivative of their sum by each log-probability [S], and figures [U]."""

    def units(self, batch: Batch) -> int:
        return int((batch["segment_ids"].max(axis=1) + 1).sum()) // 2

    def loss(self, hidden: torch.Tensor, batch: Batch, head: sft.Head, buffers: sft.Buffers) -> Measured:
        losses = sft.token_losses(hidden, sft.targets(batch), head, buffers)
        return self._weigh(losses.numpy(), batch)[0]

    def loss_and_gradient(
        self, hidden: torch.Tensor, batch: Batch, head: sft.Head, buffers: sft.Buffers, row_step: int = 1
    ) -> Measured:
        measured = Measured(0.0)

        def finish(rows: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, found: torch.Tensor | None) -> None:
            nonlocal measured
            assert found is not None
            measured, weights = self._weigh(losses.numpy(), batch)
            head.subtract_rows(targets, found)
            found.mul_(found.new_tensor(weights)[:, None])

        sft.loss_and_gradient(hidden, sft.targets(batch), head, buffers, row_step, finish)
        return measured

    def _weigh(self, losses: npt.NDArray[np.float32], batch: Batch) -> tuple[Measured, npt.NDArray[np.float32]]:
        """The loss, and what the gradient of each token's cross-entropy [M] is multiplied by."""
        of, exists = _sequence_numbers(batch)
        losses_of, slopes, figures = self.measure(read_sequences(batch, losses))
        weights = np.zeros(exists.size, np.float32)
        weights[exists.ravel()] = -slopes
        sums = {name: float(values.sum()) for name, values in figures.items()}
        return Measured(float(losses_of.sum()), sums), weights[of]


def read_sequences(batch: Batch, losses: npt.NDArray[np.float32]) -> Sequences:
    """The sequences of a micro-batch whose supervised tokens have these cross-entropies [M]."""
    of, exists = _sequence_numbers(batch)
    picked = exists.ravel()

    def known(key: str) -> Floats:
        values = batch.get(key)
        return np.full(int(picked.sum()), np.nan) if values is None else values.ravel()[picked].astype(np.float64)

    logps: Floats = -np.bincount(of, losses, exists.size)[picked].astype(np.float64)
    lengths = np.bincount(of, minlength=exists.size)[picked].astype(np.float64)
    return Sequences(logps, lengths, known("reference"), known("desirable"))


def _sequence_numbers(batch: Batch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The sequence of each supervised token [M], counted over [B, the most of a window], and which of those exist."""
    segments = batch["segment_ids"].astype(np.int64)
    last = segments.max(axis=1)
    most = int(last.max()) + 1
    numbers = most * np.arange(len(segments))[:, None] + segments
    return numbers[batch["labels"] != sft.IGNORE_INDEX], np.arange(most) <= last[:, None]


def log_sigmoid(x: Floats) -> Floats:
    """log(1 / (1 + exp(-x))) without overflow."""
    found: Floats = -np.logaddexp(0.0, -x)
    return found


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + exp(-x)) without overflow."""
    found: Floats = np.exp(log_sigmoid(x))
    return found


def preference_figures(chosen: Floats, rejected: Floats) -> dict[str, Floats]:
    """What is told of the rewards of pairs [U] beside the loss."""
    return {"reward_margin": chosen - rejected, "reward_accuracy": (chosen > rejected).astype(np.float64)}
