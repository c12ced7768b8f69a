"""A reward model: the Bradley-Terry loss of pairs (arXiv 2203.02155, equation 1), as TRL's RewardTrainer has it.

    L = -log sigmoid(m),  m = r(chosen) - r(rejected)        dL/dr(chosen) = -sigmoid(-m) = -dL/dr(rejected)

r is the one output of a linear head at the last token of an answer. A pair lies in one window, so that both are learned
in one step.

Left out: TRL's margins of single rows and its term that centres rewards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from edgetune.objectives.base import Floats, log_sigmoid, preference_figures, sigmoid
from edgetune.objectives.outputs import Scored
from edgetune.objectives.score import ScoreObjective

if TYPE_CHECKING:
    import torch

NAME = "reward"
KINDS = ("preference",)
SETTINGS: dict[str, float] = {}


class Objective(ScoreObjective):
    """See the module; a unit is a pair."""

    together: ClassVar[int] = 2

    def score(self, outputs: torch.Tensor, targets: Floats) -> Scored:
        """Of rewards [2 * pairs, 1], each chosen one before its rejected one."""
        import torch

        rewards = outputs[:, 0].numpy().astype(np.float64)
        chosen, rejected = rewards[::2], rewards[1::2]
        margin = chosen - rejected
        slope = sigmoid(-margin)
        gradient = torch.from_numpy(np.stack([-slope, slope], axis=1).reshape(-1, 1).astype(np.float32))
        figures = {name: float(values.sum()) for name, values in preference_figures(chosen, rejected).items()}
        return Scored(float(-log_sigmoid(margin).sum()), gradient, figures)
