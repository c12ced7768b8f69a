"""The command: what it prints where, how it ends, and that each flag arrives."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_config, write_model
from tiny_encoder import encoder_hf, write_encoder

from edgetune import cgroup
from edgetune.adapters.lora import LoraConfig
from edgetune.cli import launch
from edgetune.cli import verbs as cli
from edgetune.cli.console import STOPPED_EARLY, exit_code
from edgetune.cli.flags import _adapter_settings, read_budget, read_settings
from edgetune.errors import ConfigError, EdgetuneError, MissingExtraError
from edgetune.models import load_config
from edgetune.planner import check_engine
from edgetune.planner.plans import Plan, TrainConfig
from edgetune.planner.wishes import RowFacts, Wishes
from edgetune.quantizer import quantize

REPOSITORY = Path(__file__).parents[1]
VERBS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback)
PLAN_KEYS = {
    "fits", "engine", "grid", "budget_bytes", "predicted_peak_bytes", "floor_bytes", "parts", "concessions",
    "predicted_step_seconds", "adapter",
}  # fmt: skip
SUMMARY_KEYS = {
    "measured_peak_bytes", "measured_peak_rss_bytes", "enforcement", "steps", "tokens_per_second", "train_loss",
    "eval_loss", "trainable_parameters", "adapter_bytes", "stopped",
}  # fmt: skip
BENCH_KEYS = {
    "load_ms", "load_peak_bytes", "time_to_first_token_ms", "prompt_tokens_per_second", "generation_tokens_per_second",
    "p50_ms", "p95_ms", "peak_memory_bytes", "bundle_bytes", "adapter_overhead_percent", "verdict",
}  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def edgetune(*words: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "edgetune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), input=stdin, timeout=300)


def answer(*words: str | Path, code: int = 0) -> dict[str, Any]:
    """What a verb prints with --json: one object, alone on stdout."""
    result = edgetune(*words, "--json")
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = result.stdout.splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def call(*words: str | Path) -> int:
    """The command in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    return int(ended.value.code or 0)


@dataclasses.dataclass
class Way:
    """Folders that the way through left, and what each verb printed."""

    folder: Path
    said: dict[str, dict[str, Any]]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    """quantize, plan, train, export and bench, once."""
    folder = tmp_path_factory.mktemp("way")
    write_model(folder / "model", tiny_config("llama"))
    rows = [{"prompt": f"turn on lamp {i}: ", "completion": f"lamp {i} on"} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = ("--device", "galaxy-watch-7", "--data", folder / "rows.jsonl", "--learning-rate", "0.01", "--max-steps", "4")
    said = {
        "quantize": answer("quantize", folder / "model", "--out", folder / "base"),
        "plan": answer("plan", folder / "base", *job),
        "train": answer("train", folder / "base", *job, "--out", folder / "run"),
        "export": answer("export", folder / "run", "--out", folder / "bundle"),
        "bench": answer("bench", folder / "bundle", "--device", "host", "--runs", "1", "--new-tokens", "4"),
    }
    return Way(folder, said)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m", tiny_config("llama"))


def test_quantize_says_what_it_wrote(way: Way) -> None:
    said = way.said["quantize"]
    files = [path for path in (way / "base").iterdir() if path.name != "manifest.json"]
    assert said["base"] == str(way / "base")
    assert said["base_bytes"] == sum(path.stat().st_size for path in files)
    assert said["grid"] == "int4"


def told_next(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words of the command that a verb's last line on stderr names."""
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Next: edgetune ")
    return shlex.split(last)[2:]


def test_each_verb_names_the_one_that_follows(
    way: Way, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgetune.cli.training import run_job

    monkeypatch.chdir(tmp_path)
    assert call("quantize", model, "--out", "a base") == 0
    assert told_next(capsys) == ["train", "a base", "--device", "ID", "--data", "FILE", "--out", "run/"]
    flags = ("--device", "galaxy-watch-7", "--target-modules", "q_proj", "--max-steps", "1")
    assert call("plan", "a base", *flags) == 0
    assert told_next(capsys) == ["train", "a base", *flags, "--data", "FILE", "--out", "run/"]
    assert call("plan", "a base", *flags, "--data", way / "rows.jsonl", "--explain") == 0
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "start", lambda job, **options: jobs.append(job))
    assert call(*told_next(capsys)) == 0
    (job,) = jobs
    assert (job["plan"].adapter.target_modules, job["out"]) == (("q_proj",), Path("run"))
    capsys.readouterr()
    here = {"enforce": "none", "as_json": False}  # for this process holds what other tests left
    assert run_job({**job, "plan": job["plan"].to_dict(), **here}) == 0
    following = told_next(capsys)
    assert following == ["export", "run", "--out", "bundle/"]
    for verb in ("run", "bench", "report"):
        assert call(*following, *(("--new-tokens", "2", "--runs", "1") if following[0] == "bench" else ())) == 0
        following = told_next(capsys)
        assert following[:2] == [verb, "bundle"]
    assert call(*following) == 0
    assert call("quantize", model, "--out", "again", "--json") == 0
    assert "Next:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "objective", "words"),
    [
        ("lora", "sft", "export run --out bundle/"), ("vera", "sft", "export run --out bundle/"),
        ("prefix_tuning", "sft", "export run --out bundle/"), ("dora", "sft", "export run --merge --out bundle/"),
        ("full", "dpo", "export run --merge --out bundle/"), ("lst", "sft", "export run --out bundle/"),
        ("lora", "reward", "export run --out bundle/"), ("lst", "classification", "export run --out bundle/"),
    ],
)  # fmt: skip
def test_what_comes_after_training_can_be_done(
    method: str, objective: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is what the verb takes for such a run: a method without inputs of its own has to be merged."""
    from edgetune.cli import training

    plan = SimpleNamespace(adapter=SimpleNamespace(method=method), objective=objective, model_config=None)
    run = SimpleNamespace(folder=Path("run"), summary={"stopped": "done"})
    monkeypatch.setattr(training.Plan, "from_dict", lambda values: plan)
    monkeypatch.setattr(training, "train", lambda *_, **__: run)
    monkeypatch.setattr(training, "outcome", lambda run: "")
    assert training.run_job({"plan": {}, "base": Path("base"), "as_json": False}) == 0
    assert told_next(capsys) == words.split()


def test_an_encoder_is_trained_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_encoder(tmp_path / "model", encoder_hf("bert"))
    assert call("quantize", tmp_path / "model", "--out", tmp_path / "base") == 0
    words = told_next(capsys)
    assert words[0] == "train" and words[words.index("--objective") + 1] == "classification"
    assert words[1] == str(tmp_path / "base")


def test_a_model_without_a_tokenizer_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"), tokenizer=False)
    assert call("quantize", model, "--out", tmp_path / "base") == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first == f"{model} has no tokenizer.json: a base without one can be planned for, but not trained or run"


def test_plan_and_train_print_the_keys_that_scripts_rely_on(way: Way) -> None:
    assert way.said["plan"].keys() >= PLAN_KEYS
    assert way.said["train"].keys() >= PLAN_KEYS | SUMMARY_KEYS
    assert way.said["train"] == json.loads((way / "run" / "summary.json").read_text(encoding="utf-8"))
    assert {k: way.said["train"][k] for k in ("grid", "budget_bytes", "adapter")} == {
        k: way.said["plan"][k] for k in ("grid", "budget_bytes", "adapter")
    }
    assert (way.said["train"]["steps"], way.said["train"]["stopped"]) == (4, "done")


def test_export_and_bench_print_the_keys_that_scripts_rely_on(way: Way) -> None:
    assert way.said["export"].keys() >= {"bundle_bytes", "weights", "parity", "peak_rss_bytes"}
    assert way.said["export"]["parity"].keys() >= {"max_abs_logit", "top1_agreement", "kl", "rows"}
    assert way.said["bench"].keys() >= BENCH_KEYS
    for entry in way.said["bench"]["verdict"].values():
        assert entry.keys() == {"value", "wanted", "pass", "basis"}


def test_export_warns_of_slow_weights_in_one_line(model: Path, tmp_path: Path) -> None:
    result = edgetune("export", model, "--out", tmp_path / "b", "--device", "pixel-9", "--weights", "fp16", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["weights"] == "fp16"
    assert result.stderr.splitlines()[0] == (
        "warning: fp16 weights are slow on pixel-9: fp16 is widened to fp32 when it is loaded, and every token reads 4 "
        "bytes of each weight: 4.3 times slower than int4. Its profile names int4."
    )


def test_run_prints_the_text_and_nothing_else(way: Way) -> None:
    words = ("run", way / "bundle", "--max-new-tokens", "6", "--threads", "1")
    said = answer(*words, "--prompt", "turn on lamp 3: ")
    assert said["prompt_tokens"] == len("turn on lamp 3: ")
    assert len(said["token_ids"]) <= 6
    plain = edgetune(*words, "--prompt", "turn on lamp 3: ")
    assert plain.stdout == said["text"] + "\n"
    assert plain.stderr == f"Next: edgetune bench {way / 'bundle'} --device host\n"
    assert edgetune(*words, "--prompt", "-", stdin="turn on lamp 3: ").stdout == plain.stdout
    assert edgetune(*words, "--prompt", "turn on lamp 3: ", "--no-adapter").stdout != plain.stdout
    stop = said["text"][2]
    assert answer(*words, "--prompt", "turn on lamp 3: ", "--stop", stop)["text"] == said["text"].partition(stop)[0]


def test_an_answer_that_the_context_ended_is_said(way: Way, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", way / "bundle", "--prompt", "x" * 250, "--temperature", "1", "--seed", "1", "--json")
    assert call(*words, "--max-new-tokens", "2") == 0
    assert "context" not in capsys.readouterr().err
    assert call(*words, "--max-new-tokens", "500") == 0
    captured = capsys.readouterr()
    said = json.loads(captured.out)
    assert (said["stop_reason"], said["prompt_tokens"] + len(said["token_ids"])) == ("context", 256)
    assert captured.err.endswith(f"ended after {len(said['token_ids'])} tokens, not 500: the model's context is full\n")


def test_a_second_adapter_is_added_and_named(way: Way, tmp_path: Path) -> None:
    bundle = shutil.copytree(way / "bundle", tmp_path / "bundle")
    words = (
        "--device",
        "host",
        "--data",
        way / "rows.jsonl",
        "--learning-rate",
        "0.05",
        "--max-steps",
        "3",
        "--r",
        "2",
    )
    answer("train", way / "base", *words, "--out", tmp_path / "mail")
    said = answer("adapter", "add", bundle, tmp_path / "mail")
    assert (said["added"], said["default"], list(said["adapters"])) == ("mail", "adapter", ["adapter", "mail"])
    assert answer("adapter", "check", bundle)["adapters"]["mail"]["r"] == 2
    prompt = ("--prompt", "turn on lamp 3: ", "--max-new-tokens", "6")
    tokens = [
        answer("run", bundle, *prompt, *flags)["token_ids"]
        for flags in (("--adapter", "mail"), ("--adapter", bundle / "mail.safetensors"), (), ("--no-adapter",))
    ]
    assert tokens[0] == tokens[1] not in (tokens[2], tokens[3])
    assert answer("run", bundle, *prompt, "--adapter", "none", code=1)["error"] == "AdapterError"
    assert edgetune("run", bundle, *prompt, "--adapter", "mail", "--no-adapter").returncode == 2


def test_export_chooses_how_much_to_merge(way: Way, tmp_path: Path) -> None:
    words = ("export", way / "run", "--merge", "--weights", "fp32", "--retention-data", way / "rows.jsonl")
    said = answer(*words, "--out", tmp_path / "a")["merge"]
    assert said["chosen_by"] == "least sum of task and retention loss"
    assert all(row["retention"]["positions"] > row["task"]["positions"] > 0 for row in said["sweep"])
    given = edgetune(*words, "--out", tmp_path / "b", "--alpha", "0.3")
    assert re.search(r"^ +0\.3 .*<- chosen$", given.stdout, re.MULTILINE), given.stdout + given.stderr


def test_a_refused_merge_shows_what_was_measured(way: Way, tmp_path: Path) -> None:
    words = ("export", way / "run", "--merge", "--alpha", "0.01", "--out", tmp_path / "bundle")
    refused = edgetune(*words)
    assert refused.returncode == 1
    assert "ExportError: Rounding the merged int4 weights" in refused.stderr
    columns, *table = refused.stderr.splitlines()[1:]
    assert columns.split() == ["alpha", "task", "loss", "accuracy"]
    assert [line.split()[0] for line in table] == ["0", "0.01"] and table[1].endswith("<- chosen")
    assert "alpha" not in answer(*words, code=1)["message"].partition("Nothing was written")[0]


def test_run_without_a_prompt_needs_a_terminal(way: Way) -> None:
    result = edgetune("run", way / "bundle", stdin="hello\n")
    assert result.returncode == 2
    assert "--prompt" in result.stderr


def test_run_holds_a_conversation_on_a_terminal(
    way: Way, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgetune.cli import chat

    seen: list[list[int]] = []
    complete = chat.complete
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(chat, "complete", lambda s, t, ids, *rest: (seen.append(ids), complete(s, t, ids, *rest))[1])
    lines = iter(["hi", "", "again"])

    def type_line(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_line)
    assert call("run", way / "bundle", "--max-new-tokens", "2") == 0
    assert len(seen) == 2, "the empty line is no turn"
    assert len(seen[1]) > len(seen[0]) + len("again"), "the second turn is asked with the first before it"
    assert capsys.readouterr().out.count("\n") == 3


def test_a_model_that_is_not_quantized_is_quantized_beside_the_run(way: Way, tmp_path: Path) -> None:
    words = ("train", way / "model", "--device", "host", "--grid", "int4", "--data", way / "rows.jsonl")
    result = edgetune(*words, "--max-steps", "1", "--out", tmp_path / "run", "--json")
    assert result.returncode == 0, result.stderr
    assert "not in 4 bits yet" in result.stderr
    said = json.loads(result.stdout)
    assert said["base"] == str(tmp_path / "run-base")
    assert said["base_sha256"] == way.said["quantize"]["base_sha256"]
    again = answer(*words, "--out", tmp_path / "run", "--force", code=1)
    assert again["error"] == "ConfigError"
    assert str(tmp_path / "run-base") in again["message"]


def test_an_error_of_the_quantizing_process_arrives(way: Way, tmp_path: Path) -> None:
    broken = write_model(tmp_path / "model", tiny_config("llama"))
    weights = bytearray((broken / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(weights[:8], "little")  # the embedding comes first
    weights[start : start + 4] = b"\x00\x00\xc0\x7f"  # NaN
    (broken / "model.safetensors").write_bytes(weights)
    words = ("--grid", "int4", "--data", way / "rows.jsonl", "--out", tmp_path / "run")
    said = answer("train", broken, "--device", "host", *words, code=1)
    assert said["error"] == "ModelError"
    assert "holds NaN or infinity" in said["message"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_to_resume_from(way: Way, tmp_path: Path, number: signal.Signals) -> None:
    words = ["train", way / "base", "--device", "host", "--data", way / "rows.jsonl", "--out", tmp_path / "run"]
    command = [sys.executable, "-m", "edgetune", *map(str, words), "--max-steps", "1000000", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert any(line.startswith("step 1/") for line in process.stderr), "it ended before the first step"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    said = json.loads(stdout.splitlines()[-1])
    assert (said["stopped"], said["signal"]) == ("signal", number)
    assert 1 <= said["steps"] < 1_000_000
    assert f"edgetune train --resume {tmp_path / 'run'}" in stderr


def test_a_slice_ends_with_code_75_and_how_to_go_on(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, on a clock that goes by a second at every look."""
    from edgetune.cli.training import run_job
    from edgetune.training import conduct

    monkeypatch.setattr(
        conduct, "Pace", functools.partial(conduct.Pace, clock=functools.partial(next, itertools.count()))
    )
    job = launch.new_run(
        str(way / "base"), "host", data=way / "rows.jsonl", out=tmp_path / "run", eval_data=None,
        adapter=LoraConfig(), budget="foreground",
        config=TrainConfig(max_steps=100, max_seq_length=48, batch_size=2, gradient_accumulation_steps=1),
    )  # fmt: skip
    job["plan"] = {**job["plan"].to_dict(), "slice_seconds": 100}
    assert run_job({**job, "one_slice": True, "as_json": True}) == STOPPED_EARLY == 75
    out, err = capsys.readouterr()
    said = json.loads(out.splitlines()[-1])
    assert said["stopped"] == "slice" and 0 < said["steps"] < 100
    assert f"edgetune train --resume {tmp_path / 'run'} --one-slice" in err


def test_rows_beside_those_of_the_task_reach_the_run(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(launch, "start", lambda job, **options: seen.update(job))
    rows, texts = way / "rows.jsonl", tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Once upon a time"}\n', encoding="utf-8")
    device = ("--device", "host", "--data", rows)
    beside = ("--retention-data", rows, "--kl-data", texts, "--kl-weight", "2")
    assert call("train", way / "base", *device, "--out", tmp_path / "run", *beside) == 0
    assert (seen["retention_data"], seen["kl_data"]) == (rows, texts)
    assert (seen["plan"].retention_share, seen["plan"].kl_weight) == (0.25, 2.0)
    capsys.readouterr()
    assert call("plan", way / "base", *device, *beside, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["retention_share"], told["kl_weight"]) == (0.25, 2.0)


@pytest.mark.parametrize("typed", [[], ["--emulate"], ["--one-slice"], ["--emulate", "--one-slice"]])
@pytest.mark.parametrize("resume", [False, True])
def test_pace_flags_reach_the_run(
    way: Way, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: list[str], resume: bool
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(launch, "start", lambda job, **options: seen.update(options))
    new = ("train", way / "base", "--device", "host", "--data", way / "rows.jsonl", "--out", tmp_path / "run")
    assert call(*(("train", "--resume", way / "run") if resume else new), *typed) == 0
    assert (seen["emulate"], seen["one_slice"]) == ("--emulate" in typed, "--one-slice" in typed)


def test_an_emulated_run_takes_its_time_and_says_so(way: Way, tmp_path: Path) -> None:
    job = ("--device", "rpi-5", "--data", way / "rows.jsonl", "--max-steps", "3")
    result = edgetune("train", way / "base", *job, "--out", tmp_path / "run", "--emulate", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["emulated"] is True
    assert summary["measured_step_seconds"] >= summary["predicted_step_seconds"]
    assert "tokens/s, emulating rpi-5" in result.stderr


@pytest.mark.parametrize(
    ("summary", "last"),
    [
        ({"stopped": "slice", "emulated": True}, "--resume run --emulate --one-slice"),
        ({"stopped": "budget", "emulated": True, "late_steps": 3}, "--resume run --emulate"),
        ({"stopped": "signal"}, "--resume run"),
    ],
)
def test_the_next_step_is_told_with_its_flags(summary: dict[str, Any], last: str) -> None:
    from edgetune.cli.training import outcome

    class Ended:
        folder = Path("run")

    losses = ["train_loss", "eval_loss", "retention_loss_before", "tokens_per_second"]
    figures = dict.fromkeys(losses) | {"late_steps": 0, "emulated": False}
    sizes = ("measured_peak_bytes", "predicted_peak_bytes", "budget_bytes", "adapter_bytes")
    words = ("budget_name", "enforcement", "device")
    Ended.summary = (  # type: ignore[attr-defined]
        figures | dict.fromkeys((*sizes, "steps", "max_steps", "trainable_parameters"), 1) | dict.fromkeys(words, "x")
    ) | summary
    text = outcome(Ended())  # type: ignore[arg-type]
    assert text.endswith(last)
    assert ("3 steps took this machine longer than x would" in text) == ("late_steps" in summary)


@pytest.mark.parametrize("flags", [(), ("--keep-cache",)], ids=["removed", "kept"])
def test_the_feature_cache_is_kept_on_request(way: Way, tmp_path: Path, flags: tuple[str, ...]) -> None:
    words = ("--device", "host", "--data", way / "rows.jsonl", "--layers", "1", "--num-epochs", "2")
    said = answer("train", way / "base", *words, *flags, "--out", tmp_path / "run")
    assert said["feature_cache_bytes"] > 0 and said["stopped"] == "done"
    assert (tmp_path / "run" / "features").exists() == bool(flags)


def resumable(way: Way, folder: Path, *, summary: bool) -> Path:
    """A run of 8 steps that has made some, stopped by its budget; or killed, which leaves no summary."""
    job = launch.new_run(
        str(way / "base"), "host", data=way / "rows.jsonl", out=folder, eval_data=None,
        adapter=LoraConfig(), config=TrainConfig(max_steps=8, learning_rate=0.01), budget="foreground",
    )  # fmt: skip
    plan = {**job["plan"].to_dict(), "budget_bytes": 1 << 20}
    arguments = {"base": str(way / "base"), "data": str(way / "rows.jsonl"), "out": str(folder), "eval_data": None}
    text = json.dumps({"plan": plan, **arguments, "as_json": True})
    command = [sys.executable, "-m", "edgetune.cli.launch", "train", text]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert result.returncode == STOPPED_EARLY == 75, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["stopped"] == "budget"
    stored = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    (folder / "plan.json").write_text(
        json.dumps({**stored, "budget_bytes": job["plan"].budget_bytes}), encoding="utf-8"
    )
    if not summary:
        (folder / "summary.json").unlink()
    return folder


@pytest.mark.parametrize("summary", [True, False], ids=["stopped", "killed"])
def test_resume_needs_nothing_but_the_run(way: Way, tmp_path: Path, summary: bool) -> None:
    run = resumable(way, tmp_path / "run", summary=summary)
    job = launch.old_run(run, data=None, eval_data=None)
    assert (job["base"], job["data"], job["out"]) == (way / "base", way / "rows.jsonl", run)
    assert job["plan"].max_steps == 8
    moved = launch.old_run(run, data=tmp_path / "moved.jsonl", eval_data=tmp_path / "eval.jsonl")
    assert (moved["data"], moved["eval_data"]) == (tmp_path / "moved.jsonl", tmp_path / "eval.jsonl")


def test_resume_of_a_finished_run_says_so(way: Way, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch.old_run(way / "run", data=None, eval_data=None)
    said = f"all 4 steps of {way / 'run'} were trained already; more take a new run, with --max-steps\n"
    assert capsys.readouterr().err == said
    going_on = resumable(way, tmp_path / "run", summary=True)
    capsys.readouterr()
    launch.old_run(going_on, data=None, eval_data=None)
    assert capsys.readouterr().err == ""


def test_resume_takes_a_budget_that_holds_the_run(way: Way, tmp_path: Path) -> None:
    run = resumable(way, tmp_path / "run", summary=False)
    assert launch.old_run(run, data=None, eval_data=None, budget=500)["plan"].budget_bytes == 500 << 20
    assert launch.old_run(run, data=None, eval_data=None, budget="foreground")["plan"].budget_name == "foreground"
    for budget in (20, "min"):
        with pytest.raises(EdgetuneError, match=rf"with a peak of \d+ MiB, which --budget {budget} does not hold"):
            launch.old_run(run, data=None, eval_data=None, budget=budget)


def test_resume_of_a_run_for_a_profile_of_the_user_s_own_takes_mib(way: Way, tmp_path: Path) -> None:
    run = resumable(way, tmp_path / "run", summary=False)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    (run / "plan.json").write_text(json.dumps(plan | {"device": "mine"}), encoding="utf-8")
    assert launch.old_run(run, data=None, eval_data=None, budget=500)["plan"].budget_bytes == 500 << 20
    with pytest.raises(EdgetuneError, match=r"--budget foreground is of a profile.* planned for mine.* number of MiB"):
        launch.old_run(run, data=None, eval_data=None, budget="foreground")


@pytest.mark.parametrize(
    ("words", "named"),
    [(("--learning-rate", "0.1"), "--learning-rate"), (("some/base",), "MODEL"), (("--r", "4"), "--r")],
)
def test_resume_refuses_what_it_would_ignore(way: Way, words: tuple[str, ...], named: str) -> None:
    result = edgetune("train", *words, "--resume", way / "run")
    assert result.returncode == 2
    assert re.search(rf"cannot take {named}\b", " ".join(result.stderr.replace("│", " ").split()))


def test_resume_of_a_run_whose_base_is_gone(way: Way, tmp_path: Path) -> None:
    moved = Way(tmp_path, {})
    shutil.copytree(way / "base", moved / "base")
    shutil.copy(way / "rows.jsonl", moved / "rows.jsonl")
    run = resumable(moved, tmp_path / "run", summary=False)
    (moved / "base").rename(moved / "elsewhere")
    said = answer("train", "--resume", run, code=1)
    assert said["error"] == "CheckpointError"
    assert f"on {moved / 'base'}, which is not there. Say with --base where" in said["message"]
    done = answer("train", "--resume", run, "--base", moved / "elsewhere")
    assert (done["stopped"], done["steps"]) == ("done", 8)
    assert done["base"] == done["model"] == str(moved / "elsewhere")
    new = edgetune("train", way / "base", "--base", way / "base", "--device", "host")
    assert new.returncode == 2 and "--base goes with --resume" in new.stderr


def test_another_base_is_not_the_one_that_moved(way: Way, tmp_path: Path) -> None:
    run = resumable(way, tmp_path / "run", summary=False)
    model = write_model(tmp_path / "model", tiny_config("llama"), seed=1)
    said = answer("train", "--resume", run, "--base", quantize(model, "int4", tmp_path / "other"), code=1)
    assert said["error"] == "CheckpointError" and "was started with something else: base." in said["message"]


def test_resume_of_a_run_whose_checkpoints_are_gone(way: Way, tmp_path: Path) -> None:
    run = resumable(way, tmp_path / "run", summary=False)
    shutil.rmtree(run / "checkpoints")
    said = answer("train", "--resume", run, code=1)
    assert said["error"] == "CheckpointError"
    assert "has no checkpoint that is whole" in said["message"]


def test_a_run_in_a_cgroup(way: Way, tmp_path: Path) -> None:
    try:
        cgroup.check_cgroup()
    except EdgetuneError as error:
        pytest.skip(str(error))
    job = ("--device", "galaxy-watch-7", "--data", way / "rows.jsonl", "--learning-rate", "0.01", "--max-steps", "4")
    said = answer("train", way / "base", *job, "--out", tmp_path / "run", "--enforce", "cgroup")
    assert (said["enforcement"], said["cgroup_oom_kills"], said["stopped"]) == ("cgroup", 0, "done")
    assert said["measured_peak_bytes"] <= said["cgroup_peak_bytes"] <= said["budget_bytes"]
    assert said["adapter_sha256"] == way.said["train"]["adapter_sha256"]


def test_no_cgroup_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cgroup, "cgroup_state", lambda: cgroup._NO_CGROUP)
    words = ("no-model", "--device", "host", "--data", "no-rows", "--out", tmp_path / "run", "--enforce", "cgroup")
    assert call("train", *words) == 1
    assert "ConfigError: enforce = 'cgroup': this system has no cgroup" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("enforce", "supervise", "module"),
    [
        ("governor", False, "edgetune.cli.launch"),
        ("rlimit", True, "edgetune.cli.supervisor"),
        ("cgroup", False, "edgetune.cli.supervisor"),
    ],
)
def test_what_the_command_becomes(
    way: Way, monkeypatch: pytest.MonkeyPatch, enforce: str, supervise: bool, module: str
) -> None:
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda path, words, environment: became.append(words))
    job = launch.old_run(way / "run", data=None, eval_data=None)
    launch.start(job, supervise=supervise, resume=True, force=False, enforce=enforce, skip_bad=False, as_json=True)
    (words,) = became
    assert words[1:3] == ["-m", module]
    assert json.loads(words[-1])["enforce"] == enforce


def test_a_run_that_is_done_is_resumed_at_once(way: Way) -> None:
    assert answer("train", "--resume", way / "run") == way.said["train"]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format_version": 1}'])
def test_resume_of_what_is_no_run(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content, encoding="utf-8")
    message = "cannot be read as the plan of a run: |not a plan"
    if content is None:
        message = r"holds no plan\.json, so it is no run: there is nothing to resume\. Give the folder that --out named"
    with pytest.raises(EdgetuneError, match=message):
        launch.old_run(tmp_path, data=None, eval_data=None)


def test_resume_of_nothing_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--resume", tmp_path / "nothere") == 1
    told = capsys.readouterr().err
    assert told.startswith(f"CheckpointError: {tmp_path / 'nothere'} is no folder: there is nothing to resume. Give ")
    assert "Errno" not in told


def test_a_folder_that_is_taken_is_refused_before_anything_is_done(
    way: Way, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").touch()
    words = ("train", way / "model", "--device", "host", "--data", way / "rows.jsonl", "--out")
    for out, flags, told in (
        (way / "run", (), "exists and is not empty. Go on with --resume, replace it with --force"),
        (tmp_path / "mine", ("--force",), "is not empty and no run, so --force does not write a run into it"),
    ):
        assert call(*words, out, *flags) == 1
        assert capsys.readouterr().err.startswith(f"ConfigError: {out} {told}"), "no plan, no quantizing before it"
        assert not out.with_name(f"{out.name}-base").exists()


def test_ctrl_c_before_the_run_has_begun_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(job: str) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "_train_here", interrupted)
    assert launch.main("train", "{}") == 130


@pytest.mark.parametrize(
    ("summary", "code"),
    [
        ({"stopped": "done", "signal": None}, 0),
        ({"stopped": "budget", "signal": None}, 75),
        ({"stopped": "slice", "signal": None}, 75),
        ({"stopped": "nonfinite", "signal": None}, 1),
        ({"stopped": "signal", "signal": 2}, 130),
        ({"stopped": "signal", "signal": 15}, 143),
    ],
)
def test_exit_codes_of_a_run(summary: dict[str, Any], code: int) -> None:
    assert exit_code(summary) == code


def test_an_error_is_one_message_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("devices", "pixel-99") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("DeviceError: ")
    assert call("devices", "pixel-99", "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "DeviceError", "message": err.removeprefix("DeviceError: ").strip()}


@pytest.mark.parametrize(
    "words",
    [
        ["plan"],
        ["plan", "m"],
        ["plan", "m", "--device", "host", "--r", "eight"],
        ["plan", "m", "--device", "host", "--layers", "0-x"],
        ["plan", "m", "--device", "host", "--target-modules", "q_proj,,v_proj"],
        ["run", "b", "--prompt", "x", "--threads", "0"],
        ["train"],
        ["train", "m", "--device", "host", "--out", "run"],
        ["finetune"],
        ["devices", "--jsno"],
    ],
)
def test_a_flag_that_does_not_parse_is_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: edgetune" in err


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> Iterator[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgetune.device.list_devices", interrupted)
    assert call("devices") == 130
    assert capsys.readouterr().err.strip() == ""


def test_a_reader_that_leaves_is_no_crash() -> None:
    command = [sys.executable, "-m", "edgetune", "devices"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize("kind", [KeyError("a bug"), ModuleNotFoundError("No module named 'numpi'", name="numpi")])
def test_a_bug_keeps_its_traceback(kind: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise kind

    monkeypatch.setattr("edgetune.device.list_devices", broken)
    with pytest.raises(type(kind)):
        cli.main(["devices"])


def test_devices_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("devices") == 0
    lines = capsys.readouterr().out.splitlines()
    shipped = {path.stem for path in (REPOSITORY / "devices").glob("*.toml")}
    assert {line.split()[0] for line in lines[1:]} == shipped
    assert call("devices", "pixel-9", "--json") == 0
    assert json.loads(capsys.readouterr().out)["memory"]["budget_mib"] == 3686
    assert call("devices", "pixel-9") == 0
    out = capsys.readouterr().out
    assert re.search(r"^memory\.budget_mib +3686$", out, re.MULTILINE)
    assert "No engine trains" not in out
    assert call("devices", "apple-watch-10") == 0
    assert "No engine trains" not in capsys.readouterr().out  # the ort engine does


def test_doctor_calibrates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edgetune import calibration
    from edgetune.device import load_device

    monkeypatch.chdir(tmp_path)
    samples = {"products_gflops": {"a": {"forward": [9.0]}}, "copy_mb_s": [70.0], "decoded_weights_per_second": {}}
    monkeypatch.setattr(calibration, "_samples", lambda threads, seconds: {**samples, "library": "torch"})
    monkeypatch.setattr(calibration, "measure_floor", lambda engine, threads: 1 << 20)
    assert call("doctor", "--calibrate", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["device"] == "host-calibrated.toml"
    assert load_device("host-calibrated.toml").provenance.confidence == "measured"
    assert call("doctor", "--calibrate") == 1
    assert "host-calibrated.toml exists" in capsys.readouterr().err
    assert call("doctor", "--calibrate", "--force", "--out", "host-calibrated.toml") == 0
    shown = capsys.readouterr()
    assert "9 GFLOP/s sustained" in shown.out
    assert shown.err.endswith("Next: edgetune plan MODEL --device host-calibrated.toml\n")
    assert call("doctor", "--force") == 2
    assert call("doctor", "--out", "x.toml") == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from edgetune import __version__

    assert call("--version") == 0
    assert capsys.readouterr().out == f"edgetune {__version__}\n"


def options(verb: str) -> dict[str, str]:
    """Flag -> help of a verb, read from what a user sees."""
    import typer.main

    command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    return {name: parameter.help or "" for parameter in command.params for name in getattr(parameter, "opts", [])}


def test_the_verbs_of_adapters_have_a_help_worth_reading_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    import typer.main

    group = typer.main.get_command(cli.app).commands["adapter"]  # type: ignore[attr-defined]
    assert sorted(group.commands) == ["add", "check", "default", "list", "merge", "remove"]
    for name, command in group.commands.items():
        assert call("adapter", name, "--help") == 0
        assert f"edgetune adapter {name}" in capsys.readouterr().out, "an example"
        helps = {parameter.name: parameter.help or "" for parameter in command.params if parameter.name != "help"}
        assert "as_json" in helps
        assert all(text.endswith((".", ")")) and len(text) > 10 for text in helps.values()), helps


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_worth_reading_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb, "--help") == 0
    assert capsys.readouterr().out.strip()
    flags = options(verb)
    assert "--json" in flags
    assert all(text.endswith((".", ")")) and len(text) > 10 for text in flags.values()), flags


def test_the_verbs_are_those_of_the_readme() -> None:
    tree = [
        "devices",
        "doctor",
        "plan",
        "quantize",
        "train",
        "export",
        "run",
        "personalize",
        "bench",
        "report",
        "demo",
        "eval",
    ]
    assert sorted(tree) == VERBS
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert all(f"edgetune {verb}" in readme or f"make {verb}" in readme for verb in tree)


ADAPTER_VALUES = {
    "r": ("3", 3), "lora_alpha": ("7.5", 7.5), "lora_dropout": ("0.25", 0.25),
    "target_modules": ("q_proj, v_proj", ("q_proj", "v_proj")), "use_rslora": (None, True),
    "layers_to_transform": ("0,1-1", (0, 1)), "loraplus_lr_ratio": ("16", 16.0),
    "feedforward_modules": ("v_proj", ("v_proj",)), "vera_dropout": ("0.25", 0.25), "d_initial": ("0.5", 0.5),
    "projection_prng_key": ("7", 7), "num_virtual_tokens": ("5", 5), "placement": ("houlsby", "houlsby"),
    "non_linearity": ("tanh", "tanh"), "init_lora_weights": ("eva", "eva"), "init_from": ("original", "original"),
    "adapter_budget": ("64KiB", 64 << 10), "positions": ("f2+l3", "f2+l3"),
    "reduction": ("4", 4), "encoder_hidden_size": ("48", 48),
}  # fmt: skip
NEEDS_ROWS = {"adapter_budget"}  # what a plan has of it follows from them: tests/training/test_sensitivity.py
METHOD_OF = {
    "feedforward_modules": "ia3", "vera_dropout": "vera", "d_initial": "vera", "projection_prng_key": "vera",
    "num_virtual_tokens": "prompt_tuning", "placement": "bottleneck", "non_linearity": "bottleneck",
    "positions": "loreft", "reduction": "lst", "encoder_hidden_size": "p_tuning",
}  # fmt: skip
TRAIN_VALUES = {
    "batch_size": ("3", 3), "gradient_accumulation_steps": ("5", 5), "max_seq_length": ("48", 48),
    "recompute_layers": ("1", 1), "activation_offloading": (None, True), "num_epochs": ("2.5", 2.5),
    "max_steps": ("17", 17), "learning_rate": ("3e-3", 0.003), "optimizer": ("lion_8bit", "lion_8bit"),
    "lr_scheduler_type": ("linear", "linear"), "warmup_ratio": ("0.5", 0.5), "weight_decay": ("0.125", 0.125),
    "max_grad_norm": ("2", 2.0), "eval_fraction": ("0.25", 0.25), "seed": ("9", 9),
    "step_rule": ("mezo", "mezo"), "fast_products": (None, True), "objective": ("orpo", "orpo"),
    "beta": ("0.25", 0.25), "label_smoothing": ("0.1", 0.1), "temperature": ("3", 3.0), "distill_weight": ("1", 1.0),
    "early_stopping_patience": ("4", 4), "retention_share": ("0.5", 0.5), "kl_weight": ("2", 2.0),
}  # fmt: skip
OBJECTIVE_OF = {"beta": "kto", "label_smoothing": "dpo", "temperature": "distill", "distill_weight": "distill"}


@pytest.mark.parametrize("field", [*ADAPTER_VALUES, *TRAIN_VALUES])
def test_personalize_offers_what_training_graphs_do_not_always_refuse(field: str, model: Path) -> None:
    flag = "--" + {"layers_to_transform": "layers"}.get(field, field).replace("_", "-")
    value = "sgd" if field == "optimizer" else (ADAPTER_VALUES | TRAIN_VALUES)[field][1]
    needed = {"objective": OBJECTIVE_OF[field]} if field in OBJECTIVE_OF else {}
    needed |= {"init_lora_weights": "loftq"} if field == "init_from" else {}
    adapter, config = read_settings(METHOD_OF.get(field, "lora"), {**needed, field: value})
    wishes = Wishes(load_config(model), adapter, config.checked(), RowFacts(), "ort")
    if flag in options("personalize"):
        check_engine(wishes, "int4")
        return
    with pytest.raises(ConfigError):
        check_engine(wishes, "int4")


def test_personalize_names_the_optimizers_that_it_has() -> None:
    assert options("personalize")["--optimizer"].startswith("One of adamw, sgd. ")
    assert "adamw_8bit" in options("train")["--optimizer"]


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_every_field_of_the_configs_has_a_flag(verb: str) -> None:
    fields = {f.name for f in dataclasses.fields(TrainConfig)} | _adapter_settings().keys()
    assert fields == ADAPTER_VALUES.keys() | TRAIN_VALUES.keys(), "give the new field a value to test its flag with"
    wanted = {"--" + {"layers_to_transform": "layers"}.get(name, name).replace("_", "-") for name in fields}
    assert wanted <= options(verb).keys()


@pytest.mark.parametrize("field", [name for name in (*ADAPTER_VALUES, *TRAIN_VALUES) if name not in NEEDS_ROWS])
def test_every_flag_reaches_the_plan(
    field: str, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgetune.planner.wishes.are_offered", lambda: True)
    typed, value = (ADAPTER_VALUES | TRAIN_VALUES)[field]
    flag = "--" + {"layers_to_transform": "layers"}.get(field, field).replace("_", "-")
    needed = ["--objective", OBJECTIVE_OF[field]] if field in OBJECTIVE_OF else []
    needed += ["--init-lora-weights", "loftq"] if field == "init_from" else []
    words = [*needed, "--adapter", METHOD_OF.get(field, "lora"), flag, *([typed] if typed else [])]
    assert call("plan", model, "--device", "host", "--json", *words) == 0
    made = json.loads(capsys.readouterr().out)
    found = (made["adapter"] if field in ADAPTER_VALUES else made)[field] if field != "warmup_ratio" else made[field]
    assert (tuple(found) if isinstance(value, tuple) else found) == value


@pytest.mark.parametrize(
    ("method", "field", "typed", "value"),
    [
        ("bottleneck", "r", "3", 3),
        ("bottleneck", "placement", "houlsby", "houlsby"),
        ("bottleneck", "non_linearity", "tanh", "tanh"),
        ("bottleneck", "layers_to_transform", "1", [1]),
        ("ln_tuning", "target_modules", "norm,input_layernorm", ["input_layernorm", "norm"]),
        ("ln_tuning", "layers_to_transform", "1", [1]),
        ("lst", "reduction", "4", 4),
        ("lst", "layers_to_transform", "1", [1]),
        ("loreft", "r", "3", 3),
        ("loreft", "positions", "l5", "l5"),
        ("loreft", "layers_to_transform", "1", [1]),
        ("prompt_tuning", "num_virtual_tokens", "7", 7),
        ("prefix_tuning", "num_virtual_tokens", "7", 7),
        ("p_tuning", "num_virtual_tokens", "7", 7),
    ],
)
def test_the_flags_of_a_method_reach_the_plan(
    method: str, field: str, typed: str, value: object, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = "--" + {"layers_to_transform": "layers"}.get(field, field).replace("_", "-")
    assert call("plan", model, "--device", "host", "--json", "--adapter", method, flag, typed) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["method"], made["adapter"][field]) == (method, value)


def test_a_window_holds_the_virtual_tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--adapter", "prompt_tuning", "--num-virtual-tokens", "20", "--max-seq-length", "21")
    assert call("plan", model, "--device", "host", *flags) == 1
    assert "num_virtual_tokens takes 20; a row needs 2 more" in capsys.readouterr().err


def test_a_switch_is_turned_off_by_no(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", model, "--device", "host", "--json", "--no-fast-products") == 0
    assert json.loads(capsys.readouterr().out)["fast_products"] is False


def test_what_was_not_typed_stays_unset() -> None:
    lora, config = read_settings("lora", dict.fromkeys([*ADAPTER_VALUES, *TRAIN_VALUES]))
    assert lora == LoraConfig()
    assert config == TrainConfig()


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("loha", {}, r"adapter = 'loha'; choose from lora, dora"),
        ("ia3", {"r": 4}, r"--r is no setting of ia3; it has --layers, --target-modules, --feedforward-modules\."),
        ("lora", {"d_initial": 0.5}, r"--d-initial is no setting of lora"),
    ],
)
def test_a_setting_of_another_method_is_refused(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(method, settings)


def test_budgets_are_names_or_mib(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (read_budget("700"), read_budget("min")) == (700, "min")
    assert call("plan", model, "--device", "pixel-9", "--budget", "700", "--json") == 0
    assert json.loads(capsys.readouterr().out)["budget_bytes"] == 700 << 20
    assert call("plan", model, "--device", "pixel-9", "--budget", "background", "--json") == 0
    assert json.loads(capsys.readouterr().out)["budget_bytes"] == 1843 << 20
    assert call("plan", model, "--device", "pixel-9", "--budget", "some") == 1


def test_the_short_plan_and_the_long_one(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", model, "--device", "pixel-9", "--max-steps", "3") == 0
    short = capsys.readouterr().out
    assert "fits pixel-9" in short
    assert call("plan", model, "--device", "pixel-9", "--max-steps", "3", "--explain") == 0
    assert "floor" in capsys.readouterr().out.replace(short, "")


def test_held_out_rows_of_their_own_leave_all_rows_to_training(way: Way) -> None:
    def steps(**paths: Path | None) -> int | None:
        job = launch.new_run(
            str(way / "base"), "host", data=way / "rows.jsonl", out=way / "other",
            adapter=LoraConfig(), config=TrainConfig(eval_fraction=0.5, batch_size=1, num_epochs=1.0), **paths,
        )  # fmt: skip
        plan: Plan = job["plan"]
        return plan.max_steps

    half, whole = steps(eval_data=None), steps(eval_data=way / "rows.jsonl")
    assert half is not None
    assert whole is not None
    assert half < whole


def test_a_child_s_error_may_take_other_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sent = json.dumps({"error": "MissingExtraError", "message": "bitsandbytes is not installed."})
    ended = subprocess.CompletedProcess([], 1, stdout=sent)
    monkeypatch.setattr(subprocess, "run", lambda *words, **settings: ended)
    with pytest.raises(MissingExtraError, match="bitsandbytes is not installed"):
        launch._quantized(tmp_path, "nf4", tmp_path / "base")
    monkeypatch.setattr(subprocess, "run", lambda *words, **settings: subprocess.CompletedProcess([], -9, stdout=""))
    with pytest.raises(EdgetuneError, match="ended with code -9"):
        launch._quantized(tmp_path, "nf4", tmp_path / "base")
