"""What a run minimizes: one file per objective.

An objective is a module with `NAME`, `KINDS`, `SETTINGS` and a class `Objective`: see `base`. It starts at the
normalized hidden states and ends at the gradient of them, so that how logits are made, in tiles or at all, is its own
affair. torch is imported inside functions only: the planner reads the sizes of the tiles where there is no torch.

An objective with a trained head of its own (`score`) starts at that head's outputs; `has_head` tells which do.

One of an encoder starts at its outputs: logits, values or pooled hidden states. It has `NAME`, `SETTINGS`, `METRIC`,
`POOLED` (whether a text has one output or each token its own), `HAS_HEAD` (whether a trained linear layer makes them),
`count` and `found`, and stands in `ENCODER_OBJECTIVES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetune.data import Rows
from edgetune.data.labeled import with_targets
from edgetune.data.teacher import with_teacher
from edgetune.errors import DataError
from edgetune.objectives import (
    classification,
    distill,
    dpo,
    embedding,
    kto,
    orpo,
    regression,
    reward,
    sft,
    token_classification,
)
from edgetune.objectives.base import Objective
from edgetune.objectives.score import ScoreObjective

OBJECTIVES = {
    "sft": sft, "dpo": dpo, "orpo": orpo, "kto": kto, "distill": distill,
    "classification": classification, "regression": regression, "reward": reward,
}  # fmt: skip
ENCODER_OBJECTIVES = {
    "classification": classification, "regression": regression, "token-classification": token_classification,
    "embedding": embedding,
}  # fmt: skip

__all__ = ["ENCODER_OBJECTIVES", "OBJECTIVES", "Objective", "check_kind", "has_head", "objective_of", "with_needed"]


def has_head(objective: str) -> bool:
    """Whether a decoder learns it with a head of its own, in the place of that over the vocabulary."""
    return objective in OBJECTIVES and issubclass(OBJECTIVES[objective].Objective, ScoreObjective)


def objective_of(settings: Any) -> Objective:
    """The objective that a plan names, with that plan's settings."""
    module = OBJECTIVES[settings.objective]
    made: Objective = module.Objective(**{name: getattr(settings, name) for name in module.SETTINGS})
    return made


def with_needed(objective: str, rows: Rows, path: str | Path, vocab_size: int) -> Rows:
    """The rows of a file with all that an objective learns from.

    Raises:
        DataError: they are of another kind, or there is no record of a teacher where one is needed.
    """
    check_kind(objective, rows.kind, path)
    if has_head(objective):
        return with_targets(rows)
    needs_teacher = OBJECTIVES[objective].Objective.needs_teacher
    return with_teacher(rows, path, vocab_size) if needs_teacher else rows


def check_kind(objective: str, kind: str, path: str | Path) -> None:
    """Raises DataError for rows that an objective does not learn from."""
    if kind in OBJECTIVES[objective].KINDS:
        return
    others = [name for name, module in OBJECTIVES.items() if kind in module.KINDS]
    raise DataError(
        f"{path} has {kind} rows; --objective {objective} learns from {', '.join(OBJECTIVES[objective].KINDS)} rows. "
        + (f"For these it is --objective {' or '.join(others)}." if others else "Write rows of such a kind.")
    )
