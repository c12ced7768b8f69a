"""Gradients of the hand-driven blocks, against PEFT + bitsandbytes and against themselves under other plans."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgetune.adapters.attach import attach
from edgetune.adapters.lora import LoraConfig
from edgetune.errors import ConfigError
from edgetune.linear import Workspace
from edgetune.models import FAMILIES
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.training.backprop import Path as Walk
from edgetune.training.backprop import loss_and_gradients
from edgetune.training.forward import evaluate
from tests.training.conftest import make_base, random_batch

CONFIG = LoraConfig(r=3, lora_alpha=7)


def adapted(base: Path, config: LoraConfig = CONFIG) -> tuple[Decoder, dict[str, nn.Parameter], LoraConfig]:
    """A decoder with an adapter that is not zero."""
    decoder = load_decoder(base)
    resolved = config.resolved(decoder.config)
    parameters = attach(decoder, resolved, seed=5)
    generator = torch.Generator().manual_seed(6)
    for value in parameters.values():
        value.data.add_(0.1 * torch.randn(value.shape, generator=generator))
    return decoder, parameters, resolved


def gradients(
    decoder: Decoder, parameters: dict[str, nn.Parameter], batches: list[dict[str, np.ndarray]], walk: Walk,
    check: Callable[[], None] = lambda: None,
) -> tuple[float, dict[str, torch.Tensor]]:  # fmt: skip
    loss = loss_and_gradients(decoder, batches, walk, dropout_key=(0, 0), check=check)
    found = {}
    for name, value in parameters.items():
        assert value.grad is not None, name
        found[name], value.grad = value.grad, None
    return loss, found


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("grid", ["nf4", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_peft(tmp_path: Path, family: str, grid: str) -> None:
    from peft_twin import loss_sum, peft_model, peft_parameters

    base = make_base(tmp_path, family, grid)
    decoder, parameters, config = adapted(base)
    twin = peft_model(base, config, {name: value.detach().numpy() for name, value in parameters.items()})
    batches = [random_batch(301, 3, 37, seed=1), random_batch(301, 1, 20, seed=2)]
    supervised = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    expected = sum(loss_sum(twin, batch) for batch in batches) / supervised
    expected.backward()
    loss, found = gradients(decoder, parameters, batches, Walk(0, 1))
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    reference = peft_parameters(twin)
    assert found.keys() == reference.keys()
    for name, gradient in found.items():
        assert reference[name].grad.norm() > 1e-4
        assert relative(gradient, reference[name].grad) < 1e-4, name


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_bit(tmp_path: Path, dropout: float, family: str) -> None:
    base = make_base(tmp_path, family, num_hidden_layers=3)
    decoder, parameters, _ = adapted(base, LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout))
    batches = [random_batch(301, 2, 30, seed=1), random_batch(301, 2, 30, seed=2)]
    loss, kept = gradients(decoder, parameters, batches, Walk(0, 0))
    for recompute_layers in (1, 2, 3):
        again, found = gradients(decoder, parameters, batches, Walk(0, recompute_layers))
        assert again == loss
        for name in kept:
            assert torch.equal(found[name], kept[name]), name


def test_dropout_differs_between_steps_and_micro_batches(tmp_path: Path) -> None:
    decoder, *_ = adapted(make_base(tmp_path), LoraConfig(r=3, lora_dropout=0.5))
    batch = random_batch(301, 2, 30, seed=1)
    losses = [
        loss_and_gradients(decoder, batches, Walk(0, 0), dropout_key=key, check=lambda: None)
        for batches, key in (([batch], (0, 0)), ([batch], (0, 1)), ([batch], (1, 0)), ([batch, batch], (0, 0)))
    ]
    assert len(set(losses)) == 4
    assert len({evaluate(decoder, [batch], check=lambda: None) for _ in range(2)}) == 1


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma3_text"])
@pytest.mark.parametrize("first", [1, 2])
def test_top_blocks_alone_equal_autograd_over_the_whole_model(tmp_path: Path, first: int, family: str) -> None:
    config = LoraConfig(r=3, layers_to_transform=(first,))
    decoder, parameters, _ = adapted(make_base(tmp_path, family, num_hidden_layers=4), config)
    batch = random_batch(301, 2, 30)
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    logits = decoder(tensors["input_ids"], tensors["position_ids"], tensors["segment_ids"])
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten(), ignore_index=-100)
    reference = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    for recompute_layers in range(5 - first):
        loss, found = gradients(decoder, parameters, [batch], Walk(first, recompute_layers))
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        assert max(relative(found[name], reference[name]) for name in reference) < 1e-5


def test_micro_batches_change_neither_loss_nor_gradient(tmp_path: Path) -> None:
    decoder, parameters, _ = adapted(make_base(tmp_path))
    batch = random_batch(301, 5, 30)
    batch["labels"][0, :] = -100  # the rows do not weigh the same
    pieces = [{key: value[i : i + 2] for key, value in batch.items()} for i in range(0, 5, 2)]
    loss, whole = gradients(decoder, parameters, [batch], Walk(0, 1))
    again, found = gradients(decoder, parameters, pieces, Walk(0, 1))
    assert again == pytest.approx(loss, rel=1e-6)
    assert max(relative(found[name], whole[name]) for name in whole) < 1e-5


def test_a_window_of_several_rows_equals_the_rows_alone(tmp_path: Path) -> None:
    decoder, parameters, _ = adapted(make_base(tmp_path))
    window = random_batch(301, 1, 30)
    segments, rows = window["segment_ids"][0], []
    for segment in (0, 1):
        rows.append({key: value[:, segments == segment] for key, value in window.items()})
        rows[-1]["segment_ids"] = np.zeros_like(rows[-1]["segment_ids"])
    loss, packed = gradients(decoder, parameters, [window], Walk(0, 0))
    again, alone = gradients(decoder, parameters, rows, Walk(0, 0))
    assert again == pytest.approx(loss, rel=1e-6)
    assert max(relative(packed[name], alone[name]) for name in alone) < 1e-5


def test_evaluation_is_the_loss_of_the_step(tmp_path: Path) -> None:
    decoder, parameters, _ = adapted(make_base(tmp_path))
    batches = [random_batch(301, 3, 37, seed=1), random_batch(301, 1, 20, seed=2)]
    loss, _ = gradients(decoder, parameters, batches, Walk(0, 1))
    assert evaluate(decoder, batches, check=lambda: None) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("grid", ["nf4", "int4"])
def test_tiles_of_the_weights_change_gradients_by_rounding_alone(tmp_path: Path, grid: str) -> None:
    base, batch = make_base(tmp_path, grid=grid), random_batch(301, 2, 30)
    decoder, parameters, _ = adapted(base)
    loss, whole = gradients(decoder, parameters, [batch], Walk(0, 1))
    for tile_weights in (1, 777, 3000):
        decoder, parameters, _ = adapted(base)
        decoder.workspace.tile_weights = tile_weights
        again, found = gradients(decoder, parameters, [batch], Walk(0, 1))
        longest = max(columns for _, columns in decoder.config.matrices().values())
        assert decoder.workspace.sizes["weight"] <= 4 * max(tile_weights, longest)
        assert again == pytest.approx(loss, rel=1e-6)
        assert max(relative(found[name], whole[name]) for name in whole) < 1e-5


def test_check_runs_between_blocks_and_can_leave_the_step(tmp_path: Path) -> None:
    config = LoraConfig(r=3, layers_to_transform=(1,))
    decoder, parameters, _ = adapted(make_base(tmp_path, num_hidden_layers=3), config)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    gradients(decoder, parameters, [random_batch(301, 1, 20)], Walk(1, 1), count)
    assert calls == 1 + 2 + 1 + 2  # a lower block, two forward, the loss, two backward


def test_inputs_of_blocks_on_disk_change_no_bit(tmp_path: Path) -> None:
    decoder, parameters, _ = adapted(make_base(tmp_path, num_hidden_layers=3))
    batches = [random_batch(301, 2, 30, seed=1), random_batch(301, 2, 24, seed=2)]
    loss, kept = gradients(decoder, parameters, batches, Walk(0, 3))
    elsewhere, parameters, _ = adapted(tmp_path / "base")
    (tmp_path / "run").mkdir()
    elsewhere.workspace.offload_to = tmp_path / "run"
    again, found = gradients(elsewhere, parameters, batches, Walk(0, 3))
    assert again == loss
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert {name for name in elsewhere.workspace.sizes if "input" in name} == {"input.0", "input.1"}
    assert not list((tmp_path / "run").iterdir()), "the file has no name"


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    decoder, parameters, _ = adapted(make_base(tmp_path))
    decoder.workspace.offload_to = tmp_path / "gone"
    with pytest.raises(ConfigError, match=r"activation_offloading cannot write .* to .*gone: No such file"):
        gradients(decoder, parameters, [random_batch(301, 2, 30)], Walk(0, 2))


def test_a_disk_with_room_for_a_part_is_said(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, content: object) -> int:
            return 7

    workspace = Workspace(offload_to=tmp_path)
    workspace._file = Full()
    with pytest.raises(ConfigError, match=r"cannot write .*: No space left on device\. Free some storage"):
        workspace.put(0, torch.ones(3, 5))
