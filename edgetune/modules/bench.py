"""What a network's bundle costs to run: latency of a single row and peak memory, in a process of its own.

`edgetune bench` measures tokens of language models; a network has calls. No figure of another device is predicted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgetune import host
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.modules.bundle import ModuleBundle, load_module_bundle

FORMAT_VERSION = 1


def bench_module(bundle: ModuleBundle | str | Path, *, runs: int = 200, threads: int | None = None) -> dict[str, Any]:
    """Measure a bundle of `export_module` on onnxruntime alone, with its adapter.

    The result holds `p50_ms`, `p90_ms` and `p99_ms` of a call with one row, `load_ms`, `floor_bytes` after the imports,
    `peak_memory_bytes` (anonymous + swap, floor included), `bundle_bytes`, `threads` and `runs`.

    Raises:
        BundleError: it is none, or damaged.
        ConfigError: no runs or no threads.
        EdgetuneError: the process that measures died.
    """
    bundle = load_module_bundle(bundle)
    threads = host.threads() if threads is None else threads
    if runs < 1 or threads < 1:
        raise ConfigError(f"runs = {runs} and threads = {threads}; at least 1 of each was expected.")
    source = str(Path(__file__).parents[2])  # the caller's own code, whatever is installed
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, "-m", "edgetune.modules.worker", str(bundle.folder.absolute()), f"--threads={threads}",
         f"--runs={runs}"],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise EdgetuneError(
            f"the process that measures {bundle.folder} ended with code {child.returncode}: {last}. A negative code "
            f"is a signal, -9 mostly a lack of memory."
        )
    found = json.loads(child.stdout)
    milliseconds = 1e3 * np.array(found["seconds"])
    percentiles = {f"p{p}_ms": float(np.percentile(milliseconds, p)) for p in (50, 90, 99)}
    return {
        "format_version": FORMAT_VERSION, **percentiles, "load_ms": 1e3 * found["load_s"],
        "floor_bytes": found["floor_bytes"], "peak_memory_bytes": found["peak_memory_bytes"],
        "bundle_bytes": bundle.nbytes, "threads": threads, "runs": runs,
    }  # fmt: skip
