"""Heads of encoders, the whole way: rows, plan, training, PEFT's files, the bundle and what it says."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_encoder import encoder_hf, write_encoder

import edgetune as et
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.head import load_with_head
from edgetune.bundle import EncoderBundle, load_any_bundle
from edgetune.cli.embedding import show_embedding
from edgetune.data.labeled import read_labeled_rows
from edgetune.errors import AdapterError, BundleError, ConfigError, DataError
from edgetune.models.encoder import load_encoder
from edgetune.planner.job import Job
from edgetune.planner.plans import Plan
from edgetune.quantizer import quantize
from edgetune.runtime.embedding import open_embedder
from edgetune.runtime.predicting import predict
from edgetune.tokenizer import load_tokenizer
from edgetune.training.run import Run

LABELS = ("yes", "no", "oos")
LORA = et.LoraConfig(r=3, lora_alpha=7)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose letters tell their class."""
    rng = np.random.default_rng(seed)
    letters = {"yes": "abc", "no": "xyz", "oos": "klm"}

    def text(label: str) -> str:
        return " ".join("".join(rng.choice(list(letters[label]), 3)) for _ in range(rng.integers(1, 6)))

    return [{"text": text(label), "label": label} for label in (LABELS[i % 3] for i in range(count))]


ROWS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "classification": text_rows,
    "regression": lambda n: [row | {"label": LABELS.index(row["label"]) - 0.5} for row in text_rows(n)],
    "token-classification": lambda n: [
        {"tokens": words, "labels": [LABELS[ord(word[0]) % 3] for word in words]}
        for words in (row["text"].split() for row in text_rows(n))
    ],
    "embedding": lambda n: [{"anchor": row["text"], "positive": row["text"][::-1]} for row in text_rows(n)],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_encoder(tmp_path_factory.mktemp("encoder") / "model", encoder_hf(hidden_size=96), normalize=True)
    return quantize(model, "int4", model.parent / "int4")


def plan_for(base: Path, data: Path, objective: str, /, adapter: AdapterConfig = LORA, **settings: Any) -> Plan:
    config = et.TrainConfig(
        **({"objective": objective, "batch_size": 6, "num_epochs": 4, "learning_rate": 1e-2} | settings)
    )
    return et.plan(base, "host", data=data, adapter=adapter, config=config)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for objective, rows in ROWS.items():
        data = write(folder / f"{objective}.jsonl", rows(60))
        plan = plan_for(base, data, objective, eval_fraction=0.2)
        made[objective] = et.train(plan, base, data=data, out=folder / objective)
    return made


def peft_outputs(run: Run, base: Path, objective: str, ids: list[int]) -> np.ndarray:
    """What PEFT makes of the run's folder around the dequantized base in Hugging Face's model with a head."""
    import peft
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

    encoder = load_encoder(base)
    summary = run.summary
    kind = (
        AutoModelForTokenClassification if objective == "token-classification" else AutoModelForSequenceClassification
    )
    config = AutoConfig.from_pretrained(base.parent / "model", num_labels=max(1, len(summary["classes"])))
    model = kind.from_config(config, attn_implementation="eager").eval()
    stored = {name: torch.from_numpy(encoder.weights.float32(name)) for name in encoder.config.vectors()}
    for module, layer in encoder.named_modules():
        if hasattr(layer, "dequantize"):
            stored[f"{module}.weight"] = layer.dequantize()
    missing, unexpected = model.bert.load_state_dict(stored, strict=False)
    assert not unexpected
    assert all("pooler" in name or "position_ids" in name for name in missing)
    tuned = peft.PeftModel.from_pretrained(model, str(run.folder))
    seen: dict[str, torch.Tensor] = {}
    tuned.base_model.model.bert.encoder.register_forward_hook(lambda _, __, out: seen.update(hidden=out[0]))
    with torch.no_grad():
        found = tuned(input_ids=torch.tensor([ids])).logits[0]
        if objective != "token-classification":  # of the mean, where Hugging Face has its pooler
            found = tuned.base_model.model.classifier(seen["hidden"][0].mean(0))
    return found.numpy()


@pytest.mark.parametrize("objective", ["classification", "regression", "token-classification"])
def test_peft_loads_adapter_and_head_and_the_bundle_gives_the_same(
    runs: dict[str, Run], base: Path, objective: str, tmp_path: Path
) -> None:
    run = runs[objective]
    assert run.stopped == "done"
    bundle = et.export(run, out=tmp_path / "bundle", weights="int4")
    assert isinstance(bundle, EncoderBundle)
    assert bundle.manifest["parity"]["max_abs_logit"] < 1e-4
    assert bundle.model.objective == objective
    ids = load_tokenizer(base).encode("abc xyz bbb")
    embedder = open_embedder(bundle, fp32_compute=True)
    found = embedder.token_logits(ids) if objective == "token-classification" else embedder.logits(["abc xyz bbb"])[0]
    np.testing.assert_allclose(found, peft_outputs(run, base, objective, ids), atol=1e-5, rtol=0)


def test_a_trained_classifier_names_its_classes(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["classification"]
    summary = run.summary
    assert summary["id2label"] == {"0": "no", "1": "oos", "2": "yes"}
    assert summary["eval_accuracy"] > 0.6
    assert summary["trainable_parameters"] == sum(
        value.size for value in load_with_head(run.folder, load_encoder(summary["base"]).config, summary)[1].values()
    ) + 3 * (96 + 1)
    for merge in (False, True):
        with pytest.warns(et.EdgetuneWarning, match="fp32 weights are slow") if merge else contextlib.nullcontext():
            bundle = et.export(run, out=tmp_path / f"{merge}", merge=merge, weights="fp32" if merge else "int4")
        said = predict(load_any_bundle(bundle.folder), ["abc cab", "zzz yxz"])  # type: ignore[arg-type]
        assert said[0]["label"] == "yes"
        assert {row["label"] for row in said} <= set(LABELS)
        assert sum(said[0]["probabilities"].values()) == pytest.approx(1)
        assert next(iter(said[0]["probabilities"])) == "yes"


def test_the_other_heads_say_what_they_learned(runs: dict[str, Run], tmp_path: Path) -> None:
    (number,) = predict(et.export(runs["regression"], out=tmp_path / "a").folder, ["abc"])
    assert set(number) == {"value"}
    (words,) = predict(et.export(runs["token-classification"], out=tmp_path / "b").folder, ["abc xyz"])
    assert [word["word"] for word in words["tokens"]] == ["abc", "xyz"]
    plain = et.export(runs["embedding"], out=tmp_path / "c")
    with pytest.raises(BundleError, match=r"has no head: it gives embeddings\. Train one with --objective"):
        predict(plain.folder, ["abc"])


@pytest.mark.parametrize("objective", ROWS)
def test_every_objective_learns(runs: dict[str, Run], objective: str) -> None:
    lines = [json.loads(line) for line in (runs[objective].folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


def test_biases_learn_too(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", text_rows(60))
    plan = plan_for(base, data, "classification", et.BitfitConfig())
    run = et.train(plan, base, data=data, out=tmp_path / "run")
    losses = [json.loads(line).get("loss") for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    told = [loss for loss in losses if loss is not None]
    assert np.mean(told[-4:]) < 0.8 * np.mean(told[:4])
    assert run.summary["trainable_parameters"] == 2 * (5 * 96 + 107) + 3 * 97
    bundle = et.export(run, out=tmp_path / "bundle", merge=True)
    assert bundle.summary()["rounding"]["mean_relative_error"] == 0
    chosen = [found["label"] for found in predict(bundle.folder, [row["text"] for row in text_rows(30, seed=5)])]
    assert np.mean([label == row["label"] for label, row in zip(chosen, text_rows(30, seed=5), strict=True)]) > 0.6


def test_the_planner_counts_every_buffer_and_parameter(base: Path, tmp_path: Path) -> None:
    from edgetune.planner import costs
    from edgetune.planner.encoders import TextWishes, read_text_facts
    from edgetune.training.encoder_step import RowBatches, Rule
    from tests.training.test_encoder_step import tuned

    data = write(tmp_path / "rows.jsonl", text_rows(40))
    config = et.TrainConfig(objective="classification", batch_size=6, num_epochs=2, recompute_layers=1)
    encoder, task, parameters, lora = tuned(base, "classification", r=3)
    facts = read_text_facts(data, None, base, encoder.config, config, False)
    wishes = TextWishes(encoder.config, lora, config, facts)
    choice = replace(wishes.start(), tile_weights=2000)
    job = Job(
        model=encoder.config, adapter=lora, optimizer="adamw", grid="int4", batch_size=6, gradient_accumulation_steps=1,
        max_seq_length=facts.longest, recompute_layers=1, tile_weights=2000, activation_offloading=False,
        dequantized_layers=0, step_rule="backprop", threads=1, supervised_per_window=1,
    )  # fmt: skip
    job = wishes.fitted(job, choice, 2)
    encoder.workspace.tile_weights = 2000
    rule = Rule(encoder, task, parameters, _Plan(lora))  # type: ignore[arg-type]
    batches = RowBatches(facts.rows, batch_size=6, gradient_accumulation_steps=1, seed=config.seed)
    steps = -(-2 * len(facts.rows) // 6)
    largest = max((batches.of_step(step)[0] for step in range(steps)), key=lambda found: len(found[0]["input_ids"]))
    assert job.positions == len(largest[0]["input_ids"])
    for step in range(steps):
        rule.loss_and_gradients(batches.of_step(step)[0], (0, step), lambda: None)
    assert encoder.workspace.sizes == {name: size for name, size in costs.buffers(job).items() if size}
    assert job.head_sizes == (3 * 96, 3)  # three classes in the rows


def test_the_first_products_have_the_most_rows(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MKL packs into is then never too small."""
    data, rows, multiply = write(tmp_path / "rows.jsonl", text_rows(40)), list[int](), torch.mm

    def mm(x: torch.Tensor, *others: Any, **out: Any) -> torch.Tensor:
        rows.append(len(x))
        return multiply(x, *others, **out)

    monkeypatch.setattr(torch, "mm", mm)
    et.train(plan_for(base, data, "classification", num_epochs=2), base, data=data, out=tmp_path / "run")
    linears = 6
    assert set(rows[:linears]) == {max(rows)} and min(rows) < max(rows)
    assert rows[linears:].count(max(rows)) >= linears, "that of a real micro-batch, and no more"


class _Plan:
    max_grad_norm, recompute_layers, optimizer, weight_decay = 1.0, 1, "adamw", 0.0

    def __init__(self, adapter: Any) -> None:
        self.adapter = adapter


def test_what_cannot_be_planned_is_refused_with_the_next_step(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", text_rows(9))
    for settings, message in (
        ({"objective": "sft"}, r"objective = sft; an encoder has classification \(label rows\).*Set --objective"),
        ({"step_rule": "mezo"}, "step_rule = 'mezo'; encoders have backprop alone"),
        ({"activation_offloading": True}, "encoders keep the inputs of their blocks in memory"),
        ({"fast_products": True}, "each batch of an encoder has one of its own"),
        ({"retention_share": 0.5}, "retention_share cannot be set with objective classification: a trained head has"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_for(base, data, "classification", **settings)
    with pytest.raises(ConfigError, match=r"kl_weight cannot be set with objective classification"):
        et.plan(base, "host", data=data, kl_data=data, config=et.TrainConfig(objective="classification"))
    with pytest.raises(ConfigError, match=r"needs rows: its classes .* Give --data"):
        et.plan(base, "host", config=et.TrainConfig(objective="classification"))
    with pytest.raises(ConfigError, match="no training graphs of encoders"):
        et.plan(base, "host", data=data, config=et.TrainConfig(objective="classification"), engine="ort")


def test_rows_that_do_not_fit_are_named_by_their_line(base: Path, tmp_path: Path) -> None:
    tokenizer, rows = load_tokenizer(base), text_rows(6)

    def read(changed: dict[str, Any], objective: str = "classification", **options: Any) -> None:
        read_labeled_rows(write(tmp_path / "x.jsonl", [*rows, changed]), tokenizer, 64, objective, **options)

    for label in (None, True, 1.5, ""):
        with pytest.raises(DataError, match=r"line 7 has the label .*; the name of a class was expected"):
            read({"text": "a", "label": label})
    with pytest.raises(DataError, match=r"line 7 has the label 'maybe', which no row to learn from has; they have "):
        read({"text": "a", "label": "maybe"}, classes=("no", "oos", "yes"))
    with pytest.raises(DataError, match=r"line 1 has the label 'yes'; a finite number was expected"):
        read({"text": "a", "label": 2}, "regression")
    with pytest.raises(DataError, match=r"has label rows since line 1; the objective embedding learns from pair rows"):
        read({"text": "a", "label": "yes"}, "embedding")
    rows = [{"tokens": ["a", "b"], "labels": ["yes", "no"]}]
    with pytest.raises(DataError, match=r'line 2 has 2 "tokens" and 1 "labels"; each word needs one'):
        read({"tokens": ["a", "b"], "labels": ["yes"]}, "token-classification")
    rows = [{"text": "a", "label": 10}, {"text": "a", "label": 9}]
    write(tmp_path / "x.jsonl", rows)
    assert read_labeled_rows(tmp_path / "x.jsonl", tokenizer, 64, "classification").classes == ("9", "10")
    with pytest.raises(DataError, match=r"has a single class, 9, so that nothing can be told apart"):
        read_labeled_rows(write(tmp_path / "y.jsonl", rows[1:]), tokenizer, 64, "classification")


def test_a_head_behind_hugging_faces_pooler_is_refused(base: Path, runs: dict[str, Run]) -> None:
    config = load_encoder(base).config
    with pytest.raises(AdapterError, match=r"behind a tanh pooler, which is not computed here\. Train it"):
        load_with_head(runs["classification"].folder, config, {})
    said = {"objective": "classification", "classes": ["one", "two"]}
    with pytest.raises(AdapterError, match=r"the head has .*\(3, 96\).*of .*\(2, 96\).* were expected"):
        load_with_head(runs["classification"].folder, config, said)


def test_a_stopped_run_goes_on_to_the_bit(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", text_rows(30))
    plan = plan_for(base, data, "classification", num_epochs=2)
    whole = et.train(plan, base, data=data, out=tmp_path / "whole")
    from tests.training.conftest import at_step, interrupt

    cut = et.train(plan, base, data=data, out=tmp_path / "cut", on_progress=at_step(3, interrupt))
    assert cut.stopped == "signal"
    cut = et.train(plan, base, data=data, out=tmp_path / "cut", resume=True)
    assert cut.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_run_prints_the_label_with_its_probability(
    runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = et.export(runs["classification"], out=tmp_path / "bundle").folder
    show_embedding(bundle, "abc cab", adapter=True, threads=1, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"yes  \d+\.\d%", lines[0])
    show_embedding(bundle, "abc cab", adapter=True, threads=1, as_json=True)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["label"] == "yes"
    assert said["probability"] == max(said["probabilities"].values())
