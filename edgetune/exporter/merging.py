"""A base's weights on their way into a graph: as they are, or rounded to another format, and what rounding costs.

    W' = round(W)                   the adapter stays beside the graph, around weights that it was not trained on
    W' = round(W + scaling * B A)   merged: the adapter is folded in

Either way the frozen codes that the adapter was trained around do not survive, so the bundle is no longer "the bytes
you trained on". How far it is away is measured here per matrix, against the weight and against what the adapter changes
there, and on logits and loss by `parity`. A matrix without an adapter keeps its codes where the target can hold them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetune.adapters import lora
from edgetune.base import Base
from edgetune.exporter.job import Adapter
from edgetune.graphs import FORMATS, standard
from edgetune.grids import GRIDS, row_tiles
from edgetune.weights import Matrix

Codes = dict[str, np.ndarray]


def base_codes(base: Base, module: str) -> Codes:
    """The arrays of a matrix as its base has them: a grid's codes, or {"weight": float32 [N, K]}."""
    return {"weight": base.dequantize(module)} if base.grid_of(module) is None else base.codes(module)


def round_to(weights: str, matrix: Matrix) -> Codes:
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


class _Sum:
    """The float32 matrix [N, K] that is to be rounded, computed in ranges of rows: W, and where merged W + delta."""

    def __init__(self, base: Base, module: str, adapter: Adapter | None) -> None:
        self.base, self.module, self.adapter = base, module, adapter
        self.shape = base.shape(module)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        matrix = self.base.dequantize(self.module, rows)
        if self.adapter is not None and (delta := _delta(self.adapter, self.module, rows)) is not None:
            matrix += delta
        return matrix


def _delta(adapter: Adapter, module: str, rows: slice) -> np.ndarray | None:
    """What the adapter adds to rows of a matrix; None where it changes nothing there."""
    if not _changes(adapter, module):
        return None
    tensors = {"lora_A": adapter.tensors[f"{module}.lora_A"], "lora_B": adapter.tensors[f"{module}.lora_B"][rows]}
    return lora.delta(tensors, adapter.config)


def _changes(adapter: Adapter, module: str) -> bool:
    """Whether the adapter has a slot at a matrix, with something in it."""
    b = adapter.tensors.get(f"{module}.lora_B")
    return b is not None and bool(b.any())


class RoundedWeights(BaseWeights):
    """A base in the format `weights`, with `merge` its adapter folded in.

    `rounding` fills while matrices are produced: what it moved each of them by.
    """

    def __init__(self, base: Base, weights: str, adapter: Adapter | None, *, merge: bool) -> None:
        super().__init__(base)
        self.weights, self.adapter, self.merge = weights, adapter, merge
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
        merged = self.adapter if self.merge else None
        if not (merged and _changes(merged, module)):
            stored = super().format_of(module)
            if stored == self.weights:
                return super().codes(module)
            if (stored, self.weights) == ("int4", "standard"):
                return standard.from_int4(super().codes(module), self.base.shape(module))
        matrix = _Sum(self.base, module, merged)
        codes = round_to(self.weights, matrix)
        self.rounding[module] = self._measure(module, matrix, codes)
        return codes

    def _measure(self, module: str, matrix: Matrix, codes: Codes) -> dict[str, float]:
        """Norms of the error against the weight and, where the adapter changes it, against that change."""
        error = norm = change = 0.0
        shape = self.base.shape(module)
        for rows in row_tiles(shape):
            wanted = matrix[rows]
            error += _squares(FORMATS[self.weights].dequantize(codes, shape, rows) - wanted)
            norm += _squares(wanted)
            if self.adapter is not None and (delta := _delta(self.adapter, module, rows)) is not None:
                change += _squares(delta)
        figures = {"relative_error": (error / max(norm, 1e-60)) ** 0.5}
        return figures | ({"error_over_delta": (error / change) ** 0.5} if change else {})

    @property
    def is_exact(self) -> bool:
        """Whether every weight is what it was; known once the matrices have been produced."""
        return not any(entry["relative_error"] for entry in self.rounding.values())

    def figures(self) -> dict[str, Any]:
        """The cost of rounding over all matrices: error against the weight, and against the adapter's change.

        A ratio above 1 says that rounding moved this matrix further than training did; they are null where there is
        no adapter.
        """
        ratios = {
            name: entry["error_over_delta"] for name, entry in self.rounding.items() if "error_over_delta" in entry
        }
        worst = max(ratios, key=lambda name: ratios[name], default=None)
        return {
            "mean_relative_error": float(np.mean([entry["relative_error"] for entry in self.rounding.values()])),
            "mean_error_over_delta": float(np.mean(list(ratios.values()))) if ratios else None,
            "max_error_over_delta": ratios[worst] if worst else None, "worst_layer": worst,
            "error_over_delta": {name: round(ratio, 6) for name, ratio in ratios.items()},
        }  # fmt: skip


def _squares(values: np.ndarray) -> float:
    return float(np.vdot(values, values))
