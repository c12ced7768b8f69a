"""Gradients of the hand-driven encoder and its objectives, against torch's autograd over `models.encoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch reader knows
from tiny_encoder import encoder_hf, write_encoder
from torch import nn

from edgetune.adapters import head
from edgetune.adapters.attach import attach
from edgetune.adapters.bitfit import BitfitConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.data.labeled import LabeledRow
from edgetune.models.encoder import Encoder, load_encoder
from edgetune.models.pooling import Pooling
from edgetune.objectives import ENCODER_OBJECTIVES
from edgetune.quantizer import quantize
from edgetune.training.encoder_step import Rule, Task, evaluate, stack

CLASSES = ("a", "b", "c", "d", "e")
LENGTHS = ((9, 4), (75, 3), (17, 30), (5, 5), (66, 8))  # of the two texts of each row; two are longer than a tile


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_encoder(tmp_path_factory.mktemp("encoder") / "model", encoder_hf(num_hidden_layers=3))
    return quantize(model, "int4", model.parent / "int4")


def rows(objective: str) -> list[LabeledRow]:
    """Five rows, of one text each but for pairs."""
    rng, made = np.random.default_rng(4), []
    for index, lengths in enumerate(LENGTHS):
        used = lengths if objective == "embedding" else lengths[:1]
        labels: Any = {
            "classification": np.array([index % 4], np.int32), "regression": np.array([index / 3 - 1], np.float32),
            "token-classification": np.where(rng.random(sum(used)) < 0.5, rng.integers(0, 5, sum(used)), -100),
            "embedding": np.empty(0, np.float32),
        }[objective]  # fmt: skip
        made.append(LabeledRow(rng.integers(5, 301, sum(used)).astype(np.int32), labels, index, lengths=used))
    return made


def tuned(
    base: Path, objective: str, pooling: str = "mean", adapter: AdapterConfig | None = None, **lora: Any
) -> tuple[Encoder, Task, dict[str, nn.Parameter], AdapterConfig]:
    """An encoder with an adapter, LoRA where no other is given, and a head that are not zero."""
    encoder = load_encoder(base)
    encoder.config = replace(encoder.config, pooling=Pooling(pooling))
    config = (adapter or LoraConfig(**({"r": 3, "lora_alpha": 7} | lora))).resolved(encoder.config)
    parameters = attach(encoder, config, seed=5)
    shapes = head.head_shapes(objective, CLASSES, encoder.config.hidden_size)
    extra = {name: nn.Parameter(torch.from_numpy(value)) for name, value in head.initialize(shapes, 1).items()}
    generator = torch.Generator().manual_seed(6)
    for value in (*parameters.values(), *extra.values()):
        value.data.add_(0.1 * torch.randn(value.shape, generator=generator))
    return encoder, Task(encoder, objective, extra), parameters | extra, config


def rule(
    encoder: Encoder, task: Task, parameters: dict[str, nn.Parameter], config: AdapterConfig, again: int = 1
) -> Rule:
    plan: Any = SimpleNamespace(
        max_grad_norm=1.0, adapter=config, recompute_layers=again, optimizer="adamw", weight_decay=0.0
    )
    return Rule(encoder, task, parameters, plan)


def _info_nce(pooled: torch.Tensor, batch: Mapping[str, np.ndarray]) -> torch.Tensor:
    unit = F.normalize(pooled)
    return F.cross_entropy(20 * unit[0::2] @ unit[1::2].T, torch.arange(len(pooled) // 2), reduction="sum")


# Objective -> its loss as torch has it, of logits (or pooled states) and labels.
LOSSES: dict[str, Callable[[torch.Tensor, Mapping[str, np.ndarray]], torch.Tensor]] = {
    "classification": lambda z, b: F.cross_entropy(z, torch.from_numpy(b["labels"]).long(), reduction="sum"),
    "token-classification": lambda z, b: F.cross_entropy(z, torch.from_numpy(b["labels"]).long(), reduction="sum"),
    "regression": lambda z, b: F.mse_loss(z[:, 0], torch.from_numpy(b["labels"]), reduction="sum"),
    "embedding": _info_nce,
}


def reference(encoder: Encoder, task: Task, objective: str, batches: list[Mapping[str, np.ndarray]]) -> torch.Tensor:
    """The step's mean loss, each text alone through the module's own forward."""
    total = torch.zeros(())
    for batch in batches:
        hidden = []
        for part in np.split(batch["input_ids"], np.cumsum(batch["lengths"])[:-1]):
            ids = torch.from_numpy(part)[None]
            hidden.append(encoder.hidden(ids, torch.ones_like(ids))[0])
        outputs = torch.cat(hidden)
        if objective != "token-classification":
            mode = encoder.config.pooling.mode
            outputs = torch.stack([x[0] if mode == "cls" else x.mean(0) for x in hidden])
        if task.head:
            outputs = outputs @ task.head[head.WEIGHT].T + task.head[head.BIAS]
        total = total + LOSSES[objective](outputs, batch)
    return total / max(1, sum(ENCODER_OBJECTIVES[objective].count(batch) for batch in batches))


@pytest.mark.parametrize(
    ("objective", "pooling", "adapter"),
    [
        *((objective, pooling, None) for objective in ENCODER_OBJECTIVES for pooling in ("mean", "cls")),
        ("token-classification", "mean", BitfitConfig(layers_to_transform=(1, 2))),
    ],
)
def test_equals_autograd(base: Path, objective: str, pooling: str, adapter: AdapterConfig | None) -> None:
    encoder, task, parameters, config = tuned(base, objective, pooling, adapter)
    found = rows(objective)
    batches = [stack(found[:3]), stack(found[3:])]
    expected = reference(encoder, task, objective, batches)
    wanted = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    loss = rule(encoder, task, parameters, config).loss_and_gradients(batches, (0, 0), lambda: None)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in wanted.items():
        grad = parameters[name].grad
        assert grad is not None
        assert float((grad - gradient).norm()) < 2e-5 * max(1.0, float(gradient.norm())), name
    with torch.no_grad():
        held_out, metric = evaluate(encoder, task, batches, lambda: None)
    assert held_out == pytest.approx(expected.item(), rel=1e-5)
    assert 0 <= metric <= (10 if objective == "regression" else 1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_and_frozen_lower_blocks_change_no_bit(base: Path, dropout: float) -> None:
    encoder, task, parameters, config = tuned(base, "classification", layers_to_transform=(1, 2), lora_dropout=dropout)
    batches, seen = [stack(rows("classification"))], []
    for again in (0, 1, 2):
        loss = rule(encoder, task, parameters, config, again).loss_and_gradients(batches, (3, 1), lambda: None)
        seen.append({name: value.grad for name, value in parameters.items()} | {"loss": torch.tensor(loss)})
        for value in parameters.values():
            value.grad = None
    for other in seen[1:]:
        for name, value in seen[0].items():
            assert value is not None
            assert torch.equal(value, other[name]), name
    plain = reference(encoder, task, "classification", batches).item()
    assert (dropout == 0) == (float(seen[0]["loss"]) == pytest.approx(plain, rel=1e-4))


def test_no_code_is_kept_for_each_shape(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By oneDNN's own log: micro-batches have as many shapes as sums of lengths."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    encoder, task, parameters, config = tuned(base, "classification")
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):  # type: ignore[no-untyped-call]
        torch.nn.functional.gelu(torch.ones(3, 1201))
        assert "eltwise_gelu_erf" in capfd.readouterr().out
        rule(encoder, task, parameters, config).loss_and_gradients(
            [stack(rows("classification"))], (0, 0), lambda: None
        )
        assert "create:" not in capfd.readouterr().out
        torch.nn.functional.gelu(torch.ones(3, 1203))
        assert "eltwise_gelu_erf" in capfd.readouterr().out, "what the caller had is there again"
