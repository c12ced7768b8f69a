"""From what was typed to a process that trains: a new run with its plan and base, or a run to go on with.

A run's peak counts against the device's budget, so the process that trains holds nothing else. A model that is on no
grid yet is quantized in a child; its base lies beside the run, where the next run on it finds it. Then the process of
the command line, with its parser, replaces itself by `python -m edgetune.cli.launch train JOB`: the same process id,
terminal and signals, and the floor that the plan counted. Where the run is supervised, it becomes the supervisor
instead, which starts that same process as its child.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from edgetune import errors, host, planner
from edgetune.adapters.allocation import allocate, table
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.lora import LOFTQ, LoraConfig
from edgetune.base import open_any_base, open_base
from edgetune.checkpoint import PLAN, newest_state
from edgetune.cli.console import tell, tensor_progress
from edgetune.device import load_device
from edgetune.errors import BudgetError, CheckpointError, ConfigError, DeviceError, EdgetuneError, MissingExtraError
from edgetune.hub import model_folder
from edgetune.memory import MIB, format_mib
from edgetune.planner import Plan, TrainConfig
from edgetune.planner.sensitivity import plan_pass
from edgetune.quantizer import quantize


def new_run(
    model: str, device: str, *, data: Path, out: Path, eval_data: Path | None, config: TrainConfig,
    retention_data: Path | None = None, kl_data: Path | None = None, **wishes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Plan, and quantize where the model is not in 4 bits yet. `wishes` are the other ones of `planner.plan`.

    Raises:
        BudgetError, ConfigError, DeviceError, ModelError, DataError: as `plan` and `quantize` raise them.
    """
    others = {"eval_data": eval_data, "retention_data": retention_data, "kl_data": kl_data}
    wishes |= {"data": data, "config": config, **others}
    if budgeted(wishes["adapter"]):
        model, wishes["adapter"] = ranks_for(model, device, out=out, **wishes)
    plan = planner.plan(model, device, **wishes)
    if plan.engine != "torch":
        raise ConfigError(
            f"{model} fits {plan.device} by the {plan.engine} engine alone, which trains a bundle on the device. Next: "
            f"edgetune {shlex.join(way_to_personalize(model))}, then edgetune personalize bundle/ --device "
            f"{plan.device} --data {data} --out {out}. --engine torch says what that engine lacks."
        )
    tell(brief(plan))
    folder = _on_grid(model, plan, out)
    if open_any_base(model_folder(model)).grid is None:
        if isinstance(plan.adapter, LoraConfig) and plan.adapter.init_lora_weights == LOFTQ:
            plan = replace(plan, adapter=replace(plan.adapter, init_from=plan.adapter.init_from or plan.model))
        plan = replace(plan, model=str(folder))
    return {"plan": plan, "base": folder, "data": data, "out": out, **others}


def _on_grid(model: str, plan: Plan, out: Path) -> Path:
    """The folder of a model, quantized for the plan where it is in no 4 bits yet."""
    folder = model_folder(model)
    return folder if open_any_base(folder).grid else _quantized(folder, plan.grid, out.with_name(f"{out.name}-base"))


def budgeted(adapter: AdapterConfig) -> bool:
    """Whether the adapter's ranks follow from a number of bytes."""
    return isinstance(adapter, LoraConfig) and adapter.adapter_budget is not None


def ranks_for(
    model: str, device: str, *, adapter: LoraConfig, out: Path | None = None, **wishes: Any
) -> tuple[str, LoraConfig]:
    """The base, and the adapter with its ranks: a sensitivity pass in a child process, then what the bytes hold.

    Args:
        model: as for `plan`; without `out` it is in 4 bits already.
        device: as for `plan`.
        adapter: it has a budget.
        out: the run folder, beside which a base may be written.
        wishes: the other ones of `planner.plan`.

    Raises:
        BudgetError: the pass does not fit, or the adapter's budget holds nothing.
        ConfigError: settings contradict each other, or the model is in no 4 bits.
    """
    plan = plan_pass(model, device, adapter=adapter, **wishes)
    if out is None and open_any_base(model_folder(model)).grid is None:
        raise ConfigError(
            f"{model} is not in 4 bits yet, and what the frozen weights are on their grid decides the ranks. Next: "
            f"edgetune quantize {model} --grid {plan.grid} --out base/, then plan for base/."
        )
    folder = model_folder(model) if out is None else _on_grid(model, plan, out)
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", "train")
    tell(f"measuring how much the loss asks of each linear, {plan.max_steps} steps")
    paths = {name: None if wishes[name] is None else str(wishes[name]) for name in ("data", "eval_data")}
    job = {"plan": plan.to_dict(), "base": str(folder), **paths, "skip_bad": wishes["skip_bad"]}
    job["work"] = None if out is None else str(out.absolute().parent)
    directions = _child("measure", json.dumps(job))["directions"]
    made = allocate(adapter, plan.model_config, directions)
    tell(table(made, plan.model_config, directions))
    return str(folder), made


def way_to_personalize(model: str) -> list[str]:
    """The words that come next where the device trains itself: its graphs need an int4 base."""
    if open_base(model_folder(model)).grid is None:
        return ["quantize", model, "--grid", "int4", "--out", "base/"]
    return ["export", model, "--with-training", "--out", "bundle/"]


def old_run(
    run: Path, *, data: Path | None, eval_data: Path | None, retention_data: Path | None = None,
    kl_data: Path | None = None, base: Path | None = None, budget: str | int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A run's plan, base and rows, from its own files; a base or rows that were moved since can be named again.

    That they are the same is checked by their hashes, when the run goes on.

    `budget` replaces the plan's, where the run still fits it.

    Raises:
        BudgetError: it does not fit.
        CheckpointError: the folder is no run, has no checkpoint, or its base is gone.
    """
    path = run / PLAN
    if not path.is_file():
        what = f"holds no {PLAN}, so it is no run" if run.is_dir() else "is no folder"
        raise CheckpointError(
            f"{run} {what}: there is nothing to resume. Give the folder that --out named, or train anew without "
            "--resume."
        )
    try:
        plan = Plan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError) as error:  # the last two: not an object
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path} cannot be read as the plan of a run: {reason}. Train anew with --force, or choose another --out."
        ) from error
    state = newest_state(run / "checkpoints")
    if state is None:
        raise CheckpointError(f"{run} has no checkpoint that is whole. Train anew with --force.")
    if plan.max_steps is not None and state["step"] >= plan.max_steps:
        tell(f"all {plan.max_steps:,} steps of {run} were trained already; more take a new run, with --max-steps")
    known = state["paths"]
    if base is not None:
        plan = replace(plan, model=str(base))
    elif not Path(known["base"]).is_dir():
        raise CheckpointError(
            f"{run} was trained on {known['base']}, which is not there. Say with --base where that base is now."
        )
    if budget is not None:
        name, size = _budget_of(plan, budget)
        if size is None or size < plan.predicted_peak_bytes:
            raise BudgetError(
                f"{run} was planned with a peak of {format_mib(plan.predicted_peak_bytes)}, which --budget {budget} "
                "does not hold. Give more, or plan and train anew."
            )
        plan = replace(plan, budget_name=name, budget_bytes=size)
    others = {"eval_data": eval_data, "retention_data": retention_data, "kl_data": kl_data}
    return {
        "plan": plan, "base": base or Path(known["base"]), "data": data or Path(known["data"]), "out": run,
        **{name: given or (None if known.get(name) is None else Path(known[name])) for name, given in others.items()},
    }  # fmt: skip


def _budget_of(plan: Plan, budget: str | int) -> tuple[str, int | None]:
    """As `planner.read_budget`; a run planned for a profile of the user's own, which has no id, takes MiB alone."""
    try:
        return planner.read_budget(budget, load_device(plan.device))
    except DeviceError as error:
        if isinstance(budget, int) and budget > 0:
            return "given", budget * MIB
        raise ConfigError(
            f"--budget {budget} is of a profile, and the run was planned for {plan.device}, which is none of "
            "`edgetune devices`. Give a number of MiB."
        ) from error


def _quantized(model: Path, grid: str, base: Path) -> Path:
    """Quantize `model` into the folder `base` in a child process."""
    if base.exists():
        raise ConfigError(f"{base} exists, and {model} would be quantized into it. Train on it as MODEL, or remove it.")
    tell(f"{model} is not in 4 bits yet: quantizing it into {base} on the {grid} grid")
    _child("quantize", str(model), grid, str(base))
    return base


def _child(verb: str, *words: str) -> dict[str, Any]:
    """What a child process of `main` answers, one JSON object. Raises its error here."""
    command = [sys.executable, "-m", "edgetune.cli.launch", verb, *words]
    environment = {**host.THREAD_SETTINGS, **os.environ}
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    answer: dict[str, Any] = json.loads(child.stdout) if child.stdout.startswith("{") else {}
    if child.returncode == 1 and "error" in answer:
        kind = getattr(errors, answer["error"])
        raise kind.__new__(kind, answer["message"])  # not every class takes its message as its only argument
    if child.returncode:
        raise EdgetuneError(f"`{verb}` ended with code {child.returncode}; what it told stands above.")
    return answer


def start(job: dict[str, Any], *, supervise: bool = False, **options: bool | str) -> NoReturn:
    """Become the process that trains, or its supervisor, as `enforce = "cgroup"` always needs one.

    `job` is what `new_run` or `old_run` returned, `options` are others of `train`.

    Raises:
        MissingExtraError: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("torch", "train")
    names = ("base", "data", "out", "eval_data", "retention_data", "kl_data")
    paths = {name: None if job.get(name) is None else str(job[name]) for name in names}
    text = json.dumps({"plan": job["plan"].to_dict(), **paths, **options})
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**host.THREAD_SETTINGS, **os.environ}
    supervised = supervise or options["enforce"] == "cgroup"
    words = ["edgetune.cli.supervisor", text] if supervised else ["edgetune.cli.launch", "train", text]
    os.execve(sys.executable, [sys.executable, "-m", *words], environment)


def brief(plan: Plan) -> str:
    """A plan in a few lines; `plan.explain()` has the rest."""
    seconds = plan.predicted_run_seconds
    how_long = "" if seconds is None else f", {seconds:,.0f} s for the whole run"
    fits = "for" if plan.exceeds_device else "fits"
    lines = [
        f"{plan.model} {fits} {plan.device}: predicted peak {format_mib(plan.predicted_peak_bytes)} of "
        f"{format_mib(plan.budget_bytes)} ({plan.budget_name} budget)",
        f"  {' '.join(filter(None, (plan.method, plan.adapter.brief)))} on {plan.grid}, steps of {plan.batch_size} x "
        f"{plan.gradient_accumulation_steps} {plan.unit} {plan.max_seq_length} tokens",
        f"  predicted for {plan.device}: {plan.predicted_step_seconds:.3g} s per step{how_long}",
    ]
    if plan.exceeds_device:
        lines.append(
            f"  MORE than the {format_mib(plan.device_budget_bytes)} that {plan.device} allows in the foreground"
        )
    lines += [f"  conceded {c.setting}: {c.wanted} -> {c.given} ({c.reason})" for c in plan.concessions]
    return "\n".join(lines)


def _quantize_here(model: str, grid: str, base: str) -> int:
    """The child: an error of ours leaves as one JSON object on stdout."""
    try:
        with tensor_progress() as show:
            quantize(model, grid, base, on_progress=show)
    except EdgetuneError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return 1
    return 0


def _measure_here(job: str) -> int:
    """The same for what a sensitivity pass measures."""
    from edgetune.training.progress import show_progress
    from edgetune.training.sensitivity import measure_directions

    values = json.loads(job)
    try:
        with show_progress() as show:
            plan, base = Plan.from_dict(values.pop("plan")), values.pop("base")
            directions = measure_directions(plan, base, **values, on_progress=show)
    except EdgetuneError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return 1
    print(json.dumps({"directions": directions}))
    return 0


def _train_here(job: str) -> int:
    from edgetune.cli.training import run_job  # here, so that Ctrl-C while torch is imported is caught below

    return run_job(json.loads(job))


def main(verb: str, *words: str) -> int:
    """`python -m edgetune.cli.launch VERB WORDS`; returns the exit code.

    quantize MODEL GRID FOLDER, or measure JOB or train JOB, which are JSON.
    """
    try:
        if verb == "quantize":
            return _quantize_here(*words)
        return _measure_here(*words) if verb == "measure" else _train_here(*words)
    except KeyboardInterrupt:
        tell("stopped before the first step; nothing was written")
        return 130


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
