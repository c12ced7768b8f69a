"""The device's pace on a machine with a clock of our own: no test waits."""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgetune import errors, host
from edgetune.checkpoint import read_checkpoint
from edgetune.training import backprop, conduct, pace, torch_trainer, trainer
from edgetune.training.loop import Run, train
from edgetune.training.pace import Pace
from edgetune.training.progress import Progress
from edgetune.training.stop import Stopped
from tests.training.conftest import make_base, make_plan, write_rows


class Clock:
    """Stands still unless somebody sleeps or works."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.naps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        self.now += seconds


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and rows."""
    folder = tmp_path_factory.mktemp("job")
    return make_base(folder), write_rows(folder / "rows.jsonl", 40)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(job: tuple[Path, Path], clock: Clock) -> Callable[..., Pace]:
    """A pace on the clock for a device that takes 4 s for a step, in slices of 10 s with a grace of 1 s."""

    def made(**options: bool) -> Pace:
        plan = make_plan(job[0], predicted_step_seconds=4.0, slice_seconds=10, grace_seconds=1.0)
        return Pace(plan, clock=clock, sleep=clock.sleep, **options)

    return made


def step(run: Pace, clock: Clock, seconds: float, *, checkpoint_seconds: float = 0.0) -> float | None:
    """One step on which this machine works for so long."""
    run.begin_step(checkpoint_seconds)
    clock.now += seconds
    return run.end_step(lambda: run.check(checkpoint_seconds))


def test_a_step_lasts_as_long_as_on_the_device(make: Callable[..., Pace], clock: Clock) -> None:
    run = make(emulate=True)
    assert [step(run, clock, seconds) for seconds in (1.5, 3.75, 4.0)] == [2.5, 0.25, 0.0]
    assert clock.now == pytest.approx(1012)
    assert max(clock.naps) <= pace.NAP_SECONDS and run.warning() is None


def test_without_emulation_nobody_sleeps(make: Callable[..., Pace], clock: Clock) -> None:
    run = make()
    assert [step(run, clock, seconds) for seconds in (1.5, 300.0)] == [None, None]
    run.end_evaluation(clock.now - 5, pytest.fail)
    assert clock.naps == [] and run.warning() is None


def test_a_slower_machine_is_told_of_once(make: Callable[..., Pace], clock: Clock) -> None:
    run = make(emulate=True)
    assert step(run, clock, 9.0) == 0.0 and run.warning() is None, "a first step may be slow"
    assert step(run, clock, 5.5) == 0.0
    message = run.warning()
    assert message is not None and "slower than none: 5.5 s" in message and "4 s there" in message
    assert step(run, clock, 6.0) == 0.0 and run.warning() is None
    assert clock.naps == []


def test_an_evaluation_is_slowed_down_as_the_steps_were(make: Callable[..., Pace], clock: Clock) -> None:
    run = make(emulate=True)
    started = clock.now
    clock.now += 3
    run.end_evaluation(started, lambda: None)
    assert clock.naps == [], "nothing is known before the first step"
    for seconds in (1.0, 2.0, 0.5):
        step(run, clock, seconds)
    started = clock.now
    clock.now += 3
    run.end_evaluation(started, lambda: None)
    assert clock.now - started == pytest.approx(3 * 4 / 1.0)


def test_the_sleep_ends_for_whatever_stops_the_run(make: Callable[..., Pace], clock: Clock) -> None:
    run = make(emulate=True)
    run.begin_step(0.0)
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stopped("signal")

    with pytest.raises(Stopped, match="signal"):
        run.end_step(check)
    assert clock.now == pytest.approx(1000 + 2 * pace.NAP_SECONDS)


def test_no_step_is_begun_that_does_not_end_in_the_slice(make: Callable[..., Pace], clock: Clock) -> None:
    run = make(one_slice=True)
    for _ in range(3):
        step(run, clock, 3.0)
    with pytest.raises(Stopped, match="slice"):
        run.begin_step(0.0)
    clock.now += 0.9
    run.check(0.0)
    clock.now += 0.2
    with pytest.raises(Stopped, match="slice"):
        run.check(0.0)


def test_one_slow_step_does_not_end_a_slice_early(make: Callable[..., Pace], clock: Clock) -> None:
    run = make(one_slice=True)
    for seconds in (1.0, 1.0, 6.0):
        step(run, clock, seconds)
    run.begin_step(0.0)


@pytest.mark.parametrize(("checkpoint_seconds", "most"), [(0.25, 10.0), (0.5, 10.0), (1.0, 9.0), (3.0, 5.0)])
def test_what_is_written_at_the_end_is_done_within_the_grace(
    make: Callable[..., Pace], clock: Clock, checkpoint_seconds: float, most: float
) -> None:
    """A checkpoint, and as much again; whatever of it the grace of 1 s does not hold is taken from the slice."""
    run = make(one_slice=True)
    clock.now += most - 0.01
    run.check(checkpoint_seconds)
    clock.now += 0.02
    with pytest.raises(Stopped, match="slice"):
        run.check(checkpoint_seconds)


def test_an_emulated_slice_is_one_of_the_device_s_time(make: Callable[..., Pace], clock: Clock) -> None:
    """Two steps of 4 s fit 10 s, however long this machine works on them."""
    for seconds in (0.5, 4.0, 60.0):
        run = make(emulate=True, one_slice=True)
        for _ in range(2):
            run.begin_step(0.0)
            clock.now += seconds
            run.check(0.0)
            run.end_step(lambda run=run: run.check(0.0))  # type: ignore[misc]
        with pytest.raises(Stopped, match="slice"):
            run.begin_step(0.0)


@pytest.mark.parametrize("seconds", [1.0, 4.0, 9.0])
def test_an_emulated_slice_has_the_device_s_time_for_evaluations_too(
    make: Callable[..., Pace], clock: Clock, seconds: float
) -> None:
    """Half as much work as a step takes 2 s there: beside it two steps of 4 s fit 10 s, however fast this machine."""
    run = make(emulate=True, one_slice=True)
    step(run, clock, seconds)
    started = clock.now
    clock.now += seconds / 2
    run.end_evaluation(started, lambda: None)
    run.begin_step(0.0)
    clock.now += 3.9
    run.check(0.0)


def on_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch, *step_seconds: float) -> None:
    """Let runs go by this clock; this machine works so long on its steps, by turns, and on nothing else."""
    seconds = itertools.cycle(step_seconds)
    monkeypatch.setattr(conduct, "Pace", functools.partial(Pace, clock=clock, sleep=clock.sleep))
    real = backprop.loss_and_gradients

    def loss_and_gradients(*args: Any, **kwargs: Any) -> float:
        clock.now += next(seconds)
        return real(*args, **kwargs)

    monkeypatch.setattr(backprop, "loss_and_gradients", loss_and_gradients)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_an_emulated_run_has_the_device_s_figures_and_the_same_adapter(
    job: tuple[Path, Path], clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, data = job
    plan = make_plan(base, predicted_step_seconds=8.0)
    plain = train(plan, base, data=data, out=tmp_path / "plain").summary
    assert plain["emulated"] is False and plain["late_steps"] == 0
    on_clock(clock, monkeypatch, 2.0)
    emulated = train(plan, base, data=data, out=tmp_path / "emulated", emulate=True)
    summary = emulated.summary
    assert clock.now - 1000 == pytest.approx(12 * 8.0)
    assert summary["emulated"] is True and summary["late_steps"] == 0
    assert summary["measured_step_seconds"] == pytest.approx(8.0)
    steps = [line for line in lines(emulated) if "loss" in line]
    tokens = sum(line["tokens"] for line in steps) / 12
    assert summary["tokens_per_second"] == pytest.approx(tokens / 8.0)
    assert [line["idle_seconds"] for line in steps] == pytest.approx([6.0] * 12)
    assert summary["adapter_sha256"] == plain["adapter_sha256"]


def test_a_machine_that_is_too_slow_says_so(
    job: tuple[Path, Path], clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, data = job
    on_clock(clock, monkeypatch, 2.0)
    told: list[str | None] = []
    plan = make_plan(base, predicted_step_seconds=0.5, max_steps=4)
    run = train(
        plan,
        base,
        data=data,
        out=tmp_path / "run",
        emulate=True,
        on_progress=lambda progress: told.append(progress.note),
    )
    assert sum("slower than none" in (note or "") for note in told) == 1
    assert run.summary["late_steps"] == 4 and run.summary["measured_step_seconds"] == pytest.approx(2.0)


def test_speeds_are_those_of_steps_made_alike(
    job: tuple[Path, Path], clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run that is emulated only from a step on does not mix the two."""
    base, data = job
    on_clock(clock, monkeypatch, 2.0)
    plan, out = make_plan(base, predicted_step_seconds=8.0), tmp_path / "run"

    def stop(progress: Progress) -> None:
        if progress.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    first = train(plan, base, data=data, out=out, on_progress=stop).summary
    assert (first["steps"], first["emulated"]) == (9, False)
    assert first["measured_step_seconds"] == pytest.approx(2.0)
    second = train(plan, base, data=data, out=out, resume=True, emulate=True).summary
    assert (second["stopped"], second["emulated"]) == ("done", True)
    assert second["measured_step_seconds"] == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("emulate", "step_seconds", "per_slice"),
    [(False, [2.0], 5), (True, [2.0], 3), (False, [2.0, 2.0, 7.0], 2)],
    ids=["here", "emulated", "left in a step"],
)
def test_slice_by_slice_a_run_ends_with_the_same_bytes(
    job: tuple[Path, Path], clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    emulate: bool, step_seconds: list[float], per_slice: int,
) -> None:  # fmt: skip
    base, data = job
    plan = make_plan(base, predicted_step_seconds=3.0, slice_seconds=10)
    whole = train(plan, base, data=data, out=tmp_path / "whole").summary
    on_clock(clock, monkeypatch, *step_seconds)
    ends = []
    for number in range(10):
        run = train(plan, base, data=data, out=tmp_path / "run", resume=number > 0, emulate=emulate, one_slice=True)
        ends.append((run.stopped, run.summary["steps"]))
        assert read_checkpoint(run.folder / "checkpoints", run.summary["steps"]).step == run.summary["steps"]
        if run.stopped == "done":
            break
    stops = [("slice", steps) for steps in range(per_slice, 12, per_slice)]
    assert ends == [*stops, ("done", 12)]
    assert run.summary["adapter_sha256"] == whole["adapter_sha256"]
    assert [line.get("loss") for line in lines(run)] == [line.get("loss") for line in lines(Run(tmp_path / "whole"))]


def test_a_slice_in_which_nothing_is_done_is_an_error(
    job: tuple[Path, Path], clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, data = job
    on_clock(clock, monkeypatch, 2.0)
    plan = make_plan(base, predicted_step_seconds=11.0, slice_seconds=10)
    with pytest.raises(errors.ConfigError, match=r"slice of none, 10 s: no step.*stands at step 0.*--batch-size"):
        train(plan, base, data=data, out=tmp_path / "run", emulate=True, one_slice=True)
    assert Run(tmp_path / "run").summary["stopped"] == "slice"
    assert train(plan, base, data=data, out=tmp_path / "run", resume=True, one_slice=True).summary["steps"] == 5


def test_an_evaluation_that_was_stopped_is_made_again(
    job: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the best adapter could be another one than without the stop."""
    base, data = job
    losses = [5.0, 4.0, 2.0, 3.0, *[4.0] * 8]
    interrupted = False

    def evaluate(*_: Any, check: Callable[[], None], **__: Any) -> float:
        nonlocal interrupted
        if losses[0] == 2.0 and not interrupted:
            interrupted = True
            os.kill(os.getpid(), signal.SIGTERM)
            check()
        return losses.pop(0)

    monkeypatch.setattr(torch_trainer, "evaluate", evaluate)
    stopped = train(make_plan(base), base, data=data, out=tmp_path / "run")
    assert (stopped.stopped, stopped.summary["steps"], stopped.summary["best_step"]) == ("signal", 3, 2)
    resumed = train(make_plan(base), base, data=data, out=tmp_path / "run", resume=True)
    assert (resumed.summary["best_step"], resumed.summary["eval_loss"]) == (3, 2.0)
    assert [line["step"] for line in lines(resumed) if "eval_loss" in line] == list(range(1, 13))


def test_how_long_a_checkpoint_takes_is_known_after_resuming(
    job: tuple[Path, Path], clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A checkpoint of 4 s, twice, less a grace of 1 s, leaves 3 s of 10: one step of 2 s and not two."""
    base, data = job
    on_clock(clock, monkeypatch, 2.0)
    real = trainer.save_checkpoint

    def save_checkpoint(folder: Path, state: dict[str, Any], tensors: Any) -> Any:
        clock.now += 0.0 if (folder / f"ckpt-{state['step']:06d}").exists() else 4.0
        return real(folder, state, tensors)

    monkeypatch.setattr(trainer, "save_checkpoint", save_checkpoint)
    plan = make_plan(base, slice_seconds=10, grace_seconds=1.0, eval_fraction=0.0)
    train(plan, base, data=data, out=tmp_path / "run", on_progress=lambda p: os.kill(os.getpid(), signal.SIGTERM))
    before, at = Run(tmp_path / "run").summary["steps"], clock.now
    sliced = train(plan, base, data=data, out=tmp_path / "run", resume=True, one_slice=True)
    assert (sliced.stopped, sliced.summary["steps"] - before) == ("slice", 1)
    assert clock.now - at <= plan.slice_seconds + plan.grace_seconds


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or host.threads() < 2, reason="needs Linux and two cores")
def test_pinned_to_as_many_cores_and_given_back() -> None:
    before, seen = os.sched_getaffinity(0), []
    go, moved = threading.Event(), threading.Event()

    def look() -> None:
        go.wait()
        seen.append(os.sched_getaffinity(0))
        moved.set()

    thread = threading.Thread(target=look)
    thread.start()
    with pytest.raises(RuntimeError, match="from inside"), pace.pinned(1):
        assert len(os.sched_getaffinity(0)) == 1 and os.sched_getaffinity(0) < before
        go.set()
        moved.wait()
        raise RuntimeError("from inside")
    thread.join()
    assert [len(cores) for cores in seen] == [1], "threads that run already are moved too"
    assert os.sched_getaffinity(0) == before
    with pace.pinned(len(before)):
        assert os.sched_getaffinity(0) == before


def test_no_affinity_no_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    with pace.pinned(1):
        assert host.threads() == os.cpu_count()


@pytest.mark.skipif(sys.platform != "linux", reason="reads a mask of cores")
def test_an_emulated_run_is_pinned_and_another_is_not(
    job: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, data = job
    counts: list[int] = []
    monkeypatch.setattr(pace.host, "threads", lambda: 2)
    monkeypatch.setattr(pace.host, "fastest_cores", lambda count: counts.append(count) or os.sched_getaffinity(0))
    train(make_plan(base, max_steps=1), base, data=data, out=tmp_path / "free")
    assert counts == []
    train(make_plan(base, max_steps=1), base, data=data, out=tmp_path / "held", emulate=True)
    assert counts == [1]
