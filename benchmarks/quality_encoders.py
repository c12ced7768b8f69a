"""The runs of `quality.py` for encoders: MiniLM learns intents from ten examples each.

LoRA r=8 on all linears and a linear head on the mean of the last hidden states, batches of 16, 6 epochs.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import real

BATCH, EPOCHS, RANK = 16, 6, 8


def write_rows(name: str, base: Path, train: Path, test: Path, every: int) -> None:
    """Ten examples of each class, and the test rows; `base` is not asked."""
    shutil.copyfile(real(name) / "train_10.jsonl", train)
    test.write_text("".join(json.dumps(row) + "\n" for row in _test_rows(name, every)), encoding="utf-8")


def _test_rows(name: str, every: int) -> Iterator[dict[str, str]]:
    """The test rows whose class is learned; of them each `every`-th."""
    folder = real(name)
    if name == "banking77":
        with (folder / "test.csv").open(newline="", encoding="utf-8") as file:
            rows = [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]
    else:
        lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if row["label"] != "oos"]
    yield from rows[::every]


def edgetune_run(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    import edgetune as et
    from edgetune.adapters.attach import attach, load_tensors
    from edgetune.adapters.head import load_with_head
    from edgetune.data.labeled import labeled, read_labeled_rows
    from edgetune.models.encoder import load_encoder
    from edgetune.tokenizer import load_tokenizer
    from edgetune.training.encoder_step import Task, evaluate, held_out_batches

    config = et.TrainConfig(
        objective="classification", batch_size=BATCH, gradient_accumulation_steps=1, num_epochs=EPOCHS,
        learning_rate=job["rate"], seed=job["seed"], eval_fraction=0.0,
    )  # fmt: skip
    plan = et.plan(job["base"], "host", data=job["train"], adapter=et.LoraConfig(r=RANK), config=config)
    started = time.perf_counter()
    run = et.train(plan, job["base"], data=job["train"], out=job["out"])
    seconds, summary = time.perf_counter() - started, run.summary
    encoder = load_encoder(job["base"])
    adapter, tensors, head = load_with_head(run.folder, encoder.config, summary)
    assert head is not None
    load_tensors(attach(encoder, adapter), tensors)
    task = Task(
        encoder, "classification", {n: torch.nn.Parameter(torch.from_numpy(v)) for n, v in head.tensors.items()}
    )
    rows = read_labeled_rows(job["test"], load_tokenizer(job["base"]), 512, "classification", classes=head.classes)
    _, accuracy = evaluate(encoder, task, held_out_batches(labeled(rows), 32, 1024), lambda: None)
    keys = ("trainable_parameters", "adapter_bytes", "measured_peak_bytes", "predicted_peak_bytes")
    return {"accuracy": accuracy, "seconds": seconds} | {key: summary[key] for key in keys}


def peft_run(job: dict[str, Any]) -> dict[str, Any]:
    import peft
    import torch
    from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

    torch.manual_seed(job["seed"])
    folder, four_bit = job["model"], job["system"] == "peft-nf4"
    options: dict[str, Any] = {}
    if four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, **options)
    modules = ["query", "key", "value", "dense"]
    lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules, exclude_modules=".*pooler.*")
    encoder = peft.get_peft_model(encoder, lora).eval()  # no dropout, as edgetune has none
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = ([json.loads(line) for line in Path(job[key]).read_text().splitlines()] for key in ("train", "test"))
    classes = sorted({row["label"] for row in train})
    head = torch.nn.Linear(384, len(classes))
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.bias)

    def logits(rows: list[dict[str, str]]) -> torch.Tensor:
        given = tokenizer([row["text"] for row in rows], padding="longest", truncation=True, return_tensors="pt")
        hidden = encoder(**given).last_hidden_state
        mask = given["attention_mask"][..., None].float()
        return head((hidden * mask).sum(1) / mask.sum(1))

    parameters = [p for p in (*encoder.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job["rate"], weight_decay=0.0)
    from edgetune.data import epoch_order
    from edgetune.training.schedule import learning_rate

    order = [int(index) for epoch in range(EPOCHS) for index in epoch_order(len(train), job["seed"], epoch)]
    steps = -(-len(order) // BATCH)
    started = time.perf_counter()
    for step in range(steps):
        rows = [train[index] for index in order[step * BATCH : (step + 1) * BATCH]]
        targets = torch.tensor([classes.index(row["label"]) for row in rows])
        loss = torch.nn.functional.cross_entropy(logits(rows), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = learning_rate(
            step, peak=job["rate"], warmup_steps=round(0.03 * steps), max_steps=steps, schedule="cosine"
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    seconds, right = time.perf_counter() - started, 0
    with torch.no_grad():
        for start in range(0, len(test), 32):
            rows = test[start : start + 32]
            found = logits(rows).argmax(1).tolist()
            right += sum(classes[i] == row["label"] for i, row in zip(found, rows, strict=True))
    encoder.save_pretrained(job["out"])
    size = (Path(job["out"]) / "adapter_model.safetensors").stat().st_size
    trained = sum(p.numel() for p in parameters)
    size += 4 * sum(p.numel() for p in head.parameters())
    return {
        "accuracy": right / len(test), "seconds": seconds, "trainable_parameters": trained, "adapter_bytes": size
    }  # fmt: skip


def features_run(job: dict[str, Any]) -> dict[str, Any]:
    from edgetune.training.feature_based import train_feature_based

    started = time.perf_counter()
    made = train_feature_based(job["base"], job["train"])
    seconds = time.perf_counter() - started
    size = made.weight.numel() + made.bias.numel()
    accuracy = made.accuracy(made.read(job["test"]))
    return {"accuracy": accuracy, "seconds": seconds, "trainable_parameters": size, "adapter_bytes": 4 * size}
