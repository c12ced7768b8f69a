"""Predicted against measured peak: the plan's bytes beside the kernel's, for one training run per case.

Each case runs as `edgetune plan` and `edgetune train` do, in a process of its own, for a few steps. The peak is the
certificate's: anonymous + swap bytes of the whole process, sampled every 4 ms.

Run: python benchmarks/plan_accuracy.py [--cases sample smollm2-135m] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import about
from shapes import write_shape

from edgetune import sample
from edgetune.quantizer import quantize

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards mix five dozen jugs of liquid"
ALL = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def case(
    grid: str, budget: str | int, length: int | None = None, batch: int | None = 1, *, device: str = "pixel-9",
    layers: str | None = None, r: int | None = None, targets: str | None = None, optimizer: str | None = "adamw",
    eval_fraction: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Flags of `edgetune train`; what is None is left to the plan."""
    settings = {
        "grid": grid, "device": device, "budget": budget, "max-seq-length": length, "batch-size": batch,
        "layers": layers, "r": r, "target-modules": targets, "optimizer": optimizer,
        "eval-fraction": eval_fraction,
    }  # fmt: skip
    return {name: value for name, value in settings.items() if value is not None}


# With r, layers, targets and optimizer set nothing of what is learned may be conceded.
CASES: dict[str, list[dict[str, Any]]] = {
    "sample": [
        case("int4", "foreground", batch=None, device="galaxy-watch-7"),
        case("int4", "foreground", 64, 16, device="galaxy-watch-7", r=64, layers="0-4", targets=ALL),
    ],
    "smollm2-135m": [
        case("int4", "min", 256),
        case("int4", "min", 256, r=8, layers="0-29", targets=ALL),
        case("nf4", "min", 256, r=8, layers="0-29", targets=ALL),
        case("int4", "foreground", 256),
        case("nf4", 300, 64, 4, r=16, targets="q_proj,v_proj"),
        case("int4", "min", 512, 2),
        case("int4", "min", 1024, r=8, layers="0-29", targets=ALL),
        case("int4", "foreground", 256, 2, r=8, layers="20-29", targets=ALL, optimizer="adamw_8bit"),
        case("nf4", "foreground", 128, 2, r=32, layers="0-29", targets=ALL, optimizer="adamw_8bit"),
    ],
    "gemma-3-270m": [
        case("int4", "min", 256, r=8, layers="0-17", targets=ALL),
        case("nf4", "foreground", 768, r=8, layers="6-17", targets=ALL),  # beyond the sliding window
    ],
    "qwen2.5-0.5b": [
        case("int4", "min", 256, r=8, layers="0-23", targets=ALL),
        case("nf4", 700, 128, 2, r=16, layers="0-23", targets=ALL),
        case("int4", "foreground", 256, r=8, layers="16-23", targets=ALL),
        case("nf4", "min", 64, 4),
    ],
    "llama-3.2-1b": [  # not evaluated: after each of so few steps it would take minutes
        case("int4", "min", 64, r=8, layers="0-15", targets=ALL, eval_fraction=0),
        case("int4", "min", 256, r=8, layers="0-15", targets=ALL, optimizer="adamw_8bit", eval_fraction=0),
        case("int4", 1200, 512, r=4, layers="12-15", targets="q_proj,v_proj", eval_fraction=0),
    ],
}  # fmt: skip


def write_rows(path: Path) -> Path:
    """Plain text rows of random words: 24 rows of about 2,000 bytes, longer than any window here."""
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS.split(), 400))} for _ in range(24)]
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


def measure_all(folder: Path, names: Sequence[str], steps: int) -> Iterator[dict[str, Any]]:
    """All cases of some models; models and bases that lie in the folder already are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "rows.jsonl")
    for name in names:
        for settings in CASES[name]:
            base = folder / f"{name}-{settings['grid']}"
            if not base.exists():
                model = sample.BASE if name == "sample" else folder / name
                if not model.exists():
                    write_shape(name, model)
                quantize(model, settings["grid"], base)
            result = {"model": name} | measure(base, rows, folder / "run", steps, settings)
            print(json.dumps(result), file=sys.stderr)
            yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", type=Path, help="keep models and bases here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = list(measure_all(options.work or Path(name), options.cases, options.steps))
    percents = {key: [result[key] for result in results] for key in ("error_percent", "error_above_floor_percent")}
    wanted = {"error_percent": (-2, 5), "error_above_floor_percent": (-15, 15)}
    outside = [
        index for index, result in enumerate(results)
        if any(not low <= result[key] <= high for key, (low, high) in wanted.items())
    ]  # fmt: skip
    ranges = {key: [min(values), max(values)] for key, values in percents.items()}
    print(json.dumps({"wanted": wanted, "found": ranges, "outside": outside, "cases": results, **about()}, indent=1))


if __name__ == "__main__":
    main()
