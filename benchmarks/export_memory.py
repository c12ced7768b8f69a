"""Peak memory of `edgetune export` for every kind of weights, against floor + 1.5 x the largest tensor.

Each export is a process of its own, the parity gate inside. Its tree is sampled from here every 4 ms: `peak_bytes` is
anonymous + swap memory, what a budget counts. `peak_rss_bytes` has the mapped files too, as the kernel remembers it.
The floor is the peak of the same command on a model of 5,000 weights: Python, torch, onnx and onnxruntime with all that
they load or reserve on first use. The largest tensor is that of the written bundle, in its bytes there.

Run: python benchmarks/export_memory.py [--cases llama-3.2-1b] [--weights int4 fp32] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from machine import REPOSITORY, about
from shapes import SHAPES, write_shape

from edgetune.graphs import FORMATS
from edgetune.memory import SAMPLE_SECONDS, anonymous_bytes
from edgetune.quantizer import quantize
from edgetune.training.floor import write_tiny_model

ALLOWED = 1.5  # of the largest tensor, above the floor
# The base that each kind is exported from; None is the model itself.
SOURCES = {"int4": "int4", "standard": "int4", "nf4": "nf4", "int8": "nf4"}


def source_of(folder: Path, name: str, weights: str) -> Path:
    """A model or base in `folder`; one that lies there already is used again."""
    model, grid = folder / name, SOURCES.get(weights)
    if not model.exists():
        model.mkdir()
        write_tiny_model(model) if name == "tiny" else write_shape(name, model)
    if grid is None:
        return model
    base = folder / f"{name}-{grid}"
    return base if base.exists() else quantize(model, grid, base)


def export(source: Path, out: Path, weights: str) -> dict[str, Any]:
    """Run the command; its peaks and its own answer."""
    command = [sys.executable, "-m", "edgetune", "export", str(source), f"--out={out}", f"--weights={weights}"]
    started, peak = time.monotonic(), 0
    with subprocess.Popen([*command, "--force", "--json"], stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        ended = 0
        while not ended:
            with contextlib.suppress(ProcessLookupError):
                peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}: {lines[-1:]}")
    answer = json.loads(lines[-1])
    return {
        "peak_bytes": peak, "peak_rss_bytes": usage.ru_maxrss * 1024, "seconds": round(time.monotonic() - started, 1),
        "bundle_bytes": answer["bundle_bytes"], "parity": answer["parity"],
    }  # fmt: skip


def measure(folder: Path, name: str, weights: str) -> dict[str, Any]:
    """One case beside the floor of the same kind of weights."""
    floor = export(source_of(folder, "tiny", weights), folder / "bundle", weights)
    figures = export(source_of(folder, name, weights), folder / "bundle", weights)
    values = ir.load(folder / "bundle" / "model.onnx").graph.initializers.values()
    largest = max(value.const_value.nbytes for value in values if value.const_value is not None)
    above = figures["peak_bytes"] - floor["peak_bytes"]
    return {
        "model": name, "weights": weights, **figures, "floor_bytes": floor["peak_bytes"],
        "floor_rss_bytes": floor["peak_rss_bytes"], "largest_tensor_bytes": largest,
        "above_floor_over_largest_tensor": round(above / largest, 3),
        "rss_above_floor_over_largest_tensor": round(
            (figures["peak_rss_bytes"] - floor["peak_rss_bytes"]) / largest, 3
        ),
        "pass": above <= ALLOWED * largest,
    }  # fmt: skip


def measure_all(folder: Path, names: Sequence[str], weights: Sequence[str]) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for name in names:
        for kind in weights:
            results.append(measure(folder, name, kind))
            print(json.dumps(results[-1]), file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=["smollm2-135m"], choices=sorted(SHAPES))
    parser.add_argument("--weights", nargs="*", default=sorted(FORMATS), choices=sorted(FORMATS))
    parser.add_argument("--work", type=Path, help="keep models, bases and the last bundle here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cases = measure_all(options.work or Path(name), options.cases, options.weights)
    print(
        json.dumps(
            {"allowed": ALLOWED, "pass": all(case["pass"] for case in cases), "cases": cases, **about()}, indent=1
        )
    )


if __name__ == "__main__":
    main()
