"""Places of a decoder where an adapter method puts something that is no linear's: hidden states, keys and values.

    attention_output, mlp_output    on what attention and MLP add to the stream         StateAdapter
    mlp_parallel                    beside the MLP, of what that takes                  StateAdapter
    block_output                    on the stream after a block, at some positions      StateAdapter
    side                            a rung of the network beside the blocks             StateAdapter
    side_output                     from that to what the head gets                     StateAdapter
    self_attn.prefix                keys and values at the virtual tokens' positions    Prefix
    prompt                          input embeddings at these positions                 VirtualTokens
    score                           in the place of the head over the vocabulary        Score

Each is an attribute of `Block`, of its attention or of `Decoder`, None where there is nothing; `adapters.attach` fills
it, and `training.torch_trainer` the last one. Virtual tokens are the first positions of every row, so attention, rotary
embedding and packing know them as any other; what would be computed there is overwritten. The positions of
`block_output` are the first and the last ones of every row's prompt (`prompt_positions`). A rung is called with
x = y = what the rung below gave and the `pooled` output of its block, and gives a state of its own (`adapters.lst`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


class StateAdapter(nn.Module):
    """Computes y + f(x) of hidden states; a serial one is called with x = y."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """X and y [..., hidden] -> [..., hidden]."""
        raise NotImplementedError

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The same into y [N, hidden] itself."""
        raise NotImplementedError

    def add_gradients(self, x: torch.Tensor, d_y: torch.Tensor, d_x: torch.Tensor) -> None:
        """Backward of f for d_y [N, hidden]: adds to d_x [N, hidden] and to `.grad` of the tensors."""
        raise NotImplementedError


def pooled(h: torch.Tensor, group: int) -> torch.Tensor:
    """The means of `group` neighbours of h [..., hidden], as long as these are on average: [..., hidden / group]."""
    grouped = h.reshape(*h.shape[:-1], h.shape[-1] // group, group)
    return grouped.mean(-1).mul_(math.sqrt(group))


def prompt_positions(counts: tuple[int, int], position_ids: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
    """Which positions are among so many first and last ones of a prompt, bool [B, T], each at most once.

    `position_ids` [B or 1, T] count from zero in every row, whose prompt has `prompt_lengths` [B, T or 1] tokens.
    """
    first, last = counts
    return (position_ids < prompt_lengths) & ((position_ids < first) | (position_ids >= prompt_lengths - last))


@dataclass(frozen=True)
class Score:
    """A trained head: its weight [outputs, hidden], and what its gradient is multiplied by."""

    weight: nn.Parameter
    scale: float = 1.0


class VirtualTokens(nn.Module):
    """Trained vectors for the virtual tokens: some columns of `weight` [virtual tokens, n]."""

    def __init__(self, weight: nn.Parameter, columns: slice) -> None:
        super().__init__()
        self.weight, self.columns = weight, columns

    @property
    def values(self) -> torch.Tensor:
        """[virtual tokens, width]."""
        return self.weight[:, self.columns]

    def add_gradients(self, tokens: torch.Tensor, d: torch.Tensor) -> None:
        """Adds d [M, width], the gradients at virtual tokens of these numbers, to `.grad`."""
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad[:, self.columns].index_add_(0, tokens, d)

    def forward(self, x: torch.Tensor, virtual: torch.Tensor) -> torch.Tensor:
        """X [B, T, width] with the vectors where `virtual` [B or 1, T] names a token."""
        return torch.where(virtual[..., None] >= 0, self.values[virtual.clamp(min=0)], x)


class Prefix(nn.Module):
    """Keys and values of one layer for the virtual tokens; keys are as the rotary embedding leaves them."""

    def __init__(self, key: VirtualTokens, value: VirtualTokens) -> None:
        super().__init__()
        self.key, self.value = key, value

    def forward(self, k: torch.Tensor, v: torch.Tensor, virtual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and v [B, kv_heads, T, head_dim] with theirs at the virtual tokens."""

        def put(place: VirtualTokens, x: torch.Tensor) -> torch.Tensor:
            rows = x.transpose(1, 2)
            filled: torch.Tensor = place(rows.flatten(2), virtual)
            return filled.view(rows.shape).transpose(1, 2)

        return put(self.key, k), put(self.value, v)
