"""What each adapter method learns on the same rows, steps and seeds, at the best of some learning rates, and what it
costs; beside PEFT's LoRA and IA3.

Batches of 4 windows of 304 tokens, or as many as the model has, on the nf4 grid. Every rate is tried with the first
seed, and the best one with the others. Judged is the held-out loss at the end, in nats per token.

    instructions   stories260k learns rasbt's instructions with their answers; held out is every twentieth row
    shakespeare    and pieces of 480 characters of tinyshakespeare, without prompts; held out are some of the last tenth
    sample         the packaged sample learns its personal rows

PEFT gets the same base, rows, order, initial adapter and learning rate (`shakespeare.theirs`). The peak is that of the
process that trains, all of it: `floor_bytes` of it are there before a model is. Virtual tokens take part of a window:
a step with these has fewer rows.

Run: python benchmarks/methods.py [--methods lora ia3] [--rates 1e-3 1e-2] [--steps 60] [--seeds 2]
     [--data instructions] [--optimizer adamw] [--peft lora ia3] [--out methods.json]

EDGETUNE_REAL names the folder of real data. Runs are added to --out, and what is there already is not run again, so it
can be stopped and gone on with at any time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from adapter_budget import instructions, one_core, shakespeare
from machine import about, real

import edgetune as et
from edgetune import sample
from edgetune.adapters import METHODS
from edgetune.adapters.bottleneck import BottleneckConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.full import FullConfig
from edgetune.base import open_base
from edgetune.data import pack, read_rows
from edgetune.tokenizer import load_tokenizer

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
WINDOW, BATCH = 304, 4
COSTS = ("trainable_parameters", "adapter_bytes", "measured_peak_bytes", "tokens_per_second")


def personal(folder: Path) -> tuple[Path, Path]:
    return sample.PERSONAL_TRAIN, sample.PERSONAL_EVAL


DATA = {
    "instructions": partial(instructions, every=20), "shakespeare": partial(shakespeare, every=8), "sample": personal
}  # fmt: skip


def adapters(layers: int) -> dict[str, AdapterConfig]:
    """Each method as it comes, and those that come in kinds in several."""
    found: dict[str, AdapterConfig] = {name: module.Config() for name, module in METHODS.items()}
    del found["bottleneck"]
    upper = tuple(range(layers - -(-layers // 3), layers))
    return found | {
        "full, top third": FullConfig(layers_to_transform=upper),
        "bottleneck, houlsby": BottleneckConfig(placement="houlsby"),
        "bottleneck, parallel": BottleneckConfig(placement="parallel"),
    }


def planned(job: dict[str, Any]) -> et.Plan:
    model = open_base(job["base"]).config
    config = et.TrainConfig(
        batch_size=BATCH, gradient_accumulation_steps=1, max_steps=job["steps"],
        max_seq_length=min(WINDOW, model.max_position_embeddings),
        learning_rate=job["rate"], seed=job["seed"], optimizer=job["optimizer"],
    )  # fmt: skip
    adapter = adapters(model.num_hidden_layers)[job["method"]]
    return et.plan(job["base"], one_core(), data=job["data"], eval_data=job["held"], adapter=adapter, config=config)


def edgetune_run(job: dict[str, Any]) -> dict[str, Any]:
    try:
        plan = planned(job)
    except (et.ConfigError, et.DataError) as error:  # nothing in this model or these rows for the method
        return {"skipped": str(error)}
    run = et.train(plan, job["base"], data=job["data"], eval_data=job["held"], out=job["out"])
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    nll = [line["eval_loss"] for line in lines if "eval_loss" in line][-1] if run.stopped == "done" else None
    return {"nll": nll, "stopped": run.stopped, "floor_bytes": plan.floor_bytes} | {k: run.summary[k] for k in COSTS}


def peft_run(job: dict[str, Any]) -> dict[str, Any]:
    from shakespeare import theirs, twin

    base, plan = Path(job["base"]), planned(job)
    rows = read_rows(Path(job["held"]), load_tokenizer(base), plan.max_seq_length)
    return theirs(twin(base, plan), base, plan, Path(job["data"]), pack(rows, plan.max_seq_length))


RUNS = {"edgetune": edgetune_run, "peft": peft_run}


def apart(job: dict[str, Any]) -> dict[str, Any]:
    """A run in a process of its own, so that its peak is its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def of(runs: Iterable[dict[str, Any]], system: str, method: str, rate: float | None = None) -> list[dict[str, Any]]:
    return [
        run for run in runs if (run["system"], run["method"]) == (system, method) and rate in (None, run["rate"])
    ]  # fmt: skip


def best_rate(runs: Iterable[dict[str, Any]], method: str) -> float | None:
    """Of the first seed, which alone has seen every rate; None where no run ended."""
    nll = {run["rate"]: run.get("nll") for run in of(runs, "edgetune", method) if run["seed"] == 0}
    found = {rate: loss for rate, loss in nll.items() if loss is not None}
    return min(found, key=found.__getitem__) if found else None


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By method what its best rate learned and took."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        rate = best_rate(runs, method)
        if rate is None:
            found[method] = of(runs, "edgetune", method)[0]
            continue
        mine = of(runs, "edgetune", method, rate)
        found[method] = {"rate": rate, **_spread(mine)} | {key: mine[0][key] for key in COSTS}
        if peft := of(runs, "peft", method, rate):
            found[method]["peft"] = _spread(peft)
            apart = [a["nll"] - b["nll"] for a in mine for b in peft if a["seed"] == b["seed"]]
            found[method]["minus_peft"] = statistics.fmean(apart)
    return found


def _spread(runs: list[dict[str, Any]]) -> dict[str, Any]:
    values = [run["nll"] for run in runs]
    return {"nll": statistics.fmean(values), "spread": max(values) - min(values), "seeds": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(adapters(1)), choices=adapters(1), metavar="METHOD")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--data", choices=DATA, default="instructions")
    parser.add_argument("--peft", nargs="*", default=["lora", "ia3"], help="methods that PEFT learns too, with adamw")
    parser.add_argument("--out", type=Path, default=Path("methods.json"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        print(json.dumps(RUNS[job["system"]](job)))
        return
    setting = {"data": args.data, "steps": args.steps, "optimizer": args.optimizer}
    runs: list[dict[str, Any]] = []
    if args.out.exists():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        if (others := {key: before[key] for key in setting}) != setting:
            sys.exit(f"{args.out} has runs of {others}, not of {setting}. Choose another --out.")
        runs = before["runs"]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = sample.BASE if args.data == "sample" else real("stories260k")
        base = et.quantize(model, "nf4", folder / "base")
        learned, held = DATA[args.data](folder)
        files = setting | {"base": str(base), "data": str(learned), "held": str(held)}

        def add(system: str, method: str, rate: float, seed: int) -> bool:
            """Whether there is such a run now: not where model or rows have nothing for the method."""
            key = {"system": system, "method": method, "rate": rate, "seed": seed}
            found = next((run for run in runs if key.items() <= run.items()), None)
            if found is None:
                found = key | apart(key | files | {"out": str(folder / f"{method}-{rate}-{seed}")})
                runs.append(found)
                print(found, file=sys.stderr, flush=True)
                args.out.write_text(json.dumps(about() | setting | {"runs": runs}, indent=1), encoding="utf-8")
            return "skipped" not in found

        for method in args.methods:
            if not all(add("edgetune", method, rate, 0) for rate in args.rates):
                continue
            rate = best_rate(runs, method)
            for seed in range(args.seeds) if rate is not None else ():
                add("edgetune", method, rate, seed)
                if method in args.peft and args.optimizer == "adamw":
                    add("peft", method, rate, seed)
    print(json.dumps(about() | setting | {"methods": summary(runs)}, indent=1))


if __name__ == "__main__":
    main()
