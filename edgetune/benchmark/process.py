"""The parent's side of a worker: start it, tell it what to do, and say how it ended where it did not answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from edgetune import errors
from edgetune.errors import EdgetuneError


class Worker:
    """A fresh process with one bundle (see `worker`); it ends with the `with` block.

    Orders raise what the worker raised, or EdgetuneError where it died.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        source = str(Path(__file__).parents[2])  # the caller's own code, whatever is installed
        path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
        # A file and no pipe, which could fill up. `__exit__` closes it.
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgetune.benchmark.worker", str(folder.absolute()), f"--threads={threads}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True, encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def load(self) -> dict[str, Any]:
        """Open the bundle: `load_ms`, `check_ms`, `load_peak_bytes`, `floor_bytes`, `has_adapter`, `machine`."""
        found: dict[str, Any] = self._ask(do="load")
        return found

    def generate(self, prompt_tokens: int, new_tokens: int, *, adapter: bool = True) -> list[float]:
        """Seconds to the first token, then seconds for each further one, from an empty cache."""
        seconds: list[float] = self._ask(
            do="generate", prompt_tokens=prompt_tokens, new_tokens=new_tokens, adapter=adapter
        )
        return seconds

    def memory(self) -> dict[str, Any]:
        """`peak_memory_bytes`, `peak_rss_bytes`, `peak_file_backed_bytes` and the `series`."""
        found: dict[str, Any] = self._ask(do="memory")
        return found

    def _ask(self, **order: Any) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(order) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._death()
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        return answer

    def _death(self) -> EdgetuneError:
        code = self._process.wait()
        self._stderr.seek(0)
        last = (self._stderr.read().strip().splitlines() or ["no message"])[-1]
        return EdgetuneError(
            f"the benchmark's process ended with code {code} ({last}); a negative code is a signal, -9 mostly "
            f"a lack of memory. `edgetune run {self.folder}` shows whether the bundle works at all"
        )
