"""Lion: every parameter moves by the learning rate, in the direction of a momentum (Chen et al., arXiv 2302.06675).

    c = b1 m + (1 - b1) g        p = (1 - lr wd) p - lr sign(c)        m = b2 m + (1 - b2) g

One moment. A sign is more than what Adam makes of most gradients, so the paper asks for a rate 3 to 10 times smaller
than AdamW's, and a decay as many times larger. It is 3 here: a LoRA starts at zero, and its runs are short.
"""

from __future__ import annotations

from typing import Any

NAME = "lion"
LEARNING_RATE = 7e-5
MOMENTS = {"exp_avg": True}
BETAS = (0.9, 0.99)


def update(
    parameter: Any, gradient: Any, exp_avg: Any, *, learning_rate: float, weight_decay: float, updates: int
) -> None:
    """See `edgetune.optimizers`."""
    beta1, beta2 = BETAS
    parameter.mul_(1 - learning_rate * weight_decay)
    c = gradient.lerp_(exp_avg, beta1)
    exp_avg.lerp_(c, (1 - beta2) / (1 - beta1))  # m + (1 - b2) (g - m), as c - m = (1 - b1) (g - m): g is gone
    parameter.add_(c.sign_(), alpha=-learning_rate)
