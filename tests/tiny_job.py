"""Jobs for a process that trains, on a model whose activations are a good part of what lies above the floor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import tiny_config, write_model

from edgetune import planner
from edgetune.adapters.lora import LoraConfig
from edgetune.device import load_device
from edgetune.planner import Plan, TrainConfig
from edgetune.quantizer import quantize

REPOSITORY = Path(__file__).parents[1]
LAYERS = 6


def write_base(folder: Path) -> Path:
    """About 10 MiB of weights; a block keeps 5 MiB of activations in micro-batches of 2 windows of 256 tokens."""
    config = tiny_config(
        "llama", hidden_size=256, intermediate_size=768, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, vocab_size=3001,
    )  # fmt: skip
    return quantize(write_model(folder / "model", config), "int4", folder / "base")


def write_rows(path: Path, count: int = 12) -> Path:
    """Texts of letters, one window each."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd "), 240)) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_plan(base: Path, rows: Path, budget: str | int, *, max_steps: int = 3, fast_products: bool = False) -> Plan:
    """For one core of this machine. Nothing but recomputation, and the tiles of the loss, may be conceded."""
    config = TrainConfig(
        batch_size=2, gradient_accumulation_steps=1, max_seq_length=256, max_steps=max_steps, learning_rate=1e-2,
        fast_products=fast_products,
    )  # fmt: skip
    every_layer = LoraConfig(r=4, target_modules=("q_proj", "down_proj"), layers_to_transform=tuple(range(LAYERS)))
    host = load_device("host")
    host = replace(host, compute=replace(host.compute, threads=1))
    return planner.plan(base, host, data=rows, adapter=every_layer, config=config, budget=budget)


def make_job(plan: Plan, rows: Path, out: Path, **options: Any) -> dict[str, Any]:
    """What `launch.start` hands over."""
    job = {"plan": plan.to_dict(), "base": plan.model, "data": str(rows), "out": str(out), "eval_data": None}
    return job | {"resume": False, "force": False, "enforce": "governor", "skip_bad": False, "as_json": True} | options


def start(job: dict[str, Any], *, supervised: bool = False, **options: Any) -> subprocess.Popen[str]:
    """The process that trains, or its supervisor, in a process group of its own."""
    words = ["edgetune.cli.supervisor"] if supervised else ["edgetune.cli.launch", "train"]
    return subprocess.Popen(
        [sys.executable, "-m", *words, json.dumps(job)], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0, **options,
    )  # fmt: skip


def run(job: dict[str, Any], **options: Any) -> tuple[int, dict[str, Any], str]:
    """Its exit code, the object that it printed last, and its stderr."""
    with start(job, **options) as process:
        stdout, stderr = process.communicate(timeout=300)
    return process.returncode, json.loads(stdout.splitlines()[-1]) if stdout else {}, stderr


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Until the run has made this step; fails where it ends before."""
    wait_until(process, lambda: f'{{"step": {step}, "loss"' in _text(out / "metrics.jsonl"))


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"ended with {process.returncode}: {process.communicate()}")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
