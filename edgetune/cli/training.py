"""What `edgetune train` does once the plan is made: run it, show it, and end with the right code.

It runs in a process of its own (`launch.start`): the parser and what it imports would add about 10 MiB to a peak that
counts against a device's budget.
"""

from __future__ import annotations

from typing import Any

from edgetune.adapters import METHODS
from edgetune.cli.console import answer, exit_code, fail
from edgetune.errors import EdgetuneError
from edgetune.memory import format_mib
from edgetune.planner.plans import Plan
from edgetune.training.loop import Run, train
from edgetune.training.progress import show_progress


def outcome(run: Run) -> str:
    """A run's end for people: what came out, what it took, and how to go on with what is not done."""
    summary = run.summary
    loss, held_out, speed = (summary[key] for key in ("train_loss", "eval_loss", "tokens_per_second"))
    lines = [
        f"{run.folder}: {summary['steps']} of {summary['max_steps']} steps, stopped: {summary['stopped']}",
        f"  peak memory  {format_mib(summary['measured_peak_bytes'])} measured, "
        f"{format_mib(summary['predicted_peak_bytes'])} predicted, budget {format_mib(summary['budget_bytes'])} "
        f"({summary['budget_name']}), held by {summary['enforcement']}",
        f"  loss         {_number(loss)} on the rows of the last steps, {_number(held_out)} on held-out rows",
        f"  speed        {_number(speed)} tokens/s, "
        + (f"emulating {summary['device']}" if summary["emulated"] else "on this machine"),
        f"  adapter      {summary['trainable_parameters']:,} parameters, {format_mib(summary['adapter_bytes'])}",
    ]
    if summary["retention_loss_before"] is not None:
        before, after = (_number(summary[key]) for key in ("retention_loss_before", "retention_loss"))
        lines.insert(3, f"  retention    loss {before} before, {after} after, on held-out retention rows")
    if summary["late_steps"]:
        lines.append(
            f"  NOT held     {summary['late_steps']} steps took this machine longer than {summary['device']} would"
        )
    if summary["stopped"] == "nonfinite":
        lines.append("Loss or gradients were not finite too often. Lower --learning-rate and train anew.")
    elif summary["stopped"] != "done":
        flags = " --emulate" * summary["emulated"] + " --one-slice" * (summary["stopped"] == "slice")
        lines.append(f"Go on with: edgetune train --resume {run.folder}{flags}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.4g}"


def run_job(job: dict[str, Any]) -> int:
    """Run the arguments of `train`, show the run, and return the exit code."""
    as_json = job.pop("as_json")
    try:
        with show_progress() as show:
            plan = Plan.from_dict(job.pop("plan"))
            run = train(plan, job.pop("base"), **job, on_progress=show)
    except EdgetuneError as error:
        fail(error, as_json)
        return 1
    merge = ["--merge"] * METHODS[plan.adapter.method].CAPABILITIES.only_merges
    following = ("export", str(run.folder), *merge, "--out", "bundle/") if run.summary["stopped"] == "done" else ()
    answer(run.summary, outcome(run), as_json, following=following)
    return exit_code(run.summary)
