"""A run folder: who may write it, what is in it, and what is read from it later.

    run/  adapter_config.json  adapter_model.safetensors  plan.json  metrics.jsonl  summary.json  checkpoints/
          features/ while the run goes on, where its plan has a feature cache
          reference/ likewise, where its objective compares with the base

`summary.json` is written last, whenever a run ends in order: it is the certificate, and its `stopped` says how the run
ended. A folder without one belongs to a run that goes on, or was killed and can be resumed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from edgetune.adapters.base import CONFIG, MODEL
from edgetune.checkpoint import PLAN, check_run_folder, lock_run
from edgetune.errors import ConfigError
from edgetune.weights import write_atomic

FORMAT_VERSION = 1
METRICS, SUMMARY, CHECKPOINTS = "metrics.jsonl", "summary.json", "checkpoints"
FEATURES, REFERENCE = "features", "reference"
TRAIN_LOSS_STEPS = 10  # the summary's train_loss is the mean of so many last steps


@dataclass(frozen=True)
class Run:
    """A folder that `train` wrote and whose run has ended, in whatever way."""

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """The certificate: the plan's figures, the measured ones, hashes, and how the run ended."""
        values: dict[str, Any] = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        return values

    @property
    def stopped(self) -> str:
        """One of done, budget, signal, slice, nonfinite."""
        return str(self.summary["stopped"])


@contextlib.contextmanager
def open_run(folder: Path, *, resume: bool, force: bool) -> Iterator[None]:
    """Hold the lock of a run folder that may be written; a folder made for nothing is removed again.

    Raises as `check_run_folder`, ConfigError also where it cannot be made, CheckpointError where another process holds
    it.
    """
    check_run_folder(folder, resume=resume, force=force)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}. Choose another --out.") from error
    try:
        with lock_run(folder):
            if force and not resume:
                _clear(folder)
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it is not empty: something was written
                folder.rmdir()


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    for name in (SUMMARY, PLAN, METRICS, CONFIG, MODEL):
        (folder / name).unlink(missing_ok=True)
    for name in (CHECKPOINTS, FEATURES, REFERENCE):
        shutil.rmtree(folder / name, ignore_errors=True)


def memory_file_system(folder: Path) -> str | None:
    """The kind of file system that the folder lies on, where its files take memory; None on a disk."""
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind if kind in ("tmpfs", "ramfs") else None


def on_disk(folder: Path) -> Path:
    """The folder, where files in it take no memory.

    Raises:
        ConfigError: it lies on a file system in memory.
    """
    kind = memory_file_system(folder)
    if kind is not None:
        raise ConfigError(
            f"{folder} lies on {kind}, whose files are memory, so activation_offloading saves none there. "
            "Choose an --out on a disk, or give the run more --budget."
        )
    return folder


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomic(path, json.dumps(values, indent=1) + "\n")


class Metrics:
    """`metrics.jsonl`: one line per step and per evaluation, after a first line with the format's version."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, step: int, evaluated_step: int) -> None:
        """Keep the lines up to these: what a killed run wrote after its last checkpoint is computed again."""
        kept = [line for line in self.lines() if line["step"] <= (evaluated_step if "eval_loss" in line else step)]
        head = {"format_version": FORMAT_VERSION}
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in (head, *kept)))

    def append(self, **values: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """All lines but the first; a last one that was cut is left out."""
        found = []
        with contextlib.suppress(FileNotFoundError), self.path.open(encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return [line for line in found if "step" in line]

    def figures(self, *, emulated: bool) -> dict[str, float | int | None]:
        """train_loss, and over the steps that were or were not emulated:

        measured_step_seconds (their median), tokens_per_second at that, and late_steps, those that were to be emulated
        and took this machine longer than the device. None where there is no such step.
        """
        steps = [line for line in self.lines() if "seconds" in line]
        losses = [line["loss"] for line in steps if line["loss"] is not None][-TRAIN_LOSS_STEPS:]
        alike = [line for line in steps if ("idle_seconds" in line) == emulated]
        seconds = statistics.median(line["seconds"] for line in alike) if alike else None
        return {
            "train_loss": statistics.fmean(losses) if losses else None,
            "tokens_per_second": statistics.mean(line["tokens"] for line in alike) / seconds if seconds else None,
            "measured_step_seconds": seconds,
            "late_steps": sum(line["idle_seconds"] == 0 for line in alike) if emulated else 0,
        }
