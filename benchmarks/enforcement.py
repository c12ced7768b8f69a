"""What holds a run to its budget: runs in a cgroup of exactly their budget, and runs whose budget was lowered.

A shape with random weights is planned for `min`, 1.05, 1.25 and 2 times that, and each plan is run in a cgroup of its
budget. Then the smallest plan's budget is lowered to 0.9 of its predicted peak, and run under each level of
enforcement; the first two run in a cgroup of the planned budget, which only counts what the kernel kills. The base is
dropped from the page cache before each run, so that the cgroup is charged for it.

Run, where a memory cgroup can be made (`edgetune doctor` says so): python benchmarks/enforcement.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import about
from plan_accuracy import write_rows
from shapes import SHAPES, write_shape

from edgetune import host, planner
from edgetune.adapters.lora import LoraConfig
from edgetune.cgroup import Cgroup, make_cgroup
from edgetune.checkpoint import latest_checkpoint
from edgetune.memory import MIB
from edgetune.planner import Plan, TrainConfig
from edgetune.quantizer import quantize

TIMES_MIN = (1.0, 1.05, 1.25, 2.0)
LOWERED = 0.9
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEYS = (
    "stopped", "steps", "enforcement", "recompute_layers", "predicted_peak_bytes", "measured_peak_bytes",
    "cgroup_peak_bytes", "cgroup_oom_kills",
)  # fmt: skip


def make_plan(base: Path, rows: Path, steps: int, budget: str | int) -> Plan:
    """LoRA r 8 on all linears of all blocks, 256 tokens: nothing but time is conceded."""
    blocks = json.loads((base / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    adapter = LoraConfig(r=8, target_modules=MODULES, layers_to_transform=tuple(range(blocks)))
    config = TrainConfig(
        batch_size=1, gradient_accumulation_steps=1, max_seq_length=256, max_steps=steps, optimizer="adamw"
    )
    return planner.plan(base, "host", data=rows, adapter=adapter, config=config, budget=budget)


def drop_from_page_cache(base: Path) -> None:
    for path in base.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(plan: Plan, rows: Path, run: Path, enforce: str, around: Cgroup | None = None) -> dict[str, Any]:
    """One run: how it ended, what it took, and whether its last checkpoint is whole."""
    drop_from_page_cache(Path(plan.model))
    job = {
        "plan": plan.to_dict(), "base": plan.model, "data": str(rows), "out": str(run), "eval_data": None,
        "resume": False, "force": False, "enforce": enforce, "skip_bad": False, "as_json": True,
    }  # fmt: skip
    words = ["edgetune.cli.supervisor"] if enforce == "cgroup" else ["edgetune.cli.launch", "train"]
    done = subprocess.run(
        [sys.executable, "-m", *words, json.dumps(job)], preexec_fn=around and around.enter,
        env={**host.THREAD_SETTINGS, **os.environ}, capture_output=True, text=True,
    )  # fmt: skip
    if not done.stdout:
        sys.exit(f"{enforce} at {plan.budget_bytes} bytes ended with {done.returncode} and no answer:\n{done.stderr}")
    said = json.loads(done.stdout.splitlines()[-1])
    checkpoint, set_aside = latest_checkpoint(run / "checkpoints")
    found = {
        "enforce": enforce, "budget_bytes": plan.budget_bytes, "exit_code": done.returncode,
        **{key: said.get(key) for key in KEYS},
        "checkpoint_step": checkpoint and checkpoint.step, "damaged_checkpoints": len(set_aside),
    }  # fmt: skip
    if around is not None:
        found |= {"cgroup_oom_kills": around.oom_kills, "cgroup_peak_bytes": around.peak_bytes}
    print(json.dumps(found), file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl")
        base = quantize(write_shape(options.shape, folder / "model"), "int4", folder / "base")
        smallest = make_plan(base, rows, options.steps, "min")
        kept = []
        for times in TIMES_MIN:
            plan = make_plan(base, rows, options.steps, -(-int(times * smallest.budget_bytes) // MIB))
            kept.append({"times_min": times} | measure(plan, rows, folder / f"run-{times}", "cgroup"))
        lowered = replace(smallest, budget_bytes=int(LOWERED * smallest.predicted_peak_bytes))
        stopped = []
        for enforce in ("governor", "rlimit", "cgroup"):
            around = None if enforce == "cgroup" else make_cgroup(smallest.budget_bytes)
            stopped.append(measure(lowered, rows, folder / f"run-{enforce}", enforce, around))
            if around is not None:
                around.remove()
    print(json.dumps({"shape": options.shape, "planned": kept, "lowered_to_0.9": stopped, **about()}, indent=1))


if __name__ == "__main__":
    main()
