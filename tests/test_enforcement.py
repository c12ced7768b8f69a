"""The proof: runs in a cgroup of exactly their budget, and runs whose budget was lowered after they were planned."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_job import LAYERS, make_job, make_plan, run, start, wait_for_step, write_base, write_rows

from edgetune.cgroup import Cgroup, check_cgroup, make_cgroup
from edgetune.checkpoint import latest_checkpoint
from edgetune.errors import ConfigError
from edgetune.memory import MIB
from edgetune.planner import Plan
from edgetune.products import are_offered


class Case(NamedTuple):
    """A base, rows, the smallest plan for them, and one that keeps everything."""

    base: Path
    rows: Path
    smallest: Plan
    largest: Plan


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    base, rows = write_base(folder), write_rows(folder / "rows.jsonl")
    smallest, largest = (make_plan(base, rows, budget) for budget in ("min", "foreground"))
    assert (smallest.recompute_layers, largest.recompute_layers) == (LAYERS, 0)
    assert largest.predicted_peak_bytes - smallest.predicted_peak_bytes > 20 * MIB
    return Case(base, rows, smallest, largest)


@pytest.fixture
def cgroups() -> None:
    try:
        check_cgroup()
    except ConfigError as error:
        pytest.skip(str(error))


def first_to_read(folder: Path) -> None:
    """Drop a base from the page cache, so that who maps it next is charged for it."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@pytest.mark.usefixtures("cgroups")
@pytest.mark.parametrize("times", [1, 1.05, 1.25, 2])
def test_a_run_finishes_in_a_cgroup_of_its_budget(case: Case, tmp_path: Path, times: float) -> None:
    plan = make_plan(case.base, case.rows, int(times * case.smallest.budget_bytes / MIB))
    assert plan.recompute_layers == {1: LAYERS, 2: 0}.get(times, plan.recompute_layers)
    first_to_read(case.base)
    code, summary, problems = run(make_job(plan, case.rows, tmp_path / "run", enforce="cgroup"), supervised=True)
    assert (code, summary["stopped"], summary["steps"]) == (0, "done", 3), problems
    assert summary["enforcement"] == "cgroup" and summary["cgroup_oom_kills"] == 0
    assert summary["measured_peak_bytes"] <= summary["cgroup_peak_bytes"] <= summary["budget_bytes"]
    assert summary["budget_bytes"] == plan.budget_bytes
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "held by cgroup" in problems


@pytest.mark.usefixtures("cgroups")
@pytest.mark.skipif(not are_offered(), reason="this processor has no fast products")
def test_so_does_one_with_fast_products(case: Case, tmp_path: Path) -> None:
    plan = make_plan(case.base, case.rows, "min", fast_products=True)
    assert plan.fast_products and plan.predicted_peak_bytes > case.smallest.predicted_peak_bytes + 4 * MIB
    code, summary, problems = run(make_job(plan, case.rows, tmp_path / "run", enforce="cgroup"), supervised=True)
    assert (code, summary["stopped"], summary["cgroup_oom_kills"]) == (0, "done", 0), problems
    assert summary["measured_peak_bytes"] <= plan.budget_bytes


@pytest.fixture
def around(case: Case, cgroups: None) -> Iterator[Cgroup]:
    """A cgroup of the planned budget, to count what the kernel kills; the budget is lowered inside it."""
    group = make_cgroup(case.smallest.budget_bytes)
    yield group
    assert group.oom_kills == 0
    group.remove()
    assert not group.folder.exists()


@pytest.mark.parametrize("enforce", ["governor", "rlimit"])
def test_a_lowered_budget_stops_a_run_within_one_step(case: Case, around: Cgroup, tmp_path: Path, enforce: str) -> None:
    out = tmp_path / "run"
    plan = replace(case.smallest, max_steps=500)
    with start(make_job(plan, case.rows, out), preexec_fn=around.enter) as process:
        wait_for_step(process, out, 2)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 143
    before = json.loads((out / "summary.json").read_text())["steps"]
    lowered = replace(plan, budget_bytes=int(0.9 * plan.predicted_peak_bytes))
    job = make_job(lowered, case.rows, out, resume=True, enforce=enforce)
    code, summary, problems = run(job, preexec_fn=around.enter)
    assert (code, summary["stopped"]) == (75, "budget"), problems
    assert before <= summary["steps"] <= before + 1
    checkpoint, set_aside = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None and checkpoint.step == summary["steps"] and not set_aside


@pytest.mark.usefixtures("cgroups")
@pytest.mark.parametrize("share", [0.9, 0.95, 0.98])
def test_a_lowered_budget_in_a_cgroup_stops_a_run_and_nothing_is_killed(
    case: Case, tmp_path: Path, share: float
) -> None:
    lowered = replace(case.smallest, budget_bytes=int(share * case.smallest.predicted_peak_bytes))
    out = tmp_path / "run"
    code, said, problems = run(make_job(lowered, case.rows, out, enforce="cgroup"), supervised=True)
    assert (code, said["stopped"], said["steps"]) == (75, "budget", 0), problems
    assert said == json.loads((out / "summary.json").read_text()), "the child ended by itself"
    assert (said["enforcement"], said["cgroup_oom_kills"]) == ("cgroup", 0)
    assert said["measured_peak_bytes"] < lowered.budget_bytes
    assert said["cgroup_peak_bytes"] <= lowered.budget_bytes
    assert "killed" not in problems and "crash" not in problems
    checkpoint, set_aside = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 0 and not set_aside


@pytest.mark.usefixtures("cgroups")
def test_a_lowered_budget_in_a_cgroup_lets_more_run_again(case: Case, tmp_path: Path) -> None:
    lowered = replace(case.largest, budget_bytes=case.smallest.budget_bytes)
    code, said, problems = run(make_job(lowered, case.rows, tmp_path / "run", enforce="cgroup"), supervised=True)
    assert (code, said["stopped"], said["cgroup_oom_kills"]) == (0, "done", 0), problems
    assert said["recompute_layers"] == LAYERS
    assert "killed" not in problems


@pytest.mark.usefixtures("cgroups")
def test_a_kill_at_the_budget_is_told_and_ends(case: Case, tmp_path: Path) -> None:
    """Far below the floor: killed while torch is imported, before the governor could begin."""
    lowered = replace(case.smallest, budget_bytes=64 * MIB)
    code, said, problems = run(make_job(lowered, case.rows, tmp_path / "run", enforce="cgroup"), supervised=True)
    assert code == 75, problems
    assert said == {
        "stopped": "budget", "out": str(tmp_path / "run"), "steps": 0, "budget_bytes": 64 * MIB,
        "enforcement": "cgroup", "kills": 1, "cgroup_oom_kills": 1, "cgroup_peak_bytes": said["cgroup_peak_bytes"],
    }  # fmt: skip
    assert 63 * MIB < said["cgroup_peak_bytes"] <= 64 * MIB
    assert "was killed by the kernel at the budget of 64.0 MiB; nothing was written" in problems
    assert not (tmp_path / "run").exists()


def test_what_is_near_its_budget_gives_up_what_changes_no_bit(case: Case, tmp_path: Path) -> None:
    largest = replace(case.largest, dequantized_layers=0)  # which would be given up first
    _, whole, problems = run(make_job(largest, case.rows, tmp_path / "whole"))
    assert (whole["stopped"], whole["shrunk"]) == ("done", []), problems
    reached = whole["measured_peak_bytes"]
    # Near it is where one or two blocks less will do, and far enough from the budget to be noticed before that is met.
    tight = replace(largest, budget_bytes=reached + 16 * MIB, reserve_bytes=2 * 22 * MIB)
    code, shrunk, problems = run(make_job(tight, case.rows, tmp_path / "shrunk"))
    assert (code, shrunk["stopped"], shrunk["enforcement"]) == (0, "done", "governor"), problems
    assert shrunk["adapter_sha256"] == whole["adapter_sha256"]
    assert shrunk["measured_peak_bytes"] < reached
    assert shrunk["recompute_layers"] == 3 and "3 blocks run again, not 0" in problems
    lines = _lines(tmp_path / "shrunk")
    assert shrunk["shrunk"] == [line for line in lines if "recompute_layers" in line]
    assert [(line["step"], line["recompute_layers"], line["recompute_layers_before"]) for line in shrunk["shrunk"]] == [
        (0, 3, 0)
    ]
    assert shrunk["shrunk"][0]["now_bytes"] < reached - 25 * MIB, "what the unfinished step held was not given back"
    assert [line["loss"] for line in lines if "loss" in line] == [
        line["loss"] for line in _lines(tmp_path / "whole") if "loss" in line
    ]
    assert json.loads((tmp_path / "shrunk" / "plan.json").read_text())["recompute_layers"] == 3


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
