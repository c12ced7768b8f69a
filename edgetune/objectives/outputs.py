"""What an objective of an encoder makes of its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Found(NamedTuple):
    """Sums over a micro-batch: the loss, its gradient with respect to the outputs, and the metric."""

    loss: float
    gradient: torch.Tensor
    metric: float
