"""The learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Callable


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _constant(_: float) -> float:
    return 1.0


# From the share of the steps after the warm-up that lie behind, 0..1, to a factor of the learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear, "constant": _constant}


def learning_rate(step: int, *, peak: float, warmup_steps: int, max_steps: int, schedule: str) -> float:
    """The rate of step 0..max_steps-1. It rises to `peak` over the warm-up; neither the first nor the last is zero."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * SCHEDULES[schedule]((step - warmup_steps) / max(1, max_steps - warmup_steps))
