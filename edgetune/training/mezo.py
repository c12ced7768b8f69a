"""MeZO (arXiv 2305.17333): SGD whose gradient is two losses and a seed. Inference memory, and slow learning.

    z ~ N(0, 1) for every parameter        g = (L(theta + eps z) - L(theta - eps z)) / 2 eps
    theta <- (1 - rate * weight_decay) theta - rate * g z

SPSA with one direction per step: the expectation of g z is the gradient, its variance grows with the number of
parameters, so a step learns little and the rate has to be small. z is a function of (seed, step) and is drawn again for
each of its three uses, in the parameters' own memory. Adding and taking away eps z would leave rounding behind, so
theta is kept in one copy of the adapter: a step that is left gives it back to the bit.

Everything else is what evaluation needs: two buffers of block inputs, one block's activations, no gradients, no
optimizer state. Both losses see the same dropout masks. |g| is clipped to `max_grad_norm`: its mean square is the
square of the gradient's norm. The loss of a step is the mean of the two.

The plan's default rate is 1 / sqrt(d) for d parameters: z is sqrt(d) long, so a step moves the adapter by |g|, which is
clipped. Measured on the packaged sample, one window of 256 tokens a step, cosine schedule, held-out loss from 7.592:

    d = 128,000 (r = 8, all linears), 300 steps    7.58 at 1e-3, 7.52 at 3e-3, 7.29 at 5.6e-3, 6.64 at 1e-2
                                      900 steps    7.23 at 2.8e-3, the default; 3e-2 diverges within 60
    d = 1,280 (r = 2, q and v of one block), 300   7.14 at 2.8e-2, the default; 6.39 at 5.6e-2
    AdamW on gradients at 2e-4, d = 128,000, 300   4.33

So the default errs to the safe side. The authors' code trains LoRA on OPT-13B at 5e-5.

Left out: several directions per step and momentum (the paper found them to pay little).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from edgetune.adapters.attach import set_dropout
from edgetune.models.decoder import Decoder
from edgetune.objectives import objective_of
from edgetune.planner.plans import Plan
from edgetune.training.forward import Batch, Check, Features, Tally, measure

NAME = "mezo"
EPSILON = 1e-3  # the paper's for whole models; its code takes 1e-2 for LoRA


class Rule:
    """See `StepRule`."""

    def __init__(
        self, decoder: Decoder, parameters: Mapping[str, torch.nn.Parameter], plan: Plan, features: Features | None
    ) -> None:
        self.decoder, self.features = decoder, features
        self.objective, self.figures = objective_of(plan), dict[str, float]()
        self.first_block = plan.adapter.first_block
        self.max_grad_norm, self.weight_decay = plan.max_grad_norm, plan.weight_decay
        self.pairs = [(value.detach(), value.detach().clone()) for value in parameters.values()]  # in use, and theta
        self.ratios = [plan.adapter.lr_ratio(name.rpartition(".")[2]) for name in parameters]
        self.generator = torch.Generator()
        self.seed, self.projected = 0, 0.0  # of the step under way

    def gradient(self, batches: Sequence[Batch], key: tuple[int, int], check: Check) -> tuple[float, float]:
        """The mean of the two losses, and |g|; figures are those of the second one."""
        # The spawn key keeps these numbers apart from the dropout masks, which count from the same (seed, step).
        self.seed = int(np.random.SeedSequence(key, spawn_key=(0,)).generate_state(1, np.uint64)[0] >> 1)
        for used, theta in self.pairs:
            theta.copy_(used)
        try:
            self._move(EPSILON)
            above = self._loss(batches, key, check)
            self._move(-EPSILON)
            below = self._loss(batches, key, check)
        finally:
            for used, theta in self.pairs:
                used.copy_(theta)
        projected = (above - below) / (2 * EPSILON)
        self.projected = min(max(projected, -self.max_grad_norm), self.max_grad_norm)
        return (above + below) / 2, abs(projected)

    @property
    def kept_layers(self) -> int:
        """None."""
        return 0

    def keep_layers(self, count: int) -> None:
        """Nothing can be had back."""

    def update(self, learning_rate: float) -> None:
        """SGD along z, with decoupled weight decay."""
        for (_, theta), ratio in zip(self.pairs, self.ratios, strict=True):
            theta.mul_(1 - learning_rate * ratio * self.weight_decay)
        self._move(-learning_rate * self.projected, self.ratios)

    def drop(self) -> None:
        """Nothing is left of a step."""

    def tensors(self) -> dict[str, np.ndarray]:
        """Nothing is kept."""
        return {}

    def load(self, tensors: Mapping[str, np.ndarray], updates: int) -> None:
        """Nothing was kept."""

    def _move(self, distance: float, ratios: Sequence[float] | None = None) -> None:
        """Set the parameters to theta + distance * z, each by its ratio."""
        self.generator.manual_seed(self.seed)
        for (used, theta), ratio in zip(self.pairs, ratios or [1.0] * len(self.pairs), strict=True):
            torch.add(theta, used.normal_(generator=self.generator), alpha=distance * ratio, out=used)

    def _loss(self, batches: Sequence[Batch], key: tuple[int, int], check: Check) -> float:
        """Mean loss of the objective's units, with the dropout of training."""
        tally = Tally()
        for index, batch in enumerate(batches):
            set_dropout(self.decoder, (*key, index))
            measured = measure(self.decoder, batch, self.objective, check, self.first_block, self.features)
            tally.add(measured, self.objective.units(batch))
        self.figures = tally.figures
        return tally.loss if tally.num_units else 0.0
