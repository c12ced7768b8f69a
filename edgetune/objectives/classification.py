"""A class for each text: softmax cross-entropy over the logits of a linear head, of an encoder or a decoder.

loss = sum_i  logsumexp_c(z_i) - z_i[t_i]        gradient = softmax(z_i) - onehot(t_i)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgetune.objectives.base import Floats
from edgetune.objectives.outputs import Found, Scored
from edgetune.objectives.score import ScoreObjective

if TYPE_CHECKING:
    import torch

NAME = "classification"
KINDS = ("label",)
METRIC = "accuracy"
SETTINGS: dict[str, float] = {}
POOLED, HAS_HEAD = True, True


class Objective(ScoreObjective):
    """That of a decoder; a unit is a text."""

    def score(self, outputs: torch.Tensor, targets: Floats) -> Scored:
        """Of logits [texts, classes] and the numbers of the classes."""
        made = cross_entropy(outputs, targets.astype(np.int64))
        return Scored(made.loss, made.gradient, {METRIC: made.metric})


def count(batch: Mapping[str, np.ndarray]) -> int:
    """What the loss is the mean over: texts."""
    return len(batch["labels"])


def found(outputs: torch.Tensor, batch: Mapping[str, np.ndarray]) -> Found:
    """Of logits [texts, classes]."""
    return cross_entropy(outputs, batch["labels"])


def cross_entropy(logits: torch.Tensor, targets: np.ndarray) -> Found:
    """Loss and gradient of logits [n, classes], which become the latter; the metric counts correct ones.

    Rows of the target -100 are left out.
    """
    import torch

    kept = torch.from_numpy(np.flatnonzero(targets >= 0))
    classes = torch.from_numpy(targets[targets >= 0]).long()
    wanted = logits[kept]
    correct = int((wanted.argmax(1) == classes).sum())
    losses = wanted.logsumexp(1) - wanted[torch.arange(len(kept)), classes]
    gradient = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_()
    gradient[kept, classes] -= 1
    if len(kept) < len(logits):
        gradient[torch.from_numpy(np.flatnonzero(targets < 0))] = 0
    return Found(float(losses.sum(dtype=torch.float64)), gradient, correct)
