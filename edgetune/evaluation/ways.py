"""Ways to answer held-out rows, put beside each other: their figures, what tuning gains over each, the one to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.evaluation.metrics import Answers, difference, summarize
from edgetune.evaluation.verdict import choose

# Names of the label that stands for none of the others, as data sets have them.
OUT_OF_SCOPE = frozenset({"oos", "ood", "out_of_scope", "out-of-scope", "out of scope"})
_ANSWERED = 0.02  # share of exact answers from which on exact_match says more than loss


@dataclass(frozen=True)
class Way:
    """One way to answer: what it answered, and what it cost."""

    answers: Answers
    seconds: float
    training_seconds: float = 0.0
    nbytes: int = 0
    prompt_tokens: int = 0


def compare(ways: Mapping[str, Way | None], truth: np.ndarray | None, labels: Sequence[str]) -> dict[str, Any]:
    """The keys of an evaluation that follow from its ways; `tuned` is one, and `truth` are indices of labels [n]."""
    out_of_scope = next((index for index, name in enumerate(labels) if name.casefold() in OUT_OF_SCOPE), None)
    figures: dict[str, Any] = {
        name: None if way is None else _figures(way, truth, out_of_scope, len(labels)) for name, way in ways.items()
    }
    metric = _metric(figures)
    measured = {name: way.answers for name, way in ways.items() if way and figures[name][metric] is not None}
    return {
        "metric": metric, "labels": len(labels) or None,
        "unseen_labels": 0 if truth is None else int((truth < 0).sum()), "ways": figures,
        "gains": {
            name: difference(metric, measured["tuned"], answers, truth)
            for name, answers in measured.items()
            if name != "tuned"
        },
        "choice": choose(metric, measured, figures, truth),
    }  # fmt: skip


def _figures(way: Way, truth: np.ndarray | None, out_of_scope: int | None, labels: int) -> dict[str, Any]:
    return summarize(way.answers, truth, out_of_scope, labels) | {
        "seconds": way.seconds, "seconds_per_row": way.seconds / len(way.answers.tokens),
        "training_seconds": way.training_seconds, "bytes": way.nbytes, "prompt_tokens": way.prompt_tokens,
    }  # fmt: skip


def _metric(figures: Mapping[str, Any]) -> str:
    if figures["tuned"]["accuracy"] is not None:
        return "accuracy"
    exact = [way["exact_match"]["value"] for way in figures.values() if way and way["exact_match"]]
    return "exact_match" if max(exact, default=0.0) >= _ANSWERED else "loss"
