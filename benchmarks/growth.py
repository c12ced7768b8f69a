"""Does a long run grow? Anonymous memory after every step of 2,000 on the packaged sample.

The figure compares the medians of a window of steps after the first evaluation and checkpoint with the last window.

Run: python benchmarks/growth.py [--steps 2000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import about

from edgetune import sample

WINDOW = 100  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        words = [str(sample.BASE), f"--data={sample.PERSONAL_TRAIN}", f"--out={run}", f"--max-steps={steps}"]
        settings = ["--device=galaxy-watch-7", "--budget=foreground", "--batch-size=3"]
        subprocess.run([sys.executable, "-m", "edgetune", "train", *words, *settings], check=True, stdout=sys.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    used = [line["now_bytes"] for line in lines if "now_bytes" in line]
    warm = steps // 10 + 1  # a run evaluates ten times
    first, last = (statistics.median(used[at : at + WINDOW]) for at in (warm, steps - WINDOW))
    growth = {"steps": steps, "first_bytes": first, "last_bytes": last, "growth_percent": 100 * (last / first - 1)}
    print(json.dumps({**growth, "wanted_percent": 1.0, "pass": last <= 1.01 * first, **about()}, indent=1))


if __name__ == "__main__":
    main()
