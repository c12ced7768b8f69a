"""Predicted against measured seconds of a training step, on this machine as `edgetune doctor --calibrate` measures it.

The machine is calibrated once; then each case runs as `edgetune train --device CALIBRATED` does, in a process of its
own, on random weights of a known shape. Measured is the median of the steps after the first. To tune the prediction,
change the constants of `planner.work`, and compare `decoding_mb_s` of the calibration with `mem_bw_mb_s`.

Run on an idle machine: python benchmarks/step_time.py [--cases sample smollm2-135m] [--steps 6]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import about
from plan_accuracy import ALL, write_rows
from shapes import SHAPES, write_shape

from edgetune import sample
from edgetune.planner.plans import Plan
from edgetune.quantizer import quantize

SHORT = {"max-seq-length": 256, "batch-size": 1, "r": 8, "target-modules": ALL}
CASES: dict[str, list[dict[str, Any]]] = {
    "sample": [
        {"grid": "int4", "max-seq-length": 128, "batch-size": 4},
        {"grid": "nf4", "max-seq-length": 256, "batch-size": 1, "gradient-accumulation-steps": 4},
    ],
    "smollm2-135m": [
        {"grid": "int4", **SHORT, "layers": "0-29", "recompute-layers": 30},
        {"grid": "nf4", **SHORT, "layers": "0-29", "recompute-layers": 30},
        {"grid": "int4", **SHORT, "layers": "0-29", "recompute-layers": 0},
        {"grid": "int4", **SHORT, "layers": "0-29", "recompute-layers": 30, "max-seq-length": 1024},
        {"grid": "int4", **SHORT, "layers": "20-29", "recompute-layers": 0},
    ],
    "qwen2.5-0.5b": [
        {"grid": "int4", **SHORT, "layers": "0-23", "recompute-layers": 24},
        {"grid": "nf4", **SHORT, "layers": "16-23", "recompute-layers": 8},
    ],
    "llama-3.2-1b": [{"grid": "int4", **SHORT, "layers": "0-15", "recompute-layers": 16}],
}


def edgetune(*words: str) -> dict[str, Any]:
    """What the command prints with --json."""
    command = [sys.executable, "-m", "edgetune", *words, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(base: Path, device: str, rows: Path, run: Path, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    flags = [f"--{key}={value}" for key, value in settings.items() if key != "grid"]
    summary = edgetune(
        "train", str(base), f"--device={device}", f"--data={rows}", f"--out={run}", f"--max-steps={steps}",
        "--eval-fraction=0", "--enforce=none", "--force", *flags,
    )  # fmt: skip
    plan = Plan.from_dict(json.loads((run / "plan.json").read_text(encoding="utf-8")))
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    measured, predicted = statistics.median(seconds[1:]), plan.predicted_step_seconds
    return {
        **settings,
        "recompute_layers": plan.recompute_layers,
        "predicted_step_seconds": round(predicted, 4),
        "measured_step_seconds": round(measured, 4),
        "error_percent": round(100 * (predicted / measured - 1), 1),
        "all_seconds": [round(second, 4) for second in seconds],
        "tokens_per_second": round(summary["tokens_per_second"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration = edgetune("doctor", "--calibrate", "--out", str(folder / "host-calibrated.toml"))
        rows = write_rows(folder / "rows.jsonl")
        for case in options.cases:
            model = write_shape(case, folder / case) if case in SHAPES else sample.BASE
            for settings in CASES[case]:
                base = folder / f"{case}-{settings['grid']}"
                if not base.exists():
                    quantize(model, settings["grid"], base)
                found = measure(base, calibration["device"], rows, folder / "run", options.steps, settings)
                results.append({"model": case} | found)
                print(json.dumps(results[-1]), file=sys.stderr)
    worst = max(abs(result["error_percent"]) for result in results)
    print(json.dumps({"worst_error_percent": worst, "cases": results, "calibration": calibration, **about()}, indent=1))


if __name__ == "__main__":
    main()
