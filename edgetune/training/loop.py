"""A run from its plan to its adapter: step, evaluate, checkpoint, stop in good order, go on to the bit.

Everything random is a function of (seed, step): the first adapter, the order of the windows, dropout. So a checkpoint
is the adapter, what the step rule keeps and a few numbers, and a resumed run ends with the same bytes as one that was
never stopped. Between any two blocks the run may stop, for a signal or at the budget; it then stands at its last
completed step. Steps whose loss or gradient is not finite change nothing and are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgetune.errors import ConfigError, ModelError
from edgetune.models.encoder_config import EncoderConfig
from edgetune.planner.beside import NONE, Beside
from edgetune.planner.plans import Plan
from edgetune.quantizer import read_manifest
from edgetune.training import features
from edgetune.training.conduct import check_enforcement, conduct_run
from edgetune.training.crew import using
from edgetune.training.encoder_trainer import EncoderTrainer
from edgetune.training.inputs import Inputs, read_inputs
from edgetune.training.progress import Progress
from edgetune.training.run import FEATURES, REFERENCE, Run
from edgetune.training.torch_trainer import TorchTrainer
from edgetune.weights import sha256_file

__all__ = ["Run", "train"]

ENGINE = "torch"
WEIGHTS = "model.safetensors"


def train(
    plan: Plan,
    base: str | Path,
    *,
    data: str | Path,
    out: str | Path,
    eval_data: str | Path | None = None,
    retention_data: str | Path | None = None,
    kl_data: str | Path | None = None,
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
        retention_data: rows to stay good at, of which the plan says their share.
        kl_data: texts on which the base holds the model, as hard as the plan says.
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
    check_enforcement(enforce)
    base, folder = Path(base), Path(out)

    def clean_up(stopped: str) -> None:
        if stopped not in ("done", "nonfinite", "failed"):
            return  # the run may go on
        features.remove(folder / REFERENCE)
        if not keep_cache:
            features.remove(folder / FEATURES)

    def read() -> Inputs:
        beside = Beside.of(retention_data, kl_data)
        return checked_inputs(plan, base, Path(data), None if eval_data is None else Path(eval_data), skip_bad, beside)

    trainer = EncoderTrainer if isinstance(plan.model_config, EncoderConfig) else TorchTrainer
    with using(plan.threads):
        return conduct_run(
            plan, folder, read, trainer, resume=resume, force=force, enforce=enforce, emulate=emulate,
            one_slice=one_slice, clean_up=clean_up, on_progress=on_progress,
        )  # fmt: skip


def checked_inputs(
    plan: Plan, base: Path, data: Path, eval_data: Path | None, skip_bad: bool, beside: Beside = NONE
) -> Inputs:
    """Check everything before the model is loaded: base and plan, all rows of all files."""
    if plan.engine != ENGINE:
        raise ConfigError(f"the plan is for the {plan.engine} engine; this is the {ENGINE} engine. Plan again for it.")
    manifest = read_manifest(base)
    if manifest["grid"] != plan.grid:
        raise ConfigError(
            f"{base} is on the {manifest['grid']} grid; the plan is for {plan.grid}. Quantize or plan again."
        )
    if sha256_file(base / WEIGHTS) != manifest["base_sha256"]:
        raise ModelError(f"{base / WEIGHTS} is not what its manifest names. Run `edgetune quantize` again.")
    return read_inputs(plan, base, manifest["base_sha256"], data, eval_data, skip_bad, beside)
