"""Where an optimizer's moments lie: those of all tensors end to end, in float32 or in 8 bits.

`read` gives the float32 values of a tile, to be updated in place; `write` keeps what became of them. After the
beginning nothing is allocated but a float per block of the tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from edgetune.optimizers.blockwise import BLOCK, num_blocks, tables

_TINY = 1e-38  # what a block of zeros is divided by


class Float32Moment:
    """One float32 per parameter."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.starts = [0, *accumulate(sizes)]
        self.values = torch.zeros(self.starts[-1])

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is kept from step to step, by the suffix of its name."""
        return {"": self.values}

    def read(self, index: int, tile: slice) -> torch.Tensor:
        """The values of a tile of the tensor with that index."""
        start = self.starts[index]
        return self.values[start + tile.start : start + tile.stop]

    def write(self, index: int, tile: slice) -> None:
        """Nothing to do: `read` gave the values themselves."""


class BlockwiseMoment:
    """A byte per parameter and a float32 per block, as `optimizers.blockwise` says.

    `codes` [blocks, BLOCK] int32 and `edges`, float32 of that shape, are scratch for a tile.
    """

    def __init__(self, sizes: Sequence[int], signed: bool, codes: torch.Tensor, edges: torch.Tensor) -> None:
        self.starts = [0, *accumulate(map(num_blocks, sizes))]
        self.stored = torch.zeros(self.starts[-1], BLOCK, dtype=torch.uint8)
        self.absmax = torch.zeros(self.starts[-1])
        self.map, self.bounds, self.first_codes = map(torch.from_numpy, tables(signed=signed))
        self.codes, self.edges, self.values = codes, edges, torch.empty(codes.shape)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is kept from step to step, by the suffix of its name."""
        return {"": self.stored, ".absmax": self.absmax}

    def read(self, index: int, tile: slice) -> torch.Tensor:
        """The values of a tile, which begins with a block, of the tensor with that index."""
        blocks, codes, values = self._blocks(index, tile)
        codes.copy_(self.stored[blocks])
        torch.index_select(self.map, 0, codes.view(-1), out=values.view(-1))
        values.mul_(self.absmax[blocks, None])
        return values.view(-1)[: tile.stop - tile.start]

    def write(self, index: int, tile: slice) -> None:
        """Quantize what the values of the last `read`, of the same tile, have become."""
        blocks, codes, values = self._blocks(index, tile)
        stored, edges = self.stored[blocks], self.edges[: len(values)]
        absmax = torch.amax(torch.abs(values, out=edges), dim=1, out=self.absmax[blocks])
        values.mul_(absmax.clamp(min=_TINY).reciprocal_()[:, None])
        torch.bitwise_right_shift(values.view(torch.int32), 16, out=codes).bitwise_and_(0xFFFF)
        torch.index_select(self.first_codes, 0, codes.view(-1), out=stored.view(-1))
        torch.index_select(self.bounds, 0, codes.copy_(stored).view(-1), out=edges.view(-1))
        stored.copy_(torch.gt(values, edges, out=codes).add_(stored))

    def _blocks(self, index: int, tile: slice) -> tuple[slice, torch.Tensor, torch.Tensor]:
        """Which blocks these are, and scratch for their codes and values."""
        start, number = self.starts[index] + tile.start // BLOCK, num_blocks(tile.stop - tile.start)
        return slice(start, start + number), self.codes[:number], self.values[:number]
