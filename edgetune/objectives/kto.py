"""Kahneman-Tversky optimization (arXiv 2402.01306, equation 8): answers that are wanted or not, without pairs.

    r(y) = log p(y|x) - log p_ref(y|x)        z = max(0, mean over a micro-batch of r of mismatched answers)
    L = 1 - sigmoid(beta (r - z)) of an answer that is wanted, 1 - sigmoid(beta (z - r)) of one that is not

z estimates the policy's distance from the reference, KL(p || p_ref), and no gradient passes through it. The paper takes
it from the micro-batch by giving each prompt the answer of another row. A micro-batch of one row has no other, and with
z = 0 an answer would gain by whatever raises all answers. So the other answer is fixed when the rows are read: it is
that of the row before, and lies beside the row in its window (`data.read_rows`). The estimate is the paper's for any
batch size; with one row it is that of a single sample. It costs a second sequence for each row, forward and, with a
gradient of zero, backward. The reference is that of `dpo`.

Left out: other weights than 1 of the two kinds of answers (the paper's lambda_D and lambda_U).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgetune.objectives.base import Floats, SequenceObjective, Sequences, sigmoid

NAME = "kto"
KINDS = ("feedback",)
SETTINGS = {"beta": 0.1}


@dataclass(frozen=True)
class Objective(SequenceObjective):
    """See the module; a unit is a row, with the mismatched answer behind its own."""

    beta: float
    needs_reference: ClassVar[bool] = True

    def measure(self, found: Sequences) -> tuple[Floats, Floats, dict[str, Floats]]:
        ratios = found.logps - found.reference
        distance = max(0.0, float(ratios[1::2].mean()))
        sides = 2 * found.desirable[::2] - 1
        gains = sides * self.beta * (ratios[::2] - distance)
        value = sigmoid(gains)
        slope = -self.beta * sides * value * (1 - value)
        slopes = np.stack([slope, np.zeros_like(slope)], axis=1).ravel()
        figures = {"reward_margin": gains, "reward_accuracy": (gains > 0).astype(float)}
        return 1 - value, slopes, figures | {"reference_kl": np.full_like(gains, distance)}
