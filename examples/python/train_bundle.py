"""Training on a bundle with numpy and onnxruntime alone: the loop of `training/training.json`, line by line.

Run: python train_bundle.py bundle/ windows.json --steps 50 --out mine.safetensors
     python train_bundle.py bundle/ windows.json --adapter mine.safetensors --out more.safetensors
     edgetune adapter add bundle/ mine.safetensors      (the app adopts it; or it feeds the tensors, as run_bundle.py)

The bundle is from `edgetune export --with-training`. `windows.json` is a list of objects with `input_ids`,
`position_ids`, `segment_ids` and `labels`, each of the window's length; `write_windows.py` makes one from rows of text.
Every line that is printed is a step as JSON: its number, loss, norm of the gradient and learning rate.

It shows the loop and nothing else: windows come in the order of the file, each is a micro-batch of its own, all linears
are adapted, and there is no held-out loss, no checkpoint and no budget. `edgetune personalize` has these.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bundle_adapter import Adapter, Arrays, load_adapter, new_adapter, save_adapter
from run_bundle import onnxruntime, read_manifest  # it keeps usage events off before onnxruntime is loaded

KEYS = ("input_ids", "position_ids", "segment_ids", "labels")
HEAD_ROWS = 4096  # of the head at once: they exist as float32 while a tile runs
MAX_SKIPPED = 20  # steps without a finite loss, one after the other


class Graphs:
    """The graphs, and the weights of the bundle, which stay in the mapped file."""

    def __init__(self, bundle: Path, threads: int) -> None:
        path = bundle / "training" / "training.json"
        if not path.is_file():
            sys.exit(f"{bundle} has no training graphs. Export it again with --with-training, from an int4 base.")
        self.said = json.loads(path.read_text(encoding="utf-8"))
        if self.said["format_version"] != 1:
            sys.exit(f"{path} has format_version {self.said['format_version']}. This client reads 1: take a newer one.")
        data = np.memmap(bundle / self.said["data_file"], np.uint8, "r")
        self.weights = {
            name: data[t["offset"] : t["offset"] + t["nbytes"]].view(t["dtype"]).reshape(t["shape"])
            for name, t in self.said["tensors"].items()
        }
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_cpu_mem_arena = False  # or each graph keeps what it needed once
        self.sessions = {
            name: onnxruntime.InferenceSession(path.parent / graph["file"], options, ["CPUExecutionProvider"])
            for name, graph in self.said["graphs"].items()
        }
        blocks = range(self.said["model_config"]["num_hidden_layers"])
        self.blocks = [self.weights_of("forward", f"model.layers.{i}.") for i in blocks]

    def weights_of(self, graph: str, prefix: str = "") -> Arrays:
        """Those that a graph takes, in the shapes of its inputs, which are named without the prefix."""
        inputs = {i["name"]: i["shape"] for i in self.said["graphs"][graph]["inputs"]}
        return {n: self.weights[prefix + n].reshape(s) for n, s in inputs.items() if prefix + n in self.weights}

    def tiles(self) -> Iterator[Arrays]:
        """Ranges of rows of the head."""
        inputs, head = self.said["graphs"]["head_tile"]["inputs"], self.said["head"]
        parts = {i["name"]: i["shape"][1:] for i in inputs if i["name"].partition(".")[0] == "head"}
        for first in range(0, self.said["model_config"]["vocab_size"], HEAD_ROWS):
            rows = slice(first, first + HEAD_ROWS)
            tile = {n: self.weights[head + n.removeprefix("head")][rows].reshape(-1, *s) for n, s in parts.items()}
            yield {"first_row": np.array([first]), **tile}

    def run(self, graph: str, values: Arrays, outputs: list[str] | None = None) -> Arrays:
        """The outputs by name; of `values` a graph is fed what it takes."""
        signature = self.said["graphs"][graph]
        wanted = [i["name"] for i in signature["inputs"]]
        names = outputs or [o["name"] for o in signature["outputs"]]
        return dict(zip(names, self.sessions[graph].run(names, {n: values[n] for n in wanted}), strict=True))


def micro_batch(graphs: Graphs, adapter: Adapter, window: Arrays, scale: float, gradients: Arrays) -> float:
    """The loss summed over the labels of a window; `scale` times its gradients are added to `gradients`."""
    window = {key: value[None] for key, value in window.items()}  # [1, T]
    started = graphs.run("start", {**window, **graphs.weights_of("start")})
    x, kept = started.pop("x"), []
    for i, weights in enumerate(graphs.blocks):
        kind = graphs.said["model_config"]["layer_kinds"][i]
        shared = {name: started[f"{name}.{kind}"] for name in ("mask", "cos", "sin")}
        values = {"x": x, **shared, **weights, **adapter.of_block(i), "scaling": adapter.scaling}
        if i >= adapter.first_block:
            kept.append((i, values))  # x is new in it; all else is there anyway
        x = graphs.run("forward", values)["y"]
    values = {"x": x, "labels": window["labels"].reshape(-1)}
    values |= graphs.run("head_start", values | graphs.weights_of("head_start"))
    count, width = values["hidden"].shape
    if count == 0:
        return 0.0
    values |= {"highest": np.full((count, 1), -np.inf, np.float32), "weighted": np.zeros((count, width), np.float32)}
    values |= {name: np.zeros((count, 1), np.float32) for name in ("total", "of_target")}
    for tile in graphs.tiles():
        made = graphs.run("head_tile", values | tile)
        values |= {name.removesuffix(".next"): value for name, value in made.items()}
    values["scale"] = np.array([scale], np.float32)
    end = graphs.run("head_end", values | graphs.weights_of("head_end"))
    dy = end["dx"]
    for i, taken in reversed(kept):
        named = {f"{name}.gradient": f"model.layers.{i}.{name}" for name in adapter.of_block(i)}
        made = graphs.run("backward", {**taken, "dy": dy}, ["dx", *named])
        dy = made.pop("dx")
        for name, value in made.items():
            gradients[named[name]] = gradients.get(named[name], 0) + value
    return float(end["loss_sum"])


def learning_rate(step: int, steps: int, peak: float, defaults: dict[str, Any]) -> float:
    """Of step 0..steps-1: it rises over the warm-up, then falls as half a cosine."""
    warmup = round(defaults["warmup_ratio"] * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(graphs: Graphs, adapter: Adapter, windows: list[Arrays], steps: int, per_step: int, peak: float) -> None:
    """The steps, each over `per_step` windows. `adapter` is changed in place."""
    defaults = graphs.said["defaults"]
    optimizer = defaults["optimizer"]
    kinds = graphs.said["optimizers"][optimizer]["moments"]
    moments = {kind: {n: np.zeros_like(t) for n, t in adapter.tensors.items()} for kind in kinds}
    updates = skipped = 0
    for step in range(steps):
        batches = [windows[(step * per_step + i) % len(windows)] for i in range(per_step)]
        scale = 1 / max(1, sum(int((window["labels"] >= 0).sum()) for window in batches))
        gradients: Arrays = {}
        loss = scale * sum(micro_batch(graphs, adapter, window, scale, gradients) for window in batches)
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        rate = learning_rate(step, steps, peak, defaults)
        finite = math.isfinite(loss) and math.isfinite(norm)
        said = {"loss": loss, "grad_norm": norm} if finite else {"loss": None, "grad_norm": None}
        print(json.dumps({"step": step + 1, **said, "learning_rate": rate}), flush=True)
        skipped = 0 if finite else skipped + 1
        if skipped == MAX_SKIPPED:
            break
        if not finite or not gradients:
            continue
        updates += 1
        numbers = {"learning_rate": rate, "grad_norm": norm}
        numbers |= {key: defaults[key] for key in ("weight_decay", "max_grad_norm")}
        values = {key: np.array([value], np.float32) for key, value in numbers.items()}
        values["updates"] = np.array([updates])
        for name, gradient in gradients.items():
            state = {kind: moments[kind][name] for kind in kinds}
            taken = {**values, **state, "parameter": adapter.tensors[name], "gradient": gradient}
            made = graphs.run(f"optimizer.{optimizer}", taken)
            adapter.tensors[name] = made["parameter.next"]
            for kind in kinds:
                moments[kind][name] = made[f"{kind}.next"]


def read_windows(path: Path, model: dict[str, Any], context_length: int) -> list[Arrays]:
    """The windows of a file, [T] each. Ends where one would be read wrongly."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        windows = [{key: np.array(window[key], np.int64) for key in KEYS} for window in read]
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        sys.exit(f"{path} holds no windows ({error!r}). write_windows.py makes such a file.")
    for number, window in enumerate(windows):
        ids, positions, _, labels = (window[key] for key in KEYS)
        if ids.ndim != 1 or not ids.size or any(value.shape != ids.shape for value in window.values()):
            sys.exit(f"Window {number} of {path} has lists of several lengths, or none. All four are equally long.")
        if positions.min() < 0 or positions.max() >= context_length:
            sys.exit(
                f"Window {number} of {path} has a position beyond {context_length}. Cut its rows into shorter ones."
            )
        tokens = np.concatenate([ids, labels[labels != -100]])
        if tokens.min() < 0 or tokens.max() >= model["vocab_size"]:
            sys.exit(
                f"Window {number} of {path} has a token beyond {model['vocab_size']}. Use this bundle's tokenizer."
            )
    if not any((window["labels"] >= 0).any() for window in windows):
        sys.exit(f"No window of {path} has a label, so there is nothing to learn. Labels are -100 or the next token.")
    return windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the adapter, NAME.safetensors")
    parser.add_argument("--adapter", type=Path, help="go on from this one in place of a new one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--windows-per-step", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, help="its peak, in place of training.json's")
    parser.add_argument("--r", type=int, help="rank of a new adapter, in place of training.json's; lora_alpha is 2 r")
    parser.add_argument("--seed", type=int, default=0, help="of a new adapter")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as onnxruntime likes")
    flags = parser.parse_args()

    manifest = read_manifest(flags.bundle)
    graphs = Graphs(flags.bundle, flags.threads)
    windows = read_windows(flags.windows, manifest["model"], graphs.said["context_length"])
    defaults = graphs.said["defaults"]
    r = flags.r or defaults["r"]
    alpha = 2 * r if flags.r else defaults["lora_alpha"]
    adapter = load_adapter(flags.adapter, manifest) if flags.adapter else new_adapter(manifest, r, alpha, flags.seed)
    peak = flags.learning_rate or graphs.said["optimizers"][defaults["optimizer"]]["learning_rate"]
    train(graphs, adapter, windows, flags.steps, flags.windows_per_step, peak)
    save_adapter(flags.out, adapter, manifest)


if __name__ == "__main__":
    main()
