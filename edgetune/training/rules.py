"""Step rules: how a step finds its update from the loss, and what has to be kept from one step to the next for that.

A step rule is a module with `NAME` and a class `Rule(decoder, parameters, plan, features)` that follows `StepRule`.
`features` stand in for the blocks below the lowest adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from edgetune.training import backprop, mezo
from edgetune.training.forward import Batch, Check

STEP_RULES = {"backprop": backprop, "mezo": mezo}


class StepRule(Protocol):
    """One step is `gradient` and then either `update` or `drop`."""

    figures: Mapping[str, float]
    """What the objective tells of the last step beside its loss; means."""

    def gradient(self, batches: Sequence[Batch], key: tuple[int, int], check: Check) -> tuple[float, float]:
        """The step's mean loss and its gradient's norm before clipping; either may be not finite.

        `key` is (seed, step) and decides all that is random. What `check` or an allocation raises leaves the parameters
        as they were, to the bit.
        """
        ...

    @property
    def kept_layers(self) -> int:
        """Blocks that keep their activations for a backward pass."""
        ...

    def keep_layers(self, count: int) -> None:
        """Let only so many keep them, from the next step on."""
        ...

    def update(self, learning_rate: float) -> None:
        """Change the parameters. Where this breaks off they are of no step."""
        ...

    def drop(self) -> None:
        """Leave the step out."""
        ...

    def tensors(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps beside the parameters."""
        ...

    def load(self, tensors: Mapping[str, np.ndarray], updates: int) -> None:
        """Take back what `tensors` gave after that many updates."""
        ...
