"""The JSON of a benchmark on disk, beside its bundle: a bundle's own files are all in its manifest, and stay so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgetune.errors import BundleError, ConfigError
from edgetune.weights import write_atomic

FORMAT_VERSION = 1


def results_path(bundle: str | Path) -> Path:
    """Where the benchmark of a bundle is kept: `bundle-bench.json` beside `bundle/`."""
    folder = Path(bundle).absolute()
    return folder.with_name(f"{folder.name}-bench.json")


def save_results(result: Mapping[str, Any], path: Path) -> None:
    """Write a result of `bench`. Raises as `write_text`."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises ConfigError where the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}. Name another place") from error


def load_results(path: Path) -> dict[str, Any]:
    """Read such a file. Raises BundleError where it is none, or of a newer format."""
    again = "Measure again with `edgetune bench`"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as the result of a benchmark: {error}. {again}") from error
    version = result.get("format_version") if isinstance(result, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}; upgrade edgetune to read it"
        )
    if version != FORMAT_VERSION or "generation_tokens_per_second" not in result:
        raise BundleError(f"{path} is not the result of a benchmark. {again}")
    found: dict[str, Any] = result
    return found
