"""Texts that belong together close to each other: InfoNCE over the batch (van den Oord et al., arXiv 1807.03748).

    e = x / |x|      z_ij = s e(anchor_i) . e(candidate_j)      loss = sum_i  logsumexp_j(z_ij) - z_i,own

Candidates are the positives and negatives of all rows of the micro-batch: a row's own positive is right and all others
are wrong, so more rows at once make a harder task. s is 20, as in sentence-transformers' MultipleNegativesRankingLoss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from edgetune.objectives.classification import cross_entropy
from edgetune.objectives.outputs import Found

if TYPE_CHECKING:
    import torch

NAME = "embedding"
METRIC = "accuracy"
SETTINGS: dict[str, float] = {}
POOLED, HAS_HEAD = True, False
SCALE = 20.0


def count(batch: Mapping[str, np.ndarray]) -> int:
    """What the loss is the mean over: rows."""
    return len(batch["texts"])


def found(outputs: torch.Tensor, batch: Mapping[str, np.ndarray]) -> Found:
    """Of pooled hidden states [texts, hidden], each row's anchor first, then its positive."""
    import torch

    starts = np.cumsum(batch["texts"]) - batch["texts"]
    anchors = torch.from_numpy(starts)
    is_candidate = np.ones(len(outputs), bool)
    is_candidate[starts] = False
    others = np.flatnonzero(is_candidate)
    length = torch.linalg.vector_norm(outputs, dim=1, keepdim=True).clamp_min_(1e-12)
    unit = outputs / length
    a, c = unit[anchors], unit[torch.from_numpy(others)]
    loss, d_scores, correct = cross_entropy((a @ c.T).mul_(SCALE), np.searchsorted(others, starts + 1))
    d_unit = torch.empty_like(unit)
    d_unit[anchors] = (d_scores @ c).mul_(SCALE)
    d_unit[torch.from_numpy(others)] = (d_scores.T @ a).mul_(SCALE)
    along = (d_unit * unit).sum(1, keepdim=True)
    return Found(loss, d_unit.addcmul_(unit, along, value=-1).div_(length), correct)
