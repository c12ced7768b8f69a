"""The process that is measured: it holds one bundle, does what it is told and times itself.

`python -m edgetune.benchmark.worker bundle/ --threads 2` answers each line of JSON on stdin by one on stdout:

    {"do": "load"}                                                     seconds and memory of opening the bundle
    {"do": "generate", "prompt_tokens", "new_tokens", "adapter"}       seconds of each token, from an empty cache
    {"do": "memory"}                                                   peaks and course since the start

It imports what a device has and is pinned to as many cores as the profile has threads, so nothing that its parent holds
in memory or computes counts. Two of them, told in turns, compare two bundles in one run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgetune import __version__, host
from edgetune.benchmark.timeline import Timeline
from edgetune.bundle import load_bundle
from edgetune.errors import EdgetuneError
from edgetune.memory import Meter, anonymous_bytes
from edgetune.runtime.session import Session, open_session
from edgetune.tokenizer import load_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stdin ends. An EdgetuneError is an answer too: `{"error": class, "message": …}`."""
    parser = argparse.ArgumentParser(prog="edgetune.benchmark.worker")
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, required=True)
    flags = parser.parse_args(arguments)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    described = machine()  # platform starts `uname -p`: until it is another program, a meter counts this process twice
    floor_bytes = anonymous_bytes()
    with Meter() as meter, Timeline() as timeline:
        worker = _Worker(flags.folder, flags.threads, floor_bytes, described, meter, timeline)
        for line in sys.stdin:
            order = json.loads(line)
            try:
                answer = getattr(worker, order.pop("do"))(**order)
            except EdgetuneError as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            print(json.dumps(answer), flush=True)
    return 0


class _Worker:
    """One method for each order."""

    def __init__(
        self, folder: str, threads: int, floor_bytes: int, described: dict[str, Any], meter: Meter, timeline: Timeline
    ) -> None:
        self._folder, self._threads, self._floor_bytes, self._machine = folder, threads, floor_bytes, described
        self._meter, self._timeline = meter, timeline
        self._session: Session | None = None

    def load(self) -> dict[str, Any]:
        """Check the bundle, open the session and the tokenizer."""
        self._timeline.mark("load")
        start = time.perf_counter()
        bundle = load_bundle(self._folder)
        checked = time.perf_counter()
        self._session = open_session(bundle, threads=self._threads)
        if bundle.manifest["tokenizer_sha256"] is not None:
            load_tokenizer(bundle.folder)
        loaded = time.perf_counter()
        return {
            "load_ms": 1e3 * (loaded - start),
            "check_ms": 1e3 * (checked - start),
            "load_peak_bytes": max(self._meter.now_bytes, self._meter.peak_bytes),
            "floor_bytes": self._floor_bytes,
            "has_adapter": self._session.has_adapter,
            "machine": self._machine,
        }

    def generate(self, prompt_tokens: int, new_tokens: int, adapter: bool) -> list[float]:
        """Seconds to the first greedy token after a seeded random prompt, then seconds for each token after it."""
        session = self._session
        assert session is not None, "load comes first"
        self._timeline.mark(f"{prompt_tokens} + {new_tokens} tokens")
        ids = np.random.default_rng(0).integers(0, session.bundle.model.vocab_size, prompt_tokens)
        session.use_adapter(adapter)
        times = [time.perf_counter()]
        pending: Sequence[int] | np.ndarray = ids
        for _ in range(new_tokens):
            pending = [int(session.forward(pending).argmax())]
            times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]

    def memory(self) -> dict[str, Any]:
        """Peaks of the whole process, the highest that the meter or the course saw, and the course."""
        series, meter = self._timeline.series(), self._meter
        return {
            "series": series,
            "peak_memory_bytes": max(meter.now_bytes, meter.peak_bytes, *series["anonymous_bytes"]),
            "peak_rss_bytes": meter.peak_rss_bytes,
            "peak_file_backed_bytes": max(meter.peak_file_backed_bytes, *series["file_backed_bytes"]),
        }


def machine() -> dict[str, Any]:
    """What a figure needs beside it to be compared with another."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return {
        "cpu": name[1] if name else platform.processor() or host.arch(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "edgetune": __version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
