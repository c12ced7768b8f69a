"""Odds ratio preference optimization (arXiv 2403.07691, equations 6 and 7): preferences without a reference.

    l(y) = log p(y|x) / |y|        o = logit(exp l(chosen)) - logit(exp l(rejected))
    L = -l(chosen) - beta log sigmoid(o)
    dL/dl(chosen) = -1 - beta sigmoid(-o) / (1 - exp l(chosen))        dL/dl(rejected) = beta sigmoid(-o) / (1 - exp l)

Log-probabilities are means over an answer's tokens. The first term is the cross-entropy of the chosen answer alone, as
in the paper (TRL's is that of its prompt too). `beta` is TRL's name for the paper's lambda; the rewards that are told
are beta l(y), as TRL's are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgetune.objectives.base import (
    Floats,
    SequenceObjective,
    Sequences,
    log_sigmoid,
    preference_figures,
    sigmoid,
)

NAME = "orpo"
KINDS = ("preference",)
SETTINGS = {"beta": 0.1}
CLOSEST_TO_CERTAIN = 1e-6  # 1 - exp l is at least this, as an answer whose every token is certain has no odds


@dataclass(frozen=True)
class Objective(SequenceObjective):
    """See the module; a unit is a pair."""

    beta: float

    def measure(self, found: Sequences) -> tuple[Floats, Floats, dict[str, Floats]]:
        means = found.logps / found.lengths
        others = np.maximum(-np.expm1(means), CLOSEST_TO_CERTAIN)
        odds = means - np.log(others)
        chosen, rejected = means[::2], means[1::2]
        ratio = odds[::2] - odds[1::2]
        losses = -chosen - self.beta * log_sigmoid(ratio)
        pull = self.beta * sigmoid(-ratio)
        slopes = np.stack([-1 - pull / others[::2], pull / others[1::2]], axis=1).ravel() / found.lengths
        return losses, slopes, preference_figures(self.beta * chosen, self.beta * rejected)
