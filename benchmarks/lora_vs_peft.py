"""LoRA on an nf4 base against PEFT + bitsandbytes: the loss of every step and the gradient of every adapter tensor.

Both sides get the same codes, rows, order, initial adapter, learning rates and clipping; see `peft_twin`. The losses
are those of two separate runs. Gradients are compared at the same adapter, and for the record in the separate runs too.
Two models: stories260k on tinyshakespeare, and a random one of odd shapes, with two micro-batches a step.

Run: python benchmarks/lora_vs_peft.py [--steps 20]          (EDGETUNE_REAL names the folder that holds stories260k)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import about, real
from peft_twin import Batch, compare

from edgetune.data import Row, pack
from edgetune.quantizer import quantize
from edgetune.tokenizer import load_tokenizer
from edgetune.training.batches import Batches

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import tiny_config, write_model

WANTED = 1e-4


def windows_of(ids: np.ndarray, length: int, batch_size: int, accumulation: int) -> Batches:
    """Rows of differing lengths from one long sequence, packed, all of it supervised."""
    rng = np.random.default_rng(0)
    cuts = np.cumsum(rng.integers(length // 4, length, 4000))
    pieces = np.split(ids.astype(np.int32), cuts[cuts < len(ids)])[:-1]
    rows = [Row(piece, piece, line) for line, piece in enumerate(pieces)]
    return Batches(
        pack(rows, length), batch_size=batch_size, gradient_accumulation_steps=accumulation, seed=0
    )  # fmt: skip


def stories(folder: Path) -> tuple[Path, Batches]:
    base = quantize(real("stories260k"), "nf4", folder / "stories260k")
    text = (real("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")[:200_000]
    return base, windows_of(np.array(load_tokenizer(base).encode(text)), 256, 8, 1)


def odd(folder: Path) -> tuple[Path, Batches]:
    config = tiny_config("qwen2", num_hidden_layers=3)
    base = quantize(write_model(folder / "odd-model", config), "nf4", folder / "odd")
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], 20_000)
    return base, windows_of(ids, 61, 3, 2)


def measure(base: Path, batches: Batches, steps: int) -> dict[str, Any]:
    def of_step(step: int) -> list[Batch]:
        return [dict(batch) for batch in batches.of_step(step)[0]]

    apart = compare(base, of_step, steps=steps)
    together = compare(base, of_step, steps=steps, same_adapter=True)
    return {
        "max_loss_difference": max(abs(row["loss"] - row["peft_loss"]) for row in apart),
        "max_gradient_difference": max(row["gradient_difference"] for row in together),
        "max_gradient_difference_of_separate_runs": max(row["gradient_difference"] for row in apart),
        "first_loss": apart[0]["loss"],
        "last_loss": apart[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        models = {name: measure(*make(Path(folder)), steps) for name, make in (("stories260k", stories), ("odd", odd))}
    passed = all(
        figures["max_loss_difference"] <= WANTED and figures["max_gradient_difference"] <= WANTED
        for figures in models.values()
    )
    print(json.dumps({"steps": steps, "wanted": WANTED, "pass": passed, "models": models} | about(), indent=1))


if __name__ == "__main__":
    main()
