"""Distillation from recorded teacher outputs (arXiv 1503.02531): the teacher's top k of each position, and the rest.

    u_b = log p_b of the k recorded tokens, and of all other tokens together as one more bucket
    q^T, p^T = softmax(u / T) of teacher and student, over these k + 1 buckets
    L = (1 - w) nll + w T^2 KL(q^T || p^T)

T is `temperature`, w is `distill_weight`. With T = 1 this is the divergence of the two distributions but for what it
says inside the rest. With another T the rest still counts as one symbol: its members were not recorded, so no
temperature can spread them. T^2 keeps the gradient's size, as in the paper. From g_b = T (p^T_b - q^T_b), which sum
to 0,

    dL/dz_v = (1 - w) (p_v - [v = target]) + w g_v               of a recorded token v
                                           + w g_rest p_v / p_rest     of any other

so the gradient of a hidden state is that of the cross-entropy, whose sum over the vocabulary is weighed anew, and k
rows of the head: one pass over the head, as for `sft`, and k rows of it looked up for each position.

What a teacher gives is recorded beside the rows: see `data.teacher`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from edgetune.objectives import sft
from edgetune.objectives.sft import Measured

if TYPE_CHECKING:
    import torch

NAME = "distill"
KINDS = ("prompt", "chat", "instruction")
SETTINGS = {"temperature": 1.0, "distill_weight": 0.5}
PIECE = 16  # positions whose rows of the head are looked up at once
# The rest has at least this probability: what float32 leaves of a sum that is nearly 1 says no more.
LEAST_REST = 1e-6


class Head(sft.Head, Protocol):
    """What this loss needs of it beside what `sft` does."""

    def lookup(self, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class Objective:
    """See the module; a unit is a token."""

    temperature: float
    distill_weight: float
    needs_reference: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True

    def units(self, batch: Mapping[str, Any]) -> int:
        return int(np.count_nonzero(batch["labels"] != sft.IGNORE_INDEX))

    def loss(self, hidden: torch.Tensor, batch: Mapping[str, Any], head: Head, buffers: sft.Buffers) -> Measured:
        part = _Part(self, batch, head, buffers)
        sft.token_losses(hidden, sft.targets(batch), head, buffers, part)
        return part.measured

    def loss_and_gradient(
        self, hidden: torch.Tensor, batch: Mapping[str, Any], head: Head, buffers: sft.Buffers, row_step: int = 1
    ) -> Measured:
        part = _Part(self, batch, head, buffers)
        sft.loss_and_gradient(hidden, sft.targets(batch), head, buffers, row_step, part)
        return part.measured

    def buckets(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of log-probabilities [n, k] of both: the divergence [n]; and of T^2 times it what the k rows of the head are
        multiplied by [n, k], and the mean row [n].
        """
        import torch

        of_student, of_teacher = (
            torch.cat([logps, (1 - logps.exp().sum(1, keepdim=True)).clamp(min=LEAST_REST).log()], dim=1)
            for logps in (student, teacher)
        )
        ours, theirs = (torch.log_softmax(logps / self.temperature, 1) for logps in (of_student, of_teacher))
        slopes = self.temperature * (ours.exp() - theirs.exp())
        others = slopes[:, -1] / of_student[:, -1].exp()
        return (theirs.exp() * (theirs - ours)).sum(1), slopes[:, :-1] - others[:, None] * student.exp(), others


class _Part:
    """The teacher's part of one micro-batch: a `sft.Finish`."""

    def __init__(self, objective: Objective, batch: Mapping[str, Any], head: Head, buffers: sft.Buffers) -> None:
        self.objective, self.batch, self.head, self.buffers = objective, batch, head, buffers
        self.measured = Measured(0.0)

    def __call__(
        self, rows: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, found: torch.Tensor | None
    ) -> None:
        import torch

        weight, divergence = self.objective.distill_weight, 0.0
        ids, logps = (torch.from_numpy(self.batch[f"teacher_{name}"]) for name in ("ids", "logps"))
        width, columns = rows.shape[1], ids.shape[1] + 1
        for start in range(0, len(rows), PIECE):
            at = slice(start, min(start + PIECE, len(rows)))
            size = at.stop - at.start
            # The target's row comes first: its logit and its loss give the sum over the vocabulary.
            wanted = torch.cat([targets[at, None], ids[at]], dim=1)
            space = self.buffers.take(size * columns, width, "picked").view(size, columns, width)
            picked = self.head.lookup(wanted, space)
            logits = torch.bmm(picked, rows[at, :, None])[:, :, 0].double()
            student = logits[:, 1:] - logits[:, :1] - losses[at, None].double()
            values, slopes, others = self.objective.buckets(student, logps[at].double())
            divergence += float(values.sum())
            if found is not None:
                shares = torch.cat([torch.full((size, 1), weight - 1), weight * slopes], dim=1).float()
                mine = found[at].mul_((1 - weight + weight * others).float()[:, None])
                mine.add_(torch.bmm(shares[:, None], picked)[:, 0])
        cross_entropy = float(losses.sum(dtype=torch.float64))
        loss = (1 - weight) * cross_entropy + weight * self.objective.temperature**2 * divergence
        self.measured = Measured(loss, {"cross_entropy": cross_entropy, "teacher_kl": divergence})
