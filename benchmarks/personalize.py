"""Training on onnxruntime alone beside the torch engine and beside QLoRA in PEFT: peak memory and speed, in one run.

All three train the SmolLM2-135M shape (random weights) on the same windows, a LoRA of r=8 on all linears, batch 1, in
processes of their own and by turns: PEFT with gradient checkpointing on an nf4 base (and without, `peft_whole`),
`edgetune train` on an int4 base with the host's own budget, `edgetune personalize` on the bundle of that base with the
memory that its row of the targets allows as its budget (`ort`: 170 MiB at 128 tokens, a fifth of PEFT's peak at others)
and with the host's own (`ort_whole`). Figures are medians, ratios are medians over the turns. Peak is anonymous + swap
memory of the whole process, from its start to its end.

`sample` is the packaged sample as `edgetune demo` trains it, by both engines: onnxruntime in a cgroup of exactly the
watch's budget, Python included. Accuracy is of whole answers, on phrasings that training does not hold. After 1,200
steps the last bits of two engines have become two trajectories, whose accuracies differ by points either way: `points`
is the mean difference over the seeds.

Run on an idle machine: python benchmarks/personalize.py [--tokens 128 256] [--turns 3] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import about
from memory_vs_peft import (
    RANK,
    Case,
    FailedError,
    Subject,
    make_model,
    make_subject,
    medians,
    prepare_environment,
    run_peft,
    say_run,
    speed,
    watch,
)
from plan_accuracy import ALL

from edgetune import demo, sample
from edgetune.data.prompts import read_examples
from edgetune.runtime.evaluate import exact_match
from edgetune.tokenizer import load_tokenizer

MOST_PEAK_MIB, MOST_PEAK_RATIO, LEAST_SPEED_RATIO = 170, 0.2, 0.8


def make_bundle(model: Path) -> tuple[Path, Path]:
    """The int4 base of a model and its bundle with training graphs, beside it; made where they are missing."""
    base, bundle = model.with_name("int4"), model.with_name("bundle")
    edgetune = [sys.executable, "-m", "edgetune"]
    log = model.with_name("bundle.log")
    if not base.exists():
        watch([*edgetune, "quantize", model, "--grid=int4", f"--out={base}"], log)
    if not bundle.exists():
        watch([*edgetune, "export", base, f"--out={bundle}", "--with-training"], log)
    return base, bundle


def run_engine(verb: str, source: Path, subject: Subject, folder: Path, *flags: str) -> dict[str, Any]:
    """One training by `edgetune train` or `edgetune personalize`."""
    case, out = subject.case, folder / verb
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable, "-m", "edgetune", verb, source, "--device=host", f"--data={subject.rows}", f"--out={out}",
        f"--max-seq-length={case.tokens}", "--batch-size=1", "--gradient-accumulation-steps=1", f"--r={RANK}",
        f"--target-modules={ALL}", "--optimizer=adamw", "--eval-fraction=0", f"--max-steps={case.steps}",
        *flags,
    ]  # fmt: skip
    peak = watch(command, folder / f"{verb}.log", out / "metrics.jsonl", case.warmup_steps)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {
        "peak_bytes": max(peak, summary["measured_peak_bytes"]), "train_loss": summary["train_loss"],
        **speed(case, out / "metrics.jsonl"),
    }  # fmt: skip


def measure(tokens: int, work: Path, turns: int, layers: int | None) -> dict[str, Any]:
    """A row: the three by turns."""
    case = Case("smollm2-135m", {}, tokens=tokens)
    subject = make_subject(case, work, layers)
    folder = subject.rows.parent
    base, bundle = make_bundle(make_model(case.shape, work, layers))
    whole = replace(subject, case=replace(case, checkpointing=False))
    runs: dict[str, list[dict[str, Any]]] = {"peft": [], "peft_whole": [], "torch": [], "ort": [], "ort_whole": []}
    for turn in range(turns):
        found = {"peft": run_peft(subject, folder), "peft_whole": run_peft(whole, folder)}
        most = MOST_PEAK_MIB if tokens == 128 else int(MOST_PEAK_RATIO * found["peft"]["peak_bytes"]) >> 20
        found |= {
            "torch": run_engine("train", base, subject, folder),
            "ort": run_engine("personalize", bundle, subject, folder, f"--budget={most}"),
            "ort_whole": run_engine("personalize", bundle, subject, folder),
        }
        for name, run in found.items():
            say_run(f"{tokens} tokens, turn {turn + 1} of {turns}: {name}", run)
            runs[name].append(run)

    def ratio(figure: str, peer: str) -> float:
        return statistics.median(a[figure] / b[figure] for a, b in zip(runs["ort"], runs[peer], strict=True))

    row: dict[str, Any] = {name: medians(of) for name, of in runs.items()}
    row |= {
        "peak_by_peft": ratio("peak_bytes", "peft"), "peak_by_torch": ratio("peak_bytes", "torch"),
        "speed_by_torch": ratio("tokens_per_second", "torch"), "speed_by_peft": ratio("tokens_per_second", "peft"),
        "peak_by_peft_whole": ratio("peak_bytes", "peft_whole"),
        "speed_by_peft_whole": ratio("tokens_per_second", "peft_whole"),
        "loss_by_torch": ratio("train_loss", "torch"),
    }  # fmt: skip
    if tokens == 128:
        row["met"] = {"peak": row["ort"]["peak_bytes"] <= MOST_PEAK_MIB << 20}
    if tokens == 256:
        row["met"] = {
            "peak_by_peft": row["peak_by_peft"] <= MOST_PEAK_RATIO,
            "speed_by_torch": row["speed_by_torch"] >= LEAST_SPEED_RATIO,
        }
    shutil.rmtree(folder)
    return row


def run_samples(work: Path, steps: int, seeds: list[int]) -> dict[str, Any]:
    """The sample by both engines with each seed."""
    found = {seed: run_sample(work, steps, seed) for seed in seeds}
    points = [100 * (one["ort"]["accuracy"] - one["torch"]["accuracy"]) for one in found.values()]
    accuracy = {name: statistics.fmean(one[name]["accuracy"] for one in found.values()) for name in ("torch", "ort")}
    mean = statistics.fmean(points)
    return {"steps": steps, "seeds": found, "accuracy": accuracy, "points": mean, "met": mean >= -1}


def run_sample(work: Path, steps: int, seed: int) -> dict[str, Any]:
    """The sample by both engines, and the exact answers of each on held-out rows."""
    folder = Path(tempfile.mkdtemp(prefix="sample-", dir=work))
    base, bundle, tuned = (folder / name for name in ("base", "bundle", "tuned"))
    settings = [f"--device={demo.DEVICE}", f"--data={sample.PERSONAL_TRAIN}", f"--max-steps={steps}", f"--seed={seed}"]
    settings += [f"--{name}={value}" for name, value in demo.TRAINING.items()]
    verb("quantize", sample.BASE, "--grid=int4", f"--out={base}")
    verb("export", base, f"--out={bundle}", "--with-training")
    torch = verb("train", base, *settings, f"--out={folder / 'run'}")
    verb("export", folder / "run", f"--out={tuned}")
    same = [f"--{name.replace('_', '-')}={torch[name]}" for name in ("max_seq_length", "gradient_accumulation_steps")]
    same += [f"--optimizer={torch['optimizer']}", "--enforce=cgroup"]
    ort = verb("personalize", bundle, *settings, *same, f"--out={folder / 'personal'}")
    examples = read_examples(sample.PERSONAL_EVAL, load_tokenizer(bundle))
    rows = {}
    for name, summary, judged in (("torch", torch, tuned), ("ort", ort, bundle)):
        correct = exact_match(judged, examples, max_new_tokens=demo.MAX_NEW_TOKENS)["correct"]
        figures = ("budget_bytes", "enforcement", "tokens_per_second", "eval_loss", "cgroup_peak_bytes")
        rows[name] = {key: summary[key] for key in figures} | {
            "peak_bytes": summary["measured_peak_bytes"], "correct": correct, "accuracy": correct / len(examples),
        }  # fmt: skip
    shutil.rmtree(folder)
    return {"rows": len(examples), **rows}


def verb(name: str, *words: str | Path) -> dict[str, Any]:
    """The JSON that a verb prints."""
    command = [sys.executable, "-m", "edgetune", name, *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise FailedError(f"edgetune {name} ended with code {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 256])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--sample-steps", type=int, default=demo.MAX_STEPS, help="0 leaves the sample out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the sample")
    parser.add_argument("--num-hidden-layers", type=int, help="fewer layers than the shape has: a quick look")
    parser.add_argument("--work", type=Path, help="keep the models here for the next time")
    flags = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as temporary:
        work = (flags.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        rows: dict[int | str, Any] = {}
        for tokens in flags.tokens:
            try:
                rows[tokens] = measure(tokens, work, flags.turns, flags.num_hidden_layers)
            except FailedError as error:
                rows[tokens] = {"error": str(error)}
        if flags.sample_steps:
            rows["sample"] = run_samples(work, flags.sample_steps, flags.seeds)
    print(json.dumps({"cases": rows, "num_hidden_layers": flags.num_hidden_layers, **about()}, indent=1))


if __name__ == "__main__":
    main()
