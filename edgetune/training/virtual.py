"""Virtual tokens in a pass by hand: trained values in the place of what stands at their positions, and back.

They are the first positions of every row of a window (`data.Window`). What is computed there before is overwritten, and
no gradient goes past them: that is moved into the gradient of the values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from edgetune.linear import Workspace
from edgetune.models.places import VirtualTokens


class Virtual(NamedTuple):
    """Where virtual tokens stand in a pass."""

    rows: torch.Tensor
    tokens: torch.Tensor


def virtual_rows(virtual: torch.Tensor | None) -> Virtual:
    """The rows of a pass at which virtual tokens stand, and which, int64 [M] each, from `Context.virtual` [B, T]."""
    tokens = torch.empty(0, dtype=torch.int64) if virtual is None else virtual.reshape(-1)
    rows = (tokens >= 0).nonzero()[:, 0]
    return Virtual(rows, tokens[rows])


def put_virtual(place: VirtualTokens, x: torch.Tensor, virtual: Virtual, workspace: Workspace) -> None:
    """Overwrites the rows of x [N, width] at virtual tokens."""
    values = workspace.take(len(virtual.rows), x.shape[1], "inner")
    x.index_copy_(0, virtual.rows, torch.index_select(place.values, 0, virtual.tokens, out=values))


def take_virtual(place: VirtualTokens, d: torch.Tensor, virtual: Virtual, workspace: Workspace) -> None:
    """Backward of `put_virtual`: moves the gradient d [N, width] at virtual tokens into that of the place."""
    gradients = workspace.take(len(virtual.rows), d.shape[1], "inner")
    place.add_gradients(virtual.tokens, torch.index_select(d, 0, virtual.rows, out=gradients))
    d.index_fill_(0, virtual.rows, 0)
