"""Whole runs on tiny models: what is written, and that every way to stop leads back to the same bytes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edgetune import cgroup, errors, memory
from edgetune.adapters.base import load_adapter
from edgetune.checkpoint import lock_run, read_checkpoint
from edgetune.linear import FrozenLinear
from edgetune.memory import Meter, anonymous_bytes
from edgetune.models import load_config
from edgetune.models.rope import rope_tables
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner.plans import Plan
from edgetune.training import backprop, conduct, loop, torch_trainer, trainer
from edgetune.training.loop import Run, train
from edgetune.training.optimizer import Optimizer
from edgetune.training.stop import Guard, NearBudget, Stopped, is_out_of_memory
from edgetune.weights import Weights
from tests.training.conftest import at_step, interrupt, make_base, make_plan, write_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and rows."""
    folder = tmp_path_factory.mktemp("job")
    return make_base(folder), write_rows(folder / "rows.jsonl", 40)


@pytest.fixture(scope="module")
def whole(job: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that was never stopped."""
    base, data = job
    return train(make_plan(base), base, data=data, out=tmp_path_factory.mktemp("whole") / "run")


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_run_leaves(job: tuple[Path, Path], whole: Run) -> None:
    base, data = job
    summary = whole.summary
    assert sorted(path.name for path in whole.folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checkpoints", "metrics.jsonl", "plan.json", "summary.json",
    ]  # fmt: skip
    assert Plan.from_dict(json.loads((whole.folder / "plan.json").read_text())) == make_plan(base)
    assert summary["stopped"] == "done" and summary["steps"] == 12 and summary["skipped_steps"] == 0
    assert summary["enforcement"] == "governor" and summary["signal"] is None
    assert (summary["base"], summary["data"], summary["eval_data"]) == (str(base), str(data), None)
    assert summary["format_version"] == 1 and summary["batch_size"] == 2
    _, tensors = load_adapter(whole.folder, load_config(base))
    assert summary["trainable_parameters"] == sum(value.size for value in tensors.values())
    assert summary["adapter_bytes"] == (whole.folder / "adapter_model.safetensors").stat().st_size
    assert summary["measured_peak_rss_bytes"] > summary["measured_peak_bytes"] > 50 << 20
    assert summary["tokens_per_second"] > 0
    head, *rest = lines(whole)
    steps = [line for line in rest if "loss" in line]
    assert head == {"format_version": 1} and [line["step"] for line in steps] == list(range(1, 13))
    assert summary["train_loss"] == pytest.approx(np.mean([line["loss"] for line in steps][-10:]))
    assert summary["train_loss"] < steps[0]["loss"] - 0.1
    evaluations = {line["step"]: line["eval_loss"] for line in rest if "eval_loss" in line}
    assert set(evaluations) == set(range(1, 13))
    assert summary["eval_loss"] == min(evaluations.values()) == evaluations[summary["best_step"]]


def test_the_same_seed_gives_the_same_bytes(job: tuple[Path, Path], whole: Run, tmp_path: Path) -> None:
    base, data = job
    again = train(make_plan(base), base, data=data, out=tmp_path / "again")
    other = train(make_plan(base, seed=4), base, data=data, out=tmp_path / "other")
    assert again.summary["adapter_sha256"] == whole.summary["adapter_sha256"] != other.summary["adapter_sha256"]


@pytest.mark.parametrize("step", [1, 5, 11])
def test_stopped_by_a_signal_and_resumed(job: tuple[Path, Path], whole: Run, tmp_path: Path, step: int) -> None:
    base, data = job
    plan, out = make_plan(base), tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)
    stopped = train(plan, base, data=data, out=out, on_progress=at_step(step, interrupt))
    assert signal.getsignal(signal.SIGTERM) == before
    summary = stopped.summary
    assert (summary["stopped"], summary["signal"], summary["steps"]) == ("signal", signal.SIGTERM, step)
    load_adapter(out, load_config(base))
    resumed = train(plan, base, data=data, out=out, resume=True).summary
    assert resumed["stopped"] == "done" and resumed["signal"] is None
    assert resumed["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert [line.get("loss") for line in lines(stopped)] == [line.get("loss") for line in lines(whole)]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])  # which all other tests use
def test_every_optimizer_resumes_to_the_bit(job: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    base, data = job
    plan = make_plan(base, optimizer=name, learning_rate=0.1 if name == "sgd" else 5e-3)
    once = train(plan, base, data=data, out=tmp_path / "once")
    assert once.summary["train_loss"] < lines(once)[1]["loss"] - 0.1
    train(plan, base, data=data, out=tmp_path / "twice", on_progress=at_step(7, interrupt))
    twice = train(plan, base, data=data, out=tmp_path / "twice", resume=True)
    assert twice.summary["adapter_sha256"] == once.summary["adapter_sha256"]
    kept = [read_checkpoint(run.folder / "checkpoints", 12).tensors("optim") for run in (once, twice)]
    assert kept[0].keys() == kept[1].keys() and bool(kept[0]) is (name != "sgd")
    assert all(np.array_equal(value, kept[1][key]) for key, value in kept[0].items())


def test_eight_bits_learn_what_float32_learns(job: tuple[Path, Path], tmp_path: Path) -> None:
    """150 steps of a language model; the losses go from 6.1 to 2.5, and differ by less than 0.002."""
    base, data = job
    losses = []
    for name in ("adamw", "adamw_8bit"):
        plan = make_plan(base, optimizer=name, max_steps=150, gradient_accumulation_steps=1)
        run = train(plan, base, data=data, out=tmp_path / name)
        losses.append([line["loss"] for line in lines(run) if "loss" in line])
    assert losses[0][-1] < losses[0][0] - 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=0.01)


@pytest.mark.parametrize("checks", [3, 47, 100, 151])
def test_stopped_between_two_blocks_and_resumed(
    job: tuple[Path, Path], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: int
) -> None:
    base, data = job
    real, calls = Guard.check, 0

    def check(self: Guard) -> None:
        nonlocal calls
        calls += 1
        if calls == checks:
            interrupt()
        real(self)

    monkeypatch.setattr(Guard, "check", check)
    stopped = train(make_plan(base), base, data=data, out=tmp_path / "run")
    assert stopped.stopped == "signal" and calls == checks
    monkeypatch.undo()
    resumed = train(make_plan(base), base, data=data, out=tmp_path / "run", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_stopped_in_an_evaluation_that_is_made_up_for(
    job: tuple[Path, Path], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = job
    real, calls = torch_trainer.evaluate, 0

    def evaluate(*args: Any, check: Callable[[], None], **kwargs: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            interrupt()
            check()
        return real(*args, check=check, **kwargs)

    monkeypatch.setattr(torch_trainer, "evaluate", evaluate)
    stopped = train(make_plan(base), base, data=data, out=tmp_path / "run")
    assert (stopped.stopped, stopped.summary["steps"]) == ("signal", 3)
    resumed = train(make_plan(base), base, data=data, out=tmp_path / "run", resume=True)
    assert [line.get("eval_loss") for line in lines(resumed)] == [line.get("eval_loss") for line in lines(whole)]


def shrinking(monkeypatch: pytest.MonkeyPatch, checks: int) -> list[trainer.Trainer]:
    """Let the budget be near at this check between two blocks; the list gets the trainer."""
    real, calls, seen = Guard.check, 0, []
    shrink = trainer.Trainer.shrink

    def check(self: Guard) -> None:
        nonlocal calls
        calls += 1
        if calls == checks:
            self.meter.near.set()
        real(self)

    def noted(self: trainer.Trainer, kept_layers: int) -> None:
        seen.append(self)
        shrink(self, kept_layers)
        assert self.decoder.workspace.sizes == {}
        assert all(value.grad is None for value in self.parameters.values())

    monkeypatch.setattr(Guard, "check", check)
    monkeypatch.setattr(trainer.Trainer, "shrink", noted)
    return seen


@pytest.mark.parametrize("checks", [1, 3, 7, 20, 47, 100, 151])
def test_what_was_given_up_changes_no_bit(
    job: tuple[Path, Path], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: int
) -> None:
    base, data = job
    told: list[str | None] = []
    seen = shrinking(monkeypatch, checks)
    plan = make_plan(base, recompute_layers=1)
    run = train(plan, base, data=data, out=tmp_path / "run", on_progress=lambda p: told.append(p.note))
    assert run.stopped == "done"
    for key in ("loss", "eval_loss"):
        assert [x[key] for x in lines(run) if key in x] == [x[key] for x in lines(whole) if key in x]
    assert run.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    (trainer_,) = seen
    assert {name.partition(".")[2][0] for name in trainer_.decoder.workspace.sizes if "slot" in name} == {"0"}
    (line,) = run.summary["shrunk"]
    assert (line["recompute_layers"], line["recompute_layers_before"]) == (2, 1)
    assert (
        run.summary["recompute_layers"] == json.loads((run.folder / "plan.json").read_text())["recompute_layers"] == 2
    )
    assert f"step {line['step']}: no room left, from here on 2 blocks run again, not 1" in told


@pytest.mark.parametrize("checks", [0, 9])
def test_weights_that_stay_dequantized_change_no_bit(
    job: tuple[Path, Path], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: int
) -> None:
    base, data = job
    told: list[str | None] = []
    seen = shrinking(monkeypatch, checks)
    decoded: list[str] = []
    real = FrozenLinear.dequantize

    def noted(self: FrozenLinear, *args: Any, **more: Any) -> Any:
        decoded.append(self.name)
        return real(self, *args, **more)

    monkeypatch.setattr(FrozenLinear, "dequantize", noted)
    plan = make_plan(base, recompute_layers=0, dequantized_layers=1)
    run = train(plan, base, data=data, out=tmp_path / "run", on_progress=lambda p: told.append(p.note))
    assert run.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert run.summary["dequantized_layers"] == (0 if checks else 1)
    upper = decoded.count("model.layers.1.mlp.up_proj")
    assert upper > 1 if checks else upper == 1
    assert decoded.count("model.layers.0.mlp.up_proj") > 1
    if checks:
        (trainer_,), (line,) = seen, run.summary["shrunk"]
        assert not trainer_.held and (line["dequantized_layers_before"], line["recompute_layers"]) == (1, 0)
        assert any("and 1 dequantize their weights in every step" in (note or "") for note in told)


def test_nothing_is_given_up_where_nothing_holds_the_budget_or_nothing_is_left(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = job
    for name, enforce, again, rule in (
        ("free", "none", 0, "backprop"), ("least", "governor", 2, "backprop"), ("mezo", "governor", 0, "mezo"),
    ):  # fmt: skip
        seen = shrinking(monkeypatch, 20)
        plan = make_plan(base, recompute_layers=again, step_rule=rule)
        run = train(plan, base, data=data, out=tmp_path / name, enforce=enforce)
        monkeypatch.undo()
        assert (run.stopped, run.summary["shrunk"], seen) == ("done", [], [])


def test_near_the_budget_before_the_first_step_is_forgotten(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading rows may take more than training does."""
    base, data = job
    real = loop.checked_inputs
    near: list[Any] = []
    enter = Guard.__enter__
    monkeypatch.setattr(Guard, "__enter__", lambda self: near.append(self.meter.near) or enter(self))
    monkeypatch.setattr(loop, "checked_inputs", lambda *words: near[0].set() or real(*words))
    run = train(make_plan(base, max_steps=1), base, data=data, out=tmp_path / "run")
    assert (run.stopped, run.summary["shrunk"]) == ("done", [])


def test_without_limits_of_the_kernel_the_governor_alone_holds(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system such as macOS: no /proc, so no RLIMIT_DATA, and no cgroups."""
    base, data = job
    monkeypatch.setattr(memory, "_PROC", False)
    monkeypatch.setattr(cgroup, "cgroup_state", lambda: cgroup._NO_CGROUP)
    told: list[str | None] = []
    plan = make_plan(base, max_steps=1)
    for enforce in ("governor", "rlimit"):
        run = train(
            plan, base, data=data, out=tmp_path / enforce, enforce=enforce, on_progress=lambda p: told.append(p.note)
        )
        assert run.summary["enforcement"] == "governor"
        assert (run.summary["cgroup_peak_bytes"], run.summary["cgroup_oom_kills"]) == (None, None)
    assert [note for note in told if note] == [
        "This system has no RLIMIT_DATA that counts private memory: the governor alone holds the budget."
    ]
    with pytest.raises(errors.ConfigError, match="--enforce governor"):
        train(plan, base, data=data, out=tmp_path / "cgroup", enforce="cgroup")
    stopped = train(replace(plan, budget_bytes=1 << 20), base, data=data, out=tmp_path / "small")
    assert stopped.stopped == "budget"


def test_dropout_and_a_changed_recomputation_survive_resuming(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    plan = make_plan(base, adapter=loop_adapter(lora_dropout=0.2))
    once = train(plan, base, data=data, out=tmp_path / "once")
    train(plan, base, data=data, out=tmp_path / "twice", on_progress=at_step(7, interrupt))
    more = replace(plan, recompute_layers=2, budget_bytes=1 << 41)
    twice = train(more, base, data=data, out=tmp_path / "twice", resume=True)
    assert twice.summary["adapter_sha256"] == once.summary["adapter_sha256"]
    assert json.loads((tmp_path / "twice" / "plan.json").read_text())["recompute_layers"] == 2


def loop_adapter(**settings: Any) -> Any:
    from edgetune.adapters.lora import LoraConfig

    return LoraConfig(r=3, **settings)


def test_activations_on_disk(job: tuple[Path, Path], whole: Run, tmp_path: Path) -> None:
    base, data = job
    run = train(make_plan(base, activation_offloading=True), base, data=data, out=tmp_path / "run")
    assert run.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_activations_are_not_offloaded_to_memory(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edgetune.training.run.psutil.disk_partitions",
        lambda all: [
            SimpleNamespace(mountpoint="/", fstype="ext4"),
            SimpleNamespace(mountpoint=str(tmp_path), fstype="tmpfs"),
        ],
    )
    base, data = job
    with pytest.raises(errors.ConfigError, match=r"lies on tmpfs, whose files are memory.*Choose an --out on a disk"):
        train(make_plan(base, activation_offloading=True), base, data=data, out=tmp_path / "run")


SCRIPT = """
import os, signal, sys
from pathlib import Path
from edgetune.training.loop import train
from tests.training.conftest import make_plan

base, data, out, mode = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
plan = make_plan(base)

def on_progress(progress):
    if mode == "kill" and progress.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "wait":
        print(progress.step, flush=True)
        if progress.step == 3:
            sys.stdin.readline()

enforce = "governor"
if mode == "rlimit":
    from dataclasses import replace
    from edgetune.memory import anonymous_bytes
    from edgetune.training.stop import Guard
    Guard.check = lambda self: None  # only the kernel stops this run
    plan, enforce = replace(plan, budget_bytes=anonymous_bytes() - (32 << 20)), "rlimit"
run = train(plan, base, data=data, out=out, enforce=enforce, on_progress=on_progress)
"""


def start(job: tuple[Path, Path], out: Path, mode: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, (*job, out)), mode]
    return subprocess.Popen(
        arguments, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_killed_and_resumed(job: tuple[Path, Path], whole: Run, tmp_path: Path) -> None:
    with start(job, tmp_path / "run", "kill") as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = train(make_plan(job[0]), job[0], data=job[1], out=tmp_path / "run", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    steps = [line["step"] for line in lines(resumed) if "loss" in line]
    assert steps == list(range(1, 13))


def test_sigterm_from_outside(job: tuple[Path, Path], whole: Run, tmp_path: Path) -> None:
    with start(job, tmp_path / "run", "wait") as process:
        assert process.stdout is not None
        while process.stdout.readline() != "3\n":
            pass
        process.send_signal(signal.SIGTERM)
        _, problems = process.communicate("go on\n")
    assert process.returncode == 0, problems
    summary = Run(tmp_path / "run").summary
    assert (summary["stopped"], summary["signal"], summary["steps"]) == ("signal", signal.SIGTERM, 3)
    resumed = train(make_plan(job[0]), job[0], data=job[1], out=tmp_path / "run", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_a_refused_allocation_is_the_budget(job: tuple[Path, Path], tmp_path: Path) -> None:
    # Rows of whole blocks, which torch reads: it reports a refused allocation, where numpy may crash.
    base = make_base(tmp_path, hidden_size=128, intermediate_size=192, head_dim=64, num_attention_heads=3)
    with start((base, job[1]), tmp_path / "run", "rlimit") as process:
        _, problems = process.communicate()
    assert process.returncode == 0, problems
    assert Run(tmp_path / "run").summary["stopped"] == "budget"
    assert Run(tmp_path / "run").summary["enforcement"] == "rlimit"


def test_rotary_tables_are_made_before_allocations_are_limited(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ufunc that is refused its buffer ends the process: numpy sets that error without the GIL."""
    before, seen = resource.getrlimit(resource.RLIMIT_DATA), []

    def noting(*arguments: Any) -> Any:
        seen.append(resource.getrlimit(resource.RLIMIT_DATA))
        return rope_tables(*arguments)

    monkeypatch.setattr("edgetune.models.decoder.rope_tables", noting)
    plan = replace(make_plan(job[0], max_steps=1), budget_bytes=8 << 30)
    assert train(plan, job[0], data=job[1], out=tmp_path / "run", enforce="rlimit").summary["enforcement"] == "rlimit"
    assert seen and set(seen) == {before}


def test_what_stops_a_run() -> None:
    meter = Meter()
    before = [signal.getsignal(number) for number in Guard.SIGNALS]
    with Guard(meter, hold_budget=False) as guard:
        meter.exceeded.set()
        meter.near.set()
        guard.may_shrink = True
        guard.check()
        guard.hold_budget = True
        with pytest.raises(Stopped, match="budget"):
            guard.check()
        meter.exceeded.clear()
        with pytest.raises(NearBudget):
            guard.check()
        os.kill(os.getpid(), signal.SIGINT)
        guard.hold_budget = False
        with pytest.raises(Stopped, match="signal"):
            guard.check()
        with pytest.raises(KeyboardInterrupt):  # asked twice
            os.kill(os.getpid(), signal.SIGTERM)
    assert guard.signal == signal.SIGINT
    assert [signal.getsignal(number) for number in Guard.SIGNALS] == before


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (OSError(errno.ENOMEM, "x"), True), (OSError(errno.ENOSPC, "cannot allocate memory"), False),
        (MemoryError(), True), (RuntimeError("DefaultCPUAllocator: can't allocate memory: 7 bytes"), True),
        (RuntimeError("shapes differ"), False),
    ],
)  # fmt: skip
def test_which_errors_are_memory(error: BaseException, out_of_memory: bool) -> None:
    assert is_out_of_memory(error) is out_of_memory


def test_a_run_in_a_thread_leaves_signals_alone(job: tuple[Path, Path], tmp_path: Path) -> None:
    ended: list[str] = []
    plan = make_plan(job[0], max_steps=1)
    work = threading.Thread(target=lambda: ended.append(train(plan, job[0], data=job[1], out=tmp_path / "run").stopped))
    work.start()
    work.join()
    assert ended == ["done"]


@pytest.mark.skipif(not memory.has_data_limit(), reason="RLIMIT_DATA counts private memory on Linux alone")
def test_a_data_limit_is_measured_once_and_holds_its_body_alone() -> None:
    code = """
        import resource
        from edgetune.memory import MIB, anonymous_bytes
        from edgetune.training.stop import DataLimit
        get = lambda: resource.getrlimit(resource.RLIMIT_DATA)
        before, limit = get(), DataLimit(anonymous_bytes() + 32 * MIB)
        with limit:
            first = get()
        outside, more = get(), bytearray(b"x") * (64 * MIB)
        with limit:
            print(limit.holds, first[0] < before[0] or before[0] < 0, outside == before, get() == first)
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert child.stdout.split() == ["True"] * 4, child.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_all_threads_run_before_a_limit_is_measured() -> None:
    """Their stacks count towards RLIMIT_DATA, 8 MiB each, so none may start under it."""
    code = """
        import os, torch
        from edgetune.training.crew import using
        with using(5):
            before = len(os.listdir("/proc/self/task"))
            x = torch.ones(900, 900)
            (x @ x).add_(1)
            print(before >= 5, len(os.listdir("/proc/self/task")) - before)
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert child.stdout.split() == ["True", "0"], child.stderr


@pytest.mark.parametrize(
    "error", [RuntimeError("can't allocate memory"), RuntimeError("std::bad_alloc"), MemoryError()]
)
def test_a_refused_allocation_lets_more_run_again(
    job: tuple[Path, Path], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    base, data = job
    real, refused = backprop.loss_and_gradients, []

    def loss_and_gradients(decoder: Any, batches: Any, path: Any, **kwargs: Any) -> float:
        loss = real(decoder, batches, path, **kwargs)
        if kwargs["dropout_key"][1] == 5 and path.recompute_layers == 1:
            refused.append(path)
            raise error
        return loss

    monkeypatch.setattr(backprop, "loss_and_gradients", loss_and_gradients)
    run = train(make_plan(base), base, data=data, out=tmp_path / "run")
    assert (run.stopped, len(refused)) == ("done", 1)
    assert [(line["step"], line["recompute_layers"]) for line in run.summary["shrunk"]] == [(5, 2)]
    assert run.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    monkeypatch.setattr(backprop, "loss_and_gradients", lambda *_, **__: (_ for _ in ()).throw(ValueError("no memory")))
    with pytest.raises(ValueError, match="no memory"):
        train(make_plan(base), base, data=data, out=tmp_path / "other")


def test_what_a_step_held_is_given_back_before_the_end_is_written(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cgroup the end is written under the same limit."""
    base, data = job
    real, finish = trainer.Trainer.check, trainer.Trainer.finish
    held: list[tuple[int, bool]] = []

    def note(self: trainer.Trainer) -> None:
        has_gradients = any(value.grad is not None for value in self.parameters.values())
        held.append((len(self.decoder.workspace.sizes), has_gradients))

    def check(self: trainer.Trainer) -> None:
        real(self)
        note(self)
        if held[-1][1]:
            raise Stopped("budget")

    monkeypatch.setattr(trainer.Trainer, "check", check)
    monkeypatch.setattr(trainer.Trainer, "finish", lambda self, *words: note(self) or finish(self, *words))
    assert train(make_plan(base, recompute_layers=2), base, data=data, out=tmp_path / "run").stopped == "budget"
    assert held[-2][0] > 9 and held[-2][1] and held[-1] == (0, False)


@pytest.mark.parametrize(("enforce", "wanted"), [("governor", [False]), ("cgroup", ["weights", True])])
def test_weights_are_read_on_demand_in_a_cgroup_alone(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enforce: str, wanted: list[object]
) -> None:
    group = SimpleNamespace(holds=lambda budget_bytes: True, peak_bytes=5, oom_kills=0)
    finish, seen = trainer.Trainer.finish, list[object]()
    monkeypatch.setattr(conduct, "holding_cgroup", lambda budget_bytes: group)
    monkeypatch.setattr(Weights, "read_on_demand", lambda self: seen.append("weights"))
    monkeypatch.setattr(
        trainer.Trainer,
        "finish",
        lambda self, *words: seen.append(self.decoder.workspace.reads_ahead) or finish(self, *words),
    )
    run = train(make_plan(job[0], max_steps=1), job[0], data=job[1], out=tmp_path / "run", enforce=enforce)
    assert (run.stopped, run.summary["enforcement"], seen) == ("done", enforce, wanted)


def test_a_damaged_checkpoint_is_set_aside_and_said(job: tuple[Path, Path], whole: Run, tmp_path: Path) -> None:
    base, data = job
    out, told = tmp_path / "run", []
    train(make_plan(base), base, data=data, out=out, on_progress=at_step(6, interrupt))
    file = out / "checkpoints" / "ckpt-000006" / "optim.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    resumed = train(make_plan(base), base, data=data, out=out, resume=True, on_progress=lambda p: told.append(p.note))
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert any(note and "ckpt-000006 is damaged" in note for note in told)


def test_a_budget_below_the_start_leaves_the_untrained_adapter(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    told: list[str | None] = []
    plan = make_plan(base, budget_bytes=1 << 20)
    run = train(plan, base, data=data, out=tmp_path / "run", on_progress=lambda p: told.append(p.note))
    assert (run.summary["stopped"], run.summary["steps"], run.summary["train_loss"]) == ("budget", 0, None)
    _, tensors = load_adapter(run.folder, load_config(base))
    assert tensors["model.layers.0.mlp.up_proj.lora_A"].any()
    assert read_checkpoint(run.folder / "checkpoints", 0).step == 0
    assert told[-1] is not None and "before the first step" in told[-1] and "1.0 MiB" in told[-1]
    measured = train(plan, base, data=data, out=tmp_path / "free", enforce="none").summary
    assert measured["stopped"] == "done" and measured["enforcement"] == "none"


def test_stopped_at_the_budget_and_resumed_with_more(job: tuple[Path, Path], whole: Run, tmp_path: Path) -> None:
    base, data = job
    hog: list[np.ndarray] = []
    plan = make_plan(base, budget_bytes=anonymous_bytes() + (96 << 20))
    grow = at_step(4, lambda: hog.append(np.ones(128 << 17)))
    run = train(plan, base, data=data, out=tmp_path / "run", on_progress=grow)
    hog.clear()
    assert run.stopped == "budget" and 4 <= run.summary["steps"] <= 5
    assert json.loads((run.folder / "plan.json").read_text())["recompute_layers"] == 2, "for when it goes on"
    assert run.summary["measured_peak_bytes"] > plan.budget_bytes
    resumed = train(make_plan(base), base, data=data, out=tmp_path / "run", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def poisoned(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the loss of these steps, counted from zero, infinite."""
    real = backprop.loss_and_gradients

    def loss_and_gradients(*args: Any, dropout_key: tuple[int, ...], **kwargs: Any) -> float:
        loss = real(*args, dropout_key=dropout_key, **kwargs)
        return float("inf") if dropout_key[1] in steps else loss

    monkeypatch.setattr(backprop, "loss_and_gradients", loss_and_gradients)


def test_a_step_that_is_not_finite_changes_nothing(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = job
    poisoned({3, 4, 9}, monkeypatch)
    plan = make_plan(base, eval_fraction=0.0)
    run = train(plan, base, data=data, out=tmp_path / "run")
    assert (run.summary["stopped"], run.summary["steps"], run.summary["skipped_steps"]) == ("done", 12, 3)
    assert [line["step"] for line in lines(run) if line.get("loss", 0) is None] == [4, 5, 10]
    train(plan, base, data=data, out=tmp_path / "stopped", on_progress=at_step(4, interrupt))
    resumed = train(plan, base, data=data, out=tmp_path / "stopped", resume=True)
    assert resumed.summary["adapter_sha256"] == run.summary["adapter_sha256"]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert read_checkpoint(checkpoints, 12).state["updates"] == 9


def test_gradients_that_are_not_finite_are_not_applied(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backprop, "clip_gradients", lambda *_: float("nan"))
    plan = make_plan(job[0], eval_fraction=0.0)
    run = train(plan, job[0], data=job[1], out=tmp_path / "run")
    assert run.summary["skipped_steps"] == 12
    first, last = (read_checkpoint(run.folder / "checkpoints", step).tensors("adapter") for step in (11, 12))
    assert all(np.array_equal(first[name], last[name]) for name in first)


def test_twenty_in_a_row_end_the_run(job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, data = job
    poisoned(set(range(5, 100)), monkeypatch)
    run = train(make_plan(base, max_steps=60), base, data=data, out=tmp_path / "run")
    assert (run.stopped, run.summary["steps"], run.summary["skipped_steps"]) == ("nonfinite", 25, 20)
    load_adapter(run.folder, load_config(base))


def test_an_adapter_that_is_not_finite_is_never_saved(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = job
    real = Optimizer.step

    def step(self: Optimizer, learning_rate: float) -> None:
        real(self, learning_rate)
        if self.updates == 4:
            next(iter(self.parameters.values())).data[1, 2] = torch.inf

    monkeypatch.setattr(Optimizer, "step", step)
    run = train(make_plan(base), base, data=data, out=tmp_path / "run")
    assert run.stopped == "nonfinite" and run.summary["steps"] == 3
    load_adapter(run.folder, load_config(base))  # refuses what is not finite


def test_an_update_that_broke_off_is_undone(
    job: tuple[Path, Path], whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = job
    real, broken = Optimizer.step, []

    def step(self: Optimizer, learning_rate: float) -> None:
        if self.updates == 3 and not broken:
            broken.append(self)
            next(iter(self.parameters.values())).data += 1
            raise MemoryError
        real(self, learning_rate)

    monkeypatch.setattr(Optimizer, "step", step)
    run = train(make_plan(base), base, data=data, out=tmp_path / "run")
    assert run.stopped == "budget" and run.summary["steps"] == 3
    monkeypatch.undo()
    resumed = train(make_plan(base), base, data=data, out=tmp_path / "run", resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]


def test_the_best_adapter_is_the_one_kept(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = job
    losses: Iterator[float] = iter([5.0, float("nan"), 2.0, 3.0, 2.0, *[4.0] * 7])
    monkeypatch.setattr(torch_trainer, "evaluate", lambda *_, **__: next(losses))
    run = train(make_plan(base), base, data=data, out=tmp_path / "run")
    assert (run.summary["eval_loss"], run.summary["best_step"], run.summary["steps"]) == (2.0, 3, 12)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["ckpt-000003", "ckpt-000011", "ckpt-000012"]
    _, tensors = load_adapter(run.folder, load_config(base))
    best = read_checkpoint(run.folder / "checkpoints", 3).tensors("adapter")
    assert all(np.array_equal(tensors[name], best[name]) for name in best)


def test_a_run_ends_where_its_patience_does(
    job: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = job
    losses: Iterator[float] = iter([5.0, 2.0, 3.0, 1.5, 1.5, float("nan"), 1.6, 1.0])
    monkeypatch.setattr(torch_trainer, "evaluate", lambda *_, **__: next(losses))
    plan = make_plan(base, early_stopping_patience=3)
    run = train(plan, base, data=data, out=tmp_path / "run")
    assert (run.stopped, run.summary["best_step"], run.summary["steps"]) == ("done", 4, 7)
    assert train(plan, base, data=data, out=tmp_path / "run", resume=True).summary["steps"] == 7
    with pytest.raises(
        errors.ConfigError, match="early_stopping_patience = 3 goes by held-out rows, and there are none"
    ):
        train(make_plan(base, early_stopping_patience=3, eval_fraction=0.0), base, data=data, out=tmp_path / "none")


def test_own_rows_for_evaluation(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    held_out = write_rows(tmp_path / "held.jsonl", 6, seed=9)
    run = train(make_plan(base), base, data=data, eval_data=held_out, out=tmp_path / "run")
    assert run.summary["eval_data"] == str(held_out) and run.summary["eval_loss"] is not None
    assert run.summary["eval_data_sha256"] != run.summary["data_sha256"]


def test_no_evaluation_keeps_the_last_adapter(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    run = train(make_plan(base, eval_fraction=0.0), base, data=data, out=tmp_path / "run")
    assert run.summary["eval_loss"] is None and run.summary["best_step"] is None
    _, tensors = load_adapter(run.folder, load_config(base))
    last = read_checkpoint(run.folder / "checkpoints", 12).tensors("adapter")
    assert all(np.array_equal(tensors[name], last[name]) for name in last)


def test_accumulation_is_a_larger_batch(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        plan = make_plan(base, batch_size=batch_size, gradient_accumulation_steps=accumulation)
        run = train(plan, base, data=data, out=tmp_path / f"run{batch_size}")
        losses.append([line["loss"] for line in lines(run) if "loss" in line])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


def test_epochs_become_steps(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    plan = make_plan(base, max_steps=None, warmup_steps=None, num_epochs=2.0)
    summary = train(plan, base, data=data, out=tmp_path / "run").summary
    assert summary["steps"] == summary["max_steps"] > 5
    assert summary["warmup_steps"] == round(0.1 * summary["max_steps"])


def test_a_finished_run_is_returned_at_once(
    job: tuple[Path, Path], whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = job
    monkeypatch.setattr(loop, "TorchTrainer", None)
    before = (whole.folder / "summary.json").stat().st_mtime_ns
    again = train(make_plan(base), base, data=data, out=whole.folder, resume=True)
    assert again == whole and (whole.folder / "summary.json").stat().st_mtime_ns == before


def test_resuming_something_else_names_what_differs(job: tuple[Path, Path], whole: Run, tmp_path: Path) -> None:
    base, _ = job
    other = write_rows(tmp_path / "other.jsonl", 40, seed=8)
    plan = make_plan(base, learning_rate=1e-3, batch_size=4)
    with pytest.raises(errors.CheckpointError) as caught:
        train(plan, base, data=other, out=whole.folder, resume=True)
    message = str(caught.value)
    for part in ("data, ", "batch_size (2 before, 4 now)", "learning_rate (0.005 before, 0.001 now)"):
        assert part in message
    assert "base" not in message


def test_an_existing_folder_is_replaced_only_by_force(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    plan, out = make_plan(base, max_steps=2), tmp_path / "run"
    first = train(plan, base, data=data, out=out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(errors.ConfigError, match=r"exists and is not empty.*--resume.*--force"):
        train(plan, base, data=data, out=out)
    sha256 = first.summary["adapter_sha256"]
    second = train(replace(plan, seed=9), base, data=data, out=out, force=True)
    assert second.summary["adapter_sha256"] != sha256 and len(lines(second)) == 5
    assert (out / "notes.txt").read_text() == "mine"


def test_folders_that_cannot_be_resumed_or_written(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    with pytest.raises(errors.CheckpointError, match="does not exist, so there is nothing to resume"):
        train(make_plan(base), base, data=data, out=tmp_path / "none", resume=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(errors.CheckpointError, match=r"no plan\.json, so it is no run folder"):
        train(make_plan(base), base, data=data, out=tmp_path / "photos", resume=True)
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    with pytest.raises(errors.ConfigError, match="is a link or a file"):
        train(make_plan(base), base, data=data, out=tmp_path / "link", force=True)
    for folder in (tmp_path / "photos", base):
        with pytest.raises(errors.ConfigError, match="is not empty and no run, so --force"):
            train(make_plan(base), base, data=data, out=folder, force=True)
    (tmp_path / "busy").mkdir()
    with lock_run(tmp_path / "busy"), pytest.raises(errors.CheckpointError, match="in use by process"):
        train(make_plan(base), base, data=data, out=tmp_path / "busy", force=True)


def test_nothing_is_left_where_rows_or_settings_are_wrong(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(errors.DataError):
        train(make_plan(base), base, data=bad, out=tmp_path / "run")
    with pytest.raises(errors.ConfigError, match="on the nf4 grid; the plan is for int4"):
        train(make_plan(base, grid="int4"), base, data=data, out=tmp_path / "run")
    with pytest.raises(errors.ConfigError, match="for the ort engine"):
        train(make_plan(base, engine="ort"), base, data=data, out=tmp_path / "run")
    with pytest.raises(errors.ConfigError, match="enforce = 'cgroup'"):
        train(make_plan(base), base, data=data, out=tmp_path / "run", enforce="cgroup")
    changed = tmp_path / "changed"
    shutil.copytree(base, changed)
    weights = bytearray((changed / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (changed / "model.safetensors").write_bytes(weights)
    with pytest.raises(errors.ModelError, match="not what its manifest names"):
        train(make_plan(base), changed, data=data, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_base_is_not_touched_and_threads_are_given_back(job: tuple[Path, Path], tmp_path: Path) -> None:
    base, data = job
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    threads = torch.get_num_threads()
    train(make_plan(base, threads=threads + 1, max_steps=2), base, data=data, out=tmp_path / "run")
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert torch.get_num_threads() == threads
