"""Which way to take, and the sentence that says why.

The best way by the metric, unless a cheaper one cannot be told from it: one whose 95 % interval of the difference, on
the same resampled rows, holds 0. Cheap is what takes the fewest seconds to set up and to answer a thousand rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgetune.evaluation.metrics import Answers, difference
from edgetune.memory import format_mib

_ROWS = 1000
_DO = {
    "tuned": "Tune",
    "prompt": "Do not tune, prompt with {shots} examples",
    "head": "Do not tune, train the head on frozen features",
    "base": "Do not tune, the base does it alone",
}
_CALLED = {"tuned": "tuned", "prompt": "{shots} examples in the prompt", "head": "the feature head", "base": "the base"}
_CALLED_OF_CLASSES = _CALLED | {"base": "the classes' names"}
_METRICS = {"accuracy": "accuracy", "exact_match": "exact match", "loss": "loss"}


def choose(metric: str, answers: Mapping[str, Answers], figures: Mapping[str, Any], truth: np.ndarray | None) -> str:
    """The cheapest of the ways that are as good as the best."""
    sign = -1 if metric == "loss" else 1
    best = max(answers, key=lambda name: sign * figures[name][metric]["value"])
    as_good = [
        name for name in answers if name == best or difference(metric, answers[best], answers[name], truth)["low"] <= 0
    ]
    return min(as_good, key=lambda name: cost(figures[name]))


def cost(way: Mapping[str, Any]) -> float:
    """Seconds to set up and to answer a thousand rows."""
    return float(way["training_seconds"] + _ROWS * way["seconds_per_row"])


def explain_choice(result: Mapping[str, Any]) -> str:
    """One sentence: what to do, its metric beside the others', and what it costs."""
    ways = {name: way for name, way in result["ways"].items() if way and way[result["metric"]]}
    chosen, metric, shots = result["choice"], result["metric"], result["shots"]
    called = _CALLED_OF_CLASSES if result["kind"] == "label" else _CALLED
    others = [
        f"{_value(metric, ways[name][metric])} for {called[name].format(shots=shots)} ({_costs(ways[name])})"
        for name in ways
        if name != chosen
    ]
    against = f"against {', '.join(others)}" if others else "and nothing to hold it against"
    do = _DO[chosen].format(shots=shots) if others else "Tuned"
    return f"{do}: {_METRICS[metric]} {_value(metric, ways[chosen][metric])} ({_costs(ways[chosen])}), {against}."


def _value(metric: str, figure: Mapping[str, float]) -> str:
    if metric == "loss":
        return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**figure)
    return "{value:.1%} [{low:.1%}, {high:.1%}]".format(**figure)


def _costs(way: Mapping[str, Any]) -> str:
    parts = [f"{format_mib(way['bytes'])}"] if way["bytes"] else []
    parts += [f"{way['training_seconds']:.1f} s to train"] if way["training_seconds"] else []
    parts += [f"{way['prompt_tokens']:,} tokens more a row"] if way["prompt_tokens"] else []
    return ", ".join([*parts, f"{way['seconds_per_row'] * 1e3:.1f} ms a row"])
