"""The tiled loss and its gradient against torch's own cross-entropy and autograd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from edgetune.linear import Workspace
from edgetune.objectives import sft


class Matrix:
    """A head held as a plain matrix, in tiles of so many rows; counts how many rows were asked for."""

    def __init__(self, weight: torch.Tensor, tile_rows: int) -> None:
        self.weight, self.tile_rows, self.rows_read = weight, tile_rows, 0

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for start in range(0, len(self.weight), self.tile_rows):
            rows = slice(start, min(start + self.tile_rows, len(self.weight)))
            self.rows_read += rows.stop - rows.start
            yield rows, self.weight[rows].clone()

    def subtract_rows(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        out.sub_(self.weight[ids])


def run(hidden: torch.Tensor, targets: torch.Tensor, head: Matrix) -> tuple[float, torch.Tensor]:
    """The loss, and its gradient in a copy of `hidden`."""
    gradient = hidden.clone()
    return sft.loss_and_gradient(gradient, targets, head, Workspace()), gradient


def case(positions: int, width: int, vocabulary: int, *, ignored: float = 0.3, scale: float = 1.0):
    generator = torch.Generator().manual_seed(positions * vocabulary)
    hidden = scale * torch.randn(positions, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    targets[torch.rand(positions, generator=generator) < ignored] = sft.IGNORE_INDEX
    return hidden, targets, weight


def reference(hidden: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> tuple[float, torch.Tensor]:
    hidden = hidden.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden @ weight.double().T, targets, ignore_index=-100, reduction="sum")
    loss.backward()
    assert hidden.grad is not None
    return float(loss.detach()), hidden.grad


@pytest.mark.parametrize("tile_rows", [1, 7, 64, 301, 4096])
@pytest.mark.parametrize(("positions", "width", "vocabulary"), [(1, 5, 301), (37, 48, 301), (600, 9, 130)])
def test_equals_cross_entropy(tile_rows: int, positions: int, width: int, vocabulary: int) -> None:
    hidden, targets, weight = case(positions, width, vocabulary, ignored=0.3 if positions > 1 else 0.0)
    expected, expected_gradient = reference(hidden, targets, weight)
    loss, gradient = run(hidden, targets, Matrix(weight, tile_rows))
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-4, atol=2e-6)
    assert sft.loss(hidden, targets, Matrix(weight, tile_rows), Workspace()) == loss
    filled = hidden.clone()  # the same with rows that are a multiple of 32
    loss = sft.loss_and_gradient(filled, targets, Matrix(weight, tile_rows), Workspace(), 32)
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(filled, expected_gradient.float(), rtol=1e-4, atol=2e-6)


def test_large_logits_do_not_overflow() -> None:
    hidden, targets, weight = case(19, 33, 77, scale=60.0)
    expected, expected_gradient = reference(hidden, targets, weight)
    loss, gradient = run(hidden, targets, Matrix(weight, 10))
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-3, atol=1e-3)


def test_positions_without_a_target_cost_nothing_and_get_no_gradient() -> None:
    hidden, targets, weight = case(40, 6, 50, ignored=0.5)
    ignored = targets == sft.IGNORE_INDEX
    hidden[ignored] = torch.nan
    loss, gradient = run(hidden, targets, Matrix(weight, 16))
    assert loss == pytest.approx(reference(hidden[~ignored], targets[~ignored], weight)[0], rel=1e-6)
    assert not gradient[ignored].any() and gradient[~ignored].isfinite().all()


def test_nothing_supervised_is_zero() -> None:
    hidden, _, weight = case(5, 6, 50)
    loss, gradient = run(hidden, torch.full((5,), -100), Matrix(weight, 16))
    assert loss == 0.0 and gradient.shape == (5, 6) and not gradient.any()


@pytest.mark.parametrize("tile_rows", [64, 300])
def test_the_head_is_read_once(tile_rows: int) -> None:
    hidden, targets, weight = case(20, 8, 300)
    head = Matrix(weight, tile_rows)
    run(hidden, targets, head)
    assert head.rows_read == 300


def test_memory_does_not_depend_on_the_vocabulary() -> None:
    sizes = []
    for vocabulary in (400, 4000):
        hidden, targets, weight = case(30, 8, vocabulary, ignored=0.0)
        workspace = Workspace()
        sft.loss_and_gradient(hidden, targets, Matrix(weight, 50), workspace)
        sizes.append(workspace.sizes)
    assert sizes[0]["inner"] == sizes[1]["inner"] == 4 * 30 * 50


def test_nonfinite_hidden_gives_a_nonfinite_loss() -> None:
    hidden, targets, weight = case(20, 8, 30, ignored=0.0)
    hidden[3, 2] = torch.inf
    loss, _ = run(hidden, targets, Matrix(weight, 16))
    assert not torch.isfinite(torch.tensor(loss))
