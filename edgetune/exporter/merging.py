"""An adapter folded into the weights, one matrix at a time, and what rounding them again costs.

    W' = round(W + scaling * B A)

The frozen codes that the adapter was trained around do not survive this, so a merged bundle is no longer "the bytes you
trained on". How far it is away is measured per matrix here and on logits and loss by `parity`; a matrix without an
adapter keeps its codes where the target is the grid it is on already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetune.adapters import lora
from edgetune.adapters.lora import LoraConfig
from edgetune.base import Base
from edgetune.graphs import FORMATS
from edgetune.grids import GRIDS

Codes = dict[str, np.ndarray]


def base_codes(base: Base, module: str) -> Codes:
    """The arrays of a matrix as its base has them: a grid's codes, or {"weight": float32 [N, K]}."""
    return {"weight": base.dequantize(module)} if base.grid_of(module) is None else base.codes(module)


def round_to(weights: str, matrix: np.ndarray) -> Codes:
    """The arrays of a float32 matrix [N, K] in one of `FORMATS`."""
    codes: Codes
    if weights not in GRIDS:
        codes = FORMATS[weights].quantize(matrix)
        return codes
    codes = GRIDS[weights].load(GRIDS[weights].quantize(matrix).__getitem__)
    return codes


class BaseWeights:
    """A base as the graph's weights, bit for bit."""

    def __init__(self, base: Base) -> None:
        self.base, self.config = base, base.config

    def format_of(self, module: str) -> str:
        return self.base.grid_of(module) or "fp32"

    def codes(self, module: str) -> Codes:
        return base_codes(self.base, module)

    def vector(self, name: str) -> np.ndarray:
        return self.base.vector(name)


class MergedWeights(BaseWeights):
    """A base with an adapter folded in, in the format `weights`. `rounding` fills while matrices are produced."""

    def __init__(self, base: Base, adapter: LoraConfig, tensors: Mapping[str, np.ndarray], weights: str) -> None:
        super().__init__(base)
        self.adapter, self.tensors, self.weights = adapter, tensors, weights
        self.rounding: dict[str, dict[str, float]] = {}
        self._last: tuple[str, Codes] = ("", {})

    def format_of(self, module: str) -> str:
        return self.weights

    def codes(self, module: str) -> Codes:
        # Codes and scales of a matrix are asked for one after the other.
        if self._last[0] != module:
            self._last = ("", {})
            self._last = (module, self._produce(module))
        return self._last[1]

    def _produce(self, module: str) -> Codes:
        delta = self._delta(module)
        if delta is None and super().format_of(module) == self.weights:
            return super().codes(module)
        matrix = self.base.dequantize(module)
        if delta is not None:
            matrix += delta
        codes = round_to(self.weights, matrix)
        error = float(np.linalg.norm(FORMATS[self.weights].dequantize(codes, matrix.shape) - matrix))
        self.rounding[module] = {"relative_error": error / max(float(np.linalg.norm(matrix)), 1e-30)}
        if delta is not None:
            self.rounding[module]["error_over_delta"] = error / max(float(np.linalg.norm(delta)), 1e-30)
        return codes

    def _delta(self, module: str) -> np.ndarray | None:
        """What the adapter adds to a matrix; None where it has no slot there."""
        pair = {name: self.tensors.get(f"{module}.{name}") for name in ("lora_A", "lora_B")}
        if pair["lora_A"] is None or pair["lora_B"] is None:
            return None
        return lora.delta({name: value for name, value in pair.items() if value is not None}, self.adapter)

    def figures(self) -> dict[str, Any]:
        """The cost of rounding over all matrices: error against the weight, and against the adapter's change.

        A ratio above 1 says that rounding moved this matrix further than training did.
        """
        ratios = {
            name: entry["error_over_delta"] for name, entry in self.rounding.items() if "error_over_delta" in entry
        }
        worst = max(ratios, key=lambda name: ratios[name])
        return {
            "mean_relative_error": float(np.mean([entry["relative_error"] for entry in self.rounding.values()])),
            "mean_error_over_delta": float(np.mean(list(ratios.values()))),
            "max_error_over_delta": ratios[worst], "worst_layer": worst,
            "error_over_delta": {name: round(ratio, 6) for name, ratio in ratios.items()},
        }  # fmt: skip
