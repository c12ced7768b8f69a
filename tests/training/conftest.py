"""Bases, micro-batches and the PEFT twin for the tests of training."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.models import load_config
from edgetune.planner.plans import Plan
from edgetune.quantizer import quantize
from edgetune.training.progress import Progress
from tests.conftest import tiny_config, write_model

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def random_batch(vocab_size: int, batch: int, length: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Windows of two segments and some padding, with a third of the positions supervised; labels already shifted."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, (batch, length))
    cut, end = length // 3, length - 2
    positions = np.concatenate([np.arange(cut), np.arange(end - cut), np.zeros(length - end)]).astype(np.int64)
    segments = np.concatenate([np.zeros(cut), np.ones(end - cut), -np.ones(length - end)]).astype(np.int64)
    labels = np.roll(ids, -1, axis=1)
    labels[:, [cut - 1, *range(end - 1, length)]] = -100
    labels[rng.random((batch, length)) < 2 / 3] = -100
    return {
        "input_ids": ids, "labels": labels,
        "position_ids": np.tile(positions, (batch, 1)), "segment_ids": np.tile(segments, (batch, 1)),
    }  # fmt: skip


def make_base(folder: Path, family: str = "llama", grid: str = "nf4", **overrides: int) -> Path:
    """A random model of that family on a grid."""
    return quantize(write_model(folder / "model", tiny_config(family, **overrides)), grid, folder / "base")


def write_rows(path: Path, count: int, *, seed: int = 0) -> Path:
    """Texts over few letters, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcd "), int(rng.integers(5, 40)))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_prompts(path: Path, count: int) -> Path:
    """Rows with something to learn: the completion repeats the prompt's first letter."""
    rng = np.random.default_rng(4)
    prompts = ["".join(rng.choice(list("abcd"), int(rng.integers(3, 14)))) for _ in range(count)]
    rows = [{"prompt": prompt, "completion": prompt[0] * 3} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_plan(base: Path, **overrides: Any) -> Plan:
    """A small plan for a base; where it would run, and at which cost, is made up."""
    config = load_config(base)
    adapter = overrides.pop("adapter", LoraConfig(r=3)).resolved(config)
    values: dict[str, Any] = {
        "format_version": 1, "edgetune_version": "0", "device": "none", "model": str(base), "model_config": config,
        "engine": "torch", "simulated": False, "grid": open_base(base).grid, "budget_name": "MiB",
        "budget_bytes": 1 << 40, "device_budget_bytes": 1 << 40, "reserve_bytes": 0,
        "floor_bytes": 0, "parts": {}, "peak_moment": "backward", "predicted_peak_bytes": 0,
        "file_backed_bytes": 0, "fits": True, "concessions": (), "method": "lora", "adapter": adapter,
        "objective": "sft", "beta": None, "label_smoothing": None, "temperature": None,
        "distill_weight": None,
        "classes": (),
        "optimizer": "adamw", "batch_size": 2, "gradient_accumulation_steps": 2, "max_seq_length": 48,
        "step_rule": "backprop", "recompute_layers": 1, "tile_weights": 2000, "activation_offloading": False,
        "dequantized_layers": 0, "fast_products": False, "arena_bytes": 0, "feature_cache_bytes": 0,
        "max_steps": 12, "num_epochs": 1.0, "warmup_steps": 2,
        "warmup_ratio": 0.1, "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.01,
        "max_grad_norm": 1.0, "eval_fraction": 0.2, "early_stopping_patience": None, "retention_share": None,
        "kl_weight": None, "seed": 3, "threads": 1,
        "predicted_step_seconds": 0.0,
        "predicted_run_seconds": None, "predicted_energy_mwh": None, "fits_training_window": None,
        "slice_seconds": 86400, "grace_seconds": 5.0, "num_slices": None,
    }  # fmt: skip
    return Plan(**(values | overrides))


def at_step(step: int, action: Callable[[], object]) -> Callable[[Progress], None]:
    """A progress callback that does something once, after this step."""
    done = False

    def callback(progress: Progress) -> None:
        nonlocal done
        if progress.step == step and not done:
            done = True
            action()

    return callback


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
