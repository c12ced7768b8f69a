"""A folder of frozen weights, opened: which matrix lies on which grid, mapped and never copied whole.

One reader serves a base/ folder and a plain Hugging Face folder (there every matrix is dense). The trainer, the
exporter and the tests all see weights through it, so there is one place that knows how names become codes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from edgetune.errors import ModelError
from edgetune.grids import GRIDS
from edgetune.models import ModelConfig, load_config
from edgetune.models.config import DecoderConfig
from edgetune.models.encoder_config import EncoderConfig
from edgetune.weights import Weights, open_weights, sha256_file

Config = TypeVar("Config", bound=ModelConfig)


@dataclass(frozen=True)
class AnyBase(Generic[Config]):
    """`config` and mapped `weights` of a folder; matrices are named by module (`model.layers.0.mlp.up_proj`)."""

    folder: Path
    config: Config
    weights: Weights

    def grid_of(self, module: str) -> str | None:
        """The grid that a matrix is stored on; None is dense."""
        return next((name for name, grid in GRIDS.items() if f"{module}.weight{grid.MARK}" in self.weights), None)

    @property
    def grid(self) -> str | None:
        """The grid of the block linears; None where they are dense."""
        return self.grid_of(next(iter(self.config.linears())))

    def shape(self, module: str) -> tuple[int, int]:
        return self.config.matrices()[module]

    def codes(self, module: str) -> dict[str, np.ndarray]:
        """The arrays of a matrix on a grid, as that grid's `load` gives them; mapped where they need no change."""
        grid = self.grid_of(module)
        assert grid is not None, f"{module} is dense"
        codes: dict[str, np.ndarray] = GRIDS[grid].load(lambda suffix: self.weights.array(f"{module}.weight{suffix}"))
        return codes

    def dequantize(self, module: str, rows: slice | None = None) -> np.ndarray:
        """float32 [rows, K] of any matrix, on a grid or dense."""
        grid = self.grid_of(module)
        if grid is None:
            return self.weights.float32(f"{module}.weight", rows)
        weight: np.ndarray = GRIDS[grid].dequantize(self.codes(module), self.shape(module), rows)
        return weight

    def vector(self, name: str) -> np.ndarray:
        """float32 copy of a tensor that is no matrix, by its full name; of a norm's weight, what it multiplies by."""
        return self.in_use(name, self.weights.float32(name))

    def in_use(self, name: str, vector: np.ndarray) -> np.ndarray:
        """What the model computes with, of the vector that a file has under that name."""
        return vector

    def nbytes(self, module: str) -> int:
        """Stored bytes of a matrix."""
        return sum(info.nbytes for name, info in self.weights.items() if name.startswith(f"{module}.weight"))


@dataclass(frozen=True)
class Base(AnyBase[DecoderConfig]):
    """The base of a decoder."""

    def in_use(self, name: str, vector: np.ndarray) -> np.ndarray:
        """Of a norm's weight, what it multiplies by."""
        return vector + np.float32(self.config.norm_offset) if name.endswith("norm.weight") else vector


@dataclass(frozen=True)
class EncoderBase(AnyBase[EncoderConfig]):
    """The base of an encoder."""


def open_base(folder: str | Path) -> Base:
    """As `open_any_base`, for what only decoders can do.

    Raises:
        ModelError: as there, or it is an encoder.
    """
    if isinstance(load_config(folder), EncoderConfig):
        raise ModelError(
            f"{folder} is an encoder, which turns texts into embeddings; a decoder, which continues them, was "
            "expected. An encoder is trained by `edgetune train --objective classification`, here and on no device "
            "itself; `edgetune export` makes a bundle of it."
        )
    base = open_any_base(folder)
    assert isinstance(base, Base)
    return base


def open_any_base(folder: str | Path) -> Base | EncoderBase:
    """Open a base/ folder or a plain model folder and check every tensor's name and shape.

    Raises:
        ModelError: config or weights are missing or damaged, the family is not supported, or tensors do not fit the
            config; the message lists up to ten of them.
    """
    folder = Path(folder)
    config, weights = load_config(folder), open_weights(folder)
    base: Base | EncoderBase
    base = EncoderBase(folder, config, weights) if isinstance(config, EncoderConfig) else Base(folder, config, weights)
    problems = [*_missing(base), *_unexpected(base)]
    if problems:
        more = f"\n… and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ModelError(
            f"{folder}: its tensors do not fit its config.json:\n" + "\n".join(problems[:10]) + more
            + "\nCheck that both files belong to the same model."
        )  # fmt: skip
    return base


def weights_sha256(folder: Path) -> str:
    """SHA-256 of a folder's weight file; of the shards' hashes in order where there are several."""
    files = sorted(folder.glob("model*.safetensors"))
    if len(files) == 1:
        return sha256_file(files[0])
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()


def _expected(base: AnyBase[Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor that must be there, on the grid that it is on."""
    shapes: dict[str, tuple[int, ...]] = dict(base.config.vectors())
    for module, shape in base.config.matrices().items():
        grid = base.grid_of(module)
        name = f"{module}.weight"
        if grid is None:
            shapes[name] = shape
        elif grid == "nf4":
            double = f"{name}.nested_absmax" in base.weights
            shapes |= {name + s: i.shape for s, i in GRIDS["nf4"].stored(shape, double_quant=double).items()}
        else:
            shapes |= {name + s: i.shape for s, i in GRIDS[grid].stored(shape).items()}
    return shapes


def _missing(base: AnyBase[Any]) -> list[str]:
    found = []
    for name, shape in _expected(base).items():
        info = base.weights.get(name)
        if info is None:
            found.append(f"{name} is missing; {list(shape)} was expected")
        elif info.shape != shape and not name.endswith(GRIDS["nf4"].MARK):  # its JSON varies in length
            found.append(f"{name} has shape {list(info.shape)}; {list(shape)} was expected")
    return found


def _unexpected(base: AnyBase[Any]) -> list[str]:
    """Tensors that the model would silently leave out, but for those that it may."""
    expected = _expected(base)
    return [
        f"{name} {list(info.shape)} has no place in a {base.config.model_type} of this config"
        for name, info in base.weights.items()
        if name not in expected and not base.config.leaves_out(name)
    ]
