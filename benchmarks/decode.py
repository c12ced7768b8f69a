"""Tokens per second of a 4-bit bundle beside transformers in float32, onnxruntime-genai, and a graph without adapters.

Each contestant loads once, in a process of its own; then all generate by turns, greedily, after prompts of several
lengths. transformers runs the same model in float32; genai the same bundle; `no_slots` is the same graph without the
adapter's inputs. Figures are medians over the rounds, and so are ratios, each of two in the same round.

Run on an idle machine: python benchmarks/decode.py            (--num-hidden-layers 2 is a quick look)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bundle_bench import write_run
from machine import about
from shapes import SHAPES, write_shape

from edgetune.base import open_base
from edgetune.bundle import DATA, MANIFEST, MODEL, SHARE_BUFFER
from edgetune.exporter import export
from edgetune.exporter.merging import BaseWeights
from edgetune.graphs.decoder import decoder_graph
from edgetune.memory import Meter, trim_allocator
from edgetune.quantizer import quantize
from edgetune.runtime.session import open_session
from edgetune.weights import sha256_file

ATTENTION = ("q_proj", "v_proj")
OVERHEADS = {  # against the graph without slots: slots everywhere, or where the adapter is
    "empty": "edgetune", "qv": "adapter_qv", "all": "adapter_all", "empty_qv_slots": "qv_slots",
    "qv_in_qv_slots": "adapter_qv_slots",
}  # fmt: skip
Forward = Callable[[np.ndarray, bool], np.ndarray]  # ids [n], whether a sequence begins -> logits [vocab_size]


def with_edgetune(folder: Path, threads: int, adapter: bool) -> Forward:
    session = open_session(folder, threads=threads, adapter=adapter)

    def forward(ids: np.ndarray, begins: bool) -> np.ndarray:
        if begins:
            session.reset()
        return session.forward(ids)

    return forward


def with_transformers(folder: Path, threads: int) -> Forward:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache: list[Any] = [None]

    def forward(ids: np.ndarray, begins: bool) -> np.ndarray:
        with torch.inference_mode():
            past = None if begins else cache[0]
            made = model(torch.from_numpy(ids[None]), past_key_values=past, use_cache=True, logits_to_keep=1)
        cache[0] = made.past_key_values
        logits: np.ndarray = made.logits[0, -1].numpy()
        return logits

    return forward


def with_genai(folder: Path, max_length: int) -> Forward:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    generators: list[Any] = []

    def forward(ids: np.ndarray, begins: bool) -> np.ndarray:
        if begins:
            generators.clear()
            parameters = og.GeneratorParams(model)
            parameters.set_search_options(max_length=max_length, do_sample=False)
            generators.append(og.Generator(model, parameters))
        generators[0].append_tokens(ids.astype(np.int32))
        logits: np.ndarray = generators[0].get_output("logits")[0, -1]
        return logits

    return forward


def work(kind: str, folder: Path, threads: int, max_length: int) -> None:
    """A contestant: for each line "past new" on stdin, seconds of the prompt and median seconds of a token."""
    forward = {
        "edgetune": lambda: with_edgetune(folder, threads, adapter=False),
        "adapter": lambda: with_edgetune(folder, threads, adapter=True),
        "transformers": lambda: with_transformers(folder, threads),
        "genai": lambda: with_genai(folder, max_length),
    }[kind]()
    print("ready", flush=True)
    for line in sys.stdin:
        past, new = map(int, line.split())
        ids = np.random.default_rng(past).integers(3, 259, past)
        seconds, tokens = [], []
        for step in range(new + 1):
            started = time.perf_counter()
            ids = np.array([forward(ids, step == 0).argmax()], np.int64)
            seconds.append(time.perf_counter() - started)
            tokens.append(int(ids[0]))
        print(json.dumps({"prompt": seconds[0], "token": statistics.median(seconds[1:]), "ids": tokens}), flush=True)


def without_slots(bundle: Path, base: Path, folder: Path) -> Path:
    """The bundle's graph as if no adapter were ever to come."""
    folder.mkdir()
    builder = decoder_graph(BaseWeights(open_base(base)), data_file=DATA, context_length=8192)
    builder.save(folder, MODEL, {SHARE_BUFFER: "1"})
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in (MODEL, DATA)
    }
    manifest |= {"slots": [], "adapters": {}, "default_adapter": None, "probe_rows": [], "tokenizer_sha256": None}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"files": files}), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--num-hidden-layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--past", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--load", nargs="+", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.load:
        load(*flags.load)
        return
    if flags.work:
        work(flags.work[0], Path(flags.work[1]), flags.threads, max(flags.past) + flags.new_tokens + 1)
        return
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps({**compare(Path(temporary), flags), **about()}, indent=1))


def compare(folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    model = write_shape(flags.shape, folder / "model", num_hidden_layers=flags.num_hidden_layers)
    base = quantize(model, grid="nf4" if flags.weights == "nf4" else "int4", out=folder / "base")
    bundle = export(write_run(base, folder / "run", r=8), out=folder / "bundle", weights=flags.weights)
    run = write_run(base, folder / "run-qv", r=8, target_modules=ATTENTION)
    attention = export(run, out=folder / "qv", weights=flags.weights)
    few = export(run, out=folder / "few", weights=flags.weights, slots="adapter")
    plain = without_slots(bundle.folder, base, folder / "plain") if flags.weights == base_grid(base) else bundle.folder
    contestants = {
        "edgetune": ("edgetune", bundle.folder), "adapter_all": ("adapter", bundle.folder),
        "adapter_qv": ("adapter", attention.folder), "no_slots": ("edgetune", plain),
        "qv_slots": ("edgetune", few.folder), "adapter_qv_slots": ("adapter", few.folder),
        "genai": ("genai", bundle.folder), "transformers_fp32": ("transformers", model),
    }  # fmt: skip
    children = {name: _start(kind, place, flags) for name, (kind, place) in contestants.items()}
    rounds: dict[str, dict[int, list[dict[str, Any]]]] = {
        name: {past: [] for past in flags.past} for name in contestants
    }
    for turn in range(flags.rounds + 1):
        for past in flags.past:
            for name, child in children.items():
                found = _ask(child, f"{past} {flags.new_tokens}")
                if turn:  # the first is for warming up
                    rounds[name][past].append(found)
    for child in children.values():
        child.communicate()
    result: dict[str, Any] = {"shape": flags.shape, "weights": flags.weights, "threads": flags.threads, "past": {}}
    for past in flags.past:
        token = {name: statistics.median(one["token"] for one in found[past]) for name, found in rounds.items()}
        prompt = {name: statistics.median(one["prompt"] for one in found[past]) for name, found in rounds.items()}

        def ratio(name: str, peer: str, past: int = past) -> float:
            pairs = zip(rounds[name][past], rounds[peer][past], strict=True)
            return statistics.median(one["token"] / other["token"] for one, other in pairs)

        result["past"][past] = {
            "generation_tokens_per_second": {name: round(1 / seconds, 1) for name, seconds in token.items()},
            "prompt_ms": {name: round(1e3 * seconds, 1) for name, seconds in prompt.items()},
            "times_transformers": round(ratio("transformers_fp32", "edgetune"), 2),
            "times_genai": round(ratio("genai", "edgetune"), 3),
            "overhead_percent": {name: round(100 * (ratio(key, "no_slots") - 1), 1) for name, key in OVERHEADS.items()},
            "same_tokens_as_genai": rounds["genai"][past][0]["ids"] == rounds["edgetune"][past][0]["ids"],
        }
    size = (bundle.folder / DATA).stat().st_size
    for name, cache in (("", []), ("first launch", [folder / "cache"]), ("_prepacked", [folder / "cache"])):
        words = [sys.executable, __file__, "--load", bundle.folder, *cache]
        answer = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        if name != "first launch":
            result |= {f"{key}_above_floor_by_weights{name}": round(answer[key] / size, 2) for key in answer}
    return result


def load(bundle: str, cache: str | None = None) -> None:
    """Print what opening a bundle takes in this process: anonymous bytes above what it had, at most and in the end."""
    trim_allocator()
    with Meter() as meter:
        floor = meter.now_bytes
        session = open_session(bundle, adapter=False, prepacked=cache)
        found = {"load_peak": meter.peak_bytes - floor, "loaded": meter.now_bytes - floor}
    del session
    print(json.dumps(found))


def base_grid(base: Path) -> str | None:
    return open_base(base).grid


def _start(kind: str, place: Path, flags: argparse.Namespace) -> subprocess.Popen[str]:
    words = [sys.executable, __file__, "--work", kind, str(place), "--threads", str(flags.threads)]
    words += ["--new-tokens", str(flags.new_tokens), "--past", *map(str, flags.past)]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    if child.stdout.readline().strip() != "ready":
        sys.exit(f"{kind} on {place} did not start: {' '.join(words)}")
    return child


def _ask(child: subprocess.Popen[str], line: str) -> dict[str, Any]:
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()
    answer: dict[str, Any] = json.loads(child.stdout.readline())
    return answer


if __name__ == "__main__":
    main()
