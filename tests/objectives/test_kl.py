"""The divergence from the base against torch.autograd, and a step that has it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.adapters import METHODS
from edgetune.adapters.attach import attach, detached
from edgetune.adapters.lora import LoraConfig
from edgetune.data import Row, Window, stack
from edgetune.linear import Workspace
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.objectives import kl
from edgetune.planner import costs
from edgetune.planner.job import Job, row_step
from edgetune.planner.work import step_work
from edgetune.training import backprop
from edgetune.training.anchor import Anchor
from edgetune.training.batches import Batches
from tests.training.conftest import make_base, make_plan


class Head:
    """A dense head in tiles of so many rows."""

    def __init__(self, weight: torch.Tensor, rows: int) -> None:
        self.weight, self.rows = weight, rows

    def tiles(self) -> Any:
        for start in range(0, len(self.weight), self.rows):
            at = slice(start, min(start + self.rows, len(self.weight)))
            yield at, self.weight[at]


@pytest.mark.parametrize(("size", "vocab", "rows"), [(1, 2, 2), (7, 37, 11), (131, 301, 100), (64, 50, 64)])
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_value_and_gradient_are_those_of_autograd(size: int, vocab: int, rows: int, scale: float) -> None:
    torch.manual_seed(size)
    weight, base = torch.randn(vocab, 24), scale * torch.randn(size, 24)
    hidden = (base + 0.3 * torch.randn(size, 24)).requires_grad_()
    p, q = (torch.log_softmax(x.double() @ weight.double().T, 1) for x in (base, hidden))
    wanted = (p.exp() * (p - q)).sum(1)
    wanted.sum().backward()

    batch = {"labels": np.zeros((1, size + 3), np.int64)}
    batch["labels"][0, [0, 2, size]] = -100  # some positions are none
    kept = torch.from_numpy(batch["labels"][0] != -100).nonzero()[:, 0]
    given = torch.randn(size + 3, 24).index_copy_(0, kept, hidden.detach())
    filled = torch.cat([base, torch.zeros(5, 24)])
    objective, head = kl.Objective(filled), Head(weight, rows)
    assert objective.units(batch) == size
    alone = objective.loss(given.clone(), batch, head, Workspace())
    measured = objective.loss_and_gradient(given, batch, head, Workspace())
    assert alone.loss == measured.loss == pytest.approx(wanted.sum().item(), rel=2e-5, abs=1e-5)
    assert hidden.grad is not None
    torch.testing.assert_close(given[kept], hidden.grad, rtol=1e-4, atol=2e-5)
    given[kept] = 0
    assert not given.any()


def test_equal_states_do_not_diverge() -> None:
    base = torch.randn(5, 24)
    found = kl.divergences(base.clone(), base, Head(torch.randn(37, 24), 10), Workspace())
    assert not found.any()


def windows(count: int, length: int, shortest: int = 2) -> list[Window]:
    rng = np.random.default_rng(0)
    made = []
    for line in range(count):
        ids = rng.integers(0, 301, int(rng.integers(shortest, length + 1))).astype(np.int32)
        made.append(Window((Row(ids, ids, line),), length))
    return made


def adapted(tmp_path: Path, method: str, **settings: Any) -> tuple[Path, Decoder, Any]:
    base = make_base(tmp_path, num_hidden_layers=4, hidden_size=128)
    decoder = load_decoder(base)
    decoder.workspace.tile_weights = 3000
    adapter = METHODS[method].Config(**settings).resolved(decoder.config)
    torch.manual_seed(0)
    for value in attach(decoder, adapter).values():
        value.data.add_(0.1 * torch.randn_like(value))
    return base, decoder, adapter


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "ln_tuning", "full", "bottleneck"])
def test_detached_is_the_base_and_comes_back(tmp_path: Path, method: str) -> None:
    base, decoder, _ = adapted(tmp_path, method)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = decoder(ids)
        with detached(decoder):
            assert torch.equal(decoder(ids), load_decoder(base)(ids))
        assert torch.equal(decoder(ids), before)


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (2, 3)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_step_and_its_buffers(tmp_path: Path, layers: tuple[int, ...], threads: int) -> None:
    base, decoder, _ = adapted(tmp_path, "lora", r=4, layers_to_transform=layers)
    plan = make_plan(
        base, adapter=LoraConfig(r=4, layers_to_transform=layers), kl_weight=0.7, batch_size=3, threads=threads
    )
    texts = windows(5, 40)
    anchor = Anchor(decoder, texts, plan)
    walk = backprop.Path(min(layers), 1, row_step=row_step(threads))
    found = backprop.anchor_gradients(decoder, anchor, walk, (3, 1, 2), lambda: None)

    batch = anchor.of_step(1)
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    kept = tensors["labels"] != -100
    with torch.enable_grad():
        y = decoder(tensors["input_ids"], tensors["position_ids"], tensors["segment_ids"])[kept].double()
        with torch.no_grad(), detached(decoder):
            z = decoder(tensors["input_ids"], tensors["position_ids"], tensors["segment_ids"])[kept].double()
        p, q = z.log_softmax(1), y.log_softmax(1)
        wanted = (p.exp() * (p - q)).sum(1).mean()
        parameters = [value for value in decoder.parameters() if value.grad is not None]
        gradients = torch.autograd.grad(0.7 * wanted, parameters)
    assert found == pytest.approx(wanted.item(), rel=1e-4) and found > 1e-3
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-3, atol=1e-6)


def test_a_step_adds_it_under_dropout_masks_of_its_own(tmp_path: Path) -> None:
    base, decoder, adapter = adapted(tmp_path, "lora", r=4, lora_dropout=0.5)
    plan = make_plan(base, adapter=adapter, kl_weight=0.7, batch_size=3)
    rule = backprop.Rule(decoder, dict(decoder.named_parameters()), plan, None)
    batches = [stack(windows(3, 40))] * 2
    alone, _ = rule.gradient(batches, (3, 1), lambda: None)
    rule.anchor = Anchor(decoder, windows(5, 40), plan)
    loss, _ = rule.gradient(batches, (3, 1), lambda: None)
    found = [
        backprop.anchor_gradients(decoder, rule.anchor, rule.path, (3, 1, index), lambda: None) for index in range(3)
    ]
    assert len(set(found)) == 3 and rule.figures["base_kl"] == found[2]
    assert loss == pytest.approx(alone + 0.7 * found[2], rel=1e-6)


def test_all_texts_are_seen_as_often_in_an_order_of_their_own(tmp_path: Path) -> None:
    base, decoder, adapter = adapted(tmp_path, "lora", r=4)
    plan, texts = make_plan(base, adapter=adapter, kl_weight=1.0, batch_size=3), windows(7, 40)
    numbers = {tuple(window.input_ids.tolist()): index for index, window in enumerate(texts)}

    def order(batches: Any) -> list[int]:
        return [numbers[tuple(ids)] for batch in batches for ids in batch["input_ids"].tolist()]

    anchor = Anchor(decoder, texts, plan)
    seen = order(anchor.of_step(step) for step in range(14))
    assert all(sorted(seen[start : start + 7]) == list(range(7)) for start in range(0, 42, 7))
    assert order([anchor.of_step(5)]) == seen[15:18], "a step needs none before it"
    settings: dict[str, Any] = {"batch_size": 3, "gradient_accumulation_steps": 1, "seed": plan.seed}
    task = Batches(texts, **settings)
    mixed = Batches(texts, **settings, retention=texts, retention_share=1.0)
    for other in (task, mixed):
        assert order(batch for step in range(14) for batch in other.of_step(step)[0]) != seen


@pytest.mark.parametrize(("layers", "threads"), [((0, 1, 2, 3), 1), ((2, 3), 2)])
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_buffers_are_those_that_the_planner_counts(
    tmp_path: Path, method: str, layers: tuple[int, ...], threads: int
) -> None:
    base, decoder, adapter = adapted(tmp_path, method, layers_to_transform=layers)
    plan = make_plan(base, adapter=METHODS[method].Config(layers_to_transform=layers), kl_weight=1.0, threads=threads,
                     batch_size=3)  # fmt: skip
    walk = backprop.Path(min(layers), 1, row_step=row_step(threads))
    texts = windows(3, 40, shortest=40)
    backprop.loss_and_gradients(decoder, [stack(texts)], walk, dropout_key=(0, 0), check=lambda: None)
    backprop.anchor_gradients(decoder, Anchor(decoder, texts, plan), walk, (3, 1, 2), lambda: None)
    job = Job(
        model=decoder.config, adapter=adapter, optimizer="adamw", grid="nf4", batch_size=3,
        gradient_accumulation_steps=1, max_seq_length=40, recompute_layers=1, tile_weights=3000,
        activation_offloading=False, dequantized_layers=0, step_rule="backprop", threads=threads,
        supervised_per_window=39, anchored_per_window=39,
    )  # fmt: skip
    assert decoder.workspace.sizes == costs.buffers(job)
    plain = step_work(dataclasses.replace(job, anchored_per_window=0))
    more = step_work(job)
    assert 2 * plain.flops < more.flops < 3 * plain.flops and more.traffic_bytes > 2 * plain.traffic_bytes
