"""Predicted against measured peak: the plan's bytes beside the kernel's, for one training run per case.

Each case runs as `edgetune plan` and `edgetune train` do, in a process of its own, for a few steps. The peak is the
certificate's: anonymous + swap bytes of the whole process, sampled every 4 ms.

Run: python benchmarks/plan_accuracy.py [--cases sample smollm2-135m]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import about
from shapes import SHAPES, write_shape

from edgetune import sample
from edgetune.quantizer import quantize

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix five dozen jugs of liquid"
ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
WHOLE = {"r": 8, "target-modules": ALL, "layers": "0-29"}  # nothing of the adapter may be conceded
CASES: dict[str, list[dict[str, Any]]] = {
    "sample": [
        {"grid": "int4", "device": "galaxy-watch-7", "budget": "foreground"},
        {"grid": "nf4", "device": "galaxy-watch-7", "budget": "min", "max-seq-length": 64},
    ],
    "smollm2-135m": [
        {"grid": "int4", "device": "pixel-9", "budget": "min", "max-seq-length": 256, "batch-size": 1},
        {"grid": "nf4", "device": "pixel-9", "budget": "min", "max-seq-length": 256, "batch-size": 1},
        {"grid": "int4", "device": "pixel-9", "budget": "min", "max-seq-length": 256, "batch-size": 1, **WHOLE},
        {"grid": "nf4", "device": "pixel-9", "budget": "min", "max-seq-length": 256, "batch-size": 1, **WHOLE},
        {"grid": "int4", "device": "pixel-9", "budget": "foreground", "max-seq-length": 256, "batch-size": 1},
        {"grid": "int4", "device": "pixel-9", "budget": "min", "max-seq-length": 512, "batch-size": 2},
    ],
}


def write_rows(path: Path) -> Path:
    """Plain text rows of random words: 40 rows of about 600 bytes."""
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS.split(), 120))} for _ in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measure(base: Path, rows: Path, folder: Path, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    flags = [f"--{key}={value}" for key, value in settings.items() if key != "grid"]
    command = [
        sys.executable, "-m", "edgetune", "train", str(base), f"--data={rows}", f"--out={folder}",
        f"--max-steps={steps}", "--enforce=none", "--force", "--json", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    predicted, measured, floor = (
        summary[key] for key in ("predicted_peak_bytes", "measured_peak_bytes", "floor_bytes")
    )
    return {
        **settings,
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": measured,
        "floor_bytes": floor,
        "error_percent": round(100 * (predicted / measured - 1), 2),
        "error_above_floor_percent": round(100 * ((predicted - floor) / (measured - floor) - 1), 2),
        "tokens_per_second": round(summary["tokens_per_second"], 1),
        "parts": summary["parts"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl")
        for case in options.cases:
            model = write_shape(case, folder / case) if case in SHAPES else sample.BASE
            for settings in CASES[case]:
                base = folder / f"{case}-{settings['grid']}"
                if not base.exists():
                    quantize(model, settings["grid"], base)
                results.append({"model": case} | measure(base, rows, folder / "run", options.steps, settings))
                print(json.dumps(results[-1]), file=sys.stderr)
    worst = max(abs(result["error_percent"]) for result in results)
    print(json.dumps({"worst_error_percent": worst, "cases": results, **about()}, indent=1))


if __name__ == "__main__":
    main()
