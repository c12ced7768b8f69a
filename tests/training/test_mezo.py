"""MeZO: its projected gradient against autograd, its update in closed form, and steps that leave nothing behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgetune.adapters.attach import attach, set_dropout
from edgetune.adapters.lora import LoraConfig
from edgetune.checkpoint import read_checkpoint
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.objectives.sft import Measured
from edgetune.training import loop, mezo
from edgetune.training.forward import evaluate
from edgetune.training.stop import Guard, Stopped
from tests.training.conftest import make_base, make_plan, random_batch, write_rows

KEY = (11, 4)


def no_check() -> None:
    pass


def made(base: Path, config: LoraConfig | None = None, **settings: Any) -> tuple[mezo.Rule, dict[str, nn.Parameter]]:
    """The rule over an adapter that is not zero."""
    plan = make_plan(base, adapter=config or LoraConfig(r=3, lora_alpha=7), step_rule="mezo", **settings)
    decoder = load_decoder(base)
    parameters = attach(decoder, plan.adapter, seed=5)
    generator = torch.Generator().manual_seed(6)
    for value in parameters.values():
        value.data.add_(0.1 * torch.randn(value.shape, generator=generator))
    return mezo.Rule(decoder, parameters, plan, None), parameters


def copies(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


def directions(rule: mezo.Rule, parameters: dict[str, nn.Parameter], key: tuple[int, int] = KEY) -> dict[str, Any]:
    """Z of a step, seen from outside: an update of rate -1 where g = 1 adds it to zeros."""
    before = copies(parameters)
    for value in parameters.values():
        value.data.zero_()
    rule.gradient([], key, no_check)
    rule.projected = 1.0
    rule.update(-1.0)
    found = copies(parameters)
    for name, value in parameters.items():
        value.data.copy_(before[name])
    return found


def mean_loss(decoder: Decoder, batches: list[dict[str, np.ndarray]], key: tuple[int, int]) -> torch.Tensor:
    """The same loss through autograd, by whole logits."""
    total, count = torch.zeros(()), 0
    for index, batch in enumerate(batches):
        set_dropout(decoder, (*key, index))
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        logits = decoder(tensors["input_ids"], tensors["position_ids"], tensors["segment_ids"])
        labels = tensors["labels"].flatten()
        total = total + nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("family", "layers"), [("llama", (0, 1)), ("qwen3", (1,))])
def test_the_projected_gradient_is_autograd_s_along_z(
    tmp_path: Path, family: str, layers: tuple[int, ...], dropout: float
) -> None:
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, layers_to_transform=layers)
    rule, parameters = made(make_base(tmp_path, family), config, max_grad_norm=1e9)
    batches = [random_batch(301, 3, 37, seed=1), random_batch(301, 1, 20, seed=2)]
    expected = mean_loss(rule.decoder, batches, KEY)
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    z = directions(rule, parameters)
    along = sum(float((g * z[name]).sum()) for g, name in zip(gradients, parameters, strict=True))
    loss, norm = rule.gradient(batches, KEY, no_check)
    assert abs(along) > 0.1
    assert rule.projected == pytest.approx(along, rel=1e-2, abs=1e-2) and norm == abs(rule.projected)
    assert loss == pytest.approx(expected.item(), rel=1e-3)


def test_z_is_standard_normal_and_of_its_seed_and_step_alone(tmp_path: Path) -> None:
    rule, parameters = made(make_base(tmp_path))
    z = directions(rule, parameters)
    every = torch.cat([value.flatten() for value in z.values()])
    assert abs(float(every.mean())) < 5 * len(every) ** -0.5
    assert float(every.std()) == pytest.approx(1, abs=5 * (2 * len(every)) ** -0.5)
    again, others = made(tmp_path / "base")
    assert all(torch.equal(value, z[name]) for name, value in directions(again, others).items())
    for key in ((11, 5), (12, 4)):
        assert not any(torch.equal(value, z[name]) for name, value in directions(rule, parameters, key).items())


def test_z_is_not_drawn_from_the_numbers_of_a_dropout_mask(tmp_path: Path) -> None:
    rule, _ = made(make_base(tmp_path))
    rule.gradient([], KEY, no_check)
    # numpy fills entropy up with zeros: the first mask's, of batch 0 and slot 0, would be that of the step alone.
    first, step = (int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1) for key in ((*KEY, 0, 0), KEY))
    assert rule.seed != first == step


def test_the_update_is_sgd_with_decoupled_decay(tmp_path: Path) -> None:
    rule, parameters = made(make_base(tmp_path), weight_decay=0.1, max_grad_norm=1e9)
    z, before = directions(rule, parameters), copies(parameters)
    rule.gradient([random_batch(301, 2, 30)], KEY, no_check)
    rule.update(0.03)
    for name, value in parameters.items():
        expected = (1 - 0.03 * 0.1) * before[name].double() - 0.03 * rule.projected * z[name].double()
        torch.testing.assert_close(value.detach().double(), expected, rtol=0, atol=1e-6)


def test_the_projected_gradient_is_clipped_and_its_norm_told_before(tmp_path: Path) -> None:
    batch = random_batch(301, 2, 30)
    rule, _ = made(make_base(tmp_path), max_grad_norm=1e9)
    _, norm = rule.gradient([batch], KEY, no_check)
    clipped, _ = made(tmp_path / "base", max_grad_norm=norm / 3)
    assert clipped.gradient([batch], KEY, no_check)[1] == norm
    assert clipped.projected == pytest.approx(np.sign(rule.projected) * norm / 3)


@pytest.mark.parametrize("checks", [1, 3, 4, 6])
@pytest.mark.parametrize("error", [Stopped("signal"), MemoryError()])
def test_a_step_that_is_left_leaves_the_adapter_as_it_was(tmp_path: Path, checks: int, error: BaseException) -> None:
    """Two blocks and the loss are three checks of each of the two passes."""
    rule, parameters = made(make_base(tmp_path))
    before, calls = copies(parameters), 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == checks:
            assert not any(torch.equal(value, before[name]) for name, value in parameters.items())
            raise error

    with pytest.raises(type(error)):
        rule.gradient([random_batch(301, 2, 30)], KEY, check)
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())
    rule.gradient([random_batch(301, 2, 30)], KEY, no_check)
    rule.drop()
    assert all(torch.equal(value, before[name]) for name, value in parameters.items())


def test_nothing_is_kept_but_one_copy_of_the_adapter(tmp_path: Path) -> None:
    rule, parameters = made(make_base(tmp_path))
    rule.gradient([random_batch(301, 2, 30)], KEY, no_check)
    rule.update(1e-3)
    assert all(value.grad is None for value in parameters.values())
    assert rule.tensors() == {}
    assert sum(theta.numel() for _, theta in rule.pairs) == sum(value.numel() for value in parameters.values())


def test_it_learns_a_batch_by_heart(tmp_path: Path) -> None:
    rule, _ = made(make_base(tmp_path), max_grad_norm=1e9)
    batch = random_batch(301, 2, 24)
    before = evaluate(rule.decoder, [batch], check=no_check)
    for step in range(300):
        rule.gradient([batch], (0, step), no_check)
        rule.update(1e-4)
    assert evaluate(rule.decoder, [batch], check=no_check) < before - 0.7


def at_step(step: int, action: Callable[[], object]) -> Callable[[loop.Progress], None]:
    return lambda progress: action() if progress.step == step else None


def test_a_run_is_stopped_anywhere_and_resumed_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = make_base(tmp_path), write_rows(tmp_path / "rows.jsonl", 40)
    plan = make_plan(base, adapter=LoraConfig(r=3, lora_dropout=0.2), step_rule="mezo", optimizer="sgd")
    once = loop.train(plan, base, data=data, out=tmp_path / "once").summary
    assert (once["stopped"], once["steps"], once["skipped_steps"]) == ("done", 12, 0)
    first, last = (read_checkpoint(tmp_path / "once" / "checkpoints", step) for step in (11, 12))
    assert last.tensors("optim") == {}
    assert not np.array_equal(*(kept.tensors("adapter")["model.layers.0.mlp.up_proj.lora_A"] for kept in (first, last)))

    stop = at_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert loop.train(plan, base, data=data, out=tmp_path / "between", on_progress=stop).summary["steps"] == 7
    real, calls = Guard.check, 0

    def check(self: Guard) -> None:
        nonlocal calls
        calls += 1
        if calls == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    monkeypatch.setattr(Guard, "check", check)
    assert 0 < loop.train(plan, base, data=data, out=tmp_path / "inside").summary["steps"] < 12
    monkeypatch.undo()
    for name in ("between", "inside"):
        summary = loop.train(plan, base, data=data, out=tmp_path / name, resume=True).summary
        assert summary["adapter_sha256"] == once["adapter_sha256"]


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = make_base(tmp_path), write_rows(tmp_path / "rows.jsonl", 40)
    monkeypatch.setattr(mezo, "measure", lambda *_: Measured(float("inf")))
    plan = make_plan(base, step_rule="mezo", eval_fraction=0.0)
    run = loop.train(plan, base, data=data, out=tmp_path / "run")
    assert (run.summary["steps"], run.summary["skipped_steps"]) == (12, 12)
    first, last = (read_checkpoint(run.folder / "checkpoints", step).tensors("adapter") for step in (11, 12))
    assert all(np.array_equal(first[name], last[name]) for name in first)
