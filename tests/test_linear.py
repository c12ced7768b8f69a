"""Frozen linears against the grids' own reading: the same bits, whole, in ranges of rows and row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgetune.base import open_base
from edgetune.linear import FrozenLinear, Workspace, _announced, frozen_linear
from tests.training.conftest import make_base

# Rows of whole blocks, which torch decodes, and rows that are not, which numpy does.
WIDTHS = {"whole": {"hidden_size": 128, "head_dim": 32}, "cut": {}}


@pytest.fixture(params=["nf4", "int4"])
def grid(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("width", WIDTHS)
def test_reads_the_bits_of_the_grid(tmp_path: Path, grid: str, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.linear.PIECE_CODES", 640)  # several pieces, and a last one that is shorter
    base = open_base(make_base(tmp_path, grid=grid, **WIDTHS[width]))
    for module in ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer, expected = frozen_linear(base, module, Workspace(999)), base.dequantize(module)
        assert type(layer) is FrozenLinear
        np.testing.assert_array_equal(layer.dequantize().numpy(), expected)
        rows = slice(3, layer.out_features - 2)
        np.testing.assert_array_equal(layer.dequantize(rows).numpy(), expected[rows])
        seen = torch.zeros(layer.shape)
        for at, weight in layer.tiles():
            assert weight.numel() <= max(999, layer.in_features)
            seen[at] += weight
        np.testing.assert_array_equal(seen.numpy(), expected)
    assert (layer.flat is not None) == (width == "whole" and layer.in_features % 64 == 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_an_embedding(tmp_path: Path, grid: str, width: str) -> None:
    base = open_base(make_base(tmp_path, grid=grid, **WIDTHS[width]))
    layer = frozen_linear(base, "model.embed_tokens", Workspace())
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, layer.out_features, (3, 17)))
    expected = torch.from_numpy(base.dequantize("model.embed_tokens"))[ids]
    assert torch.equal(layer.lookup(ids), expected)
    into = torch.full((51, layer.in_features), torch.nan)
    layer.lookup(ids, into)
    assert torch.equal(into.view(expected.shape), expected)
    layer.subtract_rows(ids.reshape(-1), into)
    assert not into.any()


def test_announces_each_piece_before_it_is_decoded(tmp_path: Path, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.linear.PIECE_CODES", 640)
    base = open_base(make_base(tmp_path, grid=grid, hidden_size=128, head_dim=32))
    layer = frozen_linear(base, "model.layers.1.mlp.up_proj", workspace := Workspace())
    assert layer.flat is not None
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr("edgetune.linear.read_ahead", lambda *range_: announced.append(range_))
    layer.dequantize()
    assert not announced
    workspace.reads_ahead = True
    np.testing.assert_array_equal(layer.dequantize().numpy(), base.dequantize(layer.name))
    for part in layer.flat:
        start, size = part.data_ptr(), part.numel() * part.element_size()
        mine = [(at, length) for at, length in announced if start <= at < start + size]
        assert len(mine) == -(-layer.flat[0].numel() // 640) > 2
        assert [at for at, _ in mine[1:]] == [at + length for at, length in mine[:-1]]
        assert mine[0][0] == start and sum(length for _, length in mine) == size
    assert max(length for _, length in announced) <= 640


def test_no_more_than_one_piece_is_announced_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[int] = []
    monkeypatch.setattr("edgetune.linear.read_ahead", lambda address, num_bytes: announced.append(num_bytes))
    codes, scales = torch.zeros(10, dtype=torch.uint8), torch.zeros(4, dtype=torch.float16)
    pieces = list(zip(codes.split(3), scales.split(1), scales.split(1), scales.split(1), strict=True))
    seen = [sum(announced) for _ in _announced(pieces)]
    assert seen == [10, 15, 18, 18], "bytes of codes and scales, before each piece is decoded"


def test_a_weight_is_held_until_it_is_released(tmp_path: Path, grid: str) -> None:
    layer = frozen_linear(open_base(make_base(tmp_path, grid=grid)), "model.layers.0.mlp.up_proj", Workspace(999))
    layer.hold()
    assert layer.held is not None
    for rows, weight in layer.tiles():
        assert weight.data_ptr() == layer.held[rows].data_ptr()
        assert torch.equal(weight, layer.dequantize(rows))
    layer.release()
    assert layer.held is None
