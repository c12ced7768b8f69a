"""Whole runs on preferences: the reference is the base, a step is the pairs', and a run that goes on ends the same."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from edgetune.adapters.lora import LoraConfig
from edgetune.data import pack, read_rows, split_eval, stack
from edgetune.errors import CheckpointError, DataError
from edgetune.models.decoder import load_decoder
from edgetune.planner.plans import Plan
from edgetune.tokenizer import load_tokenizer
from edgetune.training import reference
from edgetune.training.loop import Run, train
from edgetune.training.run import REFERENCE
from tests.objectives.test_preferences import logps_of
from tests.training.conftest import at_step, interrupt, make_base, make_plan

DPO = {"objective": "dpo", "beta": 0.2, "label_smoothing": 0.0}


class Job(NamedTuple):
    base: Path
    data: Path

    def plan(self, **settings: Any) -> Plan:
        return make_plan(self.base, **{"max_seq_length": 96, **DPO} | settings)

    def train(self, out: Path, plan: Plan | None = None, **options: Any) -> Run:
        return train(plan or self.plan(), self.base, data=self.data, out=out, **options)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Answers of the letter a are preferred to those of b."""
    folder, rng = tmp_path_factory.mktemp("job"), np.random.default_rng(0)
    rows = [
        {"prompt": "".join(rng.choice(list("cd "), 5)), "chosen": "a" * (i % 7 + 1), "rejected": "b" * (i % 5 + 2)}
        for i in range(30)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Job(make_base(folder, num_hidden_layers=3), data)


@pytest.fixture(scope="module")
def run(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return job.train(tmp_path_factory.mktemp("run") / "run")


def lines(run: Run, key: str) -> list[float]:
    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


def test_a_run_begins_at_the_base_and_learns_what_is_preferred(run: Run) -> None:
    losses = lines(run, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), (
        "the adapter is nothing yet, so policy and reference agree"
    )
    assert lines(run, "reward_margin")[0] == pytest.approx(0, abs=1e-4)
    assert losses[-1] < 0.4 and lines(run, "reward_margin")[-1] > 1 and lines(run, "reward_accuracy")[-1] == 1
    assert lines(run, "eval_reward_margin")[-1] > 1
    summary = run.summary
    assert (summary["objective"], summary["beta"], summary["label_smoothing"]) == ("dpo", 0.2, 0.0)
    assert summary["eval_reward_accuracy"] == 1 and summary["eval_loss"] < 0.4
    assert not (run.folder / REFERENCE).exists(), "it tells what the rows are"


def test_the_reference_is_the_base_whatever_the_adapter(job: Job, tmp_path: Path) -> None:
    run = job.train(tmp_path / "run", on_progress=at_step(3, interrupt))
    assert run.stopped == "signal"
    folder = run.folder / REFERENCE
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    from safetensors.numpy import load_file

    known = load_file(folder / reference.FILE)[reference.TENSOR]
    decoder = load_decoder(job.base)
    rows, held_out = split_eval(read_rows(job.data, load_tokenizer(job.base), 96), 0.2, 3)
    expected = []
    for window in (*pack(rows, 96, 2), *pack(held_out, 96, 2)):
        batch = stack([window])
        ids, positions, segments = (
            torch.from_numpy(batch[key]) for key in ("input_ids", "position_ids", "segment_ids")
        )
        with torch.no_grad():
            logits = decoder(ids, positions, segments)[0]
        expected.append(logps_of(logits, torch.eye(logits.shape[1]), batch)[0])
    assert known == pytest.approx(torch.cat(expected).numpy(), rel=1e-5)
    assert len(known) == 60


def test_a_run_that_goes_on_ends_with_the_same_bytes(job: Job, run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    stopped = job.train(tmp_path / "run", on_progress=at_step(5, interrupt))
    assert stopped.stopped == "signal"
    with pytest.raises(CheckpointError, match=r"beta \(0\.2 before, 0\.3 now\)\. Resume"):
        job.train(tmp_path / "run", job.plan(beta=0.3), resume=True)
    with pytest.raises(CheckpointError, match=r"objective \(dpo before, orpo now\)"):
        job.train(tmp_path / "run", job.plan(objective="orpo", label_smoothing=None), resume=True)
    with monkeypatch.context() as patched:  # the reference is there and is not measured again
        patched.setattr(reference.Reference, "_measure", lambda *_: pytest.fail("measured again"))
        done = job.train(tmp_path / "run", resume=True)
    assert done.summary["adapter_sha256"] == run.summary["adapter_sha256"]
    assert lines(done, "loss") == lines(run, "loss") and lines(done, "eval_loss") == lines(run, "eval_loss")


@pytest.mark.parametrize("damage", ["bytes", "manifest", "gone", "open"])
def test_a_reference_that_is_not_whole_is_measured_again(job: Job, run: Run, tmp_path: Path, damage: str) -> None:
    job.train(tmp_path / "run", on_progress=at_step(2, interrupt))
    folder = tmp_path / "run" / REFERENCE
    if damage == "bytes":
        content = bytearray((folder / reference.FILE).read_bytes())
        content[-3] ^= 1
        (folder / reference.FILE).write_bytes(content)
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{}")
    elif damage == "gone":
        (folder / reference.FILE).unlink()
    else:
        folder.chmod(0o755)
    assert job.train(tmp_path / "run", resume=True).summary["adapter_sha256"] == run.summary["adapter_sha256"]


def test_how_the_blocks_are_walked_changes_no_bit(job: Job, tmp_path: Path) -> None:
    upper = {"adapter": LoraConfig(r=3, layers_to_transform=(1, 2)), "max_steps": 4, "recompute_layers": 0}
    plans = [
        job.plan(**upper | other)
        for other in ({}, {"recompute_layers": 2}, {"feature_cache_bytes": 1 << 30}, {"activation_offloading": True})
    ]
    shas = [job.train(tmp_path / f"run{i}", plan).summary["adapter_sha256"] for i, plan in enumerate(plans)]
    assert len(set(shas)) == 1


def test_orpo_needs_no_reference(job: Job, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(reference.Reference, "_measure", lambda *_: pytest.fail("measured a reference"))
    done = job.train(tmp_path / "run", job.plan(objective="orpo", label_smoothing=None))
    losses = lines(done, "loss")
    assert losses[-1] < losses[0] - 1 and lines(done, "eval_reward_accuracy")[-1] == 1


def test_kto_tells_what_is_wanted_from_what_is_not(job: Job, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in job.data.read_text().splitlines()]
    feedback = [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in rows
        for key in ("chosen", "rejected")
    ]
    data = tmp_path / "feedback.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in feedback), encoding="utf-8")
    plan = job.plan(objective="kto", label_smoothing=None)
    done = train(plan, job.base, data=data, out=tmp_path / "run")
    assert lines(done, "loss")[0] == pytest.approx(0.5, abs=1e-5)
    assert lines(done, "reference_kl")[0] == pytest.approx(0, abs=1e-4)
    assert lines(done, "loss")[-1] < 0.47 and lines(done, "eval_reward_accuracy")[-1] > 0.8


def test_mezo_learns_it_too(job: Job, tmp_path: Path) -> None:
    plan = job.plan(step_rule="mezo", optimizer="sgd", learning_rate=1e-2, max_steps=3)
    done = job.train(tmp_path / "run", plan)
    assert lines(done, "loss")[0] == pytest.approx(math.log(2), abs=1e-2)
    assert len(lines(done, "reward_margin")) == 3


def test_rows_that_are_no_preferences_are_refused(job: Job, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    with pytest.raises(DataError, match=r"rows\.jsonl has prompt rows; --objective dpo learns from preference rows"):
        train(job.plan(), job.base, data=rows, out=tmp_path / "run")
    with pytest.raises(DataError, match=r"has preference rows; --objective sft learns from .*--objective dpo"):
        job.train(tmp_path / "run", make_plan(job.base, max_seq_length=96))
