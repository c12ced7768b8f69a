"""Ranks by sensitivity (`--adapter-budget`) against one rank everywhere, at equal bytes.

For each data set and rank the budget is the file of a uniform LoRA of that rank at every linear; `--adapter-budget`
gets exactly those bytes. Both train with the same rows, steps and seeds, each at the learning rate that is best for it
on the mean over the seeds, and are judged by the held-out loss at the end, in nats per token.

    shakespeare    stories260k, int4, learns tinyshakespeare; every second piece of 480 characters; held
                   out are pieces of the last tenth
    instructions   stories260k, int4, learns rasbt's instructions; held out is every tenth row

Run: python benchmarks/adapter_budget.py [--steps 200] [--seeds 0 1 2]   (EDGETUNE_REAL names the folder of real data)
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import about, real

import edgetune as et
from edgetune.adapters.base import MODEL

RANKS = (2, 8)
RATES = (3e-3, 1e-2)
SEEDS = (0, 1, 2)
PIECE, WINDOW, BATCH = 480, 288, 8


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shakespeare(folder: Path, every: int = 4) -> tuple[Path, Path]:
    """Learned rows, and as held-out ones each `every`-th of the last tenth."""
    text = (real("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    pieces = [{"text": text[at : at + PIECE]} for at in range(0, len(text) - PIECE, PIECE)]
    cut = len(pieces) * 9 // 10
    return write_rows(folder / "learned.jsonl", pieces[:cut:2]), write_rows(folder / "held.jsonl", pieces[cut::every])


def instructions(folder: Path, every: int = 10) -> tuple[Path, Path]:
    """Learned rows, and as held-out ones each `every`-th."""
    rows = json.loads((real("rasbt_instruction") / "instruction-data.json").read_text(encoding="utf-8"))
    rows = [{key: row[key] for key in ("instruction", "input", "output")} for row in rows if row["output"]]
    learned = [row for index, row in enumerate(rows) if index % every]
    return write_rows(folder / "learned.jsonl", learned), write_rows(folder / "held.jsonl", rows[::every])


DATA = {"shakespeare": shakespeare, "instructions": instructions}


def one_core() -> et.DeviceProfile:
    """The host with one thread, so that runs may go on side by side."""
    host = et.load_device("host")
    return replace(host, compute=replace(host.compute, threads=1))


def compare(base: Path, learned: Path, held: Path, rank: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The losses of both ways by rate and seed, what each takes, and the difference at each one's best rate."""
    losses: dict[str, dict[float, list[float]]] = {
        way: {rate: [] for rate in args.rates} for way in ("uniform", "budget")
    }
    said: dict[str, dict[str, Any]] = {}
    host = one_core()
    for seed in args.seeds:
        adapters = {"uniform": et.LoraConfig(r=rank)}
        for rate in args.rates:
            config = et.TrainConfig(
                batch_size=BATCH, gradient_accumulation_steps=1, max_seq_length=WINDOW, max_steps=args.steps,
                learning_rate=rate, seed=seed,
            )  # fmt: skip
            for way in losses:
                if way not in adapters:
                    wanted = et.LoraConfig(adapter_budget=said["uniform"]["file_bytes"])
                    adapters[way] = et.allocate_ranks(
                        base, host, data=learned, eval_data=held, adapter=wanted, config=config
                    )
                plan = et.plan(base, host, data=learned, eval_data=held, adapter=adapters[way], config=config)
                run = et.train(plan, base, data=learned, eval_data=held, out=folder / f"{way}-{seed}-{rate}")
                last = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
                losses[way][rate].append([line["eval_loss"] for line in last if "eval_loss" in line][-1])
                said[way] = {
                    "file_bytes": (run.folder / MODEL).stat().st_size,
                    "parameters": run.summary["trainable_parameters"],
                    "peak_bytes": run.summary["measured_peak_bytes"],
                    "ranks": getattr(adapters[way], "rank_pattern", None),
                }
    best = {way: min(found, key=lambda rate: statistics.mean(found[rate])) for way, found in losses.items()}
    apart = [b - u for b, u in zip(losses["budget"][best["budget"]], losses["uniform"][best["uniform"]], strict=True)]
    return {
        way: said[way]
        | {"losses": losses[way], "best_rate": best[way], "loss": statistics.mean(losses[way][best[way]])}
        for way in losses
    } | {"budget_minus_uniform": {"mean": statistics.mean(apart), "by_seed": apart}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        base = et.quantize(real("stories260k"), "int4", Path(name) / "base")
        for data in args.data:
            for rank in args.ranks:
                folder = Path(name) / f"{data}-{rank}"
                folder.mkdir()
                found[f"{data} r={rank}"] = compare(base, *DATA[data](folder), rank, args, folder)
    print(json.dumps({"steps": args.steps, "seeds": args.seeds, "results": found} | about(), indent=1))


if __name__ == "__main__":
    main()
