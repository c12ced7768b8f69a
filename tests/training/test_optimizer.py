"""The clipping and the schedules against torch and Hugging Face; optimizers have a contract of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgetune.adapters.lora import LoraConfig
from edgetune.training.optimizer import Optimizer, clip_gradients
from edgetune.training.schedule import SCHEDULES, learning_rate


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(s, generator=generator)) for name, s in (("a", (7, 5)), ("b", (3,)))}


def set_gradients(group: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for value in group.values():
        value.grad = 10 ** (step % 5 - 3) * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_has_the_bits_of_torch(max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    set_gradients(ours, 4)
    set_gradients(theirs, 4)
    expected = nn.utils.clip_grad_norm_(theirs.values(), max_norm, foreach=False)
    assert clip_gradients(ours.values(), max_norm) == float(expected)
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in ours)


def test_clipping_reports_a_norm_that_is_not_finite() -> None:
    group = parameters()
    set_gradients(group, 4)
    group["a"].grad[2, 3] = torch.inf
    kept = group["b"].grad.clone()
    assert clip_gradients(group.values(), 1.0) == float("inf")
    assert torch.equal(group["b"].grad, kept)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_schedules_after_the_warm_up_are_those_of_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    warmup, steps = 4, 23
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(steps):
        rate = learning_rate(step, peak=0.3, warmup_steps=warmup, max_steps=steps, schedule=schedule)
        assert rate > 0
        if step >= warmup:
            assert rate == pytest.approx(reference.get_last_lr()[0])
        else:  # theirs begins at zero, ours one step further on
            assert rate == pytest.approx(0.3 * (step + 1) / warmup)
        optimizer.step()
        reference.step()


def test_no_warm_up_begins_at_the_peak() -> None:
    assert learning_rate(0, peak=0.3, warmup_steps=0, max_steps=1, schedule="cosine") == 0.3


def test_lora_plus_is_a_group_of_its_own_rate() -> None:
    """The two groups of PEFT's `create_loraplus_optimizer`: B at `loraplus_lr_ratio` times the rate of A."""
    ours, theirs = parameters(), parameters()
    named = {"q_proj.lora_A": ours["a"], "q_proj.lora_B": ours["b"]}
    optimizer = Optimizer("adamw", named, weight_decay=0.1, lr_ratio=LoraConfig(loraplus_lr_ratio=16).lr_ratio)
    groups = [{"params": [theirs["a"]]}, {"params": [theirs["b"]], "lr": 16 * 0.01}]
    reference = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, foreach=False)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step(0.01)
        reference.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
