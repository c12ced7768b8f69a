"""The exact gradient, one block at a time.

    forward    embed, then the blocks below the lowest adapter: nothing is stored
               every block from there on: its input is stored; the upper blocks keep what their backward needs too
    loss       in tiles, down to the gradient of the last hidden states (objectives.sft)
    backward   from the top: a block that kept nothing runs again from its stored input, then backward through it

Driving the blocks by hand, instead of one graph with `torch.utils.checkpoint` inside, frees each block's activations
and input as soon as its gradient is known, asks for no gradient below the lowest adapter, and gives `check` a place
between any two blocks where a run can stop. How many blocks run again is the plan's choice; the gradients do not depend
on it, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgetune.adapters.attach import set_dropout
from edgetune.models.decoder import Context, Decoder
from edgetune.objectives import sft
from edgetune.training.forward import Batch, Check, num_supervised, start, targets

NAME = "backprop"


@dataclass(frozen=True)
class Path:
    """How the blocks are walked: the lowest with an adapter, how many from there on run again, rows per loss tile."""

    first_block: int
    recompute_layers: int
    loss_tile_rows: int


@dataclass
class _Visit:
    """A block on the adapted path: its input, and its output where that still holds the graph."""

    block: nn.Module
    x: torch.Tensor
    y: torch.Tensor | None


def loss_and_gradients(
    decoder: Decoder, batches: Sequence[Batch], path: Path, *, dropout_key: tuple[int, ...], check: Check
) -> float:
    """Add the gradients of one optimizer step to `.grad` of the adapter's parameters; returns the step's mean loss.

    The loss is the sum over all micro-batches divided by all their supervised tokens, so how a batch is cut into
    micro-batches changes neither. `dropout_key` and the micro-batch's index choose the dropout masks.
    """
    supervised = max(1, sum(map(num_supervised, batches)))
    loss_sum = 0.0
    for index, batch in enumerate(batches):
        set_dropout(decoder, (*dropout_key, index))
        loss_sum += _micro_batch(decoder, batch, 1 / supervised, path, check)
    return loss_sum / supervised


def _micro_batch(decoder: Decoder, batch: Batch, scale: float, path: Path, check: Check) -> float:
    with torch.no_grad():
        x, context = start(decoder, batch)
        for block in decoder.layers[: path.first_block]:
            x = block(x, context)
            check()
    visits = []
    for index, block in enumerate(decoder.layers[path.first_block :]):
        x = x.detach().requires_grad_(index > 0)  # below the lowest adapter nobody asks for a gradient
        keep = index >= path.recompute_layers
        with torch.set_grad_enabled(keep):
            y = block(x, context)
        visits.append(_Visit(block, x, y if keep else None))
        x = y.detach()
        del y
        check()
    loss_sum, gradient = _head(decoder, x, targets(batch), scale, path.loss_tile_rows)
    del x
    check()
    while visits:
        assert gradient is not None, "only the lowest block asks for no gradient of its input"
        gradient = _backward(visits.pop(), context, gradient)
        check()
    return loss_sum


def _head(
    decoder: Decoder, x: torch.Tensor, labels: torch.Tensor, scale: float, tile_rows: int
) -> tuple[float, torch.Tensor | None]:
    """The loss sum of the last block's output x [B, T, H], and `scale` times its gradient with respect to x."""
    x.requires_grad_()
    with torch.enable_grad():
        hidden = decoder.norm(x)
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    loss_sum, gradient = sft.loss_and_gradient(flat, labels, decoder.lm_head, tile_rows=tile_rows)
    _run_backward(hidden, gradient.mul_(scale).view_as(hidden))
    return loss_sum, x.grad


def _backward(visit: _Visit, context: Context, gradient: torch.Tensor) -> torch.Tensor | None:
    """Gradient of the block's output in, gradient of its input out (None where the input asks for none)."""
    y = visit.y
    if y is None:
        with torch.enable_grad():
            y = visit.block(visit.x, context)
    visit.y = None
    _run_backward(y, gradient)
    return visit.x.grad


class _Seed(torch.autograd.Function):
    """A scalar whose gradient with respect to y is given."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient, None


def _run_backward(y: torch.Tensor, gradient: torch.Tensor) -> None:
    """`y.backward(gradient)`, which would import sympy to compare the two shapes: 33 MiB of the floor."""
    _Seed.apply(y, gradient).backward()  # type: ignore[no-untyped-call]
