"""`edgetune run` on the bundle of an encoder: the embedding of a text."""

from __future__ import annotations

import json
from pathlib import Path

from edgetune.cli.console import answer, warnings_told
from edgetune.runtime.embedding import embed


def show_embedding(bundle: Path, text: str, *, adapter: bool | str | Path, threads: int | None, as_json: bool) -> None:
    """Print one JSON list of numbers in six digits; with --json `embedding` in all, `hidden_size` and `bundle`."""
    with warnings_told():
        numbers = embed(bundle, [text], adapter=adapter, threads=threads)[0].tolist()
    short = json.dumps([float(f"{number:.6g}") for number in numbers])
    answer({"bundle": str(bundle), "hidden_size": len(numbers), "embedding": numbers}, short, as_json)
