"""The sensitivity pass against autograd's gradient by dense weights, and the whole way of `--adapter-budget`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgetune as et
from edgetune.adapters.base import MODEL
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.cli import launch
from edgetune.data import pack, read_rows
from edgetune.errors import BudgetError, ConfigError
from edgetune.planner.plans import Plan
from edgetune.planner.sensitivity import COLUMNS, STEPS, plan_pass
from edgetune.tokenizer import load_tokenizer
from edgetune.training.batches import Batches
from edgetune.training.sensitivity import effective_rank, measure_directions
from tests.training.conftest import make_base, make_plan, write_rows

SETTINGS = et.TrainConfig(batch_size=2, gradient_accumulation_steps=1, max_seq_length=48, max_steps=3)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and rows."""
    folder = tmp_path_factory.mktemp("job")
    return make_base(folder, grid="int4"), write_rows(folder / "rows.jsonl", 40)


def gradients_by_autograd(base: Path, data: Path, plan: Plan) -> dict[str, np.ndarray]:
    """Place -> sum over the steps; transformers, with the weights that int4 gives as its parameters."""
    from peft_twin import loss_sum, transformers_model

    model = transformers_model(base)
    linears = {name: m.weight.requires_grad_() for name, m in model.named_modules() if name.endswith("_proj")}
    windows = pack(read_rows(data, load_tokenizer(base), plan.max_seq_length), plan.max_seq_length)
    batches = Batches(windows, batch_size=2, gradient_accumulation_steps=2, seed=plan.seed)
    total = {name: np.zeros(weight.shape) for name, weight in linears.items()}
    for step in range(STEPS):
        micro, _ = batches.of_step(step)
        supervised = sum(int((batch["labels"] != -100).sum()) for batch in micro)
        loss = sum(loss_sum(model, batch) for batch in micro) / supervised
        for name, gradient in zip(linears, torch.autograd.grad(loss, list(linears.values())), strict=True):
            total[name] += gradient.double().numpy()
    return total


def by_entropy(matrix: np.ndarray) -> float:
    """The effective rank, from the eigenvalues of the smaller Gram matrix."""
    gram = matrix @ matrix.T if len(matrix) < len(matrix.T) else matrix.T @ matrix
    shares = np.sqrt(np.linalg.eigvalsh(gram).clip(0))
    shares = shares[shares > 1e-7 * shares.max()] / shares.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


@pytest.mark.parametrize("r", [72, 16])
def test_the_effective_ranks_are_those_of_autograd(job: tuple[Path, Path], tmp_path: Path, r: int) -> None:
    base, data = job
    plan = make_plan(
        base, adapter=LoraConfig(r=r), max_steps=STEPS, max_grad_norm=1e12, optimizer="sgd", eval_fraction=0.0
    )  # fmt: skip
    found = measure_directions(plan, base, data=data, work=tmp_path)
    gradients = gradients_by_autograd(base, data, plan)
    assert found.keys() == gradients.keys()
    for place, gradient in gradients.items():
        wanted = by_entropy(gradient)
        if gradient.shape[1] <= r:
            assert found[place] == pytest.approx(wanted, rel=2e-3), f"{place}: A is a rotation"
        else:
            assert 0.4 * min(wanted, r) < found[place] < min(1.1 * wanted, r), f"{place}: A is a projection"
    assert not list(tmp_path.iterdir()), "its files are gone"
    assert measure_directions(plan, base, data=data) == found, "the seed decides"


def test_the_effective_rank_counts_directions() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    assert effective_rank(np.zeros((3, 5))) == 1
    assert effective_rank(np.diag([2.0, 2, 2, 0, 0]) @ turn) == pytest.approx(3)
    assert effective_rank(turn[:, :1] @ turn[:1] * 7) == pytest.approx(1)
    shares = [0.5, 0.25, 0.25]
    assert effective_rank(turn[:, :3] @ np.diag(shares) @ turn[:3]) == pytest.approx(2**1.5), "an entropy of 1.5 bits"


def test_a_budgeted_run_goes_on_with_its_ranks(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    wanted = LoraConfig(adapter_budget=20_000)
    adapter = et.allocate_ranks(base, "host", data=data, adapter=wanted, config=SETTINGS)
    plan = et.plan(base, "host", data=data, adapter=adapter, config=SETTINGS)
    run = et.train(plan, base, data=data, out=tmp_path / "run")
    stored = Plan.from_dict(json.loads((run.folder / "plan.json").read_text()))
    assert stored.adapter == adapter == plan.adapter
    assert run.summary["adapter_bytes"] == (run.folder / MODEL).stat().st_size <= 20_000
    assert 4 * run.summary["trainable_parameters"] > 12_000, "most of it is used"
    other = launch.ranks_for(
        str(base), "host", adapter=wanted, data=data, eval_data=None, config=SETTINGS, skip_bad=False
    )
    assert other == (str(base), adapter), "the child process of the command line comes to the same"
    bundle = et.export(run.folder, out=tmp_path / "bundle")  # behind the parity gate
    assert (bundle.folder / "adapter.safetensors").is_file()
    et.add_adapter(bundle.folder, run.folder, name="again")


def test_the_pass_measures_the_task_alone(job: tuple[Path, Path]) -> None:
    base, data = job
    wanted = LoraConfig(adapter_budget=20_000)
    device = "pixel-9"  # a host's budget is the memory that is free at the time
    beside = plan_pass(base, device, data=data, retention_data=data, kl_data=data, adapter=wanted, config=SETTINGS)
    assert beside == plan_pass(base, device, data=data, adapter=wanted, config=SETTINGS)
    with pytest.raises(ConfigError, match=r"kl_weight = 1 goes with rows.* Give --kl-data"):
        plan_pass(base, device, data=data, adapter=wanted, config=replace(SETTINGS, kl_weight=1.0))


def test_what_the_pass_refuses(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    budgeted = LoraConfig(adapter_budget=20_000)
    with pytest.raises(ConfigError, match=r"adapter_budget = 20000 needs rows to measure on: give --data"):
        plan_pass(base, "host", data=None, adapter=budgeted)
    with pytest.raises(ConfigError, match=r"needs the torch engine, not ort"):
        plan_pass(base, "host", data=data, adapter=budgeted, engine="ort")
    with pytest.raises(ConfigError, match=r"is not in 4 bits yet.*edgetune quantize"):
        launch.ranks_for(str(base.parent / "model"), "host", adapter=budgeted, data=data, skip_bad=False)
    small = replace(make_plan(base, adapter=LoraConfig(r=2)), budget_bytes=1 << 20)
    with pytest.raises(BudgetError, match=r"measures each linear used up the budget"):
        measure_directions(small, base, data=data, work=tmp_path)
    mixed = LoraConfig(rank_pattern={"model.layers.0.self_attn.q_proj": 2, "model.layers.1.mlp.up_proj": 4})
    with pytest.raises(ConfigError, match=r"rank_pattern cannot be set here: training graphs .* know one rank"):
        et.plan(base, "host", data=data, adapter=mixed, config=SETTINGS, engine="ort")


def test_the_pass_has_16_columns_where_they_fit(job: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = job
    wishes: dict[str, Any] = {"data": data, "adapter": LoraConfig(adapter_budget=20_000), "config": SETTINGS}
    made = plan_pass(base, "host", **wishes)
    assert isinstance(made.adapter, LoraConfig) and made.adapter.r == COLUMNS
    sums = sum(out for out, _ in open_base(base).config.linears().values()) * COLUMNS * 4
    assert sums <= made.parts["optimizer"], "they lie where a moment would"

    def tight(*words: Any, adapter: LoraConfig, **others: Any) -> Plan:
        if adapter.r is not None:
            raise BudgetError("too much")
        return et.plan(*words, adapter=adapter, **others)

    monkeypatch.setattr("edgetune.planner.sensitivity.plan", tight)
    smaller = plan_pass(base, "host", **wishes)
    assert isinstance(smaller.adapter, LoraConfig) and smaller.adapter.rank < COLUMNS, (
        "the plan's, which it may concede"
    )


def test_a_linear_of_fewer_columns_is_measured_too(tmp_path: Path) -> None:
    base = make_base(tmp_path, grid="int4", intermediate_size=12)
    data = write_rows(tmp_path / "rows.jsonl", 40)
    plan = plan_pass(base, "host", data=data, adapter=LoraConfig(adapter_budget=20_000), config=SETTINGS)
    assert isinstance(plan.adapter, LoraConfig) and plan.adapter.r == 12
    found = measure_directions(plan, base, data=data)
    assert (
        found.keys() == open_base(base).config.linears().keys()
        and 1 <= min(found.values()) <= max(found.values()) <= 12
    )
