"""What `edgetune personalize` does: become a process that holds nothing else, train, show the run, end with its code.

As with `edgetune train`, the parser and what it imports would count against the device's budget, so the command line's
process replaces itself by `python -m edgetune.cli.personalizing JOB`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from edgetune import host
from edgetune.bundle import load_bundle
from edgetune.cli.console import answer, exit_code, fail, tell
from edgetune.errors import EdgetuneError
from edgetune.memory import format_mib
from edgetune.personalizer import run_plan
from edgetune.personalizer.job import make_plan, old_plan, sliced
from edgetune.planner.plans import Plan
from edgetune.training.progress import show_progress
from edgetune.training.run import Run

VERB = "personalize"


def start(
    bundle: Path, out: Path, wishes: dict[str, Any], rows: dict[str, Any], *, supervise: bool,
    slice_s: int | None, grace_s: float | None, **options: Any,
) -> NoReturn:  # fmt: skip
    """Plan, then become the process that trains, or its supervisor.

    `wishes` are those of `make_plan` beside the `rows` (data, eval_data, skip_bad), `options` those of `run_plan`.

    Raises:
        EdgetuneError: what `make_plan` and `old_plan` raise.
    """
    plan = old_plan(out) if options["resume"] else make_plan(load_bundle(bundle), **rows, **wishes)
    plan, options["one_slice"] = sliced(plan, slice_s, grace_s), options["one_slice"] or slice_s is not None
    job = {"verb": VERB, "plan": plan.to_dict(), "bundle": bundle, "out": out, **rows, **options}
    text = json.dumps(job, default=str)
    sys.stdout.flush()
    sys.stderr.flush()
    supervised = supervise or options["enforce"] == "cgroup"
    words = ["edgetune.cli.supervisor" if supervised else "edgetune.cli.personalizing", text]
    os.execve(sys.executable, [sys.executable, "-m", *words], {**host.THREAD_SETTINGS, **os.environ})


def run_job(job: dict[str, Any]) -> int:
    """Run the arguments of `run_plan`, show the run, and return the exit code."""
    as_json, _ = job.pop("as_json"), job.pop("verb")
    try:
        with show_progress() as show:
            run = run_plan(Plan.from_dict(job.pop("plan")), **job, on_progress=show)
    except EdgetuneError as error:
        fail(error, as_json)
        return 1
    answer(run.summary, outcome(run, job["bundle"]), as_json)
    return exit_code(run.summary)


def outcome(run: Run, bundle: str) -> str:
    """A run's end for people: what came out, what it took, and whether the bundle uses it."""
    summary = run.summary
    before, after, active = summary["active_loss"], summary["eval_loss"], summary["active_adapter"]
    lines = [
        f"{run.folder}: {summary['steps']} of {summary['max_steps']} steps, stopped: {summary['stopped']}",
        f"  peak memory  {format_mib(summary['measured_peak_bytes'])} measured, budget "
        f"{format_mib(summary['budget_bytes'])} ({summary['budget_name']}), held by {summary['enforcement']}",
        f"  loss         {_number(after)} on held-out rows, {_number(before)} with {active or 'the base alone'}",
        f"  speed        {_number(summary['tokens_per_second'])} tokens/s",
    ]
    if summary["stopped"] == "nonfinite":
        lines.append("Loss or gradients were not finite too often. Lower --learning-rate and train anew.")
    elif summary["stopped"] != "done":
        lines.append(f"Go on with: edgetune personalize {bundle} --data FILE --out {run.folder} --resume")
    elif summary["adopted"] is None:
        lines.append(f"{bundle} is as it was: the new adapter is no better. --accept-worse --resume takes it anyway.")
    else:
        back = f"default {bundle} {active}" if active else f"remove {bundle} {summary['adopted']}"
        lines.append(f"{bundle} uses it as {summary['adopted']}. As before: edgetune adapter {back}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.4g}"


if __name__ == "__main__":
    try:
        sys.exit(run_job(json.loads(sys.argv[1])))
    except KeyboardInterrupt:
        tell("stopped before the first step; nothing was written")
        sys.exit(130)
