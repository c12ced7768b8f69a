"""`plan_module`, `train_module` and `budget`: what a step takes, resume to the bit, and a limit that holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_module import SmallNet, accelerometer_rows, seeded
from torch import nn
from torch.nn import functional

import edgetune as et
from edgetune.checkpoint import PLAN, latest_checkpoint
from edgetune.memory import anonymous_bytes
from edgetune.modules import plan as planning
from edgetune.modules import trainer as training

ROOMY = 8 << 30


@pytest.fixture
def roomy() -> et.DeviceProfile:
    """A watch whose budget holds a process that has run other tests."""
    watch = et.load_device("galaxy-watch-7")
    return dataclasses.replace(watch, memory=dataclasses.replace(watch.memory, budget_mib=ROOMY >> 20))


def small_net(**settings: Any) -> et.AttachedModule:
    return et.attach(seeded(SmallNet), et.LoraConfig(r=4, **settings))


def train(attached: et.AttachedModule, device: et.DeviceProfile, out: Path, **settings: Any) -> Any:
    x, y = accelerometer_rows(30)
    config = et.TrainConfig(**{"num_epochs": 3.0, "batch_size": 8, "seed": 5} | settings.pop("config", {}))
    return et.train_module(attached, x, y, device, loss=functional.cross_entropy, out=out, config=config, **settings)


def test_it_learns_and_leaves_the_base_alone(roomy: et.DeviceProfile, tmp_path: Path) -> None:
    attached = small_net()
    before, x, y = attached.base_sha256, *accelerometer_rows(30)
    with torch.no_grad():
        start = float(functional.cross_entropy(attached(x), y))
    run = train(attached, roomy, tmp_path / "run", config={"num_epochs": 12.0, "learning_rate": 0.02})
    with torch.no_grad():
        assert float(functional.cross_entropy(attached(x), y)) < 0.7 * start
    assert attached.base_sha256 == before and not attached.training
    summary = run.summary
    assert run.stopped == "done" and summary["steps"] == 12 * 4 and summary["skipped_steps"] == 0
    assert summary["settings"]["base_sha256"] == before
    assert summary["predicted_peak_bytes"] < ROOMY and summary["measured_peak_bytes"] < ROOMY
    assert summary["trainable_parameters"] * 4 == attached.adapter_nbytes
    again = small_net().load(run.folder)
    torch.testing.assert_close(again(x), attached(x), atol=0, rtol=0)


def test_a_step_is_that_of_torch(roomy: et.DeviceProfile, tmp_path: Path) -> None:
    """Two steps of clipping and AdamW, micro-batches against whole ones of plain torch."""
    attached, twin = small_net(), small_net()
    config = {"num_epochs": 2.0, "batch_size": 11, "gradient_accumulation_steps": 3, "lr_scheduler_type": "constant",
              "warmup_ratio": 0.0, "learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5}  # fmt: skip
    train(attached, roomy, tmp_path / "run", config=config)
    optimizer = torch.optim.AdamW(twin.trainable().values(), lr=0.01, weight_decay=0.1)
    x, y = accelerometer_rows(30)
    twin.train()
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(twin(x), y).backward()
        nn.utils.clip_grad_norm_(twin.trainable().values(), 0.5)
        optimizer.step()
    for name, value in twin.trainable().items():
        torch.testing.assert_close(attached.trainable()[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_a_stopped_run_ends_with_the_same_bytes(
    roomy: et.DeviceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = small_net(lora_dropout=0.2)
    train(whole, roomy, tmp_path / "whole")
    checks, stop_at = iter(range(1000)), 6

    def check(self: Any) -> None:
        if next(checks) == stop_at:
            raise training.Stopped("budget")

    monkeypatch.setattr(training.Guard, "check", check)
    run = train(small_net(lora_dropout=0.2), roomy, tmp_path / "run")
    assert run.stopped == "budget" and run.summary["steps"] == stop_at
    monkeypatch.undo()
    resumed = small_net(lora_dropout=0.2)
    run = train(resumed, roomy, tmp_path / "run", resume=True)
    assert run.stopped == "done"
    for name, value in whole.trainable().items():
        torch.testing.assert_close(resumed.trainable()[name], value, atol=0, rtol=0, msg=name)
    lines = training.Metrics(run.folder / "metrics.jsonl").lines()
    assert [line["step"] for line in lines] == list(range(1, 13))
    with pytest.raises(et.CheckpointError, match="was written with another learning_rate"):
        train(small_net(lora_dropout=0.2), roomy, tmp_path / "run", resume=True, config={"learning_rate": 1e-4})
    with pytest.raises(et.ConfigError, match="exists and is not empty"):
        train(small_net(), roomy, tmp_path / "run")


def test_a_loss_that_is_no_number_changes_nothing(roomy: et.DeviceProfile, tmp_path: Path) -> None:
    attached, (x, y) = small_net(), accelerometer_rows(20)
    before = {name: value.clone() for name, value in attached.trainable().items()}
    run = et.train_module(
        attached, x, y, roomy, loss=lambda output, targets: output.sum() * torch.nan, out=tmp_path / "run",
        config=et.TrainConfig(num_epochs=30.0, batch_size=10),
    )  # fmt: skip
    assert run.stopped == "nonfinite" and run.summary["skipped_steps"] == 20
    assert all(torch.equal(before[name], value) for name, value in attached.trainable().items())


def test_the_plan_counts_what_a_step_allocates(roomy: et.DeviceProfile) -> None:
    attached, (x, y) = small_net(), accelerometer_rows(16)
    plan = et.plan_module(attached, x, y, roomy, loss=functional.cross_entropy)
    assert plan.batch_size == 16 and plan.simulated
    attached.train()
    step = planning._traced_bytes(attached, [x], y, functional.cross_entropy)
    assert plan.parts["step"] == pytest.approx(step, rel=0.02), "a straight line through batches of one and two"
    saved = sum(value.numel() * 4 for value in (x, *attached.trainable().values()))
    assert step > saved
    assert plan.parts["optimizer"] == 2 * attached.adapter_nbytes and plan.parts["frozen"] == attached.frozen_nbytes
    assert plan.predicted_peak_bytes == sum(plan.parts.values())
    assert "frozen" in plan.explain() and "(simulated)" in plan.explain()


def test_batches_are_conceded_to_the_budget_unless_they_were_asked_for(roomy: et.DeviceProfile) -> None:
    attached, (x, y) = small_net(), accelerometer_rows(16, length=3000)
    loss = functional.cross_entropy
    parts = et.plan_module(attached, x, y, roomy, loss=loss).parts
    for_five = sum(parts.values()) - int(parts["step"] * (11 - 0.25 * 5) / 16) + planning.RESERVE_BYTES

    def with_budget(num_bytes: int) -> et.DeviceProfile:
        return dataclasses.replace(roomy, memory=dataclasses.replace(roomy.memory, budget_mib=num_bytes >> 20))

    plan = et.plan_module(attached, x, y, with_budget(for_five), loss=loss)
    assert (plan.batch_size, plan.wanted_batch_size) == (4, 16) and "rather than 16" in plan.explain()
    with pytest.raises(et.BudgetError, match=r"a batch of 16 needs .* Ask for a smaller batch_size"):
        et.plan_module(attached, x, y, with_budget(for_five), loss=loss, batch_size=16)
    with pytest.raises(et.BudgetError, match=r"a batch of 1 needs .* Train in a new process"):
        et.plan_module(attached, x, y, with_budget(64 << 20), loss=loss)


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (et.DataError, {"inputs": np.zeros((4, 3, 40))}, "have to be tensors"),
        (et.DataError, {"targets": torch.zeros(3, dtype=torch.long)}, r"have \[20, 3\] rows"),
        (et.DataError, {"loss": lambda output, targets: output}, "no single number with gradients"),
        (et.DataError, {"loss": lambda output, targets: output.detach().sum()}, "no single number with gradients"),
        (et.ConfigError, {"config": et.TrainConfig(max_seq_length=64)}, "max_seq_length means nothing"),
        (et.ConfigError, {"config": et.TrainConfig(step_rule="mezo")}, "step_rule means nothing"),
        (et.ConfigError, {"config": et.TrainConfig(optimizer="adam")}, "optimizer"),
        (et.ConfigError, {"enforce": "kernel"}, "enforce = 'kernel'"),
    ],
)
def test_what_cannot_be_trained(
    error: type[Exception], change: dict[str, Any], message: str, roomy: et.DeviceProfile, tmp_path: Path
) -> None:
    x, y = accelerometer_rows(20)
    settings: dict[str, Any] = {
        "inputs": x, "targets": y, "device": roomy, "loss": functional.cross_entropy, "out": tmp_path / "run"
    }  # fmt: skip
    with pytest.raises(error, match=message):
        et.train_module(small_net(), **settings | change)
    assert not (tmp_path / "run" / PLAN).exists() and latest_checkpoint(tmp_path / "run")[0] is None


def test_a_budget_around_any_code() -> None:
    now = anonymous_bytes()
    with et.budget(now + (512 << 20)) as held:
        held.check()
        block = np.ones(1 << 23)
        held.meter.now_bytes  # noqa: B018 - a sample
        assert held.peak_bytes >= now + block.nbytes // 2
    del block
    with pytest.raises(et.BudgetError, match="the process came to"), et.budget(anonymous_bytes() + (16 << 20)) as held:
        block = np.ones(1 << 23)
        assert held.meter.now_bytes > block.nbytes
        held.check()
    with pytest.raises(et.BudgetError, match=r"holds .* already"), et.budget(1 << 20):
        pass
    with pytest.raises(et.DeviceError, match="no device"), et.budget("galaxy-watch-70"):
        pass
    for wrong in (0, True):
        with pytest.raises(et.ConfigError, match="a device or a number of bytes"), et.budget(wrong):
            pass


def test_allocations_beyond_the_budget_fail() -> None:
    with (
        pytest.raises(et.BudgetError, match="was refused"),
        et.budget(anonymous_bytes() + (64 << 20), enforce="rlimit"),
    ):
        torch.empty(1 << 28)
    torch.empty(1 << 26)  # the limit is gone
