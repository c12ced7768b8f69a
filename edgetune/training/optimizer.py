"""What turns gradients into updates: one class per optimizer, the clipping of gradients, the learning rate schedules.

torch.optim is not used: its step imports torch._dynamo (and with it sympy: more memory than a small model's whole
training), and it allocates two temporaries per tensor. The arithmetic is torch's own, operation by operation, so the
results are bit-equal; a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101), fp32 moments: two values of state per parameter."""

    BETAS = (0.9, 0.999)
    EPSILON = 1e-8

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], *, weight_decay: float) -> None:
        self.parameters, self.weight_decay = parameters, weight_decay
        self.exp_avg = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its `.grad`, which is used as scratch and dropped."""
        self.updates += 1
        beta1, beta2 = self.BETAS
        step_size = learning_rate / (1 - beta1**self.updates)
        correction = (1 - beta2**self.updates) ** 0.5
        for name, parameter in self.parameters.items():
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None, name
            mean, square = self.exp_avg[name], self.exp_avg_sq[name]
            parameter.mul_(1 - learning_rate * self.weight_decay)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = torch.sqrt(square, out=gradient).div_(correction).add_(self.EPSILON)
            parameter.addcdiv_(mean, denominator, value=-step_size)

    def drop_gradients(self) -> None:
        """Leave this step out."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, np.ndarray]:
        """The moments, by name; views, not copies."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{name}.{kind}": value.numpy() for kind, group in moments.items() for name, value in group.items()}

    def load(self, tensors: Mapping[str, np.ndarray], updates: int) -> None:
        """Take back what `tensors` gave after that many updates."""
        self.updates = updates
        for name, moment in self.tensors().items():
            moment[...] = tensors[name]


OPTIMIZERS = {"adamw": AdamW}


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale all gradients together so that their global norm is at most `max_norm`; returns the norm before.

    The same arithmetic as `torch.nn.utils.clip_grad_norm_`. A norm that is not finite leaves the gradients as they are.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    if norm.isfinite():
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
    return float(norm)


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
