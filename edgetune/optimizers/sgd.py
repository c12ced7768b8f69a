"""Stochastic gradient descent without momentum: nothing is kept.

    p = p - lr (g + wd p)

The operations are torch.optim.SGD's. A step is the rate times a gradient that clipping holds to a norm of
`max_grad_norm` over all parameters; Adam's is the rate times the root of their number, hence a rate far above its own.
Measured on two small models: 0.03 learned what AdamW learns at 2e-4, rates up to 1 more, and 3 diverged on one.
"""

from __future__ import annotations

from typing import Any

NAME = "sgd"
LEARNING_RATE = 0.1
MOMENTS: dict[str, bool] = {}


def update(parameter: Any, gradient: Any, *, learning_rate: float, weight_decay: float, updates: int) -> None:
    """See `edgetune.optimizers`."""
    parameter.add_(gradient.add_(parameter, alpha=weight_decay), alpha=-learning_rate)
