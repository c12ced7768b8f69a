"""A QLoRA run in transformers + PEFT + bitsandbytes at its best: the process that `memory_vs_peft.py` measures.

Plain float32 training with torch's fused AdamW, clipping and, where the job says so, checkpointing. It writes the
lines that a run of edgetune writes into its `metrics.jsonl`; the first one holds what the process took after its
imports. The windows come from a file, so that nothing else of edgetune runs here.

Run: python benchmarks/peft_train.py JOB       (JSON: the keyword arguments of `train`)
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from peft_twin import PeftTrainer, qlora_model

from edgetune.adapters.lora import LoraConfig
from edgetune.memory import anonymous_bytes

LEARNING_RATE = 2e-4
# What loading a model would import next.
IMPORTS = ("bitsandbytes", "peft", "transformers.models.auto.modeling_auto", "transformers.integrations.bitsandbytes")


def train(
    *, model: str, adapter: dict[str, Any], checkpointing: bool, windows: str, metrics: str, least_steps: int,
    most_seconds: float,
) -> None:  # fmt: skip
    """One step for each entry of the arrays [steps, batch, tokens] in the file `windows`.

    It ends early at the first of `least_steps` or more that is done after `most_seconds` of training.
    """
    for module in IMPORTS:
        importlib.import_module(module)
    with Path(metrics).open("w", encoding="utf-8", buffering=1) as file, np.load(windows) as arrays:
        file.write(json.dumps({"floor_bytes": anonymous_bytes()}) + "\n")
        steps = {name: arrays[name] for name in arrays}
        trainer = PeftTrainer(qlora_model(Path(model), LoraConfig(**adapter), checkpointing=checkpointing), fused=True)
        begun = time.perf_counter()
        for step in range(len(steps["input_ids"])):
            started = time.perf_counter()
            batch = {name: values[step] for name, values in steps.items()}
            loss = trainer.gradients([batch])
            trainer.update(LEARNING_RATE)
            seconds = time.perf_counter() - started
            tokens = int((batch["segment_ids"] >= 0).sum())
            file.write(json.dumps({"step": step + 1, "loss": loss, "tokens": tokens, "seconds": seconds}) + "\n")
            if step + 1 >= least_steps and time.perf_counter() - begun > most_seconds:
                break


if __name__ == "__main__":
    train(**json.loads(sys.argv[1]))
