"""Whole personalizations of a tiny bundle: what is written, what the bundle uses then, and every way to stop."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.adapters.base import load_adapter
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.bundle import load_bundle
from edgetune.data import read_rows
from edgetune.device import load_device
from edgetune.errors import BudgetError, BundleError, CheckpointError, ConfigError, ExportError
from edgetune.exporter import export
from edgetune.models import load_config
from edgetune.personalizer import job as jobs
from edgetune.personalizer import personalize, run_plan
from edgetune.personalizer.trainer import Backprop
from edgetune.planner.plans import TrainConfig
from edgetune.quantizer import quantize
from edgetune.runtime.adapters import check_adapters, list_adapters, set_default_adapter
from edgetune.runtime.evaluate import mean_nll
from edgetune.tokenizer import load_tokenizer
from edgetune.training import conduct
from edgetune.training.run import Run
from edgetune.weights import sha256_file
from tests.conftest import tiny_config, write_model
from tests.tiny_encoder import encoder_hf, write_encoder
from tests.tiny_run import write_run
from tests.training.conftest import at_step, interrupt, make_base, write_rows

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(max_steps=8, learning_rate=2e-2, max_seq_length=48, gradient_accumulation_steps=2, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a bundle that can be personalized, and rows."""
    folder = tmp_path_factory.mktemp("made")
    base = make_base(folder, "llama", "int4")
    export(base, out=folder / "bundle", with_training=True)
    write_rows(folder / "rows.jsonl", 30)
    write_rows(folder / "held_out.jsonl", 6, seed=1)
    return folder


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return shutil.copytree(made / "bundle", tmp_path / "bundle")


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(made / "bundle", folder / "bundle")
    return run(folder / "bundle", made, folder / "run")


def run(bundle: Path, made: Path, out: Path, config: TrainConfig = CONFIG, **options: Any) -> Run:
    rows = {"data": made / "rows.jsonl", "eval_data": made / "held_out.jsonl"}
    return personalize(bundle, **rows | {"out": out, "config": config, "adapter": LoraConfig(r=3)} | options)


def test_what_a_personalization_leaves(made: Path, whole: Run) -> None:
    summary, config = whole.summary, load_config(made / "base")
    assert (summary["stopped"], summary["steps"], summary["engine"], summary["grid"]) == ("done", 8, "ort", "int4")
    assert summary["eval_loss"] < summary["active_loss"] - 1 and summary["active_adapter"] is None
    assert summary["adopted"] == "run"
    assert sum(summary["parts"].values()) == summary["predicted_peak_bytes"] > summary["floor_bytes"] > 0
    assert 20 << 20 < summary["measured_peak_bytes"] < summary["measured_peak_rss_bytes"]
    lora, tensors = load_adapter(whole.folder, config)
    assert lora.r == 3 and summary["trainable_parameters"] == sum(value.size for value in tensors.values())
    bundle = load_bundle(whole.folder.parent / "bundle")
    assert bundle.default_adapter == "run"
    probed = check_adapters(bundle)["adapters"]["run"]["probe_change"]
    assert bundle.adapters["run"].probe_change == pytest.approx(probed, rel=1e-4), "the training graphs' logits"
    fed = bundle.adapter_tensors()["model.layers.1.mlp.down_proj.lora_B"]
    np.testing.assert_array_equal(fed, tensors["model.layers.1.mlp.down_proj.lora_B"].T * np.float32(lora.scaling))


def test_a_run_of_a_bundle_is_added_and_not_exported(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"was trained in the bundle .*`edgetune adapter add BUNDLE .*run`"):
        export(whole, out=tmp_path / "bundle")


def test_the_inference_graph_has_the_loss_that_training_saw(made: Path, whole: Run) -> None:
    bundle = whole.folder.parent / "bundle"
    rows = read_rows(made / "held_out.jsonl", load_tokenizer(bundle), 48).rows
    found = {adapter: mean_nll(bundle, rows, adapter=adapter, fp32_compute=True)["nll"] for adapter in (False, True)}
    assert found[True] == pytest.approx(whole.summary["eval_loss"], rel=1e-5)
    assert found[False] == pytest.approx(whole.summary["active_loss"], rel=1e-5)


def test_a_worse_adapter_is_not_used_unless_that_is_accepted(made: Path, bundle: Path, tmp_path: Path) -> None:
    assert run(bundle, made, tmp_path / "first").summary["adopted"] == "first"
    before = (bundle / "edgetune.json").read_bytes()
    worse = run(bundle, made, tmp_path / "second", replace(CONFIG, max_steps=1))
    assert worse.summary["active_adapter"] == "first" and worse.summary["adopted"] is None
    assert worse.summary["eval_loss"] > worse.summary["active_loss"]
    assert (bundle / "edgetune.json").read_bytes() == before
    accepted = run(bundle, made, tmp_path / "second", resume=True, accept_worse=True)
    assert accepted.summary["adopted"] == "second" == list_adapters(bundle)["default"]
    set_default_adapter(bundle, "first")
    again = run(bundle, made, tmp_path / "again" / "first", replace(CONFIG, max_steps=12))
    assert again.summary["active_loss"] == pytest.approx(worse.summary["active_loss"])
    assert again.summary["adopted"] == "first-2", "a name that is taken gets a number"


def test_without_held_out_rows_nothing_speaks_for_it(made: Path, bundle: Path, tmp_path: Path) -> None:
    found = run(bundle, made, tmp_path / "run", replace(CONFIG, max_steps=2, eval_fraction=0.0), eval_data=None)
    assert found.summary["active_loss"] is None and found.summary["adopted"] is None
    assert load_bundle(bundle).default_adapter is None


def test_the_bundle_of_a_dense_base(made: Path, tmp_path: Path) -> None:
    bundle = export(made / "model", out=tmp_path / "bundle", with_training=True)
    found = run(bundle.folder, made, tmp_path / "run", replace(CONFIG, max_steps=2)).summary
    assert (bundle.manifest["weights"], found["grid"], found["adopted"]) == ("fp32", None, "run")


@pytest.mark.parametrize("step", [1, 5])
def test_stopped_and_resumed_to_the_same_bytes(made: Path, bundle: Path, whole: Run, tmp_path: Path, step: int) -> None:
    stopped = run(bundle, made, tmp_path / "run", on_progress=at_step(step, interrupt))
    assert stopped.stopped == "signal" and stopped.summary["adopted"] is None
    resumed = run(bundle, made, tmp_path / "run", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert resumed.summary["adopted"] == "run"
    assert run(bundle, made, tmp_path / "run", resume=True).summary == resumed.summary, "it is done"


def test_a_slice_of_time(made: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is a second later here."""
    clock = functools.partial(next, itertools.count())
    with monkeypatch.context() as patch:
        patch.setattr(conduct, "Pace", functools.partial(conduct.Pace, clock=clock))
        found = run(bundle, made, tmp_path / "run", slice_seconds=150, grace_seconds=2.5).summary
    assert found["stopped"] == "slice" and 0 < found["steps"] < 8 and found["adopted"] is None
    assert (found["slice_seconds"], found["grace_seconds"]) == (150, 2.5)
    assert run(bundle, made, tmp_path / "run", resume=True).stopped == "done"
    with pytest.raises(ConfigError, match="slice_seconds = 0; a number of seconds above 0"):
        run(bundle, made, tmp_path / "other", slice_seconds=0)


def command(made: Path, bundle: Path, out: Path, *words: str) -> list[str]:
    return [
        sys.executable, "-m", "edgetune", "personalize", str(bundle), "--data", str(made / "rows.jsonl"), "--eval-data",
        str(made / "held_out.jsonl"), "--out", str(out), "--learning-rate", "0.02", "--max-seq-length", "48",
        "--gradient-accumulation-steps", "2", "--seed", "3", "--r", "3", "--json", *words,
    ]  # fmt: skip


def test_killed_at_any_moment(made: Path, bundle: Path, whole: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command(made, bundle, out, "--max-steps", "8"), env=environment, stdout=subprocess.PIPE)
    while not len((out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []) > 5:
        assert child.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    child.kill()
    child.communicate()
    resumed = run(bundle, made, out, resume=True)
    assert resumed.stopped == "done" and resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_neither_torch_nor_onnx_is_imported(made: Path, bundle: Path, tmp_path: Path) -> None:
    words = command(made, bundle, tmp_path / "run", "--max-steps", "2")[3:]
    code = (
        "import json, sys\nfrom edgetune.cli import personalizing, verbs\n"
        "personalizing.os.execve = lambda program, words, environment: personalizing.run_job(json.loads(words[3]))\n"
        "try: verbs.main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'onnx', 'onnx_ir', 'bitsandbytes', 'onnxscript'} & set(sys.modules)), 'none')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    said, imported = result.stdout.splitlines()[-2:]
    assert json.loads(said)["adopted"] == "run", result.stderr
    assert imported == "none"


def test_steps_that_are_not_finite(made: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change nothing and are counted; after 20 in a row the run ends with its last good adapter."""
    real, calls = Backprop.gradient, 0

    def gradient(self: Backprop, *words: Any) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        found = real(self, *words)
        return (math.inf, found[1]) if calls == 3 or calls > 6 else found

    monkeypatch.setattr(Backprop, "gradient", gradient)
    summary = run(bundle, made, tmp_path / "run", replace(CONFIG, max_steps=60)).summary
    assert (summary["stopped"], summary["steps"], summary["skipped_steps"]) == ("nonfinite", 26, 21)
    assert summary["adopted"] is None and math.isfinite(summary["eval_loss"])
    _, tensors = load_adapter(tmp_path / "run", load_config(made / "base"))
    assert all(np.isfinite(value).all() for value in tensors.values())


def test_stopped_at_the_budget(made: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"host allows 1\.0 MiB \(given\)(.|\n)*It fits with --budget \d+"):
        run(bundle, made, tmp_path / "run", budget=1)
    rows: dict[str, Any] = {"data": made / "rows.jsonl", "eval_data": made / "held_out.jsonl", "skip_bad": False}
    plan = jobs.make_plan(
        load_bundle(bundle), adapter=LoraConfig(r=3), config=CONFIG, device="host", budget="min", **rows
    )
    assert plan.budget_name == "min" and plan.predicted_peak_bytes < plan.budget_bytes
    stopped = run_plan(
        replace(plan, budget_bytes=1 << 20), bundle, out=tmp_path / "run", enforce="governor", one_slice=False,
        accept_worse=False, resume=False, force=False, on_progress=None, **rows,
    )  # fmt: skip
    assert stopped.stopped == "budget" and stopped.summary["adopted"] is None
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_defaults_follow_the_rows_and_the_device(made: Path, bundle: Path, tmp_path: Path) -> None:
    plan = run(bundle, made, tmp_path / "run", TrainConfig(max_steps=1), device="pixel-9", adapter=None).summary
    profile = load_device("pixel-9")
    assert (plan["device"], plan["batch_size"], plan["optimizer"]) == ("pixel-9", 1, "adamw")
    assert plan["budget_bytes"] == profile.memory.budget_mib << 20 and plan["slice_seconds"] == profile.duty.slice_s
    assert plan["adapter"]["r"] == 8 and plan["learning_rate"] == 2e-4 and 1 <= plan["gradient_accumulation_steps"] <= 8


@pytest.mark.parametrize(
    ("adapter", "config", "options", "message"),
    [
        (
            {"lora_dropout": 0.1},
            {},
            {},
            "lora_dropout cannot be set here: training graphs learn by sft from one file, know one rank",
        ),
        ({}, {"step_rule": "mezo"}, {}, "step_rule cannot be set here"),
        ({}, {"optimizer": "lion"}, {}, "optimizer = 'lion'; training graphs have adamw, sgd"),
        ({}, {"max_seq_length": 257}, {}, "max_seq_length = 257; the model has 256 positions"),
        ({"r": 73}, {}, {}, "r = 73; an integer from 1 to the hidden size 72"),
        ({}, {}, {"enforce": "hope"}, "enforce = 'hope'"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    made: Path, adapter: Any, config: Any, options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(
            made / "bundle", made, tmp_path / "run", replace(CONFIG, **config), adapter=LoraConfig(**adapter), **options
        )
    assert not (tmp_path / "run").exists()


def test_resuming_what_is_no_such_run(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be resumed: .*No such file"):
        run(made / "bundle", made, tmp_path / "run", resume=True)
    shutil.copytree(write_run(tmp_path / "torch", made / "base"), tmp_path / "run")
    bundle = load_bundle(made / "bundle")
    plan = jobs.make_plan(
        bundle, data=made / "rows.jsonl", eval_data=None, adapter=None,
        config=CONFIG, device="host", budget="foreground", skip_bad=False,
    )  # fmt: skip
    (tmp_path / "run" / "plan.json").write_text(json.dumps(replace(plan, engine="torch").to_dict()))
    with pytest.raises(ConfigError, match="was trained by the torch engine"):
        run(made / "bundle", made, tmp_path / "run", resume=True)


def test_a_bundle_without_training_graphs(made: Path, tmp_path: Path) -> None:
    bundle = export(made / "base", out=tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"has no training graphs\. Export it again with --with-training"):
        run(bundle.folder, made, tmp_path / "run")


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `training.json`, and the manifest with it."""
    path, manifest = bundle / "training" / "training.json", bundle / "edgetune.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    listed = json.loads(manifest.read_text())
    listed["files"]["training/training.json"] = {
        "bytes": path.stat().st_size, "sha256": sha256_file(path),
    }  # fmt: skip
    manifest.write_text(json.dumps(listed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: said.update(format_version=2), r"has format_version 2, this edgetune reads 1\. Upgrade it"),
        (lambda said: said.pop("head"), r"is damaged \(KeyError\('head'\)\)"),
        (lambda said: said["graphs"].pop("loss_end"), "no graph loss_end"),
        (lambda said: said["graphs"]["start"].update(file="../model.onnx"), r"model\.onnx is not listed"),
        (lambda said: said["model_config"].update(head_dim="x"), "head_dim"),
    ],
)
def test_a_damaged_description_is_refused(made: Path, bundle: Path, tmp_path: Path, change: Any, message: str) -> None:
    rewrite(bundle, change)
    with pytest.raises(BundleError, match=message):
        run(bundle, made, tmp_path / "run")


def test_the_weights_are_in_the_bundle_once(made: Path) -> None:
    """And `training.json` says where: what it names are the base's own bytes."""
    described = json.loads((made / "bundle" / "training" / "training.json").read_text())
    plain = export(made / "base", out=made / "plain")
    data = (made / "bundle" / described["data_file"]).read_bytes()
    assert data == (made / "plain" / "model.onnx.data").read_bytes()
    assert sum(file.stat().st_size for file in (made / "bundle" / "training").iterdir()) < 200_000
    assert "training/training.json" not in plain.manifest["files"]
    codes = described["tensors"]["model.layers.1.mlp.down_proj.weight.codes"]
    found = np.frombuffer(data, codes["dtype"], math.prod(codes["shape"]), codes["offset"]).reshape(codes["shape"])
    np.testing.assert_array_equal(found, open_base(made / "base").codes("model.layers.1.mlp.down_proj")["codes"])
    inputs = {value["name"] for value in described["graphs"]["backward"]["inputs"]}
    assert {"mlp.gate_up_proj.weight.codes", "mlp.up_proj.lora_A", "input_layernorm.weight", "dy", "scaling"} <= inputs


def test_what_cannot_have_training_graphs(made: Path, tmp_path: Path) -> None:
    nf4 = quantize(write_model(tmp_path / "model", tiny_config("llama")), "nf4", tmp_path / "nf4")
    tuned = write_run(tmp_path / "run", made / "base")
    encoder = quantize(write_encoder(tmp_path / "encoder", encoder_hf()), "int4", tmp_path / "encoder-base")
    for source, options, message in (
        (nf4, {}, r"is on the nf4 grid, .* Quantize the original model with --grid int4"),
        (tuned, {"merge": True}, "A merged bundle takes no adapter"),
        (tuned, {"weights": "fp32"}, r"the base is stored as int4, not as fp32\. Export it with --weights int4"),
        (encoder, {}, "is an encoder; training graphs predict next tokens"),
    ):
        with pytest.raises(ExportError, match=message):
            export(source, out=tmp_path / "bundle", with_training=True, **options)
    assert not (tmp_path / "bundle").exists()


def test_the_peak_of_a_real_run(made: Path, bundle: Path, tmp_path: Path) -> None:
    """In a process of its own, where the measured peak is the run's alone."""
    command = [
        sys.executable, "-m", "edgetune", "personalize", str(bundle), "--data", str(made / "rows.jsonl"), "--json",
        "--out", str(tmp_path / "run"), "--max-steps=2", "--max-seq-length=48", "--batch-size=16",
        "--gradient-accumulation-steps=1", "--enforce=none",
    ]  # fmt: skip
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    summary = json.loads(child.stdout.splitlines()[-1])
    assert summary["predicted_peak_bytes"] == pytest.approx(summary["measured_peak_bytes"], rel=0.05)
