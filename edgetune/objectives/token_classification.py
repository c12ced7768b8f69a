"""A class for each word: softmax cross-entropy over the logits of a linear head at the first token of each word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgetune.objectives.classification import cross_entropy
from edgetune.objectives.outputs import Found

if TYPE_CHECKING:
    import torch

NAME = "token-classification"
METRIC = "accuracy"
SETTINGS: dict[str, float] = {}
POOLED, HAS_HEAD = False, True


def count(batch: Mapping[str, np.ndarray]) -> int:
    """What the loss is the mean over: words."""
    return int(np.count_nonzero(batch["labels"] >= 0))


def found(outputs: torch.Tensor, batch: Mapping[str, np.ndarray]) -> Found:
    """Of logits [tokens, classes]."""
    return cross_entropy(outputs, batch["labels"])
