"""Optimizers: the rule that turns gradients into updates, and what it keeps in memory from step to step.

A rule is one file without torch, so that the planner can read it:

    NAME             what it is called while its moments are float32
    LEARNING_RATE    the peak of the schedule where the user sets none
    MOMENTS          what it keeps for every parameter: name -> whether that can be negative
    update(parameter, gradient, *moments, learning_rate=..., weight_decay=..., updates=...)
                     one update in place, of flat torch tensors; the gradient is scratch, `updates` counts from one

A rule is elementwise: `training.optimizer` applies it tile by tile, so moments that are stored in 8 bits (`blockwise`)
are float32 for one tile at a time, and no rule knows how its moments are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from edgetune.optimizers import adamw, blockwise, lion, sgd

__all__ = ["OPTIMIZERS", "TILE", "OptimizerInfo"]

TILE = 1 << 14  # parameters that are updated at a time, of one tensor: whole blocks


@dataclass(frozen=True)
class OptimizerInfo:
    """A rule and how its moments are stored. `sizes` are the numbers of parameters of the tensors that it updates."""

    rule: ModuleType
    quantized: bool = False

    @property
    def learning_rate(self) -> float:
        """The peak of the schedule where the user sets none."""
        return float(self.rule.LEARNING_RATE)

    def state_bytes(self, sizes: Sequence[int]) -> int:
        """Bytes that it keeps from step to step and writes into a checkpoint."""
        of_one = sum(map(blockwise.nbytes, sizes)) if self.quantized else 4 * sum(sizes)
        return len(self.rule.MOMENTS) * of_one

    def scratch_bytes(self, sizes: Sequence[int]) -> int:
        """Bytes that it holds beside its state: buffers of one tile and tables, where moments are quantized."""
        if not self.quantized:
            return 0
        return blockwise.scratch_bytes(min(TILE, max(sizes)), self.rule.MOMENTS)


OPTIMIZERS = {
    "adamw": OptimizerInfo(adamw),
    "adamw_8bit": OptimizerInfo(adamw, quantized=True),
    "lion": OptimizerInfo(lion),
    "lion_8bit": OptimizerInfo(lion, quantized=True),
    "sgd": OptimizerInfo(sgd),
}
