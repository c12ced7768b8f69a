"""Task metrics with 95 % intervals.

A share of independent rows has Wilson's score interval (J. Am. Stat. Assoc. 22, 1927), which stays inside 0 and 1 and
is right where few rows or extreme shares make others wrong. All else is resampled: rows with replacement, percentiles
of the metric over `RESAMPLES` such samples (Efron's bootstrap). Two ways to answer are compared on the same samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
_Z = 1.959963984540054  # of the normal distribution, at 97.5 %


@dataclass(frozen=True)
class Answers:
    """How one way to answer did on each of n rows; None where the rows do not have that."""

    nll: np.ndarray | None  # [n] sums over the row's supervised tokens, nats
    tokens: np.ndarray  # [n] supervised tokens
    exact: np.ndarray | None  # [n] whether greedy decoding says the completion and ends there
    label: np.ndarray | None  # [n] index of the label that was chosen


def wilson(successes: int, total: int) -> dict[str, float]:
    """The share and its interval."""
    share, z2 = successes / total, _Z**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return {"value": share, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def bootstrap(metric: Callable[[np.ndarray], float], total: int, seed: int = 0) -> dict[str, float]:
    """A metric of chosen rows (their indices, with repetition) on all of them, and its interval."""
    rng = np.random.default_rng(seed)
    found = [metric(rng.integers(0, total, total)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return {"value": metric(np.arange(total)), "low": float(low), "high": float(high)}


def macro_f1(truth: np.ndarray, chosen: np.ndarray, count: int) -> float:
    """The mean over the labels that stand in `truth`, but for -1, of 2 TP / (2 TP + FP + FN)."""
    right = np.bincount(truth[(truth == chosen) & (truth >= 0)], minlength=count)
    there, said = np.bincount(truth[truth >= 0], minlength=count), np.bincount(chosen[chosen >= 0], minlength=count)
    with np.errstate(invalid="ignore"):
        f1 = 2 * right / (there + said)
    return float(f1[there > 0].mean())


def summarize(answers: Answers, truth: np.ndarray | None, out_of_scope: int | None, count: int) -> dict[str, Any]:
    """loss, perplexity, exact_match, accuracy, macro_f1 and out_of_scope_recall, each value, low, high; None where the
    rows do not have it.

    `truth` are the rows' labels out of `count`, and `out_of_scope` is the one that stands for none of the others.
    """
    names = ("loss", "perplexity", "exact_match", "accuracy", "macro_f1", "out_of_scope_recall")
    found: dict[str, Any] = dict.fromkeys(names)
    nll, tokens, label = answers.nll, answers.tokens, answers.label
    if nll is not None:
        found["loss"] = bootstrap(lambda rows: float(nll[rows].sum() / tokens[rows].sum()), len(nll))
        found["perplexity"] = {key: math.exp(value) for key, value in found["loss"].items()}
    if answers.exact is not None:
        found["exact_match"] = wilson(int(answers.exact.sum()), len(answers.exact))
    if label is not None and truth is not None:
        found["accuracy"] = wilson(int((label == truth).sum()), len(truth))
        found["macro_f1"] = bootstrap(lambda rows: macro_f1(truth[rows], label[rows], count), len(truth))
        if out_of_scope is not None and (truth == out_of_scope).any():
            outside = truth == out_of_scope
            found["out_of_scope_recall"] = wilson(int((label[outside] == out_of_scope).sum()), int(outside.sum()))
    return found


def difference(metric: str, one: Answers, other: Answers, truth: np.ndarray | None) -> dict[str, float]:
    """By how much `one` is better than `other`, in loss, exact_match or accuracy of the same rows."""
    if metric == "loss":
        assert one.nll is not None and other.nll is not None
        gain, weight = other.nll - one.nll, one.tokens
    elif metric == "accuracy":
        assert one.label is not None and other.label is not None and truth is not None
        gain, weight = (one.label == truth) * 1.0 - (other.label == truth), np.ones(len(truth))
    else:
        assert one.exact is not None and other.exact is not None
        gain, weight = one.exact * 1.0 - other.exact, np.ones(len(one.exact))
    return bootstrap(lambda rows: float(gain[rows].sum() / weight[rows].sum()), len(gain))
