"""Runs with retention rows, and held to their base."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgetune import errors
from edgetune.adapters import METHODS
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.cli import launch
from edgetune.data import read_rows
from edgetune.planner import TrainConfig, plan
from edgetune.planner.beside import Beside
from edgetune.planner.wishes import RowFacts, Wishes
from edgetune.tokenizer import load_tokenizer
from edgetune.training.loop import train
from tests.training.conftest import at_step, interrupt, make_base, make_plan, write_rows

Files = dict[str, Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("beside"), num_hidden_layers=4)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = {"data": write_rows(tmp_path / "data.jsonl", 12)}
    return made | {
        name: write_rows(tmp_path / f"{name}.jsonl", 20, seed=seed) for seed, name in ((1, "old"), (2, "texts"))
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]


@pytest.mark.parametrize("layers", [None, (2, 3)])
def test_a_run_with_both_goes_on_to_the_bit(base: Path, files: Files, tmp_path: Path, layers: Any) -> None:
    beside = {"retention_data": files["old"], "kl_data": files["texts"]}
    made = make_plan(
        base, adapter=LoraConfig(r=3, layers_to_transform=layers), retention_share=0.25, kl_weight=0.5,
        feature_cache_bytes=0 if layers is None else 1 << 22,
    )  # fmt: skip
    whole = train(made, base, data=files["data"], **beside, out=tmp_path / "whole")
    found, told = whole.summary, lines(whole.folder)
    steps, evaluations = [x for x in told if "loss" in x], [x for x in told if "eval_loss" in x]
    assert len(steps) == 12 and all(x["base_kl"] >= 0 for x in steps) and steps[-1]["base_kl"] > 0
    assert steps[0]["base_kl"] == 0, "the adapter begins as the base"
    assert all(x["retention_loss"] > 0 for x in evaluations)
    assert evaluations[0] == {"step": 0, "eval_loss": None, "retention_loss": found["retention_loss_before"]}
    kept = next(x for x in evaluations if x["step"] == found["best_step"])
    assert (found["eval_loss"], found["retention_loss"]) == (kept["eval_loss"], kept["retention_loss"])
    assert found["retention_data"] == str(files["old"]) and len(found["kl_data_sha256"]) == 64

    stopped = train(made, base, data=files["data"], **beside, out=tmp_path / "run", on_progress=at_step(5, interrupt))
    assert stopped.stopped == "signal"
    resumed = train(made, base, data=files["data"], **beside, out=tmp_path / "run", resume=True)
    assert resumed.summary["adapter_sha256"] == found["adapter_sha256"]
    job = launch.old_run(tmp_path / "run", data=None, eval_data=None)
    assert {name: job[name] for name in beside} == beside, "the command line goes on with the same files"
    assert resumed.summary["retention_loss_before"] == found["retention_loss_before"]
    for name in beside:
        with pytest.raises(errors.CheckpointError, match=f"was started with something else: {name}\\."):
            train(made, base, data=files["data"], **(beside | {name: files["data"]}), out=tmp_path / "run", resume=True)


def test_retention_rows_that_are_held_out_are_not_learned(base: Path, files: Files) -> None:
    read = partial(read_rows, tokenizer=load_tokenizer(base), max_seq_length=48)
    parts = Beside.of(files["old"], files["texts"]).read("sft", read, seed=3)
    learned, held_out, anchors = (
        {row.line for row in rows.rows} for rows in (parts.retention, parts.retention_eval, parts.anchors)
    )
    assert len(held_out) == 2 and learned == anchors - held_out and anchors == set(range(1, 21))


def test_without_gradients_retention_rows_are_learned_too(base: Path, files: Files, tmp_path: Path) -> None:
    made = make_plan(base, step_rule="mezo", optimizer="sgd", learning_rate=1e-3, retention_share=0.5)
    beside = {"retention_data": files["old"]}
    whole = train(made, base, data=files["data"], **beside, out=tmp_path / "whole").summary
    train(made, base, data=files["data"], **beside, out=tmp_path / "run", on_progress=at_step(5, interrupt))
    resumed = train(made, base, data=files["data"], **beside, out=tmp_path / "run", resume=True).summary
    alone = train(replace(made, retention_share=None), base, data=files["data"], out=tmp_path / "alone").summary
    assert resumed["adapter_sha256"] == whole["adapter_sha256"] != alone["adapter_sha256"]
    assert whole["retention_loss"] != whole["retention_loss_before"] == resumed["retention_loss_before"]


def test_no_budget_takes_the_gradients_from_the_divergence(base: Path) -> None:
    def free(**settings: float) -> frozenset[str]:
        return Wishes(open_base(base).config, LoraConfig(), TrainConfig(**settings), RowFacts()).freedom.settings

    assert free() == free(retention_share=0.5) == free(kl_weight=1.0) | {"step_rule"}
    assert "step_rule" not in free(kl_weight=1.0)


def test_both_change_what_is_learned(base: Path, files: Files, tmp_path: Path) -> None:
    """Mixed in, the retention rows are learned; held to it, the model stays nearer to its base."""

    def losses(name: str, settings: dict[str, float], **beside: Path) -> dict[str, Any]:
        made = make_plan(base, eval_fraction=0.0, max_steps=20, learning_rate=2e-2, **settings)
        return train(made, base, data=files["data"], **beside, out=tmp_path / name).summary

    old = files["old"]
    little = losses("little", {"retention_share": 0.001}, retention_data=old)
    mixed = losses("mixed", {"retention_share": 0.5}, retention_data=old)
    assert little["eval_loss"] is None and little["best_step"] is None
    assert little["retention_loss_before"] == mixed["retention_loss_before"]
    assert mixed["retention_loss"] < little["retention_loss"]
    loose = losses("loose", {"kl_weight": 1e-6}, kl_data=files["texts"])
    tight = losses("tight", {"kl_weight": 100.0}, kl_data=files["texts"])
    divergence = [
        next(x["base_kl"] for x in lines(Path(tmp_path / name)) if x["step"] == 20) for name in ("loose", "tight")
    ]
    assert divergence[1] < divergence[0] / 4
    assert loose["retention_loss"] is None and tight["adapter_sha256"] != loose["adapter_sha256"]


def test_preferences_are_held_to_the_base_too(base: Path, files: Files, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "bc", "rejected": "d"}\n' * 12, encoding="utf-8")
    made = make_plan(base, objective="dpo", beta=0.1, label_smoothing=0.0, kl_weight=0.5, max_steps=3)
    train(made, base, data=pairs, kl_data=files["texts"], out=tmp_path / "run")
    divergences = [x["base_kl"] for x in lines(tmp_path / "run") if "loss" in x]
    assert len(divergences) == 3 and divergences[0] == 0 < divergences[1] < divergences[2]


def test_a_longer_file_beside_makes_all_windows_as_long(base: Path, files: Files, tmp_path: Path) -> None:
    short = write_rows(tmp_path / "short.jsonl", 3)
    rows = [json.loads(line)["text"][:6] for line in short.read_text(encoding="utf-8").splitlines()]
    short.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    made = plan(
        base, "host", data=short, retention_data=files["old"], kl_data=files["texts"],
        config=TrainConfig(max_steps=2, max_seq_length=48, batch_size=2),
    )  # fmt: skip
    assert (made.retention_share, made.kl_weight) == (0.25, 1.0)
    alone = plan(base, "host", data=short, config=TrainConfig(max_steps=2, max_seq_length=48, batch_size=2))
    assert made.parts["data"] > alone.parts["data"] and made.parts["block_workspace"] > alone.parts["block_workspace"]
    assert made.predicted_step_seconds > 2 * alone.predicted_step_seconds
    run = train(made, base, data=short, retention_data=files["old"], kl_data=files["texts"], out=tmp_path / "run")
    assert run.stopped == "done"
    assert "retention   0.25 of the windows" in made.explain() and "held to it by 1 times" in made.explain()


@pytest.mark.parametrize("rows", [True, False])
def test_the_plan_counts_the_micro_batch_that_the_base_holds(base: Path, files: Files, rows: bool) -> None:
    config, data = TrainConfig(max_steps=2, max_seq_length=48, batch_size=2), files["data"] if rows else None
    alone = plan(base, "host", data=data, config=config)
    held = plan(base, "host", data=data, kl_data=files["data"], config=config)
    assert held.parts["block_workspace"] > alone.parts["block_workspace"]
    assert held.parts["logits"] == pytest.approx(2 * alone.parts["logits"], rel=0.1), "of both models"
    assert held.predicted_step_seconds > 1.8 * alone.predicted_step_seconds


def test_epochs_are_those_of_the_task(base: Path, files: Files) -> None:
    config = TrainConfig(num_epochs=3, max_seq_length=48, batch_size=2, eval_fraction=0.0, retention_share=0.5)
    alone = plan(base, "host", data=files["data"], config=replace(config, retention_share=None)).max_steps
    mixed = plan(base, "host", data=files["data"], retention_data=files["old"], config=config).max_steps
    assert alone is not None and mixed is not None and mixed in (2 * alone, 2 * alone - 1)


class TestRefusals:
    def refused(self, base: Path, match: str, kind: type[Exception] = errors.ConfigError, **words: Any) -> None:
        config, adapter = TrainConfig(**words.pop("config", {})), words.pop("adapter", None)
        with pytest.raises(kind, match=match):
            plan(base, "host", config=config, adapter=adapter, **words)

    @pytest.mark.parametrize("share", [0.0, 0.95, -1.0, float("nan")])
    def test_a_share_out_of_range(self, base: Path, share: float) -> None:
        self.refused(base, "retention_share", config={"retention_share": share})

    def test_settings_and_files_go_together(self, base: Path, files: Files, tmp_path: Path) -> None:
        data = files["data"]
        self.refused(base, "retention_share = 0.5 goes with rows", data=data, config={"retention_share": 0.5})
        self.refused(base, "kl_weight = 2 goes with rows.*--kl-data", data=data, config={"kl_weight": 2.0})
        with pytest.raises(errors.ConfigError, match="the plan has no retention_share"):
            train(make_plan(base), base, data=data, retention_data=files["old"], out=tmp_path / "run")

    @pytest.mark.parametrize("name", ["retention_data", "kl_data"])
    def test_an_empty_file(self, base: Path, files: Files, tmp_path: Path, name: str) -> None:
        (tmp_path / "empty.jsonl").touch()
        self.refused(base, "has no rows", errors.DataError, data=files["data"], **{name: tmp_path / "empty.jsonl"})

    def test_rows_of_another_kind(self, base: Path, files: Files, tmp_path: Path) -> None:
        pairs, prompts = tmp_path / "pairs.jsonl", tmp_path / "prompts.jsonl"
        pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3, encoding="utf-8")
        prompts.write_text('{"prompt": "a", "completion": "b"}\n' * 3, encoding="utf-8")
        match = "pairs.jsonl has preference rows; --objective sft learns from text"
        self.refused(base, match, errors.DataError, data=files["data"], retention_data=pairs)
        self.refused(base, "has prompt rows; kl_data are text", errors.DataError, data=files["data"], kl_data=prompts)

    @pytest.mark.parametrize("objective", ["dpo", "kto", "distill"])
    def test_what_needs_records(self, base: Path, objective: str) -> None:
        match = f"{objective} learns from what a model said"
        self.refused(base, match, config={"objective": objective, "retention_share": 0.5})

    def test_what_cannot_be_compared_with_the_base(self, base: Path) -> None:
        self.refused(base, "needs gradients, and mezo", config={"kl_weight": 1.0, "step_rule": "mezo"})
        for method in ("prompt_tuning", "prefix_tuning", "p_tuning"):
            adapter = METHODS[method].Config()
            self.refused(base, f"{method} gives rows other positions", adapter=adapter, config={"kl_weight": 1.0})

    def test_a_start_away_from_the_base(self, base: Path) -> None:
        for start in ("kaiming", "eva"):
            adapter = LoraConfig(init_lora_weights=start)
            assert plan(base, "host", adapter=adapter, config=TrainConfig(kl_weight=1.0)).kl_weight == 1.0
        match = "kl_weight = 1; it holds the model to the quantized base, and .*loftq.* Take kaiming or eva"
        loftq = LoraConfig(init_lora_weights="loftq", init_from="original")
        self.refused(base, match, adapter=loftq, config={"kl_weight": 1.0})

    @pytest.mark.parametrize("name", ["retention_share", "kl_weight"])
    def test_the_ort_engine(self, base: Path, name: str) -> None:
        self.refused(base, f"{name} cannot be set here", engine="ort", grid=None, config={name: 0.5})
