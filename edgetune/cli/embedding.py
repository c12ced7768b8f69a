"""`edgetune run` on the bundle of an encoder, or with a trained head: what it says of a text, or its embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune.bundle import has_head
from edgetune.cli.console import answer, warnings_told
from edgetune.runtime.embedding import open_embedder
from edgetune.runtime.predicting import predict

_SHOWN = 5  # classes, the likeliest ones; --json has all


def show_embedding(bundle: Path, text: str, *, adapter: bool | str | Path, threads: int | None, as_json: bool) -> None:
    """Print what the head says, where there is one, else the embedding as a JSON list of numbers in six digits.

    With --json the embedding is whole, with `hidden_size` and `bundle`.
    """
    with warnings_told():
        if has_head(bundle):
            (found,) = predict(bundle, [text], adapter=adapter, threads=threads)
            answer({"bundle": str(bundle), **found}, _told(found), as_json)
            return
        numbers = open_embedder(bundle, adapter=adapter, threads=threads).embed([text])[0].tolist()
    short = json.dumps([float(f"{number:.6g}") for number in numbers])
    answer({"bundle": str(bundle), "hidden_size": len(numbers), "embedding": numbers}, short, as_json)


def _told(found: dict[str, Any]) -> str:
    """A line for each class that is likely, for each word, or the number."""
    if "value" in found:
        return f"{found['value']:.6g}"
    if "tokens" in found:
        return "\n".join(
            f"{token['word']:<20} {token['label']}  {token['probability']:.1%}" for token in found["tokens"]
        )
    likely = list(found["probabilities"].items())[:_SHOWN]
    return "\n".join(f"{label}  {probability:.1%}" for label, probability in likely)
