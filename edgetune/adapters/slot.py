"""A slot: one frozen linear, and the trained tensors that an adapter method keeps there."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """`linear` is the full module name; `tensors` maps a short name to its shape. All are float32."""

    linear: str
    in_features: int
    out_features: int
    tensors: dict[str, tuple[int, ...]]

    @property
    def names(self) -> dict[str, tuple[int, ...]]:
        """Full tensor name -> shape."""
        return {f"{self.linear}.{name}": shape for name, shape in self.tensors.items()}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())
