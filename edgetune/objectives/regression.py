"""A number for each text: the squared error of a linear head with one output, as Hugging Face has it for one label.

loss = sum_i (z_i - y_i)^2        gradient = 2 (z_i - y_i)
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

NAME = "regression"
KINDS = ("label",)
METRIC = "mean_absolute_error"
SETTINGS: dict[str, float] = {}
POOLED, HAS_HEAD = True, True


class Objective(ScoreObjective):
    """That of a decoder; a unit is a text."""

    def score(self, outputs: torch.Tensor, targets: Floats) -> Scored:
        """Of values [texts, 1]."""
        made = found(outputs, {"labels": targets.astype(np.float32)})
        return Scored(made.loss, made.gradient, {METRIC: made.metric})


def count(batch: Mapping[str, np.ndarray]) -> int:
    """What the loss is the mean over: texts."""
    return len(batch["labels"])


def found(outputs: torch.Tensor, batch: Mapping[str, np.ndarray]) -> Found:
    """Of values [texts, 1]."""
    import torch

    error = outputs.sub_(torch.from_numpy(batch["labels"])[:, None])
    loss, off = float(error.square().sum(dtype=torch.float64)), float(error.abs().sum(dtype=torch.float64))
    return Found(loss, error.mul_(2), off)
