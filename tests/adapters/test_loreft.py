"""LoReFT beside pyreft's own formula with torch's orthogonal parametrization, and the gradient of its rotation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model
from torch import nn
from torch.nn.utils import parametrizations

from edgetune.adapters import loreft
from edgetune.adapters.attach import attach
from edgetune.adapters.loreft import LoreftConfig
from edgetune.errors import ConfigError
from edgetune.models.decoder import load_decoder

IDS = torch.randint(0, 301, (2, 19), generator=torch.Generator().manual_seed(4))


def random_tensors(r: int, hidden: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(r * hidden)
    shapes = {"rotate_layer": (r, hidden), "learned_source": (r, hidden), "learned_bias": (r,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for name, shape in shapes.items()
    }


class Pyreft(nn.Module):
    """The paper's formula as pyreft writes it, its rotation held orthonormal by torch."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        r, hidden = tensors["rotate_layer"].shape
        self.rotate_layer = nn.Linear(hidden, r, bias=False)  # weight [r, hidden], whose rows torch makes orthonormal
        parametrizations.orthogonal(self.rotate_layer)
        self.learned_source = nn.Linear(hidden, r)
        with torch.no_grad():
            rotation, _ = torch.linalg.qr(tensors["rotate_layer"].T)
            self.rotate_layer.weight = rotation.T
            self.learned_source.weight.copy_(tensors["learned_source"])
            self.learned_source.bias.copy_(tensors["learned_bias"])

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        rotation = self.rotate_layer.weight
        result: torch.Tensor = h + (self.learned_source(h) - self.rotate_layer(h)) @ rotation
        return result


@pytest.mark.parametrize(("r", "hidden"), [(1, 5), (3, 20), (8, 72)])
def test_the_formula_is_pyrefts(r: int, hidden: int) -> None:
    tensors = random_tensors(r, hidden)
    config, h = LoreftConfig(r=r), torch.randn(7, hidden)
    expected = Pyreft(tensors)(h)  # a reflection of a direction changes nothing: R^T R is the same
    source = tensors["learned_source"].detach()
    aligned = tensors | {"learned_source": source, "learned_bias": tensors["learned_bias"]}
    with torch.no_grad():
        ours, _ = loreft._decomposed(tensors["rotate_layer"])
        theirs = torch.linalg.qr(tensors["rotate_layer"].T)[0].T
        sign = (ours * theirs).sum(1).sign()
        aligned["learned_source"], aligned["learned_bias"] = sign[:, None] * source, sign * tensors["learned_bias"]
        torch.testing.assert_close(ours @ ours.T, torch.eye(r), atol=1e-6, rtol=0)
        torch.testing.assert_close(loreft.forward(h, h, aligned, config), expected, atol=1e-5, rtol=1e-5)
        added = h.clone()
        loreft.add(h, added, aligned, config)
        torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("r", "hidden"), [(1, 5), (3, 20), (8, 72), (20, 20)])
def test_gradients_equal_autograd_through_the_decomposition(r: int, hidden: int) -> None:
    """Through Cholesky's: another way to the same rotation, in float64."""
    tensors = random_tensors(r, hidden, torch.float64)
    x = torch.randn(6, hidden, dtype=torch.float64, requires_grad=True)
    free, source, bias = tensors.values()
    rotation = torch.linalg.solve_triangular(torch.linalg.cholesky(free @ free.T), free, upper=False)
    y = x + (x @ source.T + bias - x @ rotation.T) @ rotation
    d_y = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *tensors.values()], d_y)
    found = {name: torch.zeros_like(value) for name, value in tensors.items()}
    d_x = d_y.clone()
    with torch.no_grad():
        loreft.add_gradients(x, d_y, d_x, tensors, found, LoreftConfig(r=r))
    for one, other in zip((d_x, *found.values()), expected, strict=True):
        assert (one - other).norm() < 1e-10 * other.norm() + 1e-12


def test_it_starts_as_the_base_and_then_changes_its_positions_alone(tmp_path: Path) -> None:
    decoder = load_decoder(write_model(tmp_path / "model", tiny_config("gemma3_text")))
    with torch.no_grad():
        plain = decoder(IDS)
    last = decoder.config.num_hidden_layers - 1
    config = LoreftConfig(r=3, positions="f2+l3", layers_to_transform=(last,)).resolved(decoder.config)
    parameters = attach(decoder, config, seed=1)
    with torch.no_grad():
        assert (decoder(IDS) - plain).abs().max() < 1e-5
        for value in parameters.values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)))
        moved = (decoder(IDS, prompt_lengths=torch.tensor([[11], [4]])) - plain).abs().amax(2) > 1e-4
        whole = (decoder(IDS) - plain).abs().amax(2) > 1e-4
    assert [row.nonzero()[:, 0].tolist() for row in moved] == [[0, 1, 8, 9, 10], [0, 1, 2, 3]]
    assert whole[0].nonzero()[:, 0].tolist() == [0, 1, 16, 17, 18]


def test_what_changes_something() -> None:
    slot = loreft.slot("model.layers.0.block_output", (72, 72), LoreftConfig(r=4))
    tensors = loreft.initialize(slot, LoreftConfig(r=4), np.random.default_rng(0))
    assert not loreft.changes(tensors)
    assert loreft.changes(tensors | {"learned_bias": np.full(4, 1e-3, np.float32)})
    assert loreft.changes(tensors | {"learned_source": tensors["learned_source"] + np.float32(5e-5)})
    assert loreft.changes(tensors | {"rotate_layer": tensors["rotate_layer"][::-1]})
    assert not loreft.changes(tensors | {"rotate_layer": 3 * tensors["rotate_layer"]}), "its length says nothing"


@pytest.mark.parametrize(("text", "counts"), [("f7+l7", (7, 7)), ("f12", (12, 0)), ("l1", (0, 1))])
def test_positions_are_written_as_pyreft_does(text: str, counts: tuple[int, int]) -> None:
    assert loreft.parse_positions(text) == counts


@pytest.mark.parametrize("text", ["", "7", "f7l7", "+l7", "f7+", "f0", "l10000", "f7 + l7"])
def test_other_positions_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="such as f7"):
        loreft.parse_positions(text)
