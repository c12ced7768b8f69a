"""A slot: one place of a model, and the trained tensors that an adapter method keeps there."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """`tensors` maps a short name to its shape. All are float32.

    `place` is the full name of what the method stands at: a linear, a norm, a block (its output), or the embedding (the
    model's input); "" is the model as a whole. Features are what goes in and what comes out there.
    """

    place: str
    in_features: int
    out_features: int
    tensors: dict[str, tuple[int, ...]]

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Full tensor name -> shape."""
        return {f"{self.place}.{name}": shape for name, shape in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())
