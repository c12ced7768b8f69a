"""Predicted against measured peak of `edgetune personalize`: the plan's bytes beside the kernel's, one run per case.

As `plan_accuracy` for the torch engine: each case runs as the command line does, in a process of its own, for a few
steps, with a row held out. The peak is the certificate's.

Run: python benchmarks/personalize_accuracy.py [--cases sample smollm2-135m] [--work FOLDER]
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
from plan_accuracy import ALL, WORDS
from shapes import write_shape

from edgetune import sample
from edgetune.exporter import export
from edgetune.quantizer import quantize
from edgetune.runtime.adapters import remove_adapter

# Tokens of a window, windows of a micro-batch, micro-batches of a step, rank, linears.
CASES: dict[str, list[tuple[int, int, int, int, str]]] = {
    "sample": [
        (64, 1, 1, 8, ALL),
        (128, 2, 4, 16, ALL),
        (256, 4, 1, 64, ALL),
    ],
    "smollm2-135m": [
        (64, 1, 1, 8, ALL),
        (128, 1, 1, 8, ALL),
        (256, 1, 1, 8, ALL),
        (128, 2, 1, 8, ALL),
        (256, 2, 1, 8, ALL),
        (128, 1, 1, 32, ALL),
        (128, 1, 1, 8, "q_proj,v_proj"),
        (64, 1, 4, 8, ALL),
    ],
    # The same shape in cases that no constant of the planner was found by, and other shapes.
    "smollm2-135m-unseen": [
        (96, 3, 1, 16, ALL),
        (192, 1, 2, 4, "q_proj,v_proj"),
        (200, 1, 1, 8, "down_proj"),
        (80, 4, 1, 12, ALL),
        (224, 2, 1, 8, "q_proj,k_proj,v_proj,o_proj"),
    ],
    "qwen2.5-0.5b": [
        (64, 1, 1, 8, ALL),
        (192, 2, 2, 16, ALL),
        (128, 1, 1, 8, "q_proj,v_proj"),
    ],
    "gemma-3-270m": [
        (64, 1, 1, 8, ALL),
        (192, 2, 2, 16, ALL),
        (128, 1, 1, 8, "q_proj,v_proj"),
    ],
    # The second run begins with the adapter that the first one left.
    "smollm2-135m-adapted": [
        (128, 1, 1, 16, ALL),
        (96, 1, 1, 8, ALL),
    ],
}
LAYERS = {"qwen2.5-0.5b": 4}  # fewer than the shape has
WANTED = {"error_percent": (-2, 5), "error_above_floor_percent": (-15, 15)}


def write_rows(path: Path) -> Path:
    """Plain text rows of random words, long enough for four windows of 256 tokens."""
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(rng.choice(WORDS.split(), 110))} for _ in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measure(
    bundle: Path, rows: Path, folder: Path, steps: int, case: tuple[int, int, int, int, str], *, keep: bool
) -> dict[str, Any]:
    length, batch, accumulation, r, targets = case
    command = [
        sys.executable, "-m", "edgetune", "personalize", str(bundle), f"--data={rows}", f"--out={folder}",
        f"--max-steps={steps}", "--enforce=none", "--force", "--json", f"--max-seq-length={length}",
        f"--batch-size={batch}", f"--gradient-accumulation-steps={accumulation}", f"--r={r}",
        f"--target-modules={targets}",
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    if summary["adopted"] and not keep:  # the next case finds the bundle as it was
        remove_adapter(bundle, summary["adopted"])
    keys = ("predicted_peak_bytes", "measured_peak_bytes", "floor_bytes")
    predicted, measured, floor = (summary[key] for key in keys)
    return {
        **dict(zip(("max_seq_length", "batch_size", "gradient_accumulation_steps", "r", "targets"), case, strict=True)),
        **{key: summary[key] for key in keys},
        "error_percent": round(100 * (predicted / measured - 1), 2),
        "error_above_floor_percent": round(100 * ((predicted - floor) / (measured - floor) - 1), 2),
        "peak_moment": summary["peak_moment"],
        "parts": summary["parts"],
    }


def measure_all(folder: Path, names: Sequence[str], steps: int) -> Iterator[dict[str, Any]]:
    """All cases of some models; bundles that lie in the folder already are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "rows.jsonl")
    for name in names:
        bundle = folder / f"{name}-bundle"
        if not bundle.exists():
            model = sample.BASE if name == "sample" else folder / name
            if not model.exists():
                shape = name.removesuffix("-unseen").removesuffix("-adapted")
                write_shape(shape, model, num_hidden_layers=LAYERS.get(shape))
            export(quantize(model, "int4", folder / f"{name}-int4"), out=bundle, with_training=True)
        for case in CASES[name]:
            result = {"model": name} | measure(bundle, rows, folder / "run", steps, case, keep="adapted" in name)
            print(json.dumps(result), file=sys.stderr, flush=True)
            yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work", type=Path, help="keep bundles here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = list(measure_all(options.work or Path(name), options.cases, options.steps))
    outside = [
        index for index, result in enumerate(results)
        if any(not low <= result[key] <= high for key, (low, high) in WANTED.items())
    ]  # fmt: skip
    found = {key: [f([result[key] for result in results]) for f in (min, max)] for key in WANTED}
    print(json.dumps({"wanted": WANTED, "found": found, "outside": outside, "cases": results, **about()}, indent=1))


if __name__ == "__main__":
    main()
