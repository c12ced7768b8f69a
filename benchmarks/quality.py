"""What is learned, edgetune beside PEFT, from the same rows, order, steps and learning rates; means over seeds.

    banking77, clinc150   MiniLM learns intents from ten examples each: accuracy on the whole test set. Beside
                          them a logistic regression on frozen features (`features-…`)
    shakespeare           stories260k learns tinyshakespeare, 400 steps of 8 x 256 tokens: held-out nats per token
    preferences           stories260k learns by DPO which of two answers is better, 3 epochs of 300 pairs:
                          the share of 100 held-out pairs where the better one's reward is higher

LoRA r=8 on all linears, AdamW, cosine. edgetune trains on its nf4 and int4 grids; PEFT on float32 weights and on
bitsandbytes' NF4 (float32 compute). Of the learning rates the best mean over the seeds is shown, for each system its
own. Each run is a process of its own, so that its anonymous peak is its own; the peak is sampled from outside.

Run: python benchmarks/quality.py [--cases banking77/edgetune-nf4,…] [--seeds 0,1,2] [--rates 1e-3,2e-3]
     [--every 1] [--out quality.json]        (EDGETUNE_REAL names the folder of models and texts)

Results are added to --out, and what is there already is not run again, so parts of it can be run at any time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import about, real

SYSTEMS = ("edgetune-nf4", "edgetune-int4", "peft-nf4", "peft-fp32")


@dataclass(frozen=True)
class Task:
    """What is learned. `runs`: the module with a function for each kind of system; `sign`: -1 where less is better."""

    model: str
    runs: str
    metric: str
    rates: tuple[float, ...]
    systems: tuple[str, ...] = SYSTEMS
    sign: int = 1


_INTENTS = Task(
    "minilm", "quality_encoders", "accuracy", (1e-3, 2e-3, 4e-3), (*SYSTEMS, "features-nf4", "features-int4")
)
TASKS = {
    "banking77": _INTENTS,
    "clinc150": _INTENTS,
    "shakespeare": Task("stories260k", "quality_decoders", "nll", (5e-3, 1e-2, 2e-2), sign=-1),
    "preferences": Task("stories260k", "quality_decoders", "reward_accuracy", (1e-3, 2e-3, 4e-3)),
}


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """A run in this process, with the peak of its anonymous and swapped bytes unless the run measured its own."""
    from edgetune.memory import Meter

    runs = importlib.import_module(TASKS[job["set"]].runs)
    with Meter() as meter:
        found = getattr(runs, f"{job['system'].partition('-')[0]}_run")(job)
    return {"measured_peak_bytes": meter.peak_bytes} | found


def run_case(name: str, system: str, rate: float, seed: int, folder: Path, every: int) -> dict[str, Any]:
    """A run in a process of its own. Bases and rows are made in `folder` once."""
    task, (kind, _, weights) = TASKS[name], system.partition("-")
    base = folder / f"{task.model}-{'nf4' if kind == 'peft' else weights}"  # PEFT's has the tokenizer alone from it
    if not base.exists():
        from edgetune.quantizer import quantize

        quantize(real(task.model), base.name.rpartition("-")[2], base)
    rows = {key: folder / f"{name}-{key}.jsonl" for key in ("train", "test")}
    if not rows["train"].exists():
        importlib.import_module(task.runs).write_rows(name, base, every=every, **rows)
    job = {
        "set": name, "system": system, "rate": rate, "seed": seed, "base": str(base), "model": str(real(task.model)),
        "out": str(folder / f"{name}-{system}-{rate}-{seed}"), **{key: str(path) for key, path in rows.items()},
    }  # fmt: skip
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"case": f"{name}/{system}", "rate": rate, "seed": seed, **found}


def table(runs: list[dict[str, Any]]) -> str:
    """For each case the rate with the best mean: mean and deviation over seeds, and what a run costs."""
    lines = [f"{'':<28}{'rate':>8}{'':>18}{'parameters':>12}{'adapter':>12}{'peak MiB':>10}{'seconds':>9}"]
    for case in dict.fromkeys(run["case"] for run in runs):
        task = TASKS[case.partition("/")[0]]
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for run in runs:
            if run["case"] == case:
                by_rate.setdefault(run["rate"], []).append(run)
        rate = max(by_rate, key=lambda rate: task.sign * statistics.fmean(run[task.metric] for run in by_rate[rate]))
        of = by_rate[rate]
        found = [run[task.metric] for run in of]
        spread = f"{statistics.fmean(found):.3f} ± {statistics.stdev(found) if len(of) > 1 else 0:.3f} ({len(of)})"
        peak = max(run["measured_peak_bytes"] for run in of) / 2**20
        seconds = statistics.median(run["seconds"] for run in of)
        first = of[0]
        lines.append(
            f"{case:<28}{rate:>8g}{spread:>18}{first['trainable_parameters']:>12,}{first['adapter_bytes']:>12,}"
            f"{peak:>10.0f}{seconds:>9.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    every_case = [f"{name}/{system}" for name, task in TASKS.items() for system in task.systems]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(every_case))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", help="instead of each set's own grid")
    parser.add_argument("--every", type=int, default=1, help="take each n-th test row of the intents")
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measured(json.loads(arguments.job))))
        return
    runs: list[dict[str, Any]] = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(run["case"], run["rate"], run["seed"]) for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases.split(","):
            name, _, system = case.partition("/")
            rates = map(float, arguments.rates.split(",")) if arguments.rates else TASKS[name].rates
            fixed = system.startswith("features")  # nothing in it is random, and it has no rate
            for rate in [0.0] if fixed else rates:
                for seed in [0] if fixed else map(int, arguments.seeds.split(",")):
                    if (case, rate, seed) in done:
                        continue
                    runs.append(run_case(name, system, rate, seed, Path(folder), arguments.every))
                    print(runs[-1], file=sys.stderr, flush=True)
                    arguments.out.write_text(json.dumps(about() | {"every": arguments.every, "runs": runs}, indent=1))
    print(table(runs))


if __name__ == "__main__":
    main()
