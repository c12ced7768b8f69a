"""Rows beside those of the task, against forgetting: some that are learned too, and texts that hold it to the base.

    retention_data   rows that the model should stay good at, `retention_share` of every step's windows; a tenth of
                     their lines is held out, and their loss is told beside the task's
    kl_data          texts that nobody labelled: a micro-batch of them in each step, whose divergence from the base is
                     added to the loss, `kl_weight` times (`objectives.kl`)

Files and settings go together: a plan has the setting, a run needs the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune.data import Rows, Window, split_eval
from edgetune.errors import ConfigError, DataError
from edgetune.objectives import check_kind, kl

HELD_OUT = 0.1  # of the retention rows
FILE_OF = {"retention_share": "retention_data", "kl_weight": "kl_data"}
DEFAULTS = {"retention_share": 0.25, "kl_weight": 1.0}  # where there is the file alone
NOTHING = Rows((), "text", "", 0)


@dataclass(frozen=True)
class Parts:
    """The rows of both files, and their hashes."""

    retention: Rows = NOTHING
    retention_eval: Rows = NOTHING
    anchors: Rows = NOTHING

    @property
    def sha256(self) -> dict[str, str | None]:
        return {"retention_data_sha256": self.retention.sha256 or None, "kl_data_sha256": self.anchors.sha256 or None}


@dataclass(frozen=True)
class Beside:
    """The files."""

    retention_data: Path | None = None
    kl_data: Path | None = None

    @classmethod
    def of(cls, retention_data: str | Path | None, kl_data: str | Path | None) -> Beside:
        """Of a user's paths."""
        return cls(*(None if path is None else Path(path) for path in (retention_data, kl_data)))

    @property
    def paths(self) -> dict[str, Path | None]:
        return {"retention_data": self.retention_data, "kl_data": self.kl_data}

    def completed(self, config: Any) -> Any:
        """The TrainConfig with the default of each setting whose file is there."""
        missing = {name: DEFAULTS[name] for name, file in FILE_OF.items() if self.paths[file] is not None}
        return replace(config, **{name: value for name, value in missing.items() if getattr(config, name) is None})

    def check(self, settings: Any) -> None:
        """Raises ConfigError where a plan or config has a setting without its file, or a file has no setting."""
        for name, file in FILE_OF.items():
            value, path = getattr(settings, name), self.paths[file]
            flag = "--" + file.replace("_", "-")
            if value is not None and path is None:
                raise ConfigError(
                    f"{name} = {value:g} goes with rows, and there are none. Give {flag}, or leave it out."
                )
            if value is None and path is not None:
                raise ConfigError(f"{file} = {path}, and the plan has no {name}. Plan again with {flag}.")

    def read(self, objective: str, read: Callable[[Path], Rows], seed: int) -> Parts:
        """The rows, as `read` makes them of a file.

        Raises:
            DataError: they cannot be used, or are of a kind that is not learned.
        """
        retention = held_out = anchors = NOTHING
        if self.retention_data is not None:
            rows = read(self.retention_data)
            check_kind(objective, rows.kind, self.retention_data)
            retention, held_out = split_eval(rows, HELD_OUT, seed)
        if self.kl_data is not None:
            anchors = read(self.kl_data)
            if anchors.kind not in kl.KINDS:
                raise DataError(
                    f"{self.kl_data} has {anchors.kind} rows; kl_data are {' or '.join(kl.KINDS)} rows, of which "
                    'nothing is learned. Write {"text": "…"}, or give these to --retention-data.'
                )
        return Parts(retention, held_out, anchors)


NONE = Beside()


def one_length(parts: Sequence[Sequence[Window]]) -> list[list[Window]]:
    """The windows of each part, all as long as the longest of any: so they share micro-batches and buffers."""
    most = max((window.length for part in parts for window in part), default=0)
    return [[replace(window, length=most) for window in part] for part in parts]
