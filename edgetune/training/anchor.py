"""The micro-batch beside those of each step that holds the adapted model to its base: see `objectives.kl`.

    forward without the adapter, no gradients: what the head gets at the rows' positions is kept, [M, H]
    forward with it, the divergence of the two, backward: as any micro-batch

Which texts a step sees is a function of (seed, step), as for its other windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgetune.adapters.attach import detached
from edgetune.data import Window
from edgetune.models.decoder import Decoder
from edgetune.objectives import kl, sft
from edgetune.planner.job import filled
from edgetune.planner.plans import Plan
from edgetune.training.batches import ANCHOR_STREAM, Cycle, in_batches
from edgetune.training.forward import Batch, Check, Features, last_hidden


class Anchor:
    """The texts of a run, `plan.batch_size` windows of them in each step, and what their divergence weighs."""

    def __init__(
        self, decoder: Decoder, windows: Sequence[Window], plan: Plan, features: Features | None = None
    ) -> None:
        assert plan.kl_weight is not None
        self.decoder, self.features, self.weight = decoder, features, plan.kl_weight
        self.cycle, self.batch_size = Cycle(windows, plan.seed ^ ANCHOR_STREAM), plan.batch_size
        self.first_block, self.threads = plan.adapter.first_block, plan.threads

    def of_step(self, step: int) -> Batch:
        """The micro-batch of a step counted from zero."""
        first = step * self.batch_size
        return next(in_batches([self.cycle[first + i] for i in range(self.batch_size)], self.batch_size))

    @torch.no_grad()
    def objective(self, batch: Batch, check: Check) -> kl.Objective:
        """The divergence from what the base makes of a micro-batch, which lies in "kl.base" from here on."""
        space = self.decoder.workspace
        with detached(self.decoder):
            hidden = last_hidden(self.decoder, batch, check, self.first_block, self.features)
        kept = sft.supervised(sft.targets(batch))
        base = space.take(filled(len(kept), self.threads), hidden.shape[1], "kl.base")
        torch.index_select(hidden, 0, kept, out=base[: len(kept)])
        base[len(kept) :].zero_()
        return kl.Objective(base)
