"""`bench` of int4 and nf4 bundles of the SmolLM2-135M shape: random weights, a LoRA of rank 8 on all linears.

Run: python benchmarks/bundle_bench.py            (--num-hidden-layers 2 is a quick look)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from machine import about
from shapes import SHAPES, write_shape

from edgetune.adapters.base import save_adapter
from edgetune.adapters.lora import LoraConfig, slots
from edgetune.benchmark import bench
from edgetune.exporter import export
from edgetune.grids import GRIDS
from edgetune.models import load_config
from edgetune.quantizer import quantize


def write_run(base: Path, folder: Path, r: int, target_modules: tuple[str, ...] | None = None) -> Path:
    """A run folder as training leaves it, with a random adapter: its size and place count here, not its values."""
    model = load_config(base)
    config = LoraConfig(r=r, target_modules=target_modules).resolved(model)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        for slot in slots(config, model)
        for name, shape in slot.names.items()
    }
    folder.mkdir()
    save_adapter(folder, config, tensors)
    (folder / "plan.json").write_text("{}", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"base": str(base)}), encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--num-hidden-layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--device", default="host", help="the profile whose threads and targets count")
    parser.add_argument("--runs", type=int, default=5)
    flags = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_shape(flags.shape, folder / "model", num_hidden_layers=flags.num_hidden_layers)
        for grid in GRIDS:
            base = quantize(model, grid=grid, out=folder / f"base-{grid}")
            run = write_run(base, folder / f"run-{grid}", r=8)
            bundle = export(run, out=folder / f"bundle-{grid}")
            results[grid] = bench(bundle, flags.device, runs=flags.runs) | {"parity": bundle.manifest["parity"]}
            del results[grid]["memory"]  # a series of hundreds, for plots
    shape = {"shape": flags.shape, "num_hidden_layers": flags.num_hidden_layers, "seed": 0}
    print(json.dumps({**shape, "results": results, **about()}, indent=1))


if __name__ == "__main__":
    main()
