"""What an objective makes of a trained head's outputs, or of an encoder's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Found(NamedTuple):
    """Sums over a micro-batch: the loss, its gradient with respect to the outputs, and the metric."""

    loss: float
    gradient: torch.Tensor
    metric: float


class Scored(NamedTuple):
    """The same of a decoder, with figures by their names."""

    loss: float
    gradient: torch.Tensor
    figures: Mapping[str, float]
