"""Fast products: exact, of the shapes that the planner counts, and used only where they are exact."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edgetune import TrainConfig, host, planner, products
from edgetune.adapters.full import FullConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.loreft import LoreftConfig
from edgetune.adapters.lst import LstConfig
from edgetune.errors import ConfigError
from edgetune.planner import costs, wishes
from edgetune.planner.job import Job
from edgetune.planner.plans import Plan
from edgetune.products import CODE_BYTES, are_offered, fast_products
from edgetune.quantizer import read_manifest
from edgetune.training.backprop import Path as Walk
from edgetune.training.inputs import read_inputs
from tests.conftest import tiny_config, write_model
from tests.training.conftest import make_base, make_plan, random_batch
from tests.training.test_backprop import adapted, gradients

wide = pytest.mark.skipif(not products._reaches_exact_kernels(), reason="this processor has no fast exact products")


@pytest.fixture
def fresh() -> Iterator[None]:
    products._reaches_exact_kernels.cache_clear()
    yield
    products._reaches_exact_kernels.cache_clear()


def _job(plan: Plan) -> Job:
    """A plan's, where every position but the last of a window is supervised."""
    names = {field.name for field in dataclasses.fields(Job)}
    shared = {name: value for name, value in vars(plan).items() if name in names}
    return Job(**(shared | {"model": plan.model_config, "supervised_per_window": plan.max_seq_length - 1}))


def setting() -> str:
    return torch._C._get_fp32_precision_getter("mkldnn", "matmul")


@pytest.mark.parametrize(("m", "k", "n"), [(64, 192, 576), (33, 1537, 47), (256, 576, 100)])
def test_rounds_as_float32_does(m: int, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    with fast_products():
        found = torch.mm(x, weight.T)
    wanted = x.double() @ weight.T.double()
    assert (found - wanted).abs().max() < 8 * 2**-24 * k**0.5 * wanted.abs().max()


def test_the_setting_ends_with_the_body_and_follows_what_is_wanted() -> None:
    before = setting()
    with fast_products(False):
        assert setting() == before
    with pytest.raises(KeyError), fast_products():
        assert (setting() == "bf16") == products._reaches_exact_kernels()
        raise KeyError
    assert setting() == before


@wide
@pytest.mark.usefixtures("fresh")
def test_kernels_that_round_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a matrix unit do: here by hand."""
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: plain(a.bfloat16().float(), b))
    with fast_products():
        assert setting() != "bf16"


@pytest.mark.parametrize(
    ("isa", "offered"), [(["avx2", "avx512f"], True), (["avx2"], False), (["amx_tile", "avx512f"], False), ([], False)]
)
def test_offered_by_wide_vectors_without_a_matrix_unit(
    isa: list[str], offered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "isa", lambda: isa)
    assert are_offered() == offered


@wide
def test_gradients_are_those_of_other_products(tmp_path: Path) -> None:
    decoder, parameters, _ = adapted(make_base(tmp_path, "llama", "int4"), LoraConfig(r=3, lora_alpha=5.0))
    batches = [random_batch(decoder.config.vocab_size, 2, 40)]
    loss, wanted = gradients(decoder, parameters, batches, Walk(0, 1))
    decoder.workspace.fast_positions = decoder.workspace.fast_loss_rows = 80
    fast_loss, found = gradients(decoder, parameters, batches, Walk(0, 1))
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-9, name


RUN = """
import json, sys
from edgetune import train
from edgetune.planner.plans import Plan

plan, base, rows, out = sys.argv[1:]
train(Plan.from_dict(json.loads(plan)), base, data=rows, out=out)
"""


@wide
@pytest.mark.parametrize("tile_weights", [1 << 20, 40 * 96])
def test_as_many_shapes_as_the_plan_counts(tmp_path: Path, tile_weights: int) -> None:
    """By oneDNN's own log of a run, with evaluation and a last micro-batch that is smaller."""
    base = make_base(tmp_path, "llama", "int4", hidden_size=96, intermediate_size=176)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        20 * '{"text": "abcd dcba abdc"}\n', encoding="utf-8"
    )  # each window has as many that are supervised
    plan = make_plan(base, fast_products=True, tile_weights=tile_weights, max_steps=3, batch_size=3, threads=2)
    env = os.environ | {"ONEDNN_VERBOSE": "all"}
    command = [sys.executable, "-c", RUN, json.dumps(plan.to_dict()), str(base), str(rows), str(tmp_path / "run")]
    log = subprocess.run(command, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout
    made = {line.rpartition(",")[0] for line in log.splitlines() if "create:cache_miss" in line and ",matmul," in line}
    windows = read_inputs(plan, base, read_manifest(base)["base_sha256"], rows, None, False).windows
    job = dataclasses.replace(_job(plan), supervised_per_window=max(window.num_supervised for window in windows))
    assert max(window.length for window in windows) == plan.max_seq_length
    assert len(made) == costs.num_fast_products(job)
    assert costs.code_bytes(job) == CODE_BYTES * len(made)
    assert costs.spare_bytes(job) == 0, "heads of 16 do not divide: the threads stay"


def test_conceded_last_of_what_costs_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, tiny_config("llama"))
    config = TrainConfig(max_seq_length=64)
    monkeypatch.setattr(wishes, "are_offered", lambda: True)
    fast = planner.plan(folder, "pixel-9", config=config)
    assert fast.fast_products and costs.code_bytes(_job(fast)) < fast.parts["kernels"]
    assert costs.code_bytes(dataclasses.replace(_job(fast), fast_products=False)) == 0
    assert "widest vectors" in fast.explain()
    slow = planner.plan(folder, "pixel-9", config=config, budget="min")
    assert not slow.fast_products and "widest vectors" not in slow.explain()
    settings = [concession.setting for concession in slow.concessions]
    assert settings.index("activation_offloading") < settings.index("fast_products")
    kept = planner.plan(folder, "pixel-9", config=dataclasses.replace(config, fast_products=True), budget="min")
    assert kept.fast_products and kept.budget_bytes > slow.budget_bytes
    with pytest.raises(ConfigError, match=r"fast_products cannot be set here"):
        planner.plan(folder, "pixel-9", config=TrainConfig(fast_products=True), grid="int4", engine="ort")


def test_what_fewer_threads_take_more_is_kept_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wishes, "are_offered", lambda: True)
    monkeypatch.setattr("edgetune.planner.job.keeps_bits", lambda threads, positions, head_dim: threads > 1)
    made = planner.plan(write_model(tmp_path, tiny_config("llama")), "host", config=TrainConfig(max_seq_length=64))
    assert made.fast_products
    for threads, times, buffers in ((1, 0, 0), (2, 1, 1), (8, 3, 0)):
        one = dataclasses.replace(_job(made), threads=threads)
        panels = costs.pack_bytes(one) // threads
        assert costs.spare_bytes(one) == times * costs.code_bytes(one) + buffers * panels
        parts = costs.peak_parts(one, made.floor_bytes)[1]
        assert parts["kernels"] == costs.code_bytes(one) + threads * panels
        for other in (
            {"step_rule": "mezo"}, {"objective": "classification"}, {"adapter": FullConfig().resolved(one.decoder)},
            {"adapter": LoreftConfig().resolved(one.decoder)}, {"adapter": LstConfig().resolved(one.decoder)},
        ):  # fmt: skip
            assert costs.spare_bytes(dataclasses.replace(one, **other)) == 0
    without = made.reserve_bytes - costs.spare_bytes(_job(made))
    above = made.predicted_peak_bytes - made.floor_bytes
    assert without == pytest.approx(0.02 * made.predicted_peak_bytes + 0.05 * above, abs=2)


def test_not_planned_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path, tiny_config("llama"))
    monkeypatch.setattr(wishes, "are_offered", lambda: False)
    assert not planner.plan(folder, "pixel-9").fast_products
    with pytest.raises(ConfigError, match=r"fast_products = True; this processor has no such kernels"):
        planner.plan(folder, "pixel-9", config=TrainConfig(fast_products=True))
