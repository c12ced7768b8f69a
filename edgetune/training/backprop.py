"""The exact gradient, one block at a time.

    forward    embed, then the blocks below the lowest adapter, or what a cache knows of them: nothing is stored
               every block from there on: its input is stored; the upper blocks keep what their backward needs too
    loss       in tiles, down to the gradient of the last hidden states (objectives)
    backward   from the top: a block that kept nothing runs again from its stored input, then backward through it

Everything lies in the buffers of `decoder.workspace`, which exist after the first step and are counted by the planner,
name by name. No gradient is asked for below the lowest adapter, and `check` gets a place between any two blocks where
a run can stop. How many blocks run again is the plan's choice; the gradients do not depend on it, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from edgetune.adapters.attach import set_dropout
from edgetune.models.decoder import Decoder
from edgetune.objectives import Objective, objective_of
from edgetune.objectives.sft import Measured
from edgetune.planner.job import row_step
from edgetune.planner.plans import Plan
from edgetune.training.anchor import Anchor
from edgetune.training.blocks import Activations, normalize, normalize_backward
from edgetune.training.forward import SFT, Batch, Check, Features, Tally, below, head_of, last_states, start
from edgetune.training.optimizer import Optimizer, OptimizerRule, clip_gradients
from edgetune.training.virtual import take_virtual

NAME = "backprop"


@dataclass(frozen=True)
class Path:
    """How the blocks are walked: the lowest with an adapter, how many from there on run again in backward, who knows
    already what lies below, and of which number the rows of the loss are a multiple.
    """

    first_block: int
    recompute_layers: int
    features: Features | None = None
    row_step: int = 1


class Rule(OptimizerRule):
    """See `StepRule`: the exact gradient, clipped, and the plan's optimizer."""

    figures: Mapping[str, float]

    def __init__(
        self, decoder: Decoder, parameters: Mapping[str, torch.nn.Parameter], plan: Plan, features: Features | None
    ) -> None:
        self.decoder, self.parameters, self.max_grad_norm = decoder, parameters, plan.max_grad_norm
        self.objective, self.figures = objective_of(plan), dict[str, float]()
        self.path = Path(plan.adapter.first_block, plan.recompute_layers, features, row_step(plan.threads))
        self.anchor: Anchor | None = None
        self.optimizer = Optimizer(
            plan.optimizer, parameters, weight_decay=plan.weight_decay, lr_ratio=plan.adapter.lr_ratio
        )  # fmt: skip

    def gradient(self, batches: Sequence[Batch], key: tuple[int, int], check: Check) -> tuple[float, float]:
        """Leaves the clipped gradients in `.grad`."""
        tally = Tally()
        loss = loss_and_gradients(
            self.decoder, batches, self.path, dropout_key=key, check=check, objective=self.objective, tally=tally
        )
        self.figures = tally.figures
        if self.anchor is not None:
            divergence = anchor_gradients(self.decoder, self.anchor, self.path, (*key, len(batches)), check)
            loss += self.anchor.weight * divergence
            self.figures = {**self.figures, "base_kl": divergence}
        return loss, clip_gradients(self.parameters.values(), self.max_grad_norm)

    @property
    def kept_layers(self) -> int:
        """Of the gradient's path."""
        if self.decoder.side_output is not None:
            return 0
        return max(0, len(self.decoder.layers) - self.path.first_block - self.path.recompute_layers)

    def keep_layers(self, count: int) -> None:
        """Which changes no bit."""
        more = self.kept_layers - count
        self.path = replace(self.path, recompute_layers=self.path.recompute_layers + more)


@torch.no_grad()
def loss_and_gradients(
    decoder: Decoder, batches: Sequence[Batch], path: Path, *, dropout_key: tuple[int, ...], check: Check,
    objective: Objective = SFT, tally: Tally | None = None,
) -> float:  # fmt: skip
    """Add the gradients of one optimizer step to `.grad` of the adapter's parameters; returns the step's mean loss.

    The loss is the sum over all micro-batches divided by all their units (supervised tokens, or pairs), so how a batch
    is cut into micro-batches changes neither. `dropout_key` and the micro-batch's index choose the dropout masks.
    `tally` gets the objective's figures.
    """
    num_units = max(1, sum(map(objective.units, batches)))
    tally = tally or Tally()
    for index, batch in enumerate(batches):
        set_dropout(decoder, (*dropout_key, index))
        measured = _micro_batch(decoder, batch, objective, 1 / num_units, path, check)
        tally.add(measured, objective.units(batch))
    return tally.loss if tally.num_units else 0.0


@torch.no_grad()
def anchor_gradients(decoder: Decoder, anchor: Anchor, path: Path, dropout_key: tuple[int, ...], check: Check) -> float:
    """Add the gradients of a step's divergence from the base, times its weight; returns its mean over tokens.

    `dropout_key` is (seed, step, index of the micro-batch).
    """
    batch = anchor.of_step(dropout_key[1])
    objective = anchor.objective(batch, check)
    num_tokens = objective.units(batch)
    set_dropout(decoder, dropout_key)
    return _micro_batch(decoder, batch, objective, anchor.weight / num_tokens, path, check).loss / num_tokens


def _micro_batch(
    decoder: Decoder, batch: Batch, objective: Objective, scale: float, path: Path, check: Check
) -> Measured:
    if decoder.side_output is not None:
        return _beside(decoder, batch, objective, scale, path, check)
    x = below(decoder, batch, path.first_block, check, path.features)
    walk = start(decoder, batch)
    blocks = decoder.blocks[path.first_block :]
    shared = 1 if path.recompute_layers else 0  # blocks that run again take slot 0 by turns
    offloads = decoder.workspace.offload_to is not None
    kept: list[Activations | None] = []

    def buffer(index: int) -> torch.Tensor:
        """For what block `index` gets: one of its own, or one of two by turns where inputs are kept on disk."""
        return decoder.workspace.like(x, f"input.{index % 2 if offloads else index}")

    for index, block in enumerate(blocks):
        keep = index >= path.recompute_layers or index == len(blocks) - 1  # nothing overwrites those of the last one
        y = buffer(index + 1)
        slot = max(0, index - path.recompute_layers + shared)
        made = walk.forward(block, x, y, f"slot.{slot}")
        kept.append(made if keep else None)
        if offloads:
            decoder.workspace.put(index, x)
        x = y
        check()
    measured, d = _head(decoder, x, batch, objective, scale, path.row_step)
    check()
    for index in reversed(range(len(blocks))):
        x = decoder.workspace.get(index, buffer(index)) if offloads else buffer(index)
        made = kept[index] or walk.forward(blocks[index], x, None, "slot.0")
        walk.backward(blocks[index], x, made, d, to_input=index > 0 or decoder.prompt is not None)
        check()
    if decoder.prompt is not None:
        take_virtual(decoder.prompt, d, walk.virtual, decoder.workspace)
    return measured


def _beside(decoder: Decoder, batch: Batch, objective: Objective, scale: float, path: Path, check: Check) -> Measured:
    """The same where the adapter stands beside the blocks: these run once, and nothing goes back through them."""
    x, side = last_states(decoder, batch, check, path.first_block, path.features)
    assert side is not None
    measured, d = _head(decoder, x, batch, objective, scale, path.row_step)
    side.backward(d)
    return measured


def _head(
    decoder: Decoder, x: torch.Tensor, batch: Batch, objective: Objective, scale: float, row_step: int
) -> tuple[Measured, torch.Tensor]:
    """What the objective makes of the last block's output x [N, H], and `scale` times the gradient by x."""
    hidden = normalize(x, decoder.norm, decoder.workspace.like(x, "h"))
    measured = objective.loss_and_gradient(hidden, batch, head_of(decoder, scale), decoder.workspace, row_step)
    d = decoder.workspace.like(x, "d").zero_()
    normalize_backward(x, decoder.norm, hidden.mul_(scale), d)
    return measured, d
