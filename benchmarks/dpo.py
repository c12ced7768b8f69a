"""DPO against plain torch + transformers + PEFT, step by step: the loss and the margin of every step of two runs.

Ours is `edgetune.train` by a plan, with windows of whole pairs, a cached reference and one pass over the head. The peer
has the same codes, rows, order, initial adapter, learning rates and clipping, and nothing else: each answer is a padded
row of its own, logits exist whole, autograd goes backward, and the reference is the same model with its adapter
disabled, run again in every step. stories260k on rasbt_instruction, where the six rows whose answers are the same and
those that fill more than a window are left out.

Run: python benchmarks/dpo.py [--steps 20] [--grid nf4]      (EDGETUNE_REAL names the folder of models and data)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about, real
from peft_twin import PeftTrainer, peft_model
from torch import nn

import edgetune as et
from edgetune.adapters.attach import attach
from edgetune.data import Row, pack, read_rows, split_eval
from edgetune.models.decoder import load_decoder
from edgetune.planner import Plan
from edgetune.quantizer import quantize
from edgetune.tokenizer import load_tokenizer
from edgetune.training.batches import Batches

WANTED = 1e-4
WINDOW = 512


def compare(plan: Plan, base: Path, data: Path, run: Path) -> list[dict[str, float]]:
    """Losses and margins of both, step by step; `run` is the folder that ours writes."""
    plan = replace(plan, threads=1)
    et.train(plan, base, data=data, out=run, enforce="none")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    peer = _peer(plan, base, data, [line["learning_rate"] for line in steps])
    return [
        {"loss": ours["loss"], "margin": ours["reward_margin"], "peft_loss": loss, "peft_margin": margin}
        for ours, (loss, margin) in zip(steps, peer, strict=True)
    ]


def _peer(plan: Plan, base: Path, data: Path, rates: Sequence[float]) -> list[tuple[float, float]]:
    parameters = attach(load_decoder(base), plan.adapter, plan.seed)
    initial = {name: value.detach().numpy() for name, value in parameters.items()}
    trainer = PeftTrainer(peft_model(base, plan.adapter, initial), plan.weight_decay, plan.max_grad_norm)
    rows, _ = split_eval(read_rows(data, load_tokenizer(base), plan.max_seq_length), plan.eval_fraction, plan.seed)
    batches = Batches(
        pack(rows, plan.max_seq_length, rows.together), batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps, seed=plan.seed,
    )  # fmt: skip
    found = []
    for step, rate in enumerate(rates):
        pairs = [row for window in batches.windows_of_step(step) for row in window.rows]
        trainer.optimizer.zero_grad()
        found_margins = margins(trainer.model, pairs, plan.beta)
        found_loss = loss(found_margins)
        found_loss.backward()
        trainer.update(rate)
        found.append((found_loss.item(), found_margins.mean().item()))
    return found


def margins(model: nn.Module, pairs: Sequence[Row], beta: float) -> torch.Tensor:
    """By how much the chosen answer's reward is above the rejected one's, [pairs]; a pair is two rows, chosen first."""
    policy = _logps(model, pairs)
    with torch.no_grad(), model.disable_adapter():
        reference = _logps(model, pairs)
    rewards = beta * (policy - reference)
    return rewards[0::2] - rewards[1::2]


def loss(margins: torch.Tensor) -> torch.Tensor:
    """DPO's (Rafailov et al., arXiv 2305.18290, equation 7), the mean over pairs."""
    return -nn.functional.logsigmoid(margins).mean()


def _logps(model: nn.Module, rows: Sequence[Row]) -> torch.Tensor:
    """The log-probability of what is learned of each row, all of them padded to the longest."""
    longest = max(map(len, rows))
    ids, labels, mask = (
        torch.from_numpy(np.stack([np.pad(part, (0, longest - len(part)), constant_values=fill) for part in parts]))
        for parts, fill in (
            ([row.input_ids.astype(np.int64) for row in rows], 0),
            ([row.labels.astype(np.int64) for row in rows], -100),
            ([np.ones(len(row), np.int64) for row in rows], 0),
        )
    )
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return -losses.view(len(rows), -1).sum(1)


def write_rows(path: Path, base: Path, count: int) -> Path:
    """The first rows of rasbt_instruction that can be used."""
    given = json.loads((real("rasbt_instruction") / "instruction-data-with-preference.json").read_text("utf-8"))
    tokenizer, lines = load_tokenizer(base), []
    for row in given:
        prompt = f"{row['instruction']}\n{row['input']}\n" if row["input"] else f"{row['instruction']}\n"
        answers = {key: row[key] for key in ("chosen", "rejected")}
        needed = sum(len(tokenizer.encode(prompt + answer)) + 2 for answer in answers.values())
        if row["chosen"] != row["rejected"] and needed <= WINDOW:
            lines.append(json.dumps({"prompt": prompt, **answers}) + "\n")
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


def make_plan(base: Path, data: Path, steps: int) -> Plan:
    config = et.TrainConfig(
        objective="dpo", batch_size=4, max_seq_length=WINDOW, max_steps=steps, learning_rate=2e-3, eval_fraction=0.1
    )
    return et.plan(base, "host", data=data, adapter=et.LoraConfig(r=8), config=config)


def measure(base: Path, data: Path, steps: int, run: Path) -> dict[str, Any]:
    rows = compare(make_plan(base, data, steps), base, data, run)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "max_loss_difference": max(abs(row["loss"] - row["peft_loss"]) for row in rows),
        "max_margin_difference": max(abs(row["margin"] - row["peft_margin"]) for row in rows),
        "first_loss": rows[0]["loss"], "last_loss": rows[-1]["loss"], "peft_last_loss": rows[-1]["peft_loss"],
        "eval_loss": summary["eval_loss"], "eval_reward_accuracy": summary["eval_reward_accuracy"],
        "predicted_peak_bytes": summary["predicted_peak_bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--grid", default="nf4")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = quantize(real("stories260k"), given.grid, Path(folder) / "base")
        data = write_rows(Path(folder) / "rows.jsonl", base, 400)
        figures = measure(base, data, given.steps, Path(folder) / "run")
    passed = figures["max_loss_difference"] <= WANTED
    print(json.dumps({"steps": given.steps, "wanted": WANTED, "pass": passed} | figures | about(), indent=1))


if __name__ == "__main__":
    main()
