"""What goes into a run: rows as windows, and all that decides its result, which a run that goes on is held to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.checkpoint import Checkpoint
from edgetune.data import Rows, Window, pack, read_rows, split_eval
from edgetune.data.labeled import KIND_OF, LabeledRow, labeled, read_labeled_rows
from edgetune.data.teacher import teacher_path
from edgetune.errors import CheckpointError, ConfigError, DataError
from edgetune.models.encoder_config import EncoderConfig
from edgetune.objectives import OBJECTIVES, with_needed
from edgetune.planner.beside import NONE, Beside, one_length
from edgetune.planner.plans import Plan
from edgetune.tokenizer import load_tokenizer
from edgetune.weights import sha256_file

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


@dataclass(frozen=True)
class Inputs:
    """What goes into a run: its plan with the number of steps, the rows as windows, and all that decides its result."""

    plan: Plan
    base: Path
    data: Path
    eval_data: Path | None
    windows: Sequence[Window]
    eval_windows: Sequence[Window]
    identity: dict[str, Any]
    rows: Sequence[LabeledRow] = ()
    """Those of an encoder, in place of windows."""
    eval_rows: Sequence[LabeledRow] = ()
    beside: Beside = NONE
    retention: Sequence[Window] = ()
    """Mixed into every step's windows."""
    retention_eval: Sequence[Window] = ()
    anchors: Sequence[Window] = ()
    """Texts on which the base holds the adapted model."""

    @property
    def paths(self) -> dict[str, str | None]:
        """Where everything was read, for whoever goes on with the run or exports it."""
        named = {"base": self.base, "data": self.data, "eval_data": self.eval_data, **self.beside.paths}
        return {name: None if path is None else str(path.absolute()) for name, path in named.items()}

    @property
    def learned(self) -> Sequence[Window]:
        """The windows of a step's own micro-batches."""
        return (*self.windows, *self.retention)

    @property
    def every(self) -> Sequence[Window]:
        """Whatever the model is given."""
        return (*self.learned, *self.eval_windows, *self.retention_eval, *self.anchors)


def read_inputs(
    plan: Plan, base: Path, base_sha256: str, data: Path, eval_data: Path | None, skip_bad: bool,
    beside: Beside = NONE,
) -> Inputs:  # fmt: skip
    """Check all rows of all files and cut them to windows; `base` is the folder with the tokenizer.

    Raises:
        ConfigError: the plan has a setting of a file that is not there, or there is the file and not the setting.
        DataError: rows cannot be used, or the plan's objective does not learn from such rows.
        ModelError: there is no tokenizer.
    """
    beside.check(plan)
    tokenizer = load_tokenizer(base)
    is_text = isinstance(plan.model_config, EncoderConfig)
    virtual = plan.adapter.virtual_tokens

    def read(path: Path) -> Rows:
        length = plan.max_seq_length - virtual
        if plan.objective in KIND_OF:
            return read_labeled_rows(
                path, tokenizer, length, plan.objective, classes=plan.classes or None, skip_bad=skip_bad
            )
        rows = read_rows(path, tokenizer, length, skip_bad=skip_bad)
        plan.adapter.check_rows(rows.kind, path)
        return rows

    def learned(path: Path) -> Rows:
        rows = read(path)
        return rows if is_text else with_needed(plan.objective, rows, path, plan.model_config.vocab_size)

    rows = learned(data)
    identity: dict[str, Any] = {
        "base_sha256": base_sha256,
        "tokenizer_sha256": sha256_file(base / "tokenizer.json"),
        "data_sha256": rows.sha256,
        "eval_data_sha256": None,
    }
    if eval_data is None:
        rows, held_out = split_eval(rows, plan.eval_fraction, plan.seed)
    else:
        held_out = learned(eval_data)
        identity["eval_data_sha256"] = held_out.sha256
    if not is_text and OBJECTIVES[plan.objective].Objective.needs_teacher:
        for name, path in (("teacher", data), ("eval_teacher", eval_data)):
            identity[f"{name}_sha256"] = None if path is None else sha256_file(teacher_path(path))
    if not is_text and not rows.num_supervised:
        raise DataError(f"{data} has no token to learn from. Add completions that are not empty.")
    if plan.early_stopping_patience is not None and not (len(held_out) if is_text else held_out.num_supervised):
        raise ConfigError(
            f"early_stopping_patience = {plan.early_stopping_patience} goes by held-out rows, and there are none. Give "
            "--eval-data or an eval_fraction above 0, or leave it out."
        )
    others = beside.read(plan.objective, read, plan.seed)
    parts = (held_out, others.retention_eval, rows, others.retention, others.anchors)
    eval_windows, retention_eval, *seen = (
        [] if is_text else pack(each, plan.max_seq_length, each.together, virtual) for each in parts
    )
    windows, retention, anchors = one_length(seen)
    identity |= others.sha256
    plan = plan.with_steps(len(rows) if is_text else len(windows))
    values = json.loads(json.dumps(plan.to_dict()))  # as it comes back from a checkpoint: lists, no tuples
    identity["plan"] = {name: value for name, value in values.items() if name not in _CHANGES_NO_RESULT}
    texts = (labeled(rows), labeled(held_out)) if is_text else ((), ())
    return Inputs(
        plan, base, data, eval_data, windows, eval_windows, identity, *texts, beside, retention, retention_eval, anchors
    )


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any]) -> None:
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
