"""What the supervisor makes of every end of its child: with ends made up, and with real processes and signals."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from tiny_job import LAYERS, make_job, make_plan, run, start, wait_for_step, wait_until, write_base, write_rows

from edgetune import cgroup
from edgetune.cli import supervisor
from edgetune.cli.console import STOPPED_EARLY
from edgetune.memory import MIB, anonymous_bytes
from edgetune.planner import Plan

KILL, SEGV = -signal.SIGKILL, -signal.SIGSEGV


class Group:
    """A cgroup whose counter the tests set."""

    oom_kills: int | None = 0
    peak_bytes = 99


class Ends:
    """Children that end as they are told, one after the other: a code, the checkpoint they leave, OOM kills."""

    def __init__(self, run: Path) -> None:
        self.folder, self.group = run, Group()
        self.SIGNALS = supervisor.Child.SIGNALS
        self.asked: int | None = None
        self.asked_at_the_end: int | None = None
        self.ends: list[tuple[int, int | None, int]] = []
        self.jobs: list[dict[str, Any]] = []

    def run(self, job: dict[str, Any], group: Any) -> int:
        """In the place of `Child.run`."""
        self.asked = self.asked_at_the_end
        code, step, oom_kills = self.ends.pop(0)
        self.jobs.append(json.loads(json.dumps(job)))
        if step is not None:
            (self.folder / "checkpoints" / f"ckpt-{step:06d}").mkdir(parents=True, exist_ok=True)
            (self.folder / "plan.json").unlink(missing_ok=True)
            (self.folder / "plan.json").write_text(str(len(self.jobs)), encoding="utf-8")
        if self.group.oom_kills is not None:
            self.group.oom_kills += oom_kills
        return code

    def supervise(self, *ends: tuple[int, int | None, int], group: bool = True, **options: Any) -> int:
        self.ends += ends
        plan = {
            "budget_bytes": 64 * MIB, "recompute_layers": 2, "adapter": {"layers_to_transform": [1, 3]},
            "model_config": {"num_hidden_layers": 8},
        }  # fmt: skip
        job = {"plan": plan, "out": str(self.folder), "resume": False, "force": False, "as_json": True} | options
        job["enforce"] = "cgroup" if group else "governor"
        code = supervisor.supervise(job, self, self.group if group else None)  # type: ignore[arg-type]
        assert not self.ends, "children that were not started"
        return code


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ends:
    monkeypatch.setattr(supervisor, "own_cgroup", lambda: None)
    return Ends(tmp_path / "run")


@pytest.mark.parametrize("code", [0, 1, 75, 130, 143])
def test_who_ends_by_itself_has_said_why(ends: Ends, code: int) -> None:
    assert ends.supervise((code, 3, 0)) == code


def test_a_kill_at_the_budget_goes_on_with_what_was_given_up(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends.supervise((KILL, 4, 1), (KILL, 6, 1), (0, 9, 0), force=True) == 0
    first, second, third = ends.jobs
    assert (first["resume"], first["force"], first["plan"]["recompute_layers"]) == (False, True, 2)
    assert (second["resume"], second["force"], second["plan"]["recompute_layers"]) == (True, False, 7)
    assert third == second
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "killed by the kernel at the budget of 64.0 MiB; going on from step 4, where 7 blocks run again",
        "killed by the kernel at the budget of 64.0 MiB; going on from step 6",
    ]


def test_a_kill_that_comes_again_without_progress_is_the_budget(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends.supervise((KILL, 4, 1), (KILL, 4, 1)) == STOPPED_EARLY
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "stopped": "budget", "out": str(ends.folder), "steps": 4, "budget_bytes": 64 * MIB, "enforcement": "cgroup",
        "kills": 2, "cgroup_oom_kills": 2, "cgroup_peak_bytes": 99,
    }  # fmt: skip
    assert (
        "was killed 2 times, the last time by the kernel at the budget of 64.0 MiB; its checkpoint of step 4 is kept. "
        f"Give `edgetune train --resume {ends.folder}` a larger --budget, or plan a smaller run."
    ) in captured.err


def test_progress_does_not_go_on_for_ever(ends: Ends) -> None:
    kills = [(KILL, step, 1) for step in range(10, 10 + supervisor.MAX_KILLS)]
    assert ends.supervise(*kills) == STOPPED_EARLY


def test_nothing_to_give_up_and_nothing_done(ends: Ends) -> None:
    plan = {
        "budget_bytes": 1, "recompute_layers": 9, "adapter": {"layers_to_transform": None},
        "model_config": {"num_hidden_layers": 8},
    }  # fmt: skip
    assert ends.supervise((KILL, None, 1), plan=plan) == STOPPED_EARLY


def test_a_kill_from_outside_is_not_the_budget(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    assert ends.supervise((KILL, 3, 0), (0, 9, 0)) == 0
    assert "killed from outside; going on from step 3" in capsys.readouterr().err
    with pytest.raises(supervisor.EdgetuneError, match=r"killed 2 times, the last time from outside.*step 9 is kept"):
        ends.supervise((KILL, 9, 0), (KILL, 9, 0), resume=True)


def test_what_the_kernel_killed_before_is_not_counted(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    ends.group.oom_kills = 5
    assert ends.supervise((KILL, 3, 0), (0, 9, 0)) == 0
    assert "killed from outside" in capsys.readouterr().err


def test_an_unfinished_checkpoint_is_none(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    (ends.folder / "checkpoints" / "ckpt-000004.tmp-77").mkdir(parents=True)
    assert ends.supervise((KILL, 3, 1), (0, 9, 0)) == 0
    assert "going on from step 3" in capsys.readouterr().err


def test_a_crash_is_not_the_budget(ends: Ends) -> None:
    with pytest.raises(supervisor.EdgetuneError, match="crashed with SIGSEGV, which is not the budget"):
        ends.supervise((SEGV, 3, 0), group=False)


def test_a_crash_under_a_limit_may_be_memory_that_was_refused(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(supervisor.EdgetuneError, match="crashed with SIGSEGV, which is not the budget"):
        ends.supervise((SEGV, 4, 0), (SEGV, 6, 0))  # what could be given up was
    first, second = ends.jobs
    assert (first["resume"], first["plan"]["recompute_layers"]) == (False, 2)
    assert (second["resume"], second["plan"]["recompute_layers"]) == (True, 7)
    assert capsys.readouterr().err == (
        "crashed with SIGSEGV, perhaps on memory that it was refused; going on from step 4, where 7 blocks run again\n"
    )


def test_killed_before_it_replaced_an_earlier_run(ends: Ends, capsys: pytest.CaptureFixture[str]) -> None:
    (ends.folder / "checkpoints" / "ckpt-000050").mkdir(parents=True)
    (ends.folder / "plan.json").write_text("of the earlier run", encoding="utf-8")
    assert ends.supervise((KILL, None, 1), (KILL, None, 1), force=True) == STOPPED_EARLY
    assert [(job["resume"], job["force"]) for job in ends.jobs] == [(False, True)] * 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 0 and "going on from step 0" in captured.err


def test_a_stop_that_was_asked_for_is_never_resumed(ends: Ends) -> None:
    ends.asked = signal.SIGTERM
    assert ends.supervise() == 143, "asked before a child was started"
    ends.asked, ends.asked_at_the_end = None, signal.SIGINT
    assert ends.supervise((KILL, 3, 1)) == 130
    for code in (KILL, SEGV):  # killed or crashed on its way out, and not a step further
        ends.asked = None
        assert ends.supervise((code, 3, 1), resume=True) == 130
    ends.asked = ends.asked_at_the_end = None
    assert ends.supervise((-signal.SIGTERM, 3, 0)) == 143, "sent to the child alone, before it could catch it"


def test_without_a_group_the_kernel_counts_for_our_own_or_for_the_machine(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr(supervisor, "_VMSTAT", vmstat)
    assert supervisor._oom_kills(None) == 0  # not on Linux
    vmstat.write_text("pgfault 7\noom_kill 3\n", encoding="utf-8")
    assert supervisor._oom_kills(None) == 3
    ends.group.oom_kills = 5
    monkeypatch.setattr(supervisor, "own_cgroup", lambda: ends.group)
    assert supervisor._oom_kills(None) == 5
    assert ends.supervise((KILL, 4, 1), (KILL, 4, 1), group=False) == STOPPED_EARLY
    captured = capsys.readouterr()
    assert "the last time by the kernel, which was out of memory" in captured.err
    assert json.loads(captured.out)["cgroup_oom_kills"] is None
    ends.group.oom_kills = None
    assert supervisor._oom_kills(None) == 3, "a group without a counter"


def test_no_cgroup_is_an_error_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cgroup, "cgroup_state", lambda: cgroup._NO_CGROUP)
    job = {"plan": {"budget_bytes": 1 << 20}, "enforce": "cgroup", "as_json": True, "out": str(tmp_path / "run")}
    assert supervisor.main(json.dumps(job)) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "ConfigError"
    assert not (tmp_path / "run").exists()


def test_a_group_is_made_of_the_budget_where_one_is_wanted_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    made = Group()
    made.remove = lambda: calls.append("removed")  # type: ignore[attr-defined]
    monkeypatch.setattr(supervisor, "make_cgroup", lambda size: calls.append(size) or made)
    with supervisor._group({"enforce": "governor", "plan": {"budget_bytes": 7}}) as group:
        assert group is None
    with (
        pytest.raises(RuntimeError, match="from inside"),
        supervisor._group({"enforce": "cgroup", "plan": {"budget_bytes": 7}}) as group,
    ):
        assert group is made
        raise RuntimeError("from inside")
    assert calls == [7, "removed"]


def test_a_group_that_may_not_be_entered(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").mkdir()
    with pytest.raises(supervisor.ConfigError, match=f"no process may be moved into {tmp_path}"):
        supervisor.Child().run({}, cgroup.Cgroup(2, tmp_path))


def test_the_handlers_of_before_come_back() -> None:
    before = [signal.getsignal(number) for number in supervisor.Child.SIGNALS]
    with supervisor.Child() as child:
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.asked == signal.SIGTERM
    assert [signal.getsignal(number) for number in supervisor.Child.SIGNALS] == before


def test_a_signal_that_comes_while_the_child_starts_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    class Starting:
        def __init__(self, *words: Any, **options: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        def send_signal(self, number: int) -> None:
            sent.append(number)

        def wait(self) -> int:
            return 143

    monkeypatch.setattr(supervisor.subprocess, "Popen", Starting)
    with supervisor.Child() as child:
        assert child.run({}, None) == 143
    assert sent == [signal.SIGTERM]


class Case(NamedTuple):
    rows: Path
    plan: Plan


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    rows = write_rows(folder / "rows.jsonl")
    return Case(rows, make_plan(write_base(folder), rows, "foreground", max_steps=8))


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (lambda process: process.send_signal(signal.SIGTERM), signal.SIGTERM),
        (lambda process: os.killpg(process.pid, signal.SIGINT), signal.SIGINT),  # as a terminal does
    ],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_is_passed_on_once(case: Case, tmp_path: Path, send: Callable[[Any], None], number: int) -> None:
    out = tmp_path / "run"
    with start(make_job(replace(case.plan, max_steps=100_000), case.rows, out), supervised=True) as process:
        wait_for_step(process, out, 2)
        assert anonymous_bytes(process.pid) > 100 * MIB, "the child counts as its descendant"
        (child,) = psutil.Process(process.pid).children()
        assert os.getpgid(child.pid) != os.getpgid(process.pid), "a terminal would send Ctrl-C to both"
        assert psutil.Process(process.pid).memory_full_info().uss < 32 * MIB, "it should hold nothing itself"
        send(process)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    said = json.loads(stdout.splitlines()[-1])
    assert (said["stopped"], said["signal"]) == ("signal", number)
    assert said == json.loads((out / "summary.json").read_text())


def test_killed_from_outside_it_goes_on_to_the_same_bytes(case: Case, tmp_path: Path) -> None:
    _, whole, _ = run(make_job(case.plan, case.rows, tmp_path / "whole"))
    out = tmp_path / "run"
    with start(make_job(case.plan, case.rows, out), supervised=True) as process:
        wait_for_step(process, out, 3)
        (child,) = psutil.Process(process.pid).children()
        child.kill()
        wait_until(process, lambda: [c.pid for c in psutil.Process(process.pid).children()] not in ([], [child.pid]))
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    said = json.loads(stdout.splitlines()[-1])
    assert (said["stopped"], said["steps"], said["recompute_layers"]) == ("done", 8, LAYERS)
    assert said["adapter_sha256"] == whole["adapter_sha256"]
    assert "killed from outside; going on from step " in stderr
    assert len(stdout.splitlines()) == 1
