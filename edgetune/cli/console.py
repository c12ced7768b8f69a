"""What the command line shows: answers on stdout, progress and errors on stderr."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgetune.errors import EdgetuneError, EdgetuneWarning

STOPPED_EARLY = 75  # EX_TEMPFAIL of sysexits.h: the same again later, or with more, may work


def answer(result: Mapping[str, Any], text: str, as_json: bool, *, following: Sequence[str | Path] = ()) -> None:
    """Print what a verb found: text for people, or with --json that text on stderr and one object on stdout.

    `following` are the words of the command that comes next on the way through; people are told on stderr.
    """
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)
    if as_json:
        print(json.dumps(result), flush=True)
    elif following:
        tell(f"Next: edgetune {shlex.join(map(str, following))}")


def fail(error: EdgetuneError, as_json: bool) -> None:
    """Print an error: its class, message and notes on stderr, and with --json the former as an object on stdout."""
    name = type(error).__name__
    print(f"{name}: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({"error": name, "message": str(error)}), flush=True)


def tell(text: str) -> None:
    """A line about what happens, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Each EdgetuneWarning in the block as a line on stderr, without the place in the code that raised it."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", EdgetuneWarning)
        warnings.showwarning = lambda message, *_: tell(f"warning: {message}")
        yield


def flat(values: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Nested values as lines of `a.b.c  value`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{at}{key}.")
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            for i, item in enumerate(value):
                yield from flat(item, f"{at}{key}.{i}.")
        else:
            shown = (
                "\n".join(f"{'':<36} {item}" for item in value).strip() if isinstance(value, (list, tuple)) else value
            )
            yield f"{at + key:<36} {shown}"


@contextmanager
def tensor_progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback for `quantize(on_progress=...)`: a bar on a terminal, silence elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("quantizing"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda name, done, total: bar.update(task, completed=done, total=total, description=name)


def stream_text(piece: str) -> None:
    """Write a piece of generated text to stdout at once."""
    print(piece, end="", flush=True)


def tell_text(piece: str) -> None:
    """The same to stderr."""
    print(piece, end="", file=sys.stderr, flush=True)


def exit_code(summary: Mapping[str, Any]) -> int:
    """How the process ends for a run that ended so."""
    if summary["stopped"] == "signal":
        return 128 + int(summary["signal"])
    return {"done": 0, "budget": STOPPED_EARLY, "slice": STOPPED_EARLY}.get(summary["stopped"], 1)
