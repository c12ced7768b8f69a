"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101), two moments.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g²
    p = (1 - lr wd) p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

The operations are torch.optim.AdamW's, one by one, so the results are its bits. It is not used itself: its step imports
torch._dynamo (and with it sympy: more memory than a small model's whole training).
"""

from __future__ import annotations

from typing import Any

NAME = "adamw"
LEARNING_RATE = 2e-4
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
BETAS = (0.9, 0.999)
EPSILON = 1e-8


def update(
    parameter: Any, gradient: Any, exp_avg: Any, exp_avg_sq: Any, *, learning_rate: float, weight_decay: float,
    updates: int,
) -> None:  # fmt: skip
    """See `edgetune.optimizers`."""
    beta1, beta2 = BETAS
    correction = (1 - beta2**updates) ** 0.5
    parameter.mul_(1 - learning_rate * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = gradient.copy_(exp_avg_sq).sqrt_().div_(correction).add_(EPSILON)
    parameter.addcdiv_(exp_avg, denominator, value=-learning_rate / (1 - beta1**updates))
