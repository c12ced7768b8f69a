"""Direct preference optimization (arXiv 2305.18290, equation 7), with the label smoothing of cDPO (Mitchell 2023).

    r(y) = beta (log p(y|x) - log p_ref(y|x))        m = r(chosen) - r(rejected)
    L = -(1 - e) log sigmoid(m) - e log sigmoid(-m)
    dL/dm = -(1 - e) sigmoid(-m) + e sigmoid(m)

beta is how hard the reference holds; e (`label_smoothing`) is the share of pairs that are taken to be labeled the wrong
way round. The reference is the base without an adapter. Its log-probabilities are rows' `reference`: measured once
before the first step (`training.reference`), so there is no second model beside the one that learns.

Left out: other losses of the margin (IPO, hinge), a reference other than the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgetune.objectives.base import (
    Floats,
    SequenceObjective,
    Sequences,
    log_sigmoid,
    preference_figures,
    sigmoid,
)

NAME = "dpo"
KINDS = ("preference",)
SETTINGS = {"beta": 0.1, "label_smoothing": 0.0}


@dataclass(frozen=True)
class Objective(SequenceObjective):
    """See the module; a unit is a pair."""

    beta: float
    label_smoothing: float
    needs_reference: ClassVar[bool] = True

    def measure(self, found: Sequences) -> tuple[Floats, Floats, dict[str, Floats]]:
        rewards = self.beta * (found.logps - found.reference)
        chosen, rejected = rewards[::2], rewards[1::2]
        margin, flipped = chosen - rejected, self.label_smoothing
        losses = -(1 - flipped) * log_sigmoid(margin) - flipped * log_sigmoid(-margin)
        slope = self.beta * (flipped * sigmoid(margin) - (1 - flipped) * sigmoid(-margin))
        slopes = np.stack([slope, -slope], axis=1).ravel()
        return losses, slopes, preference_figures(chosen, rejected)
