"""How any engine's run is conducted: its folder, its budget and who holds it, its pace, its end in good order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgetune.cgroup import KERNEL_BYTES, Cgroup, holding_cgroup
from edgetune.checkpoint import latest_checkpoint
from edgetune.errors import ConfigError
from edgetune.memory import Meter, give_back, has_data_limit, trim_allocator
from edgetune.planner.plans import Plan
from edgetune.products import UNTOUCHED
from edgetune.training.inputs import Inputs, check_identity
from edgetune.training.pace import Pace, pinned
from edgetune.training.progress import Progress
from edgetune.training.run import CHECKPOINTS, SUMMARY, Run, open_run
from edgetune.training.stop import DataLimit, Guard
from edgetune.training.trainer import Trainer

ENFORCEMENTS = ("none", "governor", "rlimit", "cgroup")


def check_enforcement(enforce: str) -> None:
    """Raises ConfigError for what nothing enforces."""
    if enforce not in ENFORCEMENTS:
        raise ConfigError(f"enforce = {enforce!r}; choose from {', '.join(ENFORCEMENTS)}.")


def conduct_run(
    plan: Plan,
    folder: Path,
    read: Callable[[], Inputs],
    trainer_of: type[Trainer],
    *,
    resume: bool,
    force: bool,
    enforce: str,
    emulate: bool = False,
    one_slice: bool,
    clean_up: Callable[[str], None] = lambda stopped: None,
    on_progress: Callable[[Progress], None] | None,
) -> Run:
    """Train what `read` gives and write a run folder; see `loop.train` for the arguments, and what is raised.

    `clean_up` is told how the run stopped, before its end is written; "failed" where it raises.
    """
    check_enforcement(enforce)
    pace = Pace(plan, emulate=emulate, one_slice=one_slice)
    group = holding_cgroup(plan.budget_bytes) if enforce == "cgroup" else None
    # The kernel would kill a little earlier: it counts what it needs itself. The plan left room for that.
    most_bytes = plan.budget_bytes - (min(KERNEL_BYTES, plan.reserve_bytes) if group else 0)
    trim_allocator()
    with (
        pinned(plan.threads) if emulate else contextlib.nullcontext(),
        Meter(most_bytes, near_bytes=most_bytes - plan.reserve_bytes // 2) as meter,
        Guard(meter, hold_budget=enforce != "none") as guard,
        open_run(folder, resume=resume, force=force),
    ):
        checkpoint, notes = latest_checkpoint(folder / CHECKPOINTS)
        inputs = read()
        give_back()  # what the tokenizer took
        if checkpoint is not None:
            check_identity(checkpoint, inputs.identity)
            if (folder / SUMMARY).exists() and Run(folder).stopped == "done":
                return Run(folder)
        # In a cgroup too: an allocation that fails leaves a run in good order, and the kernel's kill does not.
        limited = enforce in ("rlimit", "cgroup") and has_data_limit()
        limit = DataLimit(most_bytes + _untouched_bytes(plan)) if limited else contextlib.nullcontext()
        trainer = trainer_of(inputs, folder, guard, limit, pace, on_progress)
        if group:  # pages on their way from disk count there, and cannot be dropped
            trainer.read_on_demand()
        if enforce == "rlimit" and not limited:
            notes.append(
                "This system has no RLIMIT_DATA that counts private memory: the governor alone holds the budget."
            )
        for note in notes:
            trainer.tell(note)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        else:
            trainer.initialize()
        before, stopped = trainer.done, "failed"
        try:
            stopped = trainer.run()
        finally:
            clean_up(stopped)
        trainer.finish(stopped, _enforcement(enforce, limit, group, plan.budget_bytes))
        if stopped == "slice" and trainer.done == before and not trainer.filled:
            raise ConfigError(
                f"nothing of {folder} gets done in a slice of {plan.device}, {plan.slice_seconds} s: no step, or no "
                f"evaluation. It stands at step {trainer.done[0]}. Go on without --one-slice, or train anew with "
                "shorter steps (--batch-size, --gradient-accumulation-steps, --max-seq-length) or fewer held-out rows."
            )
    return Run(folder)


def _untouched_bytes(plan: Plan) -> int:
    """Address space that a data limit counts, and that the code of fast products reserves and never touches."""
    return int(UNTOUCHED * plan.parts.get("kernels", 0)) if plan.fast_products else 0


def _enforcement(enforce: str, limit: object, group: Cgroup | None, budget_bytes: int) -> dict[str, Any]:
    """What the certificate says of the level that held: the one that was asked for, or the governor alone."""
    held = {"rlimit": isinstance(limit, DataLimit) and limit.holds, "cgroup": group and group.holds(budget_bytes)}
    known = group if held["cgroup"] else None
    return {
        "enforcement": enforce if held.get(enforce, True) else "governor",
        "cgroup_peak_bytes": known and known.peak_bytes,  # with pages of files, which the measured peak does not count
        "cgroup_oom_kills": known and known.oom_kills,
    }
