"""The exact gradient of an encoder's adapter and head, one block at a time, and the loss of held-out rows.

As `backprop` for a decoder: the input of every block on the gradient's path is stored, the upper blocks keep their
activations, the others run again in backward. Behind the last block stand pooling, the head and the objective, whose
arrays have a row for each text or token and a column for each class: autograd has no part in either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType

import numpy as np
import torch

from edgetune.adapters.attach import set_dropout
from edgetune.adapters.head import BIAS, WEIGHT
from edgetune.data.labeled import LabeledRow
from edgetune.models.encoder import Encoder
from edgetune.objectives import ENCODER_OBJECTIVES
from edgetune.objectives.outputs import Found
from edgetune.planner.plans import Plan
from edgetune.training.batches import Batches
from edgetune.training.encoder_blocks import Activations, EncoderPass
from edgetune.training.forward import Batch, Check
from edgetune.training.optimizer import Optimizer, OptimizerRule, clip_gradients


class RowBatches(Batches):
    """As `Batches`, of rows whose texts lie one after the other."""

    def of_step(self, step: int) -> tuple[list[Batch], int]:
        first = step * self.windows_per_step
        chosen = [self._window(first + index) for index in range(self.windows_per_step)]
        batches = [stack(chosen[at : at + self.batch_size]) for at in range(0, len(chosen), self.batch_size)]
        return batches, sum(map(len, chosen))


def stack(rows: Sequence[LabeledRow]) -> Batch:
    """A micro-batch: "input_ids" and "labels" of all rows, "lengths" of their texts, and how many "texts" each has."""
    return {
        "input_ids": np.concatenate([row.input_ids for row in rows]).astype(np.int64),
        "labels": np.concatenate([row.labels for row in rows]),
        "lengths": np.concatenate([row.lengths for row in rows]).astype(np.int64),
        "texts": np.array([len(row.lengths) for row in rows], np.int64),
    }


def held_out_batches(rows: Sequence[LabeledRow], batch_size: int, most_positions: int) -> Iterator[Batch]:
    """The rows in order, `batch_size` at a time, or fewer where they would have more tokens than that."""
    chosen: list[LabeledRow] = []
    for row in rows:
        if chosen and (len(chosen) == batch_size or sum(map(len, chosen)) + len(row) > most_positions):
            yield stack(chosen)
            chosen = []
        chosen.append(row)
    if chosen:
        yield stack(chosen)


class Task:
    """What stands behind the blocks: pooling, head, objective."""

    def __init__(self, encoder: Encoder, objective: str, head: Mapping[str, torch.nn.Parameter]) -> None:
        self.objective: ModuleType = ENCODER_OBJECTIVES[objective]
        self.head, self.mode, self.workspace = head, encoder.config.pooling.mode, encoder.workspace

    def found(self, hidden: torch.Tensor, batch: Batch, scale: float | None = None) -> Found:
        """Sums over the micro-batch of last hidden states [N, hidden].

        With `scale` they become their gradient, so many times that of the loss, and the head's gradients are added to.
        """
        pooled = self._seen(hidden, batch)
        made: Found = self.objective.found(self._outputs(pooled), batch)
        if scale is not None:
            d = made.gradient.mul_(scale)
            if self.head:
                for name, grad in ((WEIGHT, d.T @ pooled), (BIAS, d.sum(0))):
                    parameter = self.head[name]
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
                d = d @ self.head[WEIGHT]
            if self.objective.POOLED:
                self._unpool(d, batch["lengths"], hidden)
            else:
                hidden.copy_(d)
        return made

    def outputs(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What the objective starts from: logits, values or pooled states, of last hidden states [N, hidden]."""
        return self._outputs(self._seen(hidden, batch))

    def _seen(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.pool(hidden, batch["lengths"]) if self.objective.POOLED else hidden

    def _outputs(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.head[BIAS], seen, self.head[WEIGHT].T) if self.head else seen

    def pool(self, hidden: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
        """The mean of each text's rows, or its first: [texts, hidden]."""
        starts = np.cumsum(lengths) - lengths
        if self.mode == "cls":
            return hidden[torch.from_numpy(starts)]
        pooled = torch.empty(len(lengths), hidden.shape[1])
        for index, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            torch.mean(hidden[start : start + length], 0, out=pooled[index])
        return pooled

    def _unpool(self, d_pooled: torch.Tensor, lengths: np.ndarray, d: torch.Tensor) -> None:
        """Backward of `pool` into d [N, hidden]."""
        starts = np.cumsum(lengths) - lengths
        if self.mode == "cls":
            d.zero_().index_copy_(0, torch.from_numpy(starts), d_pooled)
            return
        for index, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
            d[start : start + length] = d_pooled[index] / length


class Rule(OptimizerRule):
    """See `StepRule`: the exact gradient, clipped, and the plan's optimizer."""

    def __init__(self, encoder: Encoder, task: Task, parameters: Mapping[str, torch.nn.Parameter], plan: Plan) -> None:
        self.encoder, self.task, self.parameters = encoder, task, parameters
        self.max_grad_norm, self.first_block = plan.max_grad_norm, plan.adapter.first_block
        self.recompute_layers = plan.recompute_layers
        self.figures: Mapping[str, float] = {}
        self.optimizer = Optimizer(
            plan.optimizer, parameters, weight_decay=plan.weight_decay, lr_ratio=plan.adapter.lr_ratio
        )  # fmt: skip

    def gradient(self, batches: Sequence[Batch], key: tuple[int, int], check: Check) -> tuple[float, float]:
        """Leaves the clipped gradients in `.grad`."""
        loss = self.loss_and_gradients(batches, key, check)
        return loss, clip_gradients(self.parameters.values(), self.max_grad_norm)

    @torch.no_grad()
    def loss_and_gradients(self, batches: Sequence[Batch], key: tuple[int, ...], check: Check) -> float:
        """Adds the gradients of a step to `.grad`; returns its mean loss.

        The loss is the sum over all micro-batches divided by all that it counts.
        """
        total, loss, metric = max(1, sum(map(self.task.objective.count, batches))), 0.0, 0.0
        for index, batch in enumerate(batches):
            set_dropout(self.encoder, (*key, index))
            made = self._micro_batch(batch, 1 / total, check)
            loss += made.loss
            metric += made.metric
        self.figures = {self.task.objective.METRIC: metric / total}
        return float(loss / total)

    def _micro_batch(self, batch: Batch, scale: float, check: Check) -> Found:
        walk = EncoderPass(self.encoder, batch["lengths"].tolist())
        x, like = below(self.encoder, walk, batch, self.first_block, check), self.encoder.workspace.like
        blocks, again = self.encoder.blocks[self.first_block :], self.recompute_layers
        kept: list[Activations | None] = []
        for index, block in enumerate(blocks):
            keep = index >= again or index == len(blocks) - 1  # nothing overwrites those of the last one
            y = like(x, f"input.{index + 1}")
            made = walk.forward(block, x, y, f"slot.{max(0, index - again + (again > 0))}")
            kept.append(made if keep else None)
            x = y
            check()
        d = like(x, "d").copy_(x)
        found = self.task.found(d, batch, scale)
        check()
        for index in reversed(range(len(blocks))):
            x = like(x, f"input.{index}")
            made = kept[index] or walk.forward(blocks[index], x, None, "slot.0")
            walk.backward(blocks[index], x, made, d, to_input=index > 0)
            check()
        return found

    @property
    def kept_layers(self) -> int:
        """Of the gradient's path."""
        return max(0, len(self.encoder.blocks) - self.first_block - self.recompute_layers)

    def keep_layers(self, count: int) -> None:
        """Which changes no bit."""
        self.recompute_layers += self.kept_layers - count


def below(encoder: Encoder, walk: EncoderPass, batch: Batch, first_block: int, check: Check) -> torch.Tensor:
    """What block `first_block` gets, [N, hidden] in "input.0": by turns in two buffers, nothing kept."""
    workspace = encoder.workspace
    x = workspace.take(walk.positions, encoder.config.hidden_size, "input.0")
    walk.embed(encoder.embeddings, torch.from_numpy(batch["input_ids"]), x)
    for block in encoder.blocks[:first_block]:
        y = workspace.like(x, "d")
        walk.forward(block, x, y, "slot.0")
        x.copy_(y)
        check()
    return x


@torch.no_grad()
def last_hidden(encoder: Encoder, batch: Batch, check: Check) -> torch.Tensor:
    """What the last block gives, [N, hidden], in "input.0"."""
    walk = EncoderPass(encoder, batch["lengths"].tolist())
    return below(encoder, walk, batch, len(encoder.blocks), check)


@torch.no_grad()
def evaluate(encoder: Encoder, task: Task, batches: Iterable[Batch], check: Check) -> tuple[float, float]:
    """Mean loss and metric of held-out rows; NaN where there are none."""
    set_dropout(encoder, None)
    total, loss, metric = 0, 0.0, 0.0
    for batch in batches:
        made = task.found(last_hidden(encoder, batch, check), batch)
        total += task.objective.count(batch)
        loss += made.loss
        metric += made.metric
    return (loss / total, metric / total) if total else (float("nan"), float("nan"))
