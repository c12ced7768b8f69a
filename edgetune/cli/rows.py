"""`edgetune data`: what is in a file of rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli.console import answer
from edgetune.cli.flags import Json, SkipBad

app = typer.Typer(
    help="Files of rows: check.", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich"
)


@app.callback()
def program() -> None:
    """Verbs of `edgetune data`; with one alone typer would drop its name."""


@app.command()
def check(
    data: Annotated[Path, typer.Argument(metavar="FILE", help="Rows as for train.", show_default=False)],
    *,
    eval_data: Annotated[
        Path | None,
        typer.Option("--eval-data", metavar="FILE", help="Held-out rows to compare with.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", show_default=False,
            help="A model or base/ folder, or a Hub id: lengths in its tokens, and what the window cuts.",
        ),
    ] = None,
    max_seq_length: Annotated[
        int | None,
        typer.Option(
            "--max-seq-length", min=2, show_default=False,
            help="With --model: tokens of a window. (default: as planned)",
        ),
    ] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Look for duplicates, leakage into the held-out rows, rare labels, and rows that a window cuts or refuses.

    What it finds is no error: it ends with 0, and with 1 where rows cannot be read.

    Example: edgetune data check notes.jsonl --eval-data held-out.jsonl --model base/
    """
    from edgetune.data_check import check_data

    if max_seq_length is not None and model is None:
        raise typer.BadParameter("--max-seq-length goes with --model, whose tokens it counts")
    tokenizer = context_length = None
    if model is not None:
        from edgetune.hub import model_folder
        from edgetune.models import load_config
        from edgetune.tokenizer import load_tokenizer

        folder = model_folder(model)
        tokenizer, context_length = load_tokenizer(folder), load_config(folder).max_position_embeddings
    found = check_data(
        data, eval_data=eval_data, tokenizer=tokenizer, context_length=context_length, max_seq_length=max_seq_length,
        skip_bad=skip_bad,
    )  # fmt: skip
    answer(found, _table(found), as_json)


def _table(found: Mapping[str, Any]) -> str:
    """`check_data` for people: the training rows beside the held-out ones, and what is worth a look."""
    parts = [found] if found["eval"] is None else [found, found["eval"]]
    unit, leakage = found["lengths"]["unit"], found["leakage"]
    rows: list[tuple[str, list[str]]] = [
        ("", [Path(part["data"]).name for part in parts]),
        ("rows", [f"{part['rows']:,} {part['kind']}" for part in parts]),
        ("exact duplicates", [f"{part['duplicates']['exact']:,}" for part in parts]),
        ("near duplicates", [_near(part) for part in parts]),
        ("prompts with several answers", [f"{part['conflicts']['prompts']:,}" for part in parts]),
        ("labels, balance (even is 1)", [_labels(part["labels"]) for part in parts]),
        (f"{unit}: p50 / p95 / max", ["{p50:,.0f} / {p95:,.0f} / {max:,}".format(**part["lengths"]) for part in parts]),
        (f"{unit} in all", [f"{part['lengths']['total']:,}" for part in parts]),
    ]
    if found["window"]:
        full = "{windows:,} of {max_seq_length:,} tokens, {fill:.0%} full"
        one = "each text up to {max_seq_length:,} tokens"
        windows = [part["window"] for part in parts]
        rows += [
            ("windows", [(one if window["windows"] is None else full).format(**window) for window in windows]),
            ("texts cut / rows refused", ["{cut:,} / {too_long:,}".format(**window) for window in windows]),
        ]
    if leakage:
        rows.append(
            ("among the training rows", ["", "{exact:,} exact, {prompts:,} prompts, {near:,} near".format(**leakage)])
        )
    wide = [max(len(cells[i]) for _, cells in rows) for i in range(len(parts))]
    lines = [f"{name:<29}" + "  ".join(f"{c:>{w}}" for c, w in zip(cells, wide, strict=True)) for name, cells in rows]
    return "\n".join([*lines, "", *(found["findings"] or ["Nothing to correct."])])


def _near(part: Mapping[str, Any]) -> str:
    near, compared = part["duplicates"]["near"], part["duplicates"]["compared"]
    return f"{near:,}" if compared == part["rows"] else f"{near:,} in {compared:,} rows"


def _labels(labels: Mapping[str, Any] | None) -> str:
    return "-" if labels is None else f"{labels['distinct']:,}, {labels['balance']:.2f}"
