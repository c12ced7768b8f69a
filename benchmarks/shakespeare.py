"""stories260k learns tinyshakespeare: held-out loss per token for both grids, beside the same run in PEFT.

LoRA r=8 on all linears, 400 steps of 8 x 256 tokens. Ours is `edgetune.plan` and `edgetune.train` on the `host`
profile; PEFT's has the same base, rows, order, initial adapter and learning rates (`peft_twin`; its base is
bitsandbytes' Linear4bit for nf4 and the dequantized weights for int4). Held out are 20 pieces of the last tenth of the
text: 800 characters every 5,000 from 1,000,000 on, each cut at 512 tokens. Memory is not measured here: bitsandbytes
and transformers are in the process.

Run: python benchmarks/shakespeare.py [--steps 400]          (EDGETUNE_REAL names the folder of models and texts)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about, real
from peft_twin import PeftTrainer, loss_sum, peft_model, rate_of
from torch import nn

import edgetune as et
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import load_adapter
from edgetune.data import Row, Window, pack, read_rows
from edgetune.models.decoder import load_decoder
from edgetune.tokenizer import load_tokenizer
from edgetune.training.batches import Batches, in_batches
from edgetune.training.forward import evaluate

TRAINING_CHARACTERS, PIECE_CHARACTERS, CONTEXT = 1_000_000, 480, 512


def write_rows(path: Path, text: str) -> Path:
    pieces = (text[i : i + PIECE_CHARACTERS] for i in range(0, TRAINING_CHARACTERS, PIECE_CHARACTERS))
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces), encoding="utf-8")
    return path


def held_out(base: Path, text: str) -> list[Window]:
    tokenizer, rows = load_tokenizer(base), []
    for line, start in enumerate(range(1_000_000, 1_100_000, 5_000)):
        ids = np.array(tokenizer.encode(text[start : start + 800])[:CONTEXT], np.int32)
        rows.append(Row(ids, ids, line))
    return pack(rows, CONTEXT)


def ours(base: Path, plan: et.Plan, rows: Path, out: Path, windows: Sequence[Window]) -> dict[str, Any]:
    started = time.perf_counter()
    run = et.train(plan, base, data=rows, out=out)
    seconds = time.perf_counter() - started
    decoder = load_decoder(base)
    before = nll(decoder, windows)
    config, tensors = load_adapter(run.folder, decoder.config)
    load_tensors(attach(decoder, config), tensors)
    keys = ("train_loss", "tokens_per_second", "adapter_sha256")
    return {"nll_before": before, "nll": nll(decoder, windows), "seconds": seconds} | {k: run.summary[k] for k in keys}


def nll(decoder: Any, windows: Sequence[Window]) -> float:
    return evaluate(decoder, in_batches(windows, 4), check=lambda: None)


def twin(base: Path, plan: et.Plan) -> nn.Module:
    """PEFT's model with the codes of the base and the adapter that the plan starts with."""
    initial = attach(load_decoder(base), plan.adapter, plan.seed)
    return peft_model(base, plan.adapter, {name: value.detach().numpy() for name, value in initial.items()})


def theirs(model: nn.Module, base: Path, plan: et.Plan, rows: Path, windows: Sequence[Window]) -> dict[str, Any]:
    torch.set_num_threads(plan.threads)
    trainer = PeftTrainer(model, plan.weight_decay, plan.max_grad_norm)
    packed = pack(read_rows(rows, load_tokenizer(base), plan.max_seq_length), plan.max_seq_length)
    batches = Batches(
        packed, batch_size=plan.batch_size, gradient_accumulation_steps=plan.gradient_accumulation_steps,
        seed=plan.seed,
    )  # fmt: skip
    plan = plan.with_steps(len(packed))
    assert plan.max_steps is not None
    started = time.perf_counter()
    for step in range(plan.max_steps):
        trainer.gradients([dict(batch) for batch in batches.of_step(step)[0]])
        trainer.update(rate_of(plan, step))
    seconds = time.perf_counter() - started
    # With gradients on: without, bitsandbytes 0.50 takes another path on a CPU, which refuses most shapes.
    total = sum(loss_sum(trainer.model, dict(batch)).item() for batch in in_batches(windows, 4))
    return {"nll": total / sum(row.num_supervised for window in windows for row in window.rows), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    text = (real("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    wishes = et.TrainConfig(
        batch_size=8, gradient_accumulation_steps=1, max_seq_length=256, max_steps=steps, learning_rate=2e-3,
        eval_fraction=0.0,
    )  # fmt: skip
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder / "rows.jsonl", text)
        for grid in ("nf4", "int4"):
            base = et.quantize(real("stories260k"), grid, folder / grid)
            windows = held_out(base, text)
            plan = et.plan(base, "host", data=rows, adapter=et.LoraConfig(r=8), config=wishes)
            mine = ours(base, plan, rows, folder / f"run-{grid}", windows)
            peft = theirs(twin(base, plan), base, plan, rows, windows)
            figures[grid] = {"edgetune": mine, "peft": peft, "difference": mine["nll"] - peft["nll"]}
    print(json.dumps({"steps": steps, "tokens_per_step": 8 * 256, "nll": figures} | about(), indent=1))


if __name__ == "__main__":
    main()
