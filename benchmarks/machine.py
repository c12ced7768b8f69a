"""What a figure needs beside it to be compared with another: the machine, the versions and the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = (
    "edgetune", "numpy", "onnxruntime", "onnxruntime-genai", "onnx", "onnx_ir", "torch", "bitsandbytes", "transformers",
    "peft", "tokenizers",
)  # fmt: skip
REPOSITORY = Path(__file__).parents[1]
REAL = Path(os.environ.get("EDGETUNE_REAL", REPOSITORY.parent / "shared" / "real"))


def real(name: str) -> Path:
    """A folder of real models and texts; ends the script where it is not there."""
    if not (REAL / name).is_dir():
        sys.exit(f"{REAL / name} is not there. Set EDGETUNE_REAL to the folder that holds {name}.")
    return REAL / name


def about() -> dict[str, Any]:
    """`machine`, `versions` and `commit`, to be laid over a script's own figures; "+changes" is an unclean checkout."""
    return {"machine": _machine(), "versions": _versions(), "commit": _commit()}


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return {
        "cpu": name[1] if name else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The short hash, or None where this is no git checkout or has no commit yet."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}+changes" if commit and git("status", "--porcelain") else commit
