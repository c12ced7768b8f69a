"""What a run shows: plain lines in a file, a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from edgetune.memory import MIB
from edgetune.training import progress
from edgetune.training.progress import Progress, show_progress


def at(step: int, note: str | None = None, **values: float | None) -> Progress:
    figures = {"loss": 2.5, "eval_loss": None, "tokens_per_second": 1234.4, "seconds_left": 3725.0} | values
    return Progress(
        step=step, steps=40, now_bytes=50 * MIB, peak_bytes=63 * MIB, budget_bytes=128 * MIB, note=note, **figures
    )  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_figures_in_a_line() -> None:
    text = "loss 2.5000 · 1,234 tok/s · 50.0 MiB, peak 63.0 MiB of 128 MiB · 1:02:05 left"
    assert at(3).text == text
    assert at(3, eval_loss=1.75, seconds_left=61.6).text.endswith("1:02 left")
    assert "eval 1.7500" in at(3, eval_loss=1.75).text
    assert at(0, loss=None, tokens_per_second=None, seconds_left=None).text == "50.0 MiB, peak 63.0 MiB of 128 MiB"


def test_plain_lines_come_seldom_but_notes_and_the_end_always(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.9, 5.0, 6.0, 6.1, 6.2])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    with show_progress(stream) as show:
        for step in (1, 2, 3, 4):
            show(at(step))
        show(at(4, "something happened"))
        show(at(40))
        show(at(40))
    heads = [line.split(" · ")[0] for line in stream.getvalue().splitlines()]
    assert heads == ["step 1/40", "step 4/40", "something happened", "step 40/40"]


def test_a_terminal_gets_a_bar_with_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    with show_progress(stream) as show:
        show(at(7))
        show(at(8, "step 8: [skipped]"))
        show(at(40))
    shown = stream.getvalue()
    assert "training" in shown and "40/40" in shown and at(40).text in shown
    assert "step 8: [skipped]" in shown
