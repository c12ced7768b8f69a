"""An adapter while it is trained, and the file that a bundle carries it in.

In training each linear has its own pair, `<linear>.lora_A` [in, r] and `<linear>.lora_B` [r, out]. The inference graph
has slots of one or several linears that read the same input (`modules` in edgetune.json), and knows no scaling:

    y = [x Wq, x Wk, x Wv] + x [Aq, Ak, Av] diag(s Bq, s Bk, s Bv)        s = lora_alpha / r
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from run_bundle import read_file

Arrays = dict[str, np.ndarray]


class Adapter:
    """Tensors `<linear>.lora_A` [in, r] and `<linear>.lora_B` [r, out], and what x A B is scaled by."""

    def __init__(self, tensors: Arrays, r: int, lora_alpha: float) -> None:
        self.tensors, self.r, self.lora_alpha = tensors, r, lora_alpha
        self.first_block = min(int(name.split(".")[2]) for name in tensors)

    def of_block(self, i: int) -> Arrays:
        prefix = f"model.layers.{i}."
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    @property
    def scaling(self) -> np.ndarray:
        return np.array([self.lora_alpha / self.r], np.float32)


def new_adapter(manifest: dict[str, Any], r: int, lora_alpha: float, seed: int) -> Adapter:
    """For every linear that the inference graph has a slot for; it changes nothing yet."""
    tensors: Arrays = {}
    linears = [(slot["in_features"], *item) for slot in manifest["slots"] for item in slot["modules"].items()]
    if not linears:
        sys.exit("The bundle has no slot for an adapter. Export it again with --slots all.")
    for index, (inputs, linear, outputs) in enumerate(linears):
        bound, rng = 1 / math.sqrt(inputs), np.random.default_rng([seed, index])
        a = rng.uniform(-bound, bound, (r, inputs)).astype(np.float32)
        tensors |= {f"{linear}.lora_A": a.T.copy(), f"{linear}.lora_B": np.zeros((r, outputs), np.float32)}
    return Adapter(tensors, r, lora_alpha)


def load_adapter(path: Path, manifest: dict[str, Any]) -> Adapter:
    """One that `save_adapter` wrote, slot by slot taken apart into its linears."""
    try:
        binding, stored = read_file(path, manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path} is no adapter of a bundle ({error!r}). Go on from a file that this script wrote.")
    r, tensors = binding["r"], {}
    scaling = binding["lora_alpha"] / r
    for slot in manifest["slots"]:
        a, b = (stored.get(f"{slot['name']}.{kind}", np.zeros((0, 0))) for kind in ("lora_A", "lora_B"))
        if a.shape[1] != r * len(slot["modules"]):
            sys.exit(f"{path} does not adapt all linears of {slot['name']}. Go on from a file that this script wrote.")
        start = 0
        for index, (linear, outputs) in enumerate(slot["modules"].items()):
            rows = slice(index * r, (index + 1) * r)
            tensors[f"{linear}.lora_A"] = a[:, rows].copy()
            tensors[f"{linear}.lora_B"] = b[rows, start : start + outputs] / np.float32(scaling)
            start += outputs
    return Adapter(tensors, r, binding["lora_alpha"])


def save_adapter(path: Path, adapter: Adapter, manifest: dict[str, Any]) -> None:
    """The safetensors file that bundles carry: a tensor pair for each slot, bound to the base. Whole or not at all."""
    if not all(np.isfinite(t).all() for t in adapter.tensors.values()):
        sys.exit(f"The adapter holds NaN or infinity, so {path} was not written. Train with a lower --learning-rate.")
    stored: Arrays = {}
    for slot in manifest["slots"]:
        r, linears = adapter.r, list(slot["modules"].items())
        b = np.zeros((r * len(linears), slot["out_features"]), np.float32)
        start = 0
        for index, (linear, outputs) in enumerate(linears):
            block = adapter.tensors[f"{linear}.lora_B"] * adapter.scaling
            b[index * r : (index + 1) * r, start : start + outputs] = block
            start += outputs
        a = np.concatenate([adapter.tensors[f"{linear}.lora_A"] for linear, _ in linears], 1)
        stored |= {f"{slot['name']}.lora_A": a, f"{slot['name']}.lora_B": b}
    binding = {"format_version": 1, **{key: manifest[key] for key in ("base_sha256", "grid", "tokenizer_sha256")}}
    binding |= {"r": adapter.r, "lora_alpha": adapter.lora_alpha, "slots": [slot["name"] for slot in manifest["slots"]]}
    header: dict[str, Any] = {"__metadata__": {"edgetune": json.dumps(binding)}}
    end = 0
    for name, value in stored.items():
        header[name] = {"dtype": "F32", "shape": value.shape, "data_offsets": [end, end := end + value.nbytes]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in stored.values():
            file.write(value.astype("<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
