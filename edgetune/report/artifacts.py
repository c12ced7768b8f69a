"""What a report is made of: the files that a run, its bundle and a benchmark left, read and nothing computed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.benchmark.results import load_results, results_path
from edgetune.bundle import MANIFEST, read_manifest
from edgetune.errors import CheckpointError, ConfigError
from edgetune.planner.plans import Plan
from edgetune.weights import sha256_file

# As `training.run` writes them; it imports torch, which a report needs nothing of.
PLAN, METRICS, SUMMARY = "plan.json", "metrics.jsonl", "summary.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RunFiles:
    """A run folder. `summary` is None while the run goes on, or where it was killed."""

    folder: Path
    plan: Plan
    steps: list[dict[str, Any]]
    """Lines of metrics.jsonl that have a `loss`; `evaluations` those with an `eval_loss`."""
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None


@dataclass(frozen=True)
class BundleFiles:
    """A bundle folder, and its benchmark where there is one; `stale` where the bundle has changed since."""

    folder: Path
    manifest: dict[str, Any]
    benchmark: dict[str, Any] | None
    stale: bool


@dataclass(frozen=True)
class Artifacts:
    """A run, a bundle, or both."""

    run: RunFiles | None = None
    bundle: BundleFiles | None = None


def read_artifacts(folders: Sequence[str | Path]) -> Artifacts:
    """Read a run/, a bundle/, or a run and its bundle.

    Raises:
        ConfigError: a folder is neither, two are of one kind, or they do not belong together.
        CheckpointError, BundleError: a file is missing or damaged.
    """
    found = Artifacts()
    for folder in map(Path, folders):
        twice: RunFiles | BundleFiles | None
        if (folder / MANIFEST).is_file():
            twice, made = found.bundle, Artifacts(found.run, _read_bundle(folder))
        elif (folder / PLAN).is_file():
            twice, made = found.run, Artifacts(_read_run(folder), found.bundle)
        elif not folder.exists():
            raise ConfigError(f"{folder} does not exist. Check the path; a run/ or a bundle/ was expected")
        else:
            raise ConfigError(
                f"{folder} holds neither {PLAN} nor {MANIFEST}, expected a run/ that `edgetune train` wrote or a "
                f"bundle/ that `edgetune export` wrote"
            )
        if twice is not None:
            raise ConfigError(f"{twice.folder} and {folder} are of one kind, expected a run/ and its bundle/")
        found = made
    summary = (found.run and found.run.summary) or {}
    if found.run is not None and found.bundle is not None and "base_sha256" in summary:
        theirs, ours = summary["base_sha256"], found.bundle.manifest["base_sha256"]
        if theirs != ours:
            raise ConfigError(
                f"{found.run.folder} was trained on base {str(theirs)[:12]}, {found.bundle.folder} holds {ours[:12]}: "
                f"they do not belong together. Report on each alone, or name the bundle that was exported from the run"
            )
    return found


def _read_run(folder: Path) -> RunFiles:
    try:
        plan = Plan.from_dict(_read_json(folder / PLAN))
    except ConfigError as error:
        raise CheckpointError(f"{folder / PLAN}: {error}") from error
    lines = _read_metrics(folder / METRICS)
    summary = _read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else None
    return RunFiles(
        folder,
        plan,
        [line for line in lines if "loss" in line],
        [line for line in lines if "eval_loss" in line],
        summary,
    )


def _read_bundle(folder: Path) -> BundleFiles:
    manifest, path = read_manifest(folder), results_path(folder)
    benchmark = load_results(path) if path.is_file() else None
    stale = benchmark is not None and benchmark.get("manifest_sha256") != sha256_file(folder / MANIFEST)
    return BundleFiles(folder, manifest, benchmark, stale)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Train again, or go on with --resume") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected an object. Train again")
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}; upgrade edgetune to read it"
        )
    return values


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Its lines but the first; a last one that a kill has cut is left out, as the trainer does."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found
