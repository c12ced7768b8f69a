"""Memory of this process over time, by the kernel's own figures, in a series of bounded length.

The meter in `memory` keeps peaks, sampled every 4 ms; this keeps the course, for plots. Where the series is full every
other sample is dropped and the interval doubles, so that ten minutes take no more room than one second.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from edgetune.memory import read_memory

MOST_SAMPLES = 400
FIRST_INTERVAL_S = 0.05  # a reading takes 50 us of the process's time


class Timeline:
    """Samples in a daemon thread while the `with` body runs; `mark` names what happens from here on."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._samples: list[tuple[float, int, int]] = []
        self._moments: list[dict[str, Any]] = []
        self._interval_s = FIRST_INTERVAL_S
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgetune-timeline", daemon=True)

    def __enter__(self) -> Timeline:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def mark(self, name: str) -> None:
        """Something begins now, so there is a sample of it, however short it is."""
        self._take()
        self._moments.append({"seconds": time.perf_counter() - self._start, "name": name})

    def series(self) -> dict[str, Any]:
        """Columns of equal length: seconds, anonymous_bytes (with swap) and file_backed_bytes; and the moments."""
        self._take()
        seconds, anonymous, files = zip(*self._samples, strict=True)
        return {
            "seconds": list(seconds), "anonymous_bytes": list(anonymous), "file_backed_bytes": list(files),
            "moments": list(self._moments),
        }  # fmt: skip

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._take()

    def _take(self) -> None:
        with self._lock:
            sample, now = read_memory(), time.perf_counter() - self._start
            self._samples.append((now, sample.anonymous_bytes, sample.file_backed_bytes))
            if len(self._samples) >= MOST_SAMPLES:
                self._samples = self._samples[::2]
                self._interval_s *= 2
