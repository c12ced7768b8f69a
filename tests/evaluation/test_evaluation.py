"""Whether tuning is worth it: each figure against a second way to compute it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model

import edgetune as et
from edgetune.cli import verbs
from edgetune.data import IGNORED, Row, read_rows
from edgetune.errors import CheckpointError, ConfigError, DataError, ModelError
from edgetune.evaluation import job as jobs
from edgetune.evaluation.head import fit_head
from edgetune.evaluation.metrics import Answers, bootstrap, difference, macro_f1, summarize, wilson
from edgetune.evaluation.scoring import Scorer
from edgetune.evaluation.verdict import choose
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.tokenizer import load_tokenizer

LABELS = ("on", "off", "oos", "onward")
TRAIN, HELD_OUT = 24, 12


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts that begin with the letter of their label."""
    rng = np.random.default_rng(seed)
    tails = ["".join(rng.choice(list("abcdef "), rng.integers(3, 14))) for _ in range(count)]
    return [{"prompt": f"{'wxyz'[i % 4] * 3} {tail}: ", "completion": LABELS[i % 4]} for i, tail in enumerate(tails)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, train.jsonl, test.jsonl, old.jsonl and a run/ that has learned a little."""
    path = tmp_path_factory.mktemp("evaluation")
    base = et.quantize(write_model(path / "model", tiny_config("llama")), "int4", path / "base")
    data = write(path / "train.jsonl", labelled(TRAIN, 0))
    write(path / "test.jsonl", labelled(HELD_OUT, 1))
    write(path / "old.jsonl", [{"text": "something else entirely, again and again " * 4}] * 3)
    config = et.TrainConfig(max_steps=6, batch_size=4, max_seq_length=64, learning_rate=2e-2)
    plan = et.plan(base, "host", data=data, eval_data=data, config=config)
    et.train(plan, base, data=data, eval_data=data, out=path / "run")
    return path


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return list(read_rows(folder / "test.jsonl", load_tokenizer(folder / "base"), 64))


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder / "base")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return et.evaluate(folder / "run", folder / "test.jsonl", retention=folder / "old.jsonl")


@torch.no_grad()
def logits(decoder: Decoder, ids: Any) -> torch.Tensor:
    """[T, vocab], whole, of one row alone."""
    return decoder(torch.tensor([[int(token) for token in ids]]))[0]


@pytest.mark.parametrize("positions", [64, 300])
def test_losses_and_exact_answers_are_those_of_whole_logits(decoder: Decoder, rows: list[Row], positions: int) -> None:
    said = rows[0].input_ids.copy()  # one row that the model itself says
    start = int(np.argmax(rows[0].labels != IGNORED))
    for at in range(start, len(said)):
        said[at] = int(logits(decoder, said[:at])[-1].argmax())
    labels = np.where(np.arange(len(said)) < start, IGNORED, said).astype(np.int32)
    some = [Row(said, labels, 99), *rows]
    nll, exact = Scorer(decoder, positions).tokens(some)
    for index, row in enumerate(some):
        scores = logits(decoder, row.input_ids)[:-1]
        targets = torch.from_numpy(row.labels[1:]).long()
        assert nll[index] == pytest.approx(
            float(torch.nn.functional.cross_entropy(scores, targets, reduction="sum")), abs=2e-4
        )
        assert exact[index] == bool((scores.argmax(1) == targets)[targets != IGNORED].all())
    assert exact[0] and not exact[1:].all()


def test_the_label_is_the_one_that_greedy_steps_lead_to(decoder: Decoder, rows: list[Row]) -> None:
    # Random labels, so that the model does not always choose the same; one begins as another does.
    rng = np.random.default_rng(2)
    labels = [(5,), (5, 7), *(tuple(rng.integers(3, 30, rng.integers(1, 5)).tolist()) for _ in range(40))]
    labels = list(dict.fromkeys(labels))
    prompts = [jobs.prompt_ids(row) for row in rows]
    chosen = Scorer(decoder, 128).choose(prompts, labels)
    for prompt, index in zip(prompts, chosen, strict=True):
        so_far: tuple[int, ...] = ()
        while so_far not in labels:
            follows = [label[len(so_far)] for label in labels if label[: len(so_far)] == so_far]
            scores = logits(decoder, [*prompt, *so_far])[-1]
            so_far += (max(follows, key=lambda token: float(scores[token])),)
        assert labels[index] == so_far
    assert len(set(chosen.tolist())) > 1


def test_features_are_the_hidden_states_of_each_prompt_alone(decoder: Decoder, rows: list[Row]) -> None:
    prompts = [jobs.prompt_ids(row) for row in rows]
    features = Scorer(decoder, 100).features(prompts)
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            hidden = decoder.hidden(torch.from_numpy(prompt[None]).long())[0]
        np.testing.assert_allclose(features["last"][index], hidden[-1], atol=1e-4)
        np.testing.assert_allclose(features["mean"][index], hidden.mean(0), atol=1e-4)


def test_intervals() -> None:
    assert wilson(8, 10) == pytest.approx({"value": 0.8, "low": 0.4901625, "high": 0.9433178}, abs=1e-6)
    assert wilson(0, 10)["low"] == 0 and wilson(10, 10)["high"] == pytest.approx(1)
    values = np.random.default_rng(0).normal(3, 2, 400)
    made = bootstrap(lambda rows: float(values[rows].mean()), 400)
    half = 1.96 * values.std() / math.sqrt(400)
    assert made["value"] == pytest.approx(values.mean())
    assert made["low"] == pytest.approx(values.mean() - half, abs=0.04)
    assert made["high"] == pytest.approx(values.mean() + half, abs=0.04)


def test_metrics_by_hand() -> None:
    truth, chosen = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 0])
    f1 = [2 * 2 / (3 + 3), 2 * 1 / (2 + 2), 0.0]
    assert macro_f1(truth, chosen, 4) == pytest.approx(np.mean(f1)), "a label that no row has does not count"
    unseen = macro_f1(np.append(truth, -1), np.append(chosen, 1), 4)  # a false positive of label 1
    assert unseen == pytest.approx(np.mean([f1[0], 2 * 1 / (2 + 3), 0.0]))
    answers = Answers(np.array([1.0, 2, 3, 4, 5, 6]), np.array([1, 1, 2, 2, 3, 3]), truth == chosen, chosen)
    figures = summarize(answers, truth, 1, 4)
    assert figures["loss"]["value"] == pytest.approx(21 / 12)
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(21 / 12))
    assert figures["exact_match"]["value"] == figures["accuracy"]["value"] == 0.5
    assert figures["out_of_scope_recall"]["value"] == 0.5 and figures["macro_f1"]["value"] == pytest.approx(np.mean(f1))
    worse = Answers(answers.nll + 0.5, answers.tokens, None, np.zeros(6, int))
    assert difference("loss", answers, worse, None)["value"] == pytest.approx(3 / 12)
    assert difference("accuracy", answers, worse, truth)["value"] == pytest.approx(0.0)


def test_the_head_is_at_its_optimum_and_finds_what_separates() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    centres = rng.normal(0, 3, (3, 7)).astype(np.float32)
    features = {"last": centres[labels] + rng.normal(0, 1, (200, 7)).astype(np.float32),
                "mean": rng.normal(0, 1, (200, 7)).astype(np.float32)}  # fmt: skip
    head = fit_head(features, labels, 3, seed=0)
    assert head.pooling == "last" and (head.choose(features) == labels).mean() > 0.97
    z = (features["last"] - head.mean) / head.scale
    scores = z @ head.weight.T + head.bias
    shares = np.exp(scores - scores.max(1, keepdims=True))
    wrong = shares / shares.sum(1, keepdims=True) - np.eye(3)[labels]
    assert np.abs(wrong.T @ z / 200 + head.l2 * head.weight).max() < 2e-3
    assert head.nbytes == 4 * (3 * 7 + 3)


def test_a_run_beside_what_needs_no_tuning(found: dict[str, Any], folder: Path, rows: list[Row]) -> None:
    assert (found["rows"], found["kind"], found["metric"], found["labels"]) == (HELD_OUT, "prompt", "accuracy", 4)
    base, tuned = found["ways"]["base"], found["ways"]["tuned"]
    nll, _ = Scorer(load_decoder(folder / "base"), 64).tokens(rows)
    assert base["loss"]["value"] == pytest.approx(nll.sum() / sum(row.num_supervised for row in rows), rel=1e-5)
    assert tuned["loss"]["high"] < base["loss"]["low"], "it was trained"
    assert tuned["training_seconds"] > 0 and tuned["bytes"] == (folder / "run/adapter_model.safetensors").stat().st_size
    assert found["ways"]["prompt"]["prompt_tokens"] > 0 and found["shots"] > 4
    assert found["ways"]["head"]["loss"] is None and found["ways"]["head"]["accuracy"]["value"] > 0.5
    assert base["out_of_scope_recall"] is not None and found["leaked_rows"] == 0
    for way in found["ways"].values():
        assert way["accuracy"]["low"] <= way["accuracy"]["value"] <= way["accuracy"]["high"]
    kept = found["retention"]
    assert kept["rows"] == 3 * 3 and kept["change"]["value"] == pytest.approx(
        kept["after"]["value"] - kept["before"]["value"]
    )
    summary = json.loads((folder / "run/summary.json").read_text())
    trained_on = et.evaluate(folder / "run", folder / "train.jsonl", shots=0)
    assert trained_on["ways"]["tuned"]["loss"]["value"] == pytest.approx(summary["eval_loss"], rel=1e-4)
    assert trained_on["leaked_rows"] == TRAIN and trained_on["ways"]["prompt"] is None


def test_examples_fit_the_window_and_leave_the_row_as_it_is(folder: Path) -> None:
    job = jobs.read_job(jobs.read_run(folder / "run"), folder / "test.jsonl", None, None, False)
    shots = job.shots(None, 0)
    assert sorted(answer for answer in map(jobs.answer_ids, shots[:4])) == sorted(job.labels.values())
    prompted = job.prompted(shots)
    longest = max(map(len, prompted))
    assert longest <= job.context == 256 and longest + min(len(job._example(row)) for row in job.training) > 256 - 40
    for row, plain in zip(prompted, job.rows, strict=True):
        assert row.input_ids[-len(plain) + 1 :].tolist() == plain.input_ids[1:].tolist()
        assert row.labels[row.labels != IGNORED].tolist() == plain.labels[plain.labels != IGNORED].tolist()
        text = job.tokenizer.decode(row.input_ids, skip_special_tokens=False)
        assert text.count("\n\n") == len(shots) and text.count("</s>") == 1
    assert len(job.shots(3, 0)) == 3


def test_the_cheapest_of_those_that_are_as_good_is_chosen() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 400)

    def right(share: float) -> Answers:
        label = np.where(np.arange(400) < share * 400, truth, 1 - truth)
        return Answers(None, np.ones(400), None, label)

    def costs(share: float, setup: float, each: float) -> dict[str, Any]:
        return {"accuracy": {"value": share}, "training_seconds": setup, "seconds_per_row": each}

    answers = {"base": right(0.5), "prompt": right(0.8), "head": right(0.9), "tuned": right(0.905)}
    figures = {"base": costs(0.5, 0, 0.01), "prompt": costs(0.8, 0, 0.05), "head": costs(0.9, 5, 0.01),
               "tuned": costs(0.905, 100, 0.01)}  # fmt: skip
    assert choose("accuracy", answers, figures, truth) == "head"
    figures["tuned"]["training_seconds"] = 1
    assert choose("accuracy", answers, figures, truth) == "tuned"
    answers["tuned"], figures["tuned"] = right(0.97), costs(0.97, 1e6, 0.01)
    assert choose("accuracy", answers, figures, truth) == "tuned", "no cost makes up for a worse answer"


def test_a_label_that_no_training_row_has_is_answered_wrong(folder: Path, tmp_path: Path) -> None:
    held_out = write(tmp_path / "held.jsonl", [*labelled(8, 5), {"prompt": "www ab: ", "completion": "dim"}])
    found = et.evaluate(folder / "run", held_out, shots=0)
    assert found["unseen_labels"] == 1 and found["metric"] == "accuracy"
    assert found["ways"]["head"]["accuracy"]["value"] <= 8 / 9


def test_texts_have_a_loss_and_nothing_to_prompt_with(folder: Path) -> None:
    found = et.evaluate(folder / "run", folder / "old.jsonl")
    assert found["metric"] == "loss" and found["labels"] is None
    assert found["ways"]["prompt"] is None and found["ways"]["head"] is None
    assert found["ways"]["base"]["exact_match"] is None
    assert found["verdict"].startswith(("Tune: loss ", "Do not tune, the base does it alone: loss "))


def test_what_cannot_be_evaluated_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="base is no run that has ended"):
        et.evaluate(folder / "base", folder / "test.jsonl")
    with pytest.raises(ConfigError, match="max_rows = 1; an interval needs at least 2"):
        et.evaluate(folder / "run", folder / "test.jsonl", max_rows=1)
    one = write(tmp_path / "one.jsonl", labelled(1, 3))
    with pytest.raises(DataError, match=r"one.jsonl has 1 row; an interval needs at least 2"):
        et.evaluate(folder / "run", one)
    summary = json.loads((folder / "run/summary.json").read_text())
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "plan.json").write_text((folder / "run/plan.json").read_text())
    (moved / "summary.json").write_text(json.dumps(summary | {"base_sha256": "0" * 64}))
    with pytest.raises(ModelError, match=r"base is not the base that .*run was trained on"):
        et.evaluate(moved, folder / "test.jsonl")


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        verbs.main(["eval", str(folder / "run"), "--data", str(folder / "test.jsonl"), "--max-rows", "6",
                    "--retention", str(folder / "old.jsonl"), "--shots", "2", "--json"])  # fmt: skip
    assert ended.value.code == 0
    shown = capsys.readouterr()
    answer = json.loads(shown.out.splitlines()[-1])
    assert answer["rows"] == 6 and answer["shots"] == 2
    assert "prompt, 2 shots" in shown.err and "retention: loss" in shown.err and answer["verdict"] in shown.err
