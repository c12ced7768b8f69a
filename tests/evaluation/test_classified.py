"""Whether tuning a classifier is worth it: each way's answers against a second way to compute them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch reader knows
from conftest import tiny_config, write_model
from tiny_encoder import encoder_hf, write_encoder

import edgetune as et
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.head import BIAS, SCORE, WEIGHT, load_with_head
from edgetune.adapters.loreft import LoreftConfig
from edgetune.adapters.prompt import PromptConfig
from edgetune.cli import verbs
from edgetune.data import Row
from edgetune.errors import ConfigError, DataError
from edgetune.evaluation import classified
from edgetune.evaluation.job import read_run
from edgetune.evaluation.scoring import Scorer
from edgetune.evaluation.verdict import explain_choice
from edgetune.models.decoder import load_decoder
from edgetune.models.encoder import Encoder, load_encoder
from edgetune.tokenizer import load_tokenizer
from edgetune.training.feature_based import train_feature_based
from edgetune.training.forward import start_virtual_tokens
from tests.test_heads import text_rows, write

CLASSES = ("no", "oos", "yes")


def trained(path: Path, base: Path, **settings: Any) -> Path:
    """A run/ of few steps on train.jsonl."""
    config = et.TrainConfig(
        **({"objective": "classification", "max_steps": 8, "batch_size": 4, "learning_rate": 2e-2} | settings)
    )
    data = path / "train.jsonl"
    plan = et.plan(base, "host", data=data, adapter=et.LoraConfig(r=3), config=config)
    return et.train(plan, base, data=data, out=base.with_name(f"run-{plan.objective}")).folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """encoder/ and decoder/, each with a base/ and a run-classification/; train.jsonl, test.jsonl."""
    path = tmp_path_factory.mktemp("classified")
    write(path / "train.jsonl", text_rows(30))
    write(path / "test.jsonl", text_rows(21, seed=1))
    models = {
        "encoder": write_encoder(path / "encoder/model", encoder_hf(hidden_size=96), normalize=True),
        "decoder": write_model(path / "decoder/model", tiny_config("llama")),
    }
    for kind, model in models.items():
        trained(path, et.quantize(model, "int4", path / kind / "base"))
    return path


def job_of(folder: Path, kind: str) -> classified.Job:
    run = read_run(folder / kind / "run-classification")
    return classified.read_job(
        run, folder / "test.jsonl", retention=None, shots=None, max_rows=None, skip_bad=False
    )  # fmt: skip


@torch.no_grad()
def pooled(encoder: Encoder, base: Path, texts: list[str]) -> torch.Tensor:
    tokenizer, found = load_tokenizer(base), []
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        found.append(encoder.hidden(ids, torch.ones_like(ids))[0].mean(0))
    return torch.stack(found)


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_each_way_of_an_encoder_answers_what_it_says(folder: Path) -> None:
    job = job_of(folder, "encoder")
    base, texts = job.trained.base, texts_of(folder / "test.jsonl")
    ways = classified.ways_of(job, 0)
    chosen = {name: way.answers.label for name, way in ways.items() if way is not None}
    assert ways["prompt"] is None and job.classes == CLASSES
    frozen = load_encoder(base)
    by_name = F.normalize(pooled(frozen, base, texts)) @ F.normalize(pooled(frozen, base, list(CLASSES))).T
    assert chosen["base"].tolist() == by_name.argmax(1).tolist()
    rows = text_rows(30)
    learned = {row.line for row in job.training}
    kept = write(folder / "kept.jsonl", [row for line, row in enumerate(rows, 1) if line in learned])
    alone = train_feature_based(base, kept)
    assert len(job.training) == 27
    assert chosen["head"].tolist() == alone.predict(alone.read(folder / "test.jsonl")).tolist()
    encoder = load_encoder(base)
    config, tensors, head = load_with_head(job.trained.run.folder, encoder.config, job.trained.summary)
    load_tensors(attach(encoder, config), tensors)
    assert head is not None
    weight, bias = (torch.from_numpy(head.tensors[name]) for name in (WEIGHT, BIAS))
    assert chosen["tuned"].tolist() == (pooled(encoder, base, texts) @ weight.T + bias).argmax(1).tolist()
    assert len(set(chosen["tuned"].tolist())) > 1


def test_each_way_of_a_decoder_answers_what_it_says(folder: Path) -> None:
    job = job_of(folder, "decoder")
    ways = classified.ways_of(job, 0)
    assert ways["base"] is None and ways["head"] is not None and ways["tuned"] is not None
    decoder = load_decoder(job.trained.base)
    config, tensors, head = load_with_head(job.trained.run.folder, decoder.config, job.trained.summary)
    load_tensors(attach(decoder, config), tensors)
    assert head is not None
    with torch.no_grad():
        last = torch.stack([decoder.hidden(torch.tensor(row.input_ids[None]).long())[0, -1] for row in job.rows])
    expected = (last @ torch.from_numpy(head.tensors[SCORE]).T).argmax(1)
    assert ways["tuned"].answers.label is not None
    assert ways["tuned"].answers.label.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_what_evaluate_returns(folder: Path, kind: str) -> None:
    run = folder / kind / "run-classification"
    found = et.evaluate(run, folder / "test.jsonl", max_rows=15)
    assert (found["rows"], found["kind"], found["metric"], found["labels"]) == (15, "label", "accuracy", 3)
    tuned, head = found["ways"]["tuned"], found["ways"]["head"]
    for figure in ("accuracy", "macro_f1", "out_of_scope_recall"):
        assert tuned[figure]["low"] <= tuned[figure]["value"] <= tuned[figure]["high"]
    assert tuned["loss"] is None and tuned["training_seconds"] > 0
    assert tuned["bytes"] == (run / "adapter_model.safetensors").stat().st_size > head["bytes"]
    assert set(found["gains"]) == ({"base", "head"} if kind == "encoder" else {"head"})
    assert found["verdict"].startswith(("Tune: accuracy ", "Do not tune, "))
    assert et.evaluate(run, folder / "train.jsonl")["leaked_rows"] == 27


def test_a_head_that_is_as_good_in_a_twentieth_of_the_time_is_taken() -> None:
    """The figures of banking77 with ten rows of each class: accuracy 0.851 in 100 s, and 0.863 in 5 s."""
    from edgetune.evaluation.metrics import Answers
    from edgetune.evaluation.ways import Way, compare

    truth = np.random.default_rng(0).integers(0, 77, 3080)

    def way(right: int, **costs: float) -> Way:
        order = np.random.default_rng(right).permutation(len(truth))
        label = truth.copy()
        label[order[right:]] = (label[order[right:]] + 1) % 77
        return Way(Answers(None, np.ones(len(truth)), None, label), 9.0, **costs)  # type: ignore[arg-type]

    ways = {"tuned": way(2621, training_seconds=100.0), "head": way(2658, training_seconds=5.0), "base": way(1800)}
    found = compare(ways, truth, [str(i) for i in range(77)])
    assert found["choice"] == "head"
    verdict = explain_choice({**found, "kind": "label", "shots": 0})
    assert verdict.startswith("Do not tune, train the head on frozen features: accuracy 86.3%")
    assert "85.1%" in verdict and "for tuned (100.0 s to train" in verdict and "for the classes' names" in verdict
    worth = compare(ways | {"tuned": way(2900, training_seconds=100.0)}, truth, [str(i) for i in range(77)])
    assert worth["choice"] == "tuned"
    alone = compare({"tuned": ways["tuned"], "head": None, "base": None}, truth, [str(i) for i in range(77)])
    verdict = explain_choice({**alone, "kind": "label", "shots": 0})
    assert verdict.startswith("Tuned: accuracy 85.1% [") and verdict.endswith("a row), and nothing to hold it against.")


def test_what_it_learned_from_is_the_file_of_the_run_less_its_held_out_rows(folder: Path, tmp_path: Path) -> None:
    run, test = read_run(folder / "encoder/run-classification"), folder / "test.jsonl"
    other = write(tmp_path / "other.jsonl", text_rows(30, seed=7))

    def learned(**said: Any) -> int:
        trained = replace(run, summary=run.summary | {name: str(path) for name, path in said.items()})
        made = classified.read_job(trained, test, retention=None, shots=None, max_rows=None, skip_bad=False)
        return len(made.training)

    assert learned() == 27
    assert learned(eval_data=other) == 30
    assert learned(data=other) == learned(data=tmp_path / "gone.jsonl") == 0, "other rows, and none"
    (tmp_path / "damaged.jsonl").write_text("what was here is no JSON now\n", encoding="utf-8")
    assert learned(data=tmp_path / "damaged.jsonl") == 0


def test_rows_are_cut_to_what_virtual_tokens_leave(folder: Path) -> None:
    run = read_run(folder / "decoder/run-classification")
    adapter = PromptConfig(num_virtual_tokens=4).resolved(run.plan.model_config)
    job = classified.read_job(
        replace(run, plan=replace(run.plan, adapter=adapter, max_seq_length=10)), folder / "test.jsonl",
        retention=None, shots=None, max_rows=None, skip_bad=False,
    )  # fmt: skip
    assert max(map(len, job.rows)) == 6 < max(len(row) for row in job_of(folder, "decoder").rows)


def test_names_that_are_no_words_tell_nothing(tmp_path: Path) -> None:
    rows = [row | {"label": len(row["label"])} for row in text_rows(12) if row["label"] != "oos"]
    write(tmp_path / "train.jsonl", rows)
    model = write_encoder(tmp_path / "encoder/model", encoder_hf())
    run = trained(tmp_path, et.quantize(model, "int4", tmp_path / "encoder/base"), max_steps=1)
    found = et.evaluate(run, tmp_path / "train.jsonl")
    assert found["ways"]["base"] is None and found["ways"]["head"] is not None


def test_what_cannot_be_evaluated_is_refused(folder: Path, tmp_path: Path) -> None:
    run, test = folder / "encoder/run-classification", folder / "test.jsonl"
    other = write(tmp_path / "other.jsonl", [*text_rows(3), {"text": "a", "label": "maybe"}])
    with pytest.raises(DataError, match=r"line 4 has the label 'maybe', which no row to learn from has"):
        et.evaluate(run, other)
    with pytest.raises(ConfigError, match="retention: a classifier continues no text"):
        et.evaluate(run, test, retention=test)
    with pytest.raises(ConfigError, match="shots = 3: a classifier continues no text"):
        et.evaluate(run, test, shots=3)
    with pytest.raises(DataError, match="has 1 row; an interval needs at least 2"):
        et.evaluate(run, write(tmp_path / "one.jsonl", text_rows(1)))
    write(tmp_path / "train.jsonl", [{"text": "ab", "label": i} for i in range(6)])
    number = trained(tmp_path, folder / "encoder/base", objective="regression", max_steps=1)
    with pytest.raises(ConfigError, match=r"was trained for regression; .* eval_mean_absolute_error of its held-out"):
        et.evaluate(number, test)


def test_virtual_tokens_take_positions_of_their_own(folder: Path) -> None:
    decoder = load_decoder(folder / "decoder/base")
    attach(decoder, PromptConfig(num_virtual_tokens=4).resolved(decoder.config), seed=2)
    start_virtual_tokens(decoder, 3)
    rng = np.random.default_rng(0)
    rows = [Row(ids := rng.integers(3, 250, n).astype(np.int32), ids, 0) for n in (9, 5, 14)]
    nll, _ = Scorer(decoder, 60).tokens(rows)
    for row, found in zip(rows, nll, strict=True):
        with torch.no_grad():
            logits = decoder(torch.tensor(row.input_ids[None]).long())[0]
        expected = F.cross_entropy(logits[:-1], torch.tensor(row.input_ids[1:]).long(), reduction="sum")
        assert found == pytest.approx(expected.item(), rel=1e-5)


def test_features_are_those_of_whole_prompts_where_positions_are_changed(folder: Path) -> None:
    decoder = load_decoder(folder / "decoder/base")
    parameters = attach(decoder, LoreftConfig(r=2).resolved(decoder.config), seed=2)
    generator = torch.Generator().manual_seed(6)
    for value in parameters.values():
        value.data.add_(0.3 * torch.randn(value.shape, generator=generator))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 250, n).astype(np.int32) for n in (9, 5, 14)]
    found = Scorer(decoder, 60).features(prompts)["last"]
    for ids, last in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = decoder.hidden(torch.tensor(ids[None]).long())[0, -1]
        np.testing.assert_allclose(last, expected, atol=1e-5)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", str(folder / "encoder/run-classification"), "--data", str(folder / "test.jsonl"), "--json"]
    with pytest.raises(SystemExit) as ended:
        verbs.main(words)
    assert ended.value.code == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out.splitlines()[-1])
    assert "out-of-scope recall" in shown.err and "class names" in shown.err and answer["verdict"] in shown.err
