"""`edgetune eval`: is fine-tuning worth it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli.console import answer, tell
from edgetune.cli.flags import Json, SkipBad
from edgetune.host import THREAD_SETTINGS
from edgetune.memory import format_mib

_METRICS = {
    "loss": "loss", "perplexity": "perplexity", "exact_match": "exact match", "accuracy": "accuracy",
    "macro_f1": "macro-F1", "out_of_scope_recall": "out-of-scope recall",
}  # fmt: skip


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run/ folder.", show_default=False)],
    *,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Held-out rows.", show_default=False)],
    retention: Annotated[
        Path | None,
        typer.Option(
            "--retention", metavar="FILE", show_default=False,
            help="Rows of what the base could do already: how much of it was forgotten.",
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots", min=0, show_default=False,
            help="Most examples in the base's prompt. (default: as many as the window holds)",
        ),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option("--max-rows", min=2, help="Use so many rows of a file. (default: all)", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the examples.")] = 0,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compare a run with the base, with examples in its prompt, and with a head on frozen features, on the same rows.

    A classifier is compared with that head, and an encoder's with the names of the classes.

    It ends in one sentence: tune, or prompt, or train the head, by 95 % intervals and by cost.

    Example: edgetune eval run/ --data held-out.jsonl --retention old.jsonl
    """
    for name, value in THREAD_SETTINGS.items():  # before torch is loaded
        os.environ.setdefault(name, value)
    from edgetune import evaluation

    tell("the base, prompted and not, a head on its features where answers are labels, and the tuned model")
    found = evaluation.evaluate(
        run, data, retention=retention, shots=shots, max_rows=max_rows, seed=seed, skip_bad=skip_bad
    )
    answer(found, _table(found), as_json)


def _table(found: Mapping[str, Any]) -> str:
    """`evaluate` for people."""
    ways = {name: way for name, way in found["ways"].items() if way}
    heads = {"prompt": f"prompt, {found['shots']} shots", "head": "feature head"}
    if found["kind"] == "label":
        heads["base"] = "class names"
    rows = [["", *(heads.get(name, name) for name in ways)]]
    for key, name in _METRICS.items():
        if any(way[key] for way in ways.values()):
            rows.append([name, *(_cell(key, way[key]) for way in ways.values())])
    rows += [
        ["ms a row", *(f"{way['seconds_per_row'] * 1e3:.1f}" for way in ways.values())],
        ["seconds to train", *(f"{way['training_seconds']:.1f}" for way in ways.values())],
        ["bytes beside the base", *(format_mib(way["bytes"]) for way in ways.values())],
        ["examples' tokens a row", *(f"{way['prompt_tokens']:,}" for way in ways.values())],
    ]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"{name:<{wide[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, wide[1:], strict=True))
        for name, *cells in rows
    ]
    if found["retention"]:
        kept = found["retention"]
        lines.append(
            f"retention: loss {_cell('loss', kept['before'])} before, {_cell('loss', kept['after'])} after, "
            f"change {_cell('loss', kept['change'])}"
        )
    if found["leaked_rows"]:
        lines.append(f"{found['leaked_rows']} of {found['rows']} held-out rows stand among the training rows")
    return "\n".join([*lines, "", found["verdict"]])


def _cell(key: str, figure: Mapping[str, float] | None) -> str:
    if figure is None:
        return "-"
    if key in ("loss", "perplexity"):
        return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**figure)
    return "{value:.1%} [{low:.1%}, {high:.1%}]".format(**figure)
