"""A run from its plan to its adapter: step, evaluate, checkpoint, stop in good order, go on to the bit.

Everything random is a function of (seed, step): the first adapter, the order of the windows, dropout. So a checkpoint
is the adapter, what the step rule keeps and a few numbers, and a resumed run ends with the same bytes as one that was
never stopped. Between any two blocks the run may stop, for a signal or at the budget; it then stands at its last
completed step. Steps whose loss or gradient is not finite change nothing and are counted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgetune.cgroup import KERNEL_BYTES, Cgroup, holding_cgroup
from edgetune.checkpoint import Checkpoint, latest_checkpoint
from edgetune.data import pack, read_rows, split_eval
from edgetune.errors import CheckpointError, ConfigError, DataError, ModelError
from edgetune.memory import Meter, give_back, has_data_limit, trim_allocator
from edgetune.planner.plans import Plan
from edgetune.quantizer import read_manifest
from edgetune.tokenizer import load_tokenizer
from edgetune.training import features
from edgetune.training.crew import using
from edgetune.training.pace import Pace, pinned
from edgetune.training.progress import Progress
from edgetune.training.run import CHECKPOINTS, FEATURES, SUMMARY, Run, open_run
from edgetune.training.stop import DataLimit, Guard
from edgetune.training.trainer import Inputs, Trainer
from edgetune.weights import sha256_file

__all__ = ["Run", "train"]

ENGINE = "torch"
WEIGHTS = "model.safetensors"
ENFORCEMENTS = ("none", "governor", "rlimit", "cgroup")
# Fields of a plan that may differ when a run goes on. They say where it runs and what that costs; recomputation and
# the feature cache change no bit; the ratios are in the steps that follow from them.
_CHANGES_NO_RESULT = frozenset(
    {
        "format_version", "edgetune_version", "device", "model", "simulated", "budget_name", "budget_bytes",
        "device_budget_bytes", "reserve_bytes",
        "floor_bytes", "parts", "peak_moment", "predicted_peak_bytes", "file_backed_bytes", "fits", "concessions",
        "recompute_layers", "activation_offloading", "dequantized_layers", "feature_cache_bytes", "num_epochs",
        "warmup_ratio",
        "predicted_step_seconds", "predicted_run_seconds", "predicted_energy_mwh", "fits_training_window",
        "slice_seconds", "grace_seconds", "num_slices",
    }
)  # fmt: skip


def train(
    plan: Plan,
    base: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    eval_data: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    enforce: str = "governor",
    emulate: bool = False,
    one_slice: bool = False,
    keep_cache: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    skip_bad: bool = False,
) -> Run:
    """Train the adapter that a plan describes and write a run folder.

    Args:
        plan: every number of the run.
        base: the base/ folder on the plan's grid.
        data: rows to learn from, JSON Lines.
        out: the run folder.
        eval_data: rows to evaluate on; None takes the plan's `eval_fraction` of the data.
        resume: go on where the folder's last checkpoint stands; a run that is done is returned at once.
        force: replace what an earlier run left in the folder.
        enforce: "governor" recomputes more where the budget is near and stops at the budget; "rlimit" also lets
            allocations beyond it fail; "cgroup" does that too, and asks for a process that a cgroup of that size has
            held since it started, as `edgetune train` starts one; "none" only measures.
        emulate: take as long as the plan's device would, on as many cores; where this machine is slower it says so.
        one_slice: stop at the end of the device's longest uninterrupted run; `resume` goes on with the next one.
        keep_cache: leave the feature cache, where the plan has one, in the folder at the end.
        on_progress: called after every step.
        skip_bad: leave bad rows out, up to 1 %.

    Returns:
        The run; `summary["stopped"]` is done, budget, signal, slice or nonfinite. In each case the folder holds an
        adapter.

    Raises:
        ConfigError: the folder exists, plan and base do not go together, no step ends inside a slice, or no cgroup
            holds this process.
        DataError: rows cannot be used.
        ModelError: the base is missing or damaged.
        CheckpointError: the folder is in use, a checkpoint cannot be written, or what is resumed differs from the
            arguments.
    """
    if enforce not in ENFORCEMENTS:
        raise ConfigError(f"enforce = {enforce!r}; choose from {', '.join(ENFORCEMENTS)}.")
    base, folder = Path(base), Path(out)
    pace = Pace(plan, emulate=emulate, one_slice=one_slice)
    group = holding_cgroup(plan.budget_bytes) if enforce == "cgroup" else None
    # The kernel would kill a little earlier: it counts what it needs itself. The plan left room for that.
    most_bytes = plan.budget_bytes - (min(KERNEL_BYTES, plan.reserve_bytes) if group else 0)
    trim_allocator()
    with (
        pinned(plan.threads) if emulate else contextlib.nullcontext(),
        using(plan.threads),
        Meter(most_bytes, near_bytes=most_bytes - plan.reserve_bytes // 2) as meter,
        Guard(meter, hold_budget=enforce != "none") as guard,
        open_run(folder, resume=resume, force=force),
    ):
        checkpoint, notes = latest_checkpoint(folder / CHECKPOINTS)
        inputs = _read_inputs(plan, base, Path(data), None if eval_data is None else Path(eval_data), skip_bad)
        give_back()  # what the tokenizer took
        if checkpoint is not None:
            _check_identity(checkpoint, inputs.identity)
            if (folder / SUMMARY).exists() and Run(folder).stopped == "done":
                return Run(folder)
        # In a cgroup too: an allocation that fails leaves a run in good order, and the kernel's kill does not.
        limited = enforce in ("rlimit", "cgroup") and has_data_limit()
        limit = DataLimit(most_bytes) if limited else contextlib.nullcontext()
        trainer = Trainer(inputs, folder, guard, limit, pace, on_progress)
        if group:  # pages on their way from disk count there, and cannot be dropped
            trainer.decoder.read_on_demand()
        if enforce == "rlimit" and not limited:
            notes.append(
                "This system has no RLIMIT_DATA that counts private memory: the governor alone holds the budget."
            )
        for note in notes:
            trainer.tell(note)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        before, stopped = trainer.done, "failed"
        try:
            stopped = trainer.run()
        finally:
            if not keep_cache and stopped in ("done", "nonfinite", "failed"):  # else the run may go on
                features.remove(folder / FEATURES)
        trainer.finish(stopped, _enforcement(enforce, limit, group, plan.budget_bytes))
        if stopped == "slice" and trainer.done == before and not trainer.filled:
            raise ConfigError(
                f"nothing of {folder} gets done in a slice of {plan.device}, {plan.slice_seconds} s: no step, or no "
                f"evaluation. It stands at step {trainer.done[0]}. Go on without --one-slice, or train anew with "
                "shorter steps (--batch-size, --gradient-accumulation-steps, --max-seq-length) or fewer held-out rows."
            )
    return Run(folder)


def _enforcement(enforce: str, limit: object, group: Cgroup | None, budget_bytes: int) -> dict[str, Any]:
    """What the certificate says of the level that held: the one that was asked for, or the governor alone."""
    held = {"rlimit": isinstance(limit, DataLimit) and limit.holds, "cgroup": group and group.holds(budget_bytes)}
    known = group if held["cgroup"] else None
    return {
        "enforcement": enforce if held.get(enforce, True) else "governor",
        "cgroup_peak_bytes": known and known.peak_bytes,  # with pages of files, which the measured peak does not count
        "cgroup_oom_kills": known and known.oom_kills,
    }


def _read_inputs(plan: Plan, base: Path, data: Path, eval_data: Path | None, skip_bad: bool) -> Inputs:
    """Check everything before the model is loaded: base and plan, all rows of both files."""
    if plan.engine != ENGINE:
        raise ConfigError(f"the plan is for the {plan.engine} engine; this is the {ENGINE} engine. Plan again for it.")
    manifest = read_manifest(base)
    if manifest["grid"] != plan.grid:
        raise ConfigError(
            f"{base} is on the {manifest['grid']} grid; the plan is for {plan.grid}. Quantize or plan again."
        )
    if sha256_file(base / WEIGHTS) != manifest["base_sha256"]:
        raise ModelError(f"{base / WEIGHTS} is not what its manifest names. Run `edgetune quantize` again.")
    tokenizer = load_tokenizer(base)
    rows = read_rows(data, tokenizer, plan.max_seq_length, skip_bad=skip_bad)
    identity: dict[str, Any] = {
        "base_sha256": manifest["base_sha256"],
        "tokenizer_sha256": sha256_file(base / "tokenizer.json"),
        "data_sha256": rows.sha256,
        "eval_data_sha256": None,
    }
    if eval_data is None:
        rows, held_out = split_eval(rows, plan.eval_fraction, plan.seed)
    else:
        held_out = read_rows(eval_data, tokenizer, plan.max_seq_length, skip_bad=skip_bad)
        identity["eval_data_sha256"] = held_out.sha256
    if not rows.num_supervised:
        raise DataError(f"{data} has no token to learn from. Add completions that are not empty.")
    windows, eval_windows = pack(rows, plan.max_seq_length), pack(held_out, plan.max_seq_length)
    plan = plan.with_steps(len(windows))
    values = json.loads(json.dumps(plan.to_dict()))  # as it comes back from a checkpoint: lists, no tuples
    identity["plan"] = {name: value for name, value in values.items() if name not in _CHANGES_NO_RESULT}
    return Inputs(plan, base, data, eval_data, windows, eval_windows, identity)


def _check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming everything that differs from what the checkpoint was made with."""
    before = checkpoint.state["identity"]
    hashes = [name for name in identity if name != "plan"]
    differs = [name.removesuffix("_sha256") for name in hashes if identity[name] != before.get(name)]
    plan, old = identity["plan"], before["plan"]
    differs += [
        f"{name} ({old.get(name)} before, {plan.get(name)} now)"
        for name in sorted({*plan, *old})
        if plan.get(name) != old.get(name)
    ]
    if differs:
        raise CheckpointError(
            f"{checkpoint.folder.parent.parent} was started with something else: {', '.join(differs)}. "
            "Resume with what it was started with, or train anew with --force."
        )
