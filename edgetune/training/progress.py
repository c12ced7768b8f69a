"""What a run tells while it trains: a live bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from edgetune.memory import format_mib

_BAR_SECONDS = 0.25  # between two redraws
_LINE_SECONDS = 5.0  # between two plain lines


@dataclass(frozen=True)
class Progress:
    """The state after a step. Losses are nats per supervised token; tokens are those that are no padding."""

    step: int
    steps: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    now_bytes: int
    peak_bytes: int
    budget_bytes: int
    seconds_left: float | None
    note: str | None = None
    """Something that happened besides a step; such a message is always shown."""

    @property
    def text(self) -> str:
        """The figures in one line."""
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        if self.eval_loss is not None:
            parts.append(f"eval {self.eval_loss:.4f}")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tok/s")
        now, peak, budget = map(format_mib, (self.now_bytes, self.peak_bytes, self.budget_bytes))
        parts.append(f"{now}, peak {peak} of {budget}")
        if self.seconds_left is not None:
            parts.append(f"{_clock(self.seconds_left)} left")
        return " · ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def show_progress(stream: TextIO | None = None) -> Iterator[Callable[[Progress], None]]:
    """A callback for `train(on_progress=...)` that draws on `stream` (stderr where none is given)."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield _lines(stream)
        return
    with _bar(stream) as show:
        yield show


def _lines(stream: TextIO) -> Callable[[Progress], None]:
    last_step, last_time = -1, -_LINE_SECONDS

    def show(progress: Progress) -> None:
        nonlocal last_step, last_time
        now = time.monotonic()
        if progress.note is not None:
            stream.write(f"{progress.note}\n")
        elif now - last_time >= _LINE_SECONDS or (progress.step == progress.steps != last_step):
            last_step, last_time = progress.step, now
            stream.write(f"step {progress.step}/{progress.steps} · {progress.text}\n")
        stream.flush()

    return show


@contextmanager
def _bar(stream: TextIO) -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(file=stream)
    columns = (TextColumn("training"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.description}"))
    # Redrawn from here, not from rich's own thread: a run should not compete with its progress bar.
    with Bar(*columns, console=console, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)
        last = 0.0

        def show(progress: Progress) -> None:
            nonlocal last
            if progress.note is not None:
                console.print(progress.note, markup=False, highlight=False)
            bar.update(task, completed=progress.step, total=progress.steps, description=progress.text)
            now = time.monotonic()
            if now - last >= _BAR_SECONDS or progress.step == progress.steps:
                last = now
                bar.refresh()

        yield show
