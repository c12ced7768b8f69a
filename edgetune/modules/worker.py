"""The process that is measured: `python -m edgetune.modules.worker bundle/ --threads 1 --runs 200` prints one JSON.

It imports what a device has: no torch. Inputs are seeded, one row of the shape that the bundle was exported with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

import numpy as np
import onnxruntime

from edgetune.memory import Meter, anonymous_bytes
from edgetune.modules.bundle import load_module_bundle

WARMUP = 20


def measure(folder: str, threads: int, runs: int) -> dict[str, Any]:
    """Latencies of single calls in seconds, memory in bytes."""
    floor = anonymous_bytes()
    with Meter() as meter:
        start = time.perf_counter()
        bundle = load_module_bundle(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        session = onnxruntime.InferenceSession(bundle.model_path, options, providers=["CPUExecutionProvider"])
        loaded = time.perf_counter() - start
        feeds = {value["name"]: _row(value) for value in bundle.manifest["inputs"]} | bundle.adapter_feeds()
        seconds = []
        for _ in range(WARMUP + runs):
            start = time.perf_counter()
            session.run(None, feeds)
            seconds.append(time.perf_counter() - start)
    return {
        "load_s": loaded, "seconds": seconds[WARMUP:], "floor_bytes": floor, "peak_memory_bytes": meter.peak_bytes
    }  # fmt: skip


def _row(value: dict[str, Any]) -> np.ndarray:
    """One row of an input: where its first size is free, of length one."""
    sizes = value["example_shape"]
    shape = sizes if isinstance(value["shape"][0], int) else [1, *sizes[1:]]
    dtype = np.dtype(value["dtype"])
    if dtype.kind != "f":
        return np.zeros(shape, dtype)
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="edgetune.modules.worker")
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--runs", type=int, required=True)
    flags = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    sys.stdout.write(json.dumps(measure(flags.folder, flags.threads, flags.runs)) + "\n")


if __name__ == "__main__":
    main()
