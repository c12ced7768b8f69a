"""The network beside the blocks of one pass (`adapters.lst`): up with the blocks, and back without them.

Of each rung what it took stays, [N, s] for s = hidden / reduction; nothing of the block itself does. The sources of
its formulas, and what is kept, stand in `adapters.lst`.
"""

from __future__ import annotations

import torch

from edgetune.models.decoder import Decoder
from edgetune.models.places import pooled
from edgetune.training.blocks import normalize


class SidePass:
    """One pass over N positions, whose rungs are called in the order of their blocks."""

    def __init__(self, decoder: Decoder, positions: int) -> None:
        assert decoder.side_group is not None
        self.decoder, self.group, self.workspace = decoder, decoder.side_group, decoder.workspace
        self.positions, self.width = positions, decoder.config.hidden_size // decoder.side_group
        self.z = self._take("side.z").zero_()

    def rung(self, index: int, y: torch.Tensor) -> None:
        """What block `index` gave, y [N, hidden], goes up one rung, where there is one."""
        place = self.decoder.blocks[index].side
        if place is None:
            return
        h = normalize(y, self.decoder.norm_above(index), self.workspace.like(y, "h"))
        self.z.add_(pooled(h, self.group))
        place.add(self._take(f"side.{index}").copy_(self.z), self.z)

    def add(self, x: torch.Tensor) -> None:
        """Adds to what the last block gave, x [N, hidden]."""
        assert self.decoder.side_output is not None
        self.decoder.side_output.add(self.z, x)

    def backward(self, d: torch.Tensor) -> None:
        """Fills the gradients for d [N, hidden], that of what `add` left."""
        assert self.decoder.side_output is not None
        d_z = self._take("side.d").zero_()
        self.decoder.side_output.add_gradients(self.z, d, d_z)
        for index, block in reversed(list(enumerate(self.decoder.blocks))):
            if block.side is not None:
                block.side.add_gradients(self._take(f"side.{index}"), d_z, d_z)

    def _take(self, name: str) -> torch.Tensor:
        return self.workspace.take(self.positions, self.width, name)
