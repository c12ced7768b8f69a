"""Every grid keeps the contract of `edgetune.grids`; nf4 is bitsandbytes bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from edgetune.grids import GRIDS, int4, nf4

# (301, 72) and (64, 172) have blocks that cross rows; (7, 33) has an odd number of weights in odd rows.
SHAPES = [(64, 64), (130, 256), (64, 172), (301, 72), (7, 33), (5, 3), (1, 1)]


def weight(shape: tuple[int, int], seed: int = 1) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    values[0] = 0  # a block of nothing must not divide by zero
    return values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_what_is_stored_has_the_announced_form(grid: ModuleType, shape: tuple[int, int]) -> None:
    arrays = grid.quantize(weight(shape))
    announced = grid.stored(shape)
    assert list(arrays) == list(announced)
    assert {s: (a.shape, a.nbytes) for s, a in arrays.items()} == {s: (i.shape, i.nbytes) for s, i in announced.items()}
    assert grid.nbytes(shape) == sum(a.nbytes for a in arrays.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_rows_out_and_index_agree_with_the_whole(grid: ModuleType, shape: tuple[int, int]) -> None:
    codes = grid.load(grid.quantize(weight(shape)).__getitem__)
    whole = grid.dequantize(codes, shape)
    assert whole.shape == shape
    assert whole.dtype == np.float32
    for rows in (slice(0, 1), slice(shape[0] // 2, shape[0]), slice(shape[0] // 3, shape[0] // 3 + 2)):
        np.testing.assert_array_equal(grid.dequantize(codes, shape, rows), whole[rows])
        out = np.full_like(whole[rows], np.nan)
        assert grid.dequantize(codes, shape, rows, out) is out
        np.testing.assert_array_equal(out, whole[rows])
    index = np.array([shape[0] - 1, 0, shape[0] - 1])
    np.testing.assert_array_equal(grid.dequantize(codes, shape, index), whole[index])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_error_is_that_of_a_good_4_bit_grid(grid: ModuleType) -> None:
    values = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    found = grid.dequantize(grid.load(grid.quantize(values).__getitem__), values.shape)
    error = np.linalg.norm(found - values) / np.linalg.norm(values)
    # Relative Frobenius error on Gaussian weights: nf4 .0919, int4 with a searched scale .0811; plain absmax is .0859.
    assert error == pytest.approx({"nf4": 0.0919, "int4": 0.0811}[grid.NAME], abs=5e-4)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_bitsandbytes_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> None:
    values = torch.from_numpy(weight(shape)).to(dtype)
    codes, state = quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=double_quant)
    mine = nf4.quantize(values.float().numpy(), double_quant=double_quant)
    np.testing.assert_array_equal(mine[""], codes.numpy())
    np.testing.assert_array_equal(mine[".absmax"], state.absmax.numpy())
    state.dtype = torch.float32
    found = nf4.dequantize(nf4.load(mine.__getitem__), shape)
    np.testing.assert_array_equal(found, dequantize_4bit(codes, state).numpy())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(301, 72), (130, 256), (7, 33), (300, 64)])
def test_nf4_of_pieces_is_that_of_the_whole(
    shape: tuple[int, int], double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = nf4.quantize(weight(shape), double_quant=double_quant)
    monkeypatch.setattr(nf4, "_QUANTIZED_AT_ONCE", 1000)
    pieces = nf4.quantize(weight(shape), double_quant=double_quant)
    assert pieces.keys() == whole.keys()
    for suffix, array in whole.items():
        np.testing.assert_array_equal(pieces[suffix], array)


def test_bitsandbytes_is_imported_without_fetching_a_kernel(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text("print('fetching')", encoding="utf-8")
    code = (
        "import numpy as np, sys; from edgetune.grids import nf4; nf4.quantize(np.ones((2, 64), np.float32));"
        "assert 'kernels' not in sys.modules; import kernels; print('done')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("fetching\ndone\n", "")


def test_nf4_reads_rows_that_bitsandbytes_reads_wrongly() -> None:
    """With AVX-512, bitsandbytes 0.50 takes a wrong absmax where K is a multiple of 16 but not of 64."""
    values = np.random.default_rng(3).standard_normal((64, 48)).astype(np.float32)
    mine = nf4.quantize(values)
    element = np.stack([mine[""] >> 4, mine[""] & 15], -1).reshape(-1)
    formula = (nf4.LEVELS[element].reshape(-1, 64) * mine[".absmax"][:, None]).reshape(values.shape)
    np.testing.assert_array_equal(nf4.dequantize(nf4.load(mine.__getitem__), values.shape), formula)


def test_nf4_golden_numbers(real: Callable[[str], Path]) -> None:
    golden = np.load(real("nf4_golden") / "nf4_golden_48x128_b64.npz")
    mine = nf4.quantize(golden["W"])
    np.testing.assert_array_equal(mine[""].reshape(-1), golden["bnb_packed"])
    np.testing.assert_array_equal(mine[".absmax"], golden["bnb_absmax"])
    found = nf4.dequantize(nf4.load(mine.__getitem__), golden["W"].shape)
    np.testing.assert_array_equal(found, golden["bnb_dequant"])


def test_int4_bytes_are_those_of_matmulnbits() -> None:
    values = np.zeros((2, 40), np.float32)
    values[0, :3] = [-8, 7, 1]  # scale 1: codes 0, 15, 9
    values[1, 32] = -4  # in the second, padded block
    stored = int4.quantize(values)
    assert stored[".codes"][0, 0, :2].tolist() == [0 | 15 << 4, 9 | 8 << 4], "the low nibble is the even k"
    assert stored[".scales"][0, 0] == 1
    assert (stored[".codes"][1, 0] == 0x88).all(), "zero is code 8"
    assert (stored[".codes"][:, 1, 4:] == 0x88).all(), "padding is zero"
    np.testing.assert_array_equal(int4.dequantize(int4.load(stored.__getitem__), values.shape), values)


def test_int4_search_finds_the_best_of_its_candidates() -> None:
    values = np.random.default_rng(5).standard_t(5, (16, 32)).astype(np.float32)
    stored = int4.quantize(values)
    found = int4.dequantize(int4.load(stored.__getitem__), values.shape)
    for row, result in zip(values, found, strict=True):
        best = np.inf
        for factor in np.linspace(0.70, 1.15, 19):
            for sign in (-1, 1):
                scale = np.float32(np.float16(np.abs(row).max() * np.float32(sign * factor / 8)))
                rounded = np.clip(np.round(row / scale), -8, 7) * scale
                best = min(best, float(((rounded - row) ** 2).sum()))
        assert float(((result - row) ** 2).sum()) == pytest.approx(best, rel=1e-5)
