"""A base's weights on their way into a graph: as they are, or rounded to another format, and what rounding costs.

    W' = round(W)                   the adapter stays beside the graph, around weights that it was not trained on
    W' = round(merge(W))            merged: the adapter is folded in, W + scaling * B A for LoRA

Either way the frozen codes that the adapter was trained around do not survive, so the bundle is no longer "the bytes
you trained on". How far it is away is measured here per matrix, against the weight and against what the adapter changes
there, and on logits and loss by `parity`. A matrix without an adapter keeps its codes where the target can hold them.

Matrices come in ranges of rows: an embedding of 128k rows is never whole on the heap, in whatever format.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Generic

import numpy as np
import torch

from edgetune.adapters.attach import own_vectors
from edgetune.base import AnyBase, Config
from edgetune.exporter.job import Adapter
from edgetune.graphs import FORMATS, standard
from edgetune.grids import GRIDS, row_tiles
from edgetune.models.decoder import Decoder
from edgetune.models.encoder import Encoder
from edgetune.weights import Matrix

Codes = dict[str, np.ndarray]


def round_to(weights: str, matrix: Matrix) -> Codes:
    """The arrays of a float32 matrix [N, K] in one of `FORMATS`."""
    codes: Codes
    if weights not in GRIDS:
        codes = FORMATS[weights].quantize(matrix)
        return codes
    codes = GRIDS[weights].load(GRIDS[weights].quantize(matrix).__getitem__)
    return codes


def use_merged_vectors(model: Decoder | Encoder, adapter: Adapter) -> None:
    """Give a torch model its merged norms and biases, before it gets merged weights."""
    for name, (module, attribute) in own_vectors(model).items():
        merged = adapter.merged_vector(name, getattr(module, attribute).numpy())
        setattr(module, attribute, torch.from_numpy(merged))


class BaseWeights(Generic[Config]):
    """A base as the graph's weights, bit for bit."""

    def __init__(self, base: AnyBase[Config]) -> None:
        self.base, self.config = base, base.config

    def format_of(self, module: str) -> str:
        return self.base.grid_of(module) or "fp32"

    def parts(self, module: str) -> Iterator[tuple[slice, Codes]]:
        """A matrix in ranges of rows, each with its arrays: a grid's codes, or {"weight": float32 [rows, K]}."""
        yield from self._stored(module, self.format_of(module))

    def _stored(self, module: str, weights: str) -> Iterator[tuple[slice, Codes]]:
        """The ranges that have bytes of their own in a format as well, with what the base holds there."""
        shape, grid = self.base.shape(module), self.base.grid_of(module)
        units = FORMATS[weights].row_unit(shape), GRIDS[grid].row_unit(shape) if grid else 1
        codes = self.base.codes(module) if grid else {}
        for rows in row_tiles(shape, unit=math.lcm(*units)):
            if grid is None:
                yield rows, {"weight": self.base.dequantize(module, rows)}
            else:
                yield rows, GRIDS[grid].rows_of(codes, shape, rows)
        self.base.weights.unmap()

    def fill(self, module: str, arrays: Codes) -> None:
        """Write a matrix into arrays of its format."""
        weights, shape = FORMATS[self.format_of(module)], self.base.shape(module)
        for rows, part in self.parts(module):
            for key, view in weights.rows_of(arrays, shape, rows).items():
                view[...] = part[key].reshape(view.shape)

    def vector(self, name: str) -> np.ndarray:
        return self.base.vector(name)


class RoundedWeights(BaseWeights[Config]):
    """A base in the format `weights`, with `merge` its adapter folded in.

    `rounding` fills while matrices are produced: what it moved each of them by.
    """

    def __init__(self, base: AnyBase[Config], weights: str, adapter: Adapter | None, *, merge: bool) -> None:
        super().__init__(base)
        self.weights, self.adapter, self.merge = weights, adapter, merge
        self.rounding: dict[str, dict[str, float]] = {}

    def format_of(self, module: str) -> str:
        return self.weights

    def parts(self, module: str) -> Iterator[tuple[slice, Codes]]:
        stored, columns = super().format_of(module), self.base.shape(module)[1]
        parts = self._stored(module, self.weights)
        if self.merge and self.adapter is not None and self.adapter.changes(module):
            yield from self._rounded(module, stored, parts)
        elif stored == self.weights:
            yield from parts
        elif (stored, self.weights) == ("int4", "standard"):
            for rows, part in parts:
                yield rows, standard.from_int4(part, (rows.stop - rows.start, columns))
        else:
            yield from self._rounded(module, stored, parts)

    def vector(self, name: str) -> np.ndarray:
        """As it is, or merged, where the adapter changes norms or biases."""
        if not self.merge or self.adapter is None:
            return super().vector(name)
        return self.base.in_use(name, self.adapter.merged_vector(name, self.base.weights.float32(name)))

    def _rounded(self, module: str, stored: str, parts: Iterator[tuple[slice, Codes]]) -> Iterator[tuple[slice, Codes]]:
        """The parts of a matrix rounded, with the norms of the error measured on the way."""
        columns = self.base.shape(module)[1]
        error = norm = change = 0.0
        for rows, part in parts:
            shape = rows.stop - rows.start, columns
            wanted = FORMATS[stored].dequantize(part, shape)
            if self.adapter is not None and self.adapter.changes(module):
                tuned = self.adapter.merged(module, wanted, rows)
                change += _squares(tuned - wanted)
                if self.merge:
                    wanted = tuned
            rounded = round_to(self.weights, wanted)
            error += _squares(FORMATS[self.weights].dequantize(rounded, shape) - wanted)
            norm += _squares(wanted)
            yield rows, rounded
        figures = {"relative_error": (error / max(norm, 1e-60)) ** 0.5}
        if change:  # against the weight, and where the adapter changes it, against that change
            figures["error_over_delta"] = (error / change) ** 0.5
            figures["relative_change"] = (change / max(norm, 1e-60)) ** 0.5
        self.rounding[module] = figures

    @property
    def is_exact(self) -> bool:
        """Whether every weight is what it was; known once the matrices have been produced."""
        return not any(entry["relative_error"] for entry in self.rounding.values())

    def figures(self) -> dict[str, Any]:
        """The cost of rounding over all matrices: error against the weight, and against the adapter's change.

        A ratio above 1 says that rounding moved this matrix further than training did. Ratios, and the least change of
        a matrix against its weight, are null where there is no adapter.
        """
        ratios = {
            name: entry["error_over_delta"] for name, entry in self.rounding.items() if "error_over_delta" in entry
        }
        errors = [entry["relative_error"] for entry in self.rounding.values()]
        worst = max(ratios, key=lambda name: ratios[name], default=None)
        changes = [entry["relative_change"] for entry in self.rounding.values() if "relative_change" in entry]
        return {
            "mean_relative_error": float(np.mean(errors)) if errors else 0.0,
            "least_relative_change": min(changes, default=None),
            "mean_error_over_delta": float(np.mean(list(ratios.values()))) if ratios else None,
            "max_error_over_delta": ratios[worst] if worst else None, "worst_layer": worst,
            "error_over_delta": {name: round(ratio, 6) for name, ratio in ratios.items()},
        }  # fmt: skip


def _squares(values: np.ndarray) -> float:
    return float(np.vdot(values, values))
