"""The runs of `quality.py` for decoders: stories260k learns tinyshakespeare, and to prefer the better of two answers.

PEFT's side is what its users write: transformers' model, quantized by bitsandbytes as it is loaded or in float32, LoRA
r=8 on all linears with PEFT's own start. Rows, windows, order, rates and clipping are edgetune's.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import dpo
import shakespeare
import torch
from machine import real
from peft_twin import PeftTrainer, rate_of
from torch import nn

import edgetune as et
from edgetune.data import pack, read_rows, split_eval
from edgetune.memory import Meter
from edgetune.tokenizer import load_tokenizer
from edgetune.training.batches import Batches

RANK, STEPS = 8, 400
PAIRS, PAIR_EPOCHS, HELD_OUT_PAIRS = 400, 3, 0.25
KEYS = ("trainable_parameters", "adapter_bytes", "measured_peak_bytes", "predicted_peak_bytes")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def edgetune_run(job: dict[str, Any]) -> dict[str, Any]:
    base, out, rows = Path(job["base"]), Path(job["out"]), Path(job["train"])
    plan = _plan(job)
    if job["set"] == "shakespeare":
        found = shakespeare.ours(base, plan, rows, out, shakespeare.held_out(base, _text()))
        figures = {"nll": found["nll"], "seconds": found["seconds"]}
    else:
        started = time.perf_counter()
        et.train(plan, base, data=rows, out=out)
        figures = {"seconds": time.perf_counter() - started}
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    if job["set"] == "preferences":
        figures |= {"reward_accuracy": summary["eval_reward_accuracy"], "eval_loss": summary["eval_loss"]}
    return figures | {key: summary[key] for key in KEYS}


def peft_run(job: dict[str, Any]) -> dict[str, Any]:
    plan, base, rows = _plan(job), Path(job["base"]), Path(job["train"])
    with Meter() as meter:
        model = _peft_model(job)
        if job["set"] == "shakespeare":
            windows = shakespeare.held_out(base, _text())
            figures = shakespeare.theirs(model, base, plan, rows, windows)
        else:
            figures = _preferences(model, base, plan, rows)
    model.save_pretrained(job["out"])
    return figures | {
        "measured_peak_bytes": meter.peak_bytes,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_bytes": (Path(job["out"]) / "adapter_model.safetensors").stat().st_size,
    }


def write_rows(name: str, base: Path, train: Path, test: Path, every: int) -> None:
    """What is learned; `base` has the tokenizer that says which pairs fit into a window. Held out is a part of it."""
    if name == "shakespeare":
        shakespeare.write_rows(train, _text())
    else:
        dpo.write_rows(train, base, PAIRS)


def _text() -> str:
    return (real("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")


def _plan(job: dict[str, Any]) -> et.Plan:
    common: dict[str, Any] = {"gradient_accumulation_steps": 1, "learning_rate": job["rate"], "seed": job["seed"]}
    if job["set"] == "shakespeare":
        config = et.TrainConfig(batch_size=8, max_seq_length=256, max_steps=STEPS, eval_fraction=0.0, **common)
    else:
        config = et.TrainConfig(
            objective="dpo", batch_size=4, max_seq_length=dpo.WINDOW, num_epochs=PAIR_EPOCHS,
            eval_fraction=HELD_OUT_PAIRS, **common,
        )  # fmt: skip
    return et.plan(job["base"], "host", data=job["train"], adapter=et.LoraConfig(r=RANK), config=config)


def _peft_model(job: dict[str, Any]) -> nn.Module:
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(job["seed"])
    options: dict[str, Any] = {}
    if job["system"] == "peft-nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, **options)
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(MODULES), task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora).train()  # no dropout: neither LoRA nor Llama has one here


def _preferences(model: nn.Module, base: Path, plan: et.Plan, data: Path) -> dict[str, float]:
    """DPO's training, then its loss and the share of held-out pairs whose margin is above zero."""
    torch.set_num_threads(plan.threads)
    trainer = PeftTrainer(model, plan.weight_decay, plan.max_grad_norm)
    read = read_rows(data, load_tokenizer(base), plan.max_seq_length)
    rows, held_out = split_eval(read, plan.eval_fraction, plan.seed)
    packed = pack(rows, plan.max_seq_length, rows.together)
    batches = Batches(
        packed, batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps, seed=plan.seed,
    )  # fmt: skip
    plan = plan.with_steps(len(packed))
    assert plan.max_steps is not None and plan.beta is not None
    started = time.perf_counter()
    for step in range(plan.max_steps):
        pairs = [row for window in batches.windows_of_step(step) for row in window.rows]
        trainer.optimizer.zero_grad()
        dpo.loss(dpo.margins(model, pairs, plan.beta)).backward()
        trainer.update(rate_of(plan, step))
    seconds = time.perf_counter() - started
    rest = held_out.rows
    margins = torch.cat([dpo.margins(model, rest[at : at + 8], plan.beta).detach() for at in range(0, len(rest), 8)])
    return {
        "seconds": seconds, "eval_loss": dpo.loss(margins).item(),
        "reward_accuracy": (margins > 0).float().mean().item(),
    }  # fmt: skip
