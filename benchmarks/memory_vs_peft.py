"""Peak memory and speed of `edgetune train` beside QLoRA in transformers + PEFT + bitsandbytes, in one run.

Both train the same shape (random weights, nf4) on the same windows, with the same adapter and threads, each in a
process of its own, by turns: PEFT, edgetune, PEFT, edgetune, ... Figures are medians, ratios are medians over pairs.

Peak is anonymous + swap memory of the process tree from its start to its end, the planning of `edgetune train` and the
loading of PEFT included. It is sampled from here: every 4 ms until the warm-up steps are done, from then on ten times a
second, so that watching takes no time from the steps whose time counts. Speed is tokens, padding apart, over the median
of those steps. PEFT is at its best: its codes stay mapped and nothing is computed in vain (`peft_twin.qlora_model`).

A row counts only where the mathematics is the same: there losses and gradients of the adapter are compared, at the same
adapter, with edgetune walking through the blocks as it did in the measured run, and PEFT given the dequantized
embedding and head. `gflops` is what `step_work` counts over the measured step, recomputation included, beside the best
of torch's products here, as fast as edgetune makes them.

Everything runs on two cores and two threads; the machine should be otherwise idle. About 40 minutes.

Run: python benchmarks/memory_vs_peft.py [--cases smollm2-135m quantize] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from machine import REPOSITORY, about
from plan_accuracy import ALL, WORDS
from shapes import write_shape

from edgetune import host, sample
from edgetune.adapters.lora import LoraConfig
from edgetune.data import pack, read_rows
from edgetune.memory import MIB, SAMPLE_SECONDS, anonymous_bytes, format_mib
from edgetune.models import load_config
from edgetune.models.config import DecoderConfig
from edgetune.planner import Plan
from edgetune.planner.job import Job, row_step
from edgetune.planner.work import step_work
from edgetune.products import fast_products
from edgetune.tokenizer import load_tokenizer
from edgetune.training.backprop import Path as Walk
from edgetune.training.batches import Batches
from edgetune.weights import open_weights

THREADS = 2
RANK = 8
SLOW_SAMPLE_SECONDS = 0.1
EQUAL = 1e-4  # relative
GEMM_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (256, 2048, 8192))
# A process that keeps one core busy, and ends with the one that started it.
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**7): pass\n"
QUANTIZED = "llama-3.2-1b"  # the shape whose quantization is measured
QUANTIZE = "quantize"


@dataclass(frozen=True)
class Case:
    """A row of the table. `at_most` and `at_least` are its targets by the name of the row's figure."""

    shape: str
    at_most: dict[str, float]
    at_least: dict[str, float] = field(default_factory=dict)
    tokens: int = 256
    share_of_blocks: float = 1.0
    """The adapter's, from the top."""
    checkpointing: bool = True
    """PEFT's."""
    budget_share: float | None = None
    """Of PEFT's own peak, as our budget; None is the least that can be."""
    flags: tuple[str, ...] = ()
    """More of `edgetune train`."""
    busy: bool = False
    steps: int = 9
    warmup_steps: int = 3
    windows: int | None = None
    """Of an epoch; None is as many as there are steps."""
    most_seconds: float = 120.0
    """PEFT stops after them, once it has a step after the warm-up."""
    pairs: int = 3


CASES = {
    "smollm2-135m": Case("smollm2-135m", {"peak_ratio": 0.35}, {"speed_ratio": 1.15}, budget_share=0.35),
    "least": Case("smollm2-135m", {"peak_ratio": 0.25}, {"speed_ratio": 1.15}),
    "qwen2.5-0.5b": Case(
        "qwen2.5-0.5b", {"peak_ratio": 0.20}, {"speed_ratio": 1.15}, budget_share=0.20, steps=5, warmup_steps=2
    ),
    "llama-3.2-1b": Case("llama-3.2-1b", {"peak_bytes": 1024 * MIB}, steps=3, warmup_steps=2, pairs=1),
    # The second epoch and those after it, from the feature cache.
    "top-third": Case(
        "smollm2-135m", {"peak_ratio": 0.35}, {"speed_ratio": 1.5}, share_of_blocks=1 / 3, checkpointing=False,
        budget_share=0.35, windows=8, warmup_steps=8, steps=24,
    ),
    "1024-tokens": Case(
        "smollm2-135m", {"peak_ratio": 0.25}, {"speed_ratio": 1.15}, budget_share=0.25, tokens=1024,
        steps=5, warmup_steps=2,
    ),
    "busy": Case(
        "smollm2-135m", {}, {"speed_ratio": 3.0}, budget_share=1.0, busy=True,
        steps=6, warmup_steps=1, most_seconds=45.0, pairs=5,
    ),
    "same-memory": Case(
        "smollm2-135m", {"peak_ratio": 1.0}, {"speed_ratio": 1.3}, checkpointing=False, budget_share=1.0
    ),
}  # fmt: skip


class FailedError(Exception):
    """A measured process did not end as it should."""


@dataclass(frozen=True)
class Subject:
    """What a case trains: the bases, the rows, and the same windows for PEFT in the order of edgetune's steps."""

    case: Case
    base: Path
    dense: Path
    """With dense embeddings, as transformers loads it."""
    adapter: LoraConfig
    rows: Path
    windows: Path
    batches: Batches


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a fresh process: what it leaves behind in memory and threads ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def watch(command: Sequence[str | Path], log: Path, metrics: Path | None = None, warmup_steps: int = 0) -> int:
    """Run a command to its end; returns the peak of its process tree in bytes.

    Raises:
        FailedError: it ended with another code than 0; the message has the end of what it said.
    """
    peak = 0
    with log.open("wb") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=output)
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_bytes(process.pid))
                warm = metrics is not None and len(step_lines(metrics)) >= warmup_steps
                time.sleep(SLOW_SAMPLE_SECONDS if warm else SAMPLE_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise FailedError(f"{command[1]} {command[2]} ... ended with code {process.returncode}:\n{said}")
    return peak


def step_lines(metrics: Path) -> list[dict[str, Any]]:
    """The steps in a metrics.jsonl so far; a line that is being written is left out."""
    with contextlib.suppress(FileNotFoundError):
        whole = [line for line in metrics.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
        return [json.loads(line) for line in whole if '"seconds"' in line]
    return []


@contextlib.contextmanager
def competitor(wanted: bool) -> Iterator[None]:
    """One busy process beside the measured one."""
    if not wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def make_model(shape: str, work: Path, num_hidden_layers: int | None) -> Path:
    """The folder of a shape with random weights, made where it is missing."""
    model = work / (shape if num_hidden_layers is None else f"{shape}-{num_hidden_layers}") / "model"
    if not (model / "tokenizer_config.json").exists():  # the last file that is written
        say(f"{shape}: writing random weights")
        write_shape(shape, model, num_hidden_layers=num_hidden_layers)
    return model


def make_bases(model: Path) -> tuple[Path, Path]:
    """base/, and base/ with dense embeddings, beside a model; made where they are missing."""
    base, dense = model.with_name("base"), model.with_name("dense")
    for out, flags in ((base, []), (dense, ["--dense-embeddings"])):
        if not out.exists():
            say(f"{model.parent.name}: quantizing into {out.name}/")
            watch([*quantize_command(model, out), *flags], model.with_name("quantize.log"))
    return base, dense


def quantize_command(model: Path, out: Path) -> list[str | Path]:
    return [sys.executable, "-m", "edgetune", "quantize", model, "--grid=nf4", f"--out={out}", "--force"]


def make_subject(case: Case, work: Path, num_hidden_layers: int | None) -> Subject:
    """Bases and rows of a case: texts of random words, each of them one whole window."""
    base, dense = make_bases(make_model(case.shape, work, num_hidden_layers))
    folder = Path(tempfile.mkdtemp(prefix="rows-", dir=work))
    rows, rng = folder / "rows.jsonl", np.random.default_rng(0)
    with rows.open("w", encoding="utf-8") as file:
        for _ in range(case.windows or case.steps):
            text = " ".join(rng.choice(WORDS.split(), case.tokens))[: case.tokens - 1]  # the end token is the last one
            file.write(json.dumps({"text": text}) + "\n")
    windows = pack(read_rows(rows, load_tokenizer(base), case.tokens), case.tokens)
    assert {(len(window.rows), window.num_tokens) for window in windows} == {(1, case.tokens)}
    batches = Batches(windows, batch_size=1, gradient_accumulation_steps=1, seed=0)
    steps = [batches.of_step(step)[0][0] for step in range(case.steps)]
    np.savez(folder / "windows.npz", **{name: np.stack([step[name] for step in steps]) for name in steps[0]})
    model = load_config(base)
    first = model.num_hidden_layers - max(1, round(case.share_of_blocks * model.num_hidden_layers))
    layers = tuple(range(first, model.num_hidden_layers))
    adapter = LoraConfig(r=RANK, layers_to_transform=layers).resolved(model)
    return Subject(case, base, dense, adapter, rows, folder / "windows.npz", batches)


def speed(case: Case, metrics: Path) -> dict[str, float]:
    """Tokens per second over the median step after the warm-up."""
    lines = step_lines(metrics)[case.warmup_steps :]
    seconds = statistics.median(line["seconds"] for line in lines)
    return {"timed_steps": len(lines), "step_seconds": seconds, "tokens_per_second": lines[0]["tokens"] / seconds}


def run_peft(subject: Subject, folder: Path) -> dict[str, Any]:
    """One training by PEFT."""
    case, metrics = subject.case, folder / "peft.jsonl"
    metrics.unlink(missing_ok=True)
    job = {
        "model": str(subject.dense), "adapter": asdict(subject.adapter), "checkpointing": case.checkpointing,
        "windows": str(subject.windows), "metrics": str(metrics), "least_steps": case.warmup_steps + 1,
        "most_seconds": case.most_seconds,
    }  # fmt: skip
    command = [sys.executable, Path(__file__).with_name("peft_train.py"), json.dumps(job)]
    with competitor(case.busy):
        peak = watch(command, folder / "peft.log", metrics, case.warmup_steps)
    floor = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])["floor_bytes"]
    return {"peak_bytes": peak, "floor_bytes": floor, **speed(case, metrics)}


def run_edgetune(subject: Subject, folder: Path, budget: str) -> dict[str, Any]:
    """One training by edgetune, as its command line does it."""
    case, adapter, out = subject.case, subject.adapter, folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    layers = adapter.layers_to_transform or ()
    command = [
        sys.executable, "-m", "edgetune", "train", subject.base, "--device=host", f"--data={subject.rows}",
        f"--out={out}", f"--budget={budget}", f"--max-seq-length={case.tokens}", "--batch-size=1",
        "--gradient-accumulation-steps=1", f"--r={RANK}", f"--target-modules={ALL}",
        f"--layers={layers[0]}-{layers[-1]}", "--optimizer=adamw", "--eval-fraction=0", f"--max-steps={case.steps}",
        *case.flags,
    ]  # fmt: skip
    metrics = out / "metrics.jsonl"
    with competitor(case.busy):
        peak = watch(command, folder / "edgetune.log", metrics, case.warmup_steps)
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    names = (
        "floor_bytes", "budget_bytes", "predicted_peak_bytes", "recompute_layers", "tile_weights", "fast_products",
        "threads",
    )  # fmt: skip
    return {
        # Its own meter samples quickly to the end.
        "peak_bytes": max(peak, summary["measured_peak_bytes"]),
        **{name: summary[name] for name in names},
        **speed(case, metrics),
    }


def step_flops(run: Path) -> float:
    """What the cost model counts for one step of a run."""
    plan = Plan.from_dict(json.loads((run / "plan.json").read_text(encoding="utf-8")))
    job = Job(
        model=plan.model_config, adapter=plan.adapter, grid=plan.grid, batch_size=plan.batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps, max_seq_length=plan.max_seq_length,
        recompute_layers=plan.recompute_layers, tile_weights=plan.tile_weights,
        activation_offloading=plan.activation_offloading, dequantized_layers=plan.dequantized_layers,
        optimizer=plan.optimizer, threads=plan.threads,
        step_rule=plan.step_rule, cached_windows=int(plan.feature_cache_bytes > 0),
        supervised_per_window=plan.max_seq_length - 1,
    )  # fmt: skip
    return step_work(job).flops


def equality(subject: Subject, plan: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of the loss, and of the gradient of an adapter tensor, over two steps."""
    from peft_twin import compare, qlora_model, take_embeddings

    peer = qlora_model(subject.dense, subject.adapter, checkpointing=subject.case.checkpointing)
    take_embeddings(peer, subject.base)
    walk = Walk(subject.adapter.first_block, int(plan["recompute_layers"]), row_step=row_step(THREADS))
    rows = compare(
        subject.base, lambda step: [dict(batch) for batch in subject.batches.of_step(step)[0]], steps=2,
        config=subject.adapter, same_adapter=True, model=peer, walk=walk,
        fast_positions=subject.case.tokens if plan["fast_products"] else 0,
    )  # fmt: skip
    return {
        "loss": max(abs(row["loss"] / row["peft_loss"] - 1) for row in rows),
        "gradients": max(row["gradient_difference"] for row in rows),
    }


def gemm() -> dict[str, Any]:
    """The fp32 GEMM peak of these threads: GFLOP/s of `fast_products` by shape m x k x n, the best of ten each."""
    import torch

    found = {}
    for m, k, n in GEMM_SHAPES:
        a, b, out = torch.rand(m, k), torch.rand(k, n), torch.empty(m, n)
        seconds = math.inf
        for _ in range(12):
            started = time.perf_counter()
            with fast_products():
                torch.mm(a, b, out=out)
            seconds = min(seconds, time.perf_counter() - started)
        found[f"{m}x{k}x{n}"] = 2 * m * k * n / seconds / 1e9
    return {"gflops": max(found.values()), "by_shape": found, "threads": torch.get_num_threads()}


def what_peft_lacks(subject: Subject) -> str | None:
    """Why PEFT cannot run here: a generous guess of its need against the memory available. None where it can."""
    model = load_config(subject.dense)
    assert isinstance(model, DecoderConfig)
    tables = 4 * model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    logits = 4 * model.vocab_size * subject.case.tokens
    needed = (subject.dense / "model.safetensors").stat().st_size + tables + 4 * logits + 1024 * MIB
    available = min(int(psutil.virtual_memory().available), host.total_bytes())
    return None if needed <= available else f"needs {format_mib(needed)}, {format_mib(available)} are available"


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each figure's median over the runs, and the runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {"runs": runs}


def verdict(case: Case, row: dict[str, Any]) -> dict[str, bool]:
    """Which of the targets are met, by the name of the figure; and whether the mathematics is the same."""
    met = {name: row[name] <= most for name, most in case.at_most.items()}
    met |= {name: row[name] >= least for name, least in case.at_least.items()}
    return met | ({"difference": max(row["difference"].values()) <= EQUAL} if "difference" in row else {})


def measure(name: str, case: Case, work: Path, pairs: int, layers: int | None, gemm_gflops: float) -> dict[str, Any]:
    """A row: pairs of runs by turns, then the comparison of the mathematics."""
    subject = make_subject(case, work, layers)
    folder = subject.rows.parent
    left_out = what_peft_lacks(subject)
    theirs: list[dict[str, Any]] = []
    ours: list[dict[str, Any]] = []
    for pair in range(pairs):
        if left_out is None:
            theirs.append(run_peft(subject, folder))
            say_run(f"{name}, pair {pair + 1} of {pairs}: PEFT", theirs[-1])
        budget = "min"
        if case.budget_share is not None and theirs:
            budget = str(math.floor(case.budget_share * theirs[-1]["peak_bytes"] / MIB))
        ours.append(run_edgetune(subject, folder, budget))
        say_run(f"{name}, pair {pair + 1} of {pairs}: edgetune", ours[-1])
    mine = medians(ours)
    gflops = step_flops(folder / "run") / mine["step_seconds"] / 1e9
    row: dict[str, Any] = {
        "shape": case.shape, "tokens": case.tokens, "adapted_blocks": len(subject.adapter.layers_to_transform or ()),
        "peft_checkpointing": case.checkpointing, "steps": case.steps, "warmup_steps": case.warmup_steps,
        "edgetune": mine, "gflops": gflops, "share_of_gemm_peak": gflops / gemm_gflops,
        "peak_bytes": mine["peak_bytes"],
    }  # fmt: skip
    if left_out is None:
        found = list(zip(ours, theirs, strict=True))
        row["peft"] = medians(theirs)
        row["peak_ratio"] = statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in found)
        row["speed_ratio"] = statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in found)
        row["difference"] = in_child(equality, subject, ours[-1])
        say(f"{name}: relative difference {row['difference']}")
    else:
        row["peft_left_out"] = left_out
    row |= {"at_most": case.at_most, "at_least": case.at_least, "met": verdict(case, row)}
    shutil.rmtree(folder)
    return row


def say_run(what: str, run: dict[str, Any]) -> None:
    say(f"{what} {format_mib(run['peak_bytes'])}, {run['tokens_per_second']:.1f} tokens/s")


def quantization(work: Path, num_hidden_layers: int | None) -> dict[str, Any]:
    """The peak of `edgetune quantize` above its floor, in largest tensors: as stored (bfloat16), and as float32.

    The floor is the same command's peak on the packaged sample: the imports, and tensors of a few hundred KiB.
    """
    model = make_model(QUANTIZED, work, num_hidden_layers)
    floor = watch(quantize_command(sample.BASE, work / "sample"), work / "sample.log")
    started = time.perf_counter()
    peak = watch(quantize_command(model, model.with_name("base")), model.with_name("quantize.log"))
    seconds = time.perf_counter() - started
    infos = open_weights(model).values()
    largest = {
        "stored": max(info.nbytes for info in infos), "float32": max(4 * math.prod(info.shape) for info in infos)
    }  # fmt: skip
    in_tensors = {name: (peak - floor) / size for name, size in largest.items()}
    say(f"quantize: peak {format_mib(peak)}, floor {format_mib(floor)}, above it in largest tensors {in_tensors}")
    return {
        "shape": QUANTIZED, "peak_bytes": peak, "floor_bytes": floor, "seconds": seconds,
        "largest_tensor_bytes": largest, "above_floor_in_largest_tensors": in_tensors, "at_most": 1.5,
        "met": {name: value <= 1.5 for name, value in in_tensors.items()},
    }  # fmt: skip


def prepare_environment() -> None:
    """The same cores, threads and otherwise default settings for every process that is started from here."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_"))]:
        del os.environ[name]
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [QUANTIZE, *CASES]
    parser.add_argument("--cases", nargs="*", default=names, choices=names)
    parser.add_argument("--pairs", type=int, help="runs of each side, rather than as many as the case wants")
    parser.add_argument("--num-hidden-layers", type=int, help="fewer layers than the shapes have: a quick look")
    parser.add_argument("--work", type=Path, help="keep the models here for the next time")
    flags = parser.parse_args()
    prepare_environment()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started here is ended too
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        work = flags.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        peak = in_child(gemm)
        say(f"fp32 GEMM peak {peak['gflops']:.0f} GFLOP/s")
        for name in flags.cases:
            try:
                if name == QUANTIZE:
                    results[name] = quantization(work.absolute(), flags.num_hidden_layers)
                else:
                    case = CASES[name]
                    pairs = flags.pairs or case.pairs
                    results[name] = measure(
                        name, case, work.absolute(), pairs, flags.num_hidden_layers, peak["gflops"]
                    )  # fmt: skip
            except FailedError as error:  # the other cases are worth having
                results[name] = {"error": str(error)}
                say(f"{name}: {error}")
    whole = {"num_hidden_layers": flags.num_hidden_layers, "seed": 0, "wanted_difference": EQUAL, "gemm": peak}
    print(json.dumps({**whole, "cases": results, **about()}, indent=1))


if __name__ == "__main__":
    main()
