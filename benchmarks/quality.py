"""MiniLM learns intents from ten examples each: accuracy on the whole test set, edgetune beside PEFT.

Both get the same rows, order, learning rates, steps and kind of head: LoRA r=8 on all linears, a linear head on the
mean of the last hidden states, batches of 16, 6 epochs, AdamW, cosine. edgetune trains on its nf4 and int4 grids; PEFT
on float32 weights and on bitsandbytes' NF4 (float32 compute). Of the learning rates of the grid the best mean over the
seeds is shown, for each system its own. A logistic regression on frozen features stands beside them.

Each run is a process of its own, so that its anonymous peak is its own; the peak is sampled from outside.

Run: python benchmarks/quality.py [--cases banking77/edgetune-nf4,…] [--seeds 0,1,2] [--rates 1e-3,2e-3]
     [--every 1] [--out quality.json]        (EDGETUNE_REAL names the folder of models and texts)

Results are added to --out, and what is there already is not run again, so parts of it can be run at any time.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from machine import about, real

SETS = ("banking77", "clinc150")
SYSTEMS = ("edgetune-nf4", "edgetune-int4", "peft-nf4", "peft-fp32", "features-nf4", "features-int4")
BATCH, EPOCHS, RANK = 16, 6, 8


def test_rows(name: str, every: int) -> Iterator[dict[str, str]]:
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


def feature_run(job: dict[str, Any]) -> dict[str, Any]:
    from edgetune.training.feature_based import train_feature_based

    started = time.perf_counter()
    made = train_feature_based(job["base"], job["train"])
    seconds = time.perf_counter() - started
    size = made.weight.numel() + made.bias.numel()
    accuracy = made.accuracy(made.read(job["test"]))
    return {"accuracy": accuracy, "seconds": seconds, "trainable_parameters": size, "adapter_bytes": 4 * size}


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """A run in a process of its own, with the peak of its anonymous and swapped bytes while it trains."""
    from edgetune.memory import Meter

    runs = {"edgetune": edgetune_run, "peft": peft_run, "features": feature_run}
    with Meter() as meter:
        found = runs[job["system"].partition("-")[0]](job)
    return {"measured_peak_bytes": meter.peak_bytes} | found


def run_case(name: str, system: str, rate: float, seed: int, folder: Path, every: int) -> dict[str, Any]:
    base = folder / system.partition("-")[2]
    test = folder / f"{name}.jsonl"
    if not test.exists():
        test.write_text("".join(json.dumps(row) + "\n" for row in test_rows(name, every)), encoding="utf-8")
    if not system.startswith("peft") and not base.exists():
        from edgetune.quantizer import quantize

        quantize(real("minilm"), base.name, base)
    job = {
        "system": system, "rate": rate, "seed": seed, "base": str(base), "model": str(real("minilm")),
        "train": str(real(name) / "train_10.jsonl"), "test": str(test),
        "out": str(folder / f"{name}-{system}-{rate}-{seed}"),
    }  # fmt: skip
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"case": f"{name}/{system}", "rate": rate, "seed": seed, **found}


def table(runs: list[dict[str, Any]]) -> str:
    """For each case the rate with the best mean accuracy: mean and deviation over seeds, and what a run costs."""
    lines = [f"{'':<26}{'rate':>8}{'accuracy':>18}{'parameters':>12}{'adapter':>12}{'peak MiB':>10}{'seconds':>9}"]
    for case in dict.fromkeys(run["case"] for run in runs):
        by_rate: dict[float, list[dict[str, Any]]] = {}
        for run in runs:
            if run["case"] == case:
                by_rate.setdefault(run["rate"], []).append(run)
        rate = max(by_rate, key=lambda rate: statistics.fmean(run["accuracy"] for run in by_rate[rate]))
        of = by_rate[rate]
        accuracy = [run["accuracy"] for run in of]
        spread = (
            f"{statistics.fmean(accuracy):.3f} ± {statistics.stdev(accuracy) if len(of) > 1 else 0:.3f} ({len(of)})"
        )
        peak = max(run["measured_peak_bytes"] for run in of) / 2**20
        seconds = statistics.median(run["seconds"] for run in of)
        first = of[0]
        lines.append(
            f"{case:<26}{rate:>8g}{spread:>18}{first['trainable_parameters']:>12,}{first['adapter_bytes']:>12,}"
            f"{peak:>10.0f}{seconds:>9.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    every_case = [f"{name}/{system}" for name in SETS for system in SYSTEMS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(every_case))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rates", default="1e-3,2e-3,4e-3")
    parser.add_argument("--every", type=int, default=1, help="take each n-th test row")
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measured(json.loads(arguments.job))))
        return
    runs: list[dict[str, Any]] = json.loads(arguments.out.read_text())["runs"] if arguments.out.exists() else []
    done = {(run["case"], run["rate"], run["seed"]) for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases.split(","):
            name, _, system = case.partition("/")
            fixed = system.startswith("features")  # nothing in it is random, and it has no rate
            for rate in [0.0] if fixed else map(float, arguments.rates.split(",")):
                for seed in [0] if fixed else map(int, arguments.seeds.split(",")):
                    if (case, rate, seed) in done:
                        continue
                    runs.append(run_case(name, system, rate, seed, Path(folder), arguments.every))
                    print(runs[-1], file=sys.stderr)
                    arguments.out.write_text(json.dumps(about() | {"every": arguments.every, "runs": runs}, indent=1))
    print(table(runs))


if __name__ == "__main__":
    main()
