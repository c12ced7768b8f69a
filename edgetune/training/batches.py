"""Which windows a step sees: a function of (seed, step) and nothing else, so resuming needs only the step's number.

Retention windows lie among those of the task at a share: position p of the endless sequence is one of them where
floor((p + 1) share) is more than floor(p share). So each step has the share of them, up to one window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.data import Window, epoch_order, stack

if TYPE_CHECKING:
    from edgetune.training.forward import Batch


RETENTION_STREAM, ANCHOR_STREAM = 1 << 62, 1 << 61  # keep these orders apart from the task's


class Cycle:
    """The windows of all epochs as one endless sequence, each epoch in its own order."""

    def __init__(self, windows: Sequence[Any], seed: int) -> None:
        self.windows, self.seed = windows, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> Any:
        epoch, index = divmod(position, len(self.windows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.windows), self.seed, epoch)
        return self.windows[int(self._order[index])]


class Batches:
    """The windows of all epochs as one endless sequence; steps take them in turn.

    A step may reach over the end of an epoch. So every window is seen as often as any other of its kind, and all steps
    are equal.
    """

    def __init__(
        self, windows: Sequence[Any], *, batch_size: int, gradient_accumulation_steps: int, seed: int,
        retention: Sequence[Any] = (), retention_share: float = 0.0,
    ) -> None:  # fmt: skip
        self.task, self.retention = Cycle(windows, seed), Cycle(retention, seed ^ RETENTION_STREAM)
        self.share = Fraction(str(retention_share)) if retention else Fraction(0)
        self.batch_size, self.gradient_accumulation_steps = batch_size, gradient_accumulation_steps

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps

    def of_step(self, step: int) -> tuple[list[Batch], int]:
        """The micro-batches of a step counted from zero, and how many of their tokens are no padding."""
        chosen = self.windows_of_step(step)
        return list(in_batches(chosen, self.batch_size)), sum(window.num_tokens for window in chosen)

    def windows_of_step(self, step: int) -> list[Any]:
        """The windows of a step, micro-batch by micro-batch."""
        first = step * self.windows_per_step
        return [self._window(first + i) for i in range(self.windows_per_step)]

    def _window(self, position: int) -> Any:
        retained = math.floor(position * self.share)  # before this one
        if math.floor((position + 1) * self.share) > retained:
            return self.retention[retained]
        return self.task[position - retained]


def in_batches(windows: Sequence[Window], batch_size: int) -> Iterator[Batch]:
    """The windows in order, `batch_size` at a time; the last batch may be smaller."""
    for start in range(0, len(windows), batch_size):
        yield stack(windows[start : start + batch_size])
