"""A watch's activity network, personalized: accuracy before and after, bytes, latency and peak.

    python benchmarks/basicmotions.py [--out FILE]

BasicMotions: 6 channels of a watch, 100 samples in 10 s, four activities, 40 recordings to train on and 40 to test. It
does not say who wore the watch, so another wearer is simulated as what differs most between wearers and is known
exactly: how the watch sits. Each seed draws a rotation of the accelerometer's and the gyroscope's axes and a gain for
every channel. A small 1-D CNN is pre-trained on the recordings as they are then attached for
Galaxy Watch 7 and trained on k recordings of each activity in the other wearing; the 40 test recordings, in that
wearing, are judged before and after, and in the original wearing too, for what was forgotten.

Beside it, on the same rows and steps: all weights trained in float32 (`full`), and the head alone (`head`).
The run is held to the watch's budget, torch included, in a process of its own, and is a simulation: the watch itself
has no torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import edgetune as et
from edgetune.training.run import Run

ADAPTER = et.LoraConfig(r=4)
DEVICE, SEEDS, SHOTS = "galaxy-watch-7", 5, 4
PRETRAINING_EPOCHS, STEPS = 40, 60


class ActivityNet(nn.Module):
    """x [N, 6, T] -> logits [N, classes]: three convolutions, a mean over time, two linears; 78,000 weights."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(6, 48, 5, padding="same"), nn.BatchNorm1d(48), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(48, 96, 5, padding="same"), nn.BatchNorm1d(96), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(96, 128, 3, padding="same"), nn.BatchNorm1d(128), nn.ReLU(),
        )  # fmt: skip
        self.hidden, self.head = nn.Linear(128, 128), nn.Linear(128, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.head(torch.relu(self.hidden(self.features(x).mean(-1))))


def wearing(seed: int) -> np.ndarray:
    """[6, 6]: rotations of both sensors' axes and a gain for each channel."""
    rng, mixed = np.random.default_rng([seed, 6]), np.zeros((6, 6), np.float32)
    for at in (0, 3):
        q, r = np.linalg.qr(rng.standard_normal((3, 3)))
        mixed[at : at + 3, at : at + 3] = q * np.sign(np.diag(r))
    return mixed * rng.uniform(0.7, 1.4, (6, 1)).astype(np.float32)


def load(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Recordings [40, 6, 100] and activities [40]."""
    arrays = np.load(machine.real("basicmotions") / f"{split}.npz")
    return torch.from_numpy(arrays["X"]), torch.from_numpy(arrays["y"])


def accuracy(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of right answers."""
    training = net.training
    net.eval()
    with torch.no_grad():
        right = float((net(x).argmax(-1) == y).float().mean())
    net.train(training)
    return right


def fit(net: nn.Module, x: torch.Tensor, y: torch.Tensor, *, steps: int, rate: float, seed: int) -> None:
    """Plain AdamW on batches of 16, of what has gradients; statistics of normalization follow only `net.train()`."""
    optimizer = torch.optim.AdamW([value for value in net.parameters() if value.requires_grad], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randperm(len(y), generator=generator)[:16]
        optimizer.zero_grad()
        functional.cross_entropy(net(x[at]), y[at]).backward()
        optimizer.step()


def few_shot(y: torch.Tensor, shots: int, seed: int) -> torch.Tensor:
    """Indices of so many recordings of each activity."""
    rng = np.random.default_rng([seed, 4])
    picked = [rng.choice(np.flatnonzero(y.numpy() == label), shots, replace=False) for label in range(int(y.max()) + 1)]
    return torch.from_numpy(np.concatenate(picked))


def pretrained(seed: int, x: torch.Tensor, y: torch.Tensor) -> ActivityNet:
    """The network that ships, trained on the recordings as they are."""
    torch.manual_seed(seed)
    net = ActivityNet().train()
    fit(net, x, y, steps=PRETRAINING_EPOCHS * -(-len(y) // 16), rate=2e-3, seed=seed)
    return net.eval()


def personalize(seed: int, folder: Path) -> None:
    """What would happen on the watch: a process that loads the network and the rows, and trains."""
    net = ActivityNet().eval()
    net.load_state_dict(load_file(folder / f"net-{seed}.safetensors"))
    rows = load_file(folder / f"rows-{seed}.safetensors")
    config = et.TrainConfig(max_steps=STEPS, batch_size=16, seed=seed)
    et.train_module(
        et.attach(net, ADAPTER, seed=seed), rows["x"], rows["y"], DEVICE, loss=functional.cross_entropy, config=config,
        out=folder / f"run-{seed}",
    )  # fmt: skip


def one_seed(seed: int, folder: Path) -> dict[str, Any]:
    """All figures of a seed."""
    (x, y), (test_x, test_y) = load("train"), load("test")
    worn = torch.from_numpy(wearing(seed))
    spread = x.std((0, 2), keepdim=True)
    new_x, new_test = (torch.einsum("ij,njt->nit", worn, value) / spread for value in (x, test_x))
    x, test_x = x / spread, test_x / spread
    net = pretrained(seed, x, y)
    at = few_shot(y, SHOTS, seed)
    figures: dict[str, Any] = {
        "seed": seed, "own_wearing": accuracy(net, test_x, test_y), "before": accuracy(net, new_test, test_y)
    }  # fmt: skip
    for name, part in (("full", ""), ("head", "head.")):
        other = copy.deepcopy(net)
        for key, value in other.named_parameters():
            value.requires_grad_(key.startswith(part))
        fit(other, new_x[at], y[at], steps=STEPS, rate=1e-3 if name == "full" else 5e-3, seed=seed)
        figures[name] = {"after": accuracy(other, new_test, test_y), "own_wearing": accuracy(other, test_x, test_y)}
    files = {"net": net.state_dict(), "rows": {"x": new_x[at], "y": y[at]}}
    for name, tensors in files.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}-{seed}.safetensors")
    subprocess.run([sys.executable, __file__, "--personalize", str(seed), "--folder", str(folder)], check=True)
    attached = et.attach(net, ADAPTER, seed=seed)
    figures["rounded_before"] = accuracy(attached, new_test, test_y)
    run = Run(folder / f"run-{seed}")
    attached.load(run.folder)
    figures["lora"] = {"after": accuracy(attached, new_test, test_y), "own_wearing": accuracy(attached, test_x, test_y)}
    summary = run.summary
    figures["run"] = {key: summary[key] for key in (
        "stopped", "budget_bytes", "predicted_peak_bytes", "measured_peak_bytes", "trainable_parameters", "frozen_bytes"
    )}  # fmt: skip
    for name, merge in (("slots", False), ("merged", True)):
        bundle = et.export_module(attached, new_test, out=folder / f"{name}-{seed}", merge=merge)
        figures[name] = {"parity": bundle.manifest["parity"], "bundle_bytes": bundle.nbytes}
        if seed == 0:
            figures[name]["bench"] = et.bench_module(bundle, threads=1)
            figures[name]["files"] = {key: value["bytes"] for key, value in bundle.manifest["files"].items()}
    if seed == 0:
        print(attached.summary())
        figures["dense_bytes"] = sum(layer.dense_nbytes for layer in attached.layers)
        figures["stored_bytes"] = sum(layer.nbytes for layer in attached.layers)
        figures["adapter_bytes"] = attached.adapter_nbytes
    return figures


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--personalize", type=int, metavar="SEED", help="the process that is measured")
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if flags.personalize is not None:
        personalize(flags.personalize, flags.folder)
        return
    machine.real("basicmotions")
    with tempfile.TemporaryDirectory() as folder:
        seeds = [one_seed(seed, Path(folder)) for seed in range(SEEDS)]

    def mean(*path: str) -> dict[str, float]:
        values = []
        for figures in seeds:
            value: Any = figures
            for key in path:
                value = value[key]
            values.append(value)
        return {"mean": statistics.fmean(values), "stdev": statistics.stdev(values)}

    paths = [
        ("own_wearing",), ("before",), ("rounded_before",),
        *((name, key) for name in ("lora", "full", "head") for key in ("after", "own_wearing")),
    ]  # fmt: skip
    means = {"/".join(path): mean(*path) for path in paths}
    for name, value in means.items():
        print(f"{name:20} {value['mean']:6.1%} ± {value['stdev']:.1%}")
    result = {
        "device": DEVICE, "shots": SHOTS, "steps": STEPS, "accuracy": means, "seeds": seeds, **machine.about()
    }  # fmt: skip
    print(json.dumps({key: value for key, value in seeds[0].items() if key in ("run", "slots", "merged")}, indent=1))
    if flags.out:
        flags.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
