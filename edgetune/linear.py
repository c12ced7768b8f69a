"""Frozen linear layers over mapped weights: on a grid, or dense.

Neither class owns a copy of its weight. `forward` dequantizes the matrix into a buffer that all layers of a model
share, multiplies, and the next layer overwrites it; backward does the same again (`grad_x = grad_y @ W`). So the
float32 weights alive at any time are one matrix, whatever the model's size.
"""

from __future__ import annotations

import errno
import functools
import os
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch reader knows
from torch import nn

from edgetune.base import AnyBase
from edgetune.errors import ConfigError
from edgetune.grids import GRIDS, LOOKUP_ROWS, PIECE_CODES, row_tiles
from edgetune.memory import format_mib, read_ahead

Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # codes, scales, and where they are decoded to


class Workspace:
    """Named float32 buffers, each as large as its largest request so far; a request overwrites the one before.

    `tile_weights` is how many weights may be dequantized at once. `offload_to` is a folder on a disk: `put` and `get`
    then move tensors to a nameless file there and back. `reads_ahead` announces to the system which codes are decoded
    next, for weights read on demand. Products of `fast_positions` rows, and in the loss of `fast_loss_rows`, are those
    of whole micro-batches: their shapes come in every step, so they are `fast_products`.
    """

    def __init__(self, tile_weights: int = 1 << 20, offload_to: Path | None = None) -> None:
        self.tile_weights, self.offload_to = tile_weights, offload_to
        self.reads_ahead = False
        self.fast_positions = self.fast_loss_rows = 0
        self._buffers: dict[str, torch.Tensor] = {}
        self._file: IO[bytes] | None = None

    def take(self, rows: int, columns: int, name: str = "weight") -> torch.Tensor:
        """An uninitialized [rows, columns] view."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < rows * columns:
            self._buffers.pop(name, None)
            del buffer  # give the old one back before the new one is taken
            buffer = self._buffers[name] = torch.empty(rows * columns)
        return buffer[: rows * columns].view(rows, columns)

    def like(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """As `take`, of x's shape."""
        return self.take(x.shape[0], x.shape[1], name)

    def clear(self) -> None:
        """Give every buffer back, once nobody holds a view of it; what is needed again is taken anew."""
        self._buffers.clear()

    def put(self, index: int, x: torch.Tensor) -> None:
        """Write a contiguous tensor as the file's entry of this index; all entries are of one size.

        Raises:
            ConfigError: the disk refuses.
        """
        assert self.offload_to is not None
        content = x.numpy().data.cast("B")
        try:
            if self._file is None:  # it never has a name: what it tells of the rows ends with the process
                self._file = tempfile.TemporaryFile(dir=self.offload_to, buffering=0)  # noqa: SIM115 - see finalize
                weakref.finalize(self, self._file.close)
            self._file.seek(index * len(content))
            if self._file.write(content) != len(content):  # a raw file writes what there is room for
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ConfigError(
                f"activation_offloading cannot write {format_mib(len(content))} to {self.offload_to}: "
                f"{error.strerror}. Free some storage, choose another --out, or train without it."
            ) from error

    def get(self, index: int, out: torch.Tensor) -> torch.Tensor:
        """Read the entry of this index back, into a contiguous tensor of its shape."""
        assert self._file is not None
        content = out.numpy().data.cast("B")
        self._file.seek(index * len(content))
        self._file.readinto(content)  # type: ignore[attr-defined]  # a raw file has it
        return out

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every buffer."""
        return {name: buffer.numel() * buffer.element_size() for name, buffer in self._buffers.items()}


class FrozenLinear(nn.Module):
    """y = x W^T + bias with W [out_features, in_features] on a 4-bit grid."""

    def __init__(self, base: AnyBase[Any], module: str, workspace: Workspace) -> None:
        super().__init__()
        self.name = module
        self.out_features, self.in_features = base.shape(module)
        self.nbytes = base.nbytes(module)
        self.workspace = workspace
        self.bias = torch.from_numpy(base.vector(f"{module}.bias")) if f"{module}.bias" in base.weights else None
        self.grid = base.grid_of(module)
        self.held: torch.Tensor | None = None
        self._load(base)

    def _load(self, base: AnyBase[Any]) -> None:
        assert self.grid is not None
        self.codes = base.codes(self.name)
        parts = GRIDS[self.grid].flat(self.codes, self.shape)
        self.flat = None
        if parts is not None:
            packed, scales = (_mapped(part).view(self.out_features, -1) for part in parts)
            self.flat = packed, scales

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def dequantize(self, rows: slice | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """float32 [rows, in_features]; into `out` where given, else into a new tensor."""
        start, stop, _ = (rows or slice(None)).indices(self.out_features)
        if out is None:
            out = torch.empty(stop - start, self.in_features)
        if self.flat is None:
            GRIDS[str(self.grid)].dequantize(self.codes, self.shape, rows, out.numpy())
        else:
            packed, scales = self.flat
            self._decode(packed[start:stop].view(-1), scales[start:stop].view(-1), out)
        return out

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The whole weight in ranges of rows, float32 [rows, in_features], each in the same memory."""
        for rows in row_tiles(self.shape, self.workspace.tile_weights):
            if self.held is None:
                yield rows, self.dequantize(rows, self.workspace.take(rows.stop - rows.start, self.in_features))
            else:
                yield rows, self.held[rows]

    def row_norms(self) -> torch.Tensor:
        """The norm of each row of the weight, float32 [out_features]."""
        norms = torch.empty(self.out_features)
        for rows, weight in self.tiles():
            torch.linalg.vector_norm(weight, dim=1, out=norms[rows])
        return norms

    def hold(self) -> None:
        """Keep the dequantized weight for `tiles`, until `release`."""
        self.held = self.dequantize()

    def thaw(self) -> nn.Parameter:
        """The weight, dequantized for good, as a parameter that `tiles` gives from then on."""
        weight = torch.empty(self.shape)
        for rows, part in self.tiles():
            weight[rows] = part
        self.held = nn.Parameter(weight)
        return self.held

    def release(self) -> None:
        """Dequantize again in every visit."""
        self.held = None

    def _decode(self, packed: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """The weights of whole blocks: the same bits as the grid's own `dequantize`.

        torch decodes on all threads, two to three times as fast as numpy on one.
        """
        block = GRIDS[str(self.grid)].BLOCK
        table, pairs, weights = _pairs(str(self.grid)), out.view(-1).view(torch.float64), out.view(-1)
        size = min(PIECE_CODES, len(packed))
        indices = self.workspace.take(1, size, "codes")[0].view(torch.int32)
        widened = self.workspace.take(1, 2 * size // block, "scales")[0]
        sizes = (packed, size), (scales, 2 * size // block), (pairs, size), (weights, 2 * size)
        pieces: list[Piece] = list(zip(*(torch.split(part, size) for part, size in sizes), strict=True))
        for codes, scale, pair, weight in _announced(pieces) if self.workspace.reads_ahead else pieces:
            torch.index_select(table, 0, indices[: len(codes)].copy_(codes), out=pair)
            weight.view(-1, block).mul_(widened[: len(scale)].copy_(scale)[:, None])

    def subtract_rows(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """Subtracts the rows of the weight [n, in_features] that `ids` [n] names from `out` [n, in_features]."""
        for at, rows in self._gathered(ids):
            out[at].sub_(rows)

    def lookup(self, ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the weight as an embedding: ids [...] -> float32 [..., in_features]; into `out` where given."""
        if out is None:
            out = torch.empty(*ids.shape, self.in_features)
        flat = out.view(-1, self.in_features)
        for at, rows in self._gathered(ids.reshape(-1)):
            flat[at].copy_(rows)
        return out

    def _gathered(self, ids: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows of the weight for a few of the ids [n] at a time."""
        for start in range(0, len(ids), LOOKUP_ROWS):
            at = slice(start, min(start + LOOKUP_ROWS, len(ids)))
            yield at, self._picked(ids[at])

    def _picked(self, ids: torch.Tensor) -> torch.Tensor:
        if self.flat is not None:
            packed, scales = self.flat
            out = torch.empty(len(ids), self.in_features)
            self._decode(packed[ids].view(-1), scales[ids].view(-1), out)
            return out
        return torch.from_numpy(GRIDS[str(self.grid)].dequantize(self.codes, self.shape, ids.numpy()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in_features] -> [..., out_features]. Gradients flow to x, and to what is trained in its place."""
        if isinstance(self.held, nn.Parameter):
            return F.linear(x, self.held, self.bias)
        y: torch.Tensor = _FrozenMatmul.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, grid={self.grid}"


class DenseLinear(FrozenLinear):
    """The same over a weight in its stored dtype (float32, float16 or bfloat16)."""

    def _load(self, base: AnyBase[Any]) -> None:
        weight = _mapped(base.weights.array(f"{self.name}.weight"))
        self.weight = weight.view(torch.bfloat16) if base.weights[f"{self.name}.weight"].dtype == "BF16" else weight

    def dequantize(self, rows: slice | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """As that of a grid."""
        picked = self.weight if rows is None else self.weight[rows]
        return picked.float() if out is None else out.copy_(picked)

    def _picked(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids].float()


def _mapped(array: np.ndarray) -> torch.Tensor:
    """A mapped array as a tensor over the same pages."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the map is read-only; nothing here writes to it
        return torch.from_numpy(array)


def _announced(pieces: list[Piece]) -> Iterator[Piece]:
    """The pieces in turn; while one is decoded, the next is read from disk."""
    for at, piece in enumerate(pieces):
        for codes, scale, _, _ in pieces[at + (at > 0) : at + 2]:
            for part in (codes, scale):
                read_ahead(part.data_ptr(), part.numel() * part.element_size())
        yield piece


@functools.cache
def _pairs(grid: str) -> torch.Tensor:
    """float64 [256] whose bytes are the two float32 levels of a byte of codes."""
    table: torch.Tensor = torch.from_numpy(GRIDS[grid].PAIRS)
    return table


class _FrozenMatmul(torch.autograd.Function):
    """y = x W^T; the weight is a constant that is dequantized again in backward rather than saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: FrozenLinear) -> torch.Tensor:
        ctx.linear = linear
        weight = linear.dequantize(out=linear.workspace.take(*linear.shape))
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        linear = ctx.linear
        weight = linear.dequantize(out=linear.workspace.take(*linear.shape))
        return grads[0] @ weight, None


def frozen_linear(base: AnyBase[Any], module: str, workspace: Workspace) -> FrozenLinear:
    """The layer for a matrix of a base, on its grid or dense."""
    kind = DenseLinear if base.grid_of(module) is None else FrozenLinear
    return kind(base, module, workspace)
