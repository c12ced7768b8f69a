"""A slot: one place of a model, and the trained tensors that an adapter method keeps there."""

from __future__ import annotations

import math
from dataclasses import dataclass

FACTOR_COLUMNS = 256  # of a frozen product that are computed again at a time, for the gradient of its factors


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
    scales_input: bool = False
    """Its factors multiply what a linear takes."""
    scales_output: bool = False
    """Its factors multiply what a linear gives, which backward computes again."""
    kept_floats: int = 0
    """What lies beside the tensors while the model is loaded."""

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Full tensor name -> shape."""
        return {f"{self.place}.{name}".lstrip("."): shape for name, shape in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())
