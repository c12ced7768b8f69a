"""How far two sets of logits are apart, and on which sequences that is asked. Numbers only: no torch, no onnxruntime.

Held-out rows come first; seeded token ids fill up what they lack to 1,000 positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.data import IGNORED, Row

MIN_POSITIONS = 1000
TASK_POSITIONS = 8192  # held-out positions for the task metric: one point is then some eighty tokens
_ROW_LENGTH = 128  # of seeded rows
_BATCH_POSITIONS = 256  # logits of a batch: 50 MB at a vocabulary of 49k


@dataclass(frozen=True)
class Probe:
    """A sequence to compare on: ids [n], and labels [n], the id that position t should predict or -100."""

    ids: np.ndarray
    labels: np.ndarray


def probes(rows: Iterable[Row], vocab_size: int, context_length: int) -> tuple[list[Probe], list[Probe]]:
    """(what parity is measured on, all held-out probes for the task metric).

    The first list holds at least 1,000 positions; seeded token ids fill it up where rows do not.
    """
    held_out: list[Probe] = []
    for row in rows:
        held_out.append(Probe(row.input_ids.astype(np.int64), np.append(row.labels[1:], IGNORED).astype(np.int64)))
        if num_positions(held_out) >= TASK_POSITIONS:
            break
    chosen: list[Probe] = []
    for probe in held_out:
        if num_positions(chosen) < MIN_POSITIONS:
            chosen.append(probe)
    rng = np.random.default_rng(0)
    while num_positions(chosen) < MIN_POSITIONS:
        ids = rng.integers(0, vocab_size, min(_ROW_LENGTH, context_length))
        chosen.append(Probe(ids, np.full(len(ids), IGNORED)))
    return chosen, held_out


def num_positions(items: Sequence[Probe]) -> int:
    """Positions of all probes together."""
    return sum(len(probe.ids) for probe in items)


def batches(items: Sequence[Probe]) -> Iterator[tuple[np.ndarray, list[Probe]]]:
    """Ids [B, T] and their probes. Rows end in padding, which no earlier position of a causal model sees."""
    at = 0
    while at < len(items):
        group = [items[at]]
        while at + len(group) < len(items):
            longest = max(len(probe.ids) for probe in [*group, items[at + len(group)]])
            if longest * (len(group) + 1) > _BATCH_POSITIONS:
                break
            group.append(items[at + len(group)])
        ids = np.zeros((len(group), max(len(probe.ids) for probe in group)), np.int64)
        for row, probe in zip(ids, group, strict=True):
            row[: len(probe.ids)] = probe.ids
        yield ids, group
        at += len(group)


class Agreement:
    """How far logits [n, vocab] are from expected ones: largest difference, equal top-1, mean KL(expected || got)."""

    def __init__(self) -> None:
        self.rows, self._worst, self._equal, self._kl = 0, 0.0, 0, 0.0

    def add(self, expected: np.ndarray, got: np.ndarray) -> None:
        worst = float(np.abs(expected - got).max())
        # NaN compares as smaller than anything, and a graph that returns it must not pass.
        self._worst = float("inf") if not np.isfinite(worst) else max(self._worst, worst)
        self._equal += int((expected.argmax(-1) == got.argmax(-1)).sum())
        logp, logq = _log_softmax(expected), _log_softmax(got)
        self._kl += float((np.exp(logp) * (logp - logq)).sum())
        self.rows += len(expected)

    def figures(self) -> dict[str, Any]:
        return {
            "max_abs_logit": self._worst, "top1_agreement": self._equal / self.rows,
            "kl": max(self._kl, 0.0) / self.rows,  # below zero it is the noise of float32 sums
            "rows": self.rows,
        }  # fmt: skip


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def compare_spools(expected: np.ndarray, got: np.ndarray) -> dict[str, Any]:
    """Agreement of two spools of the same probes."""
    agreement = Agreement()
    for start in range(0, len(expected), _ROW_LENGTH):
        agreement.add(expected[start : start + _ROW_LENGTH], got[start : start + _ROW_LENGTH])
    return agreement.figures()


def loss_of(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int, int]:
    """(summed NLL in nats, correct top-1, count) over the supervised ones of `logits` [n, vocab], labels [n]."""
    at = np.flatnonzero(labels != IGNORED)
    if not len(at):
        return 0.0, 0, 0
    chosen, targets = logits[at], labels[at]
    nll = -_log_softmax(chosen)[np.arange(len(at)), targets].sum()
    return float(nll), int((chosen.argmax(-1) == targets).sum()), len(at)


def rounding_cost(items: Sequence[Probe], trained: np.ndarray, rounded: np.ndarray) -> dict[str, Any]:
    """What rounding did to the trained model: agreement of both spools; loss and accuracy on held-out rows, or None."""
    cost = compare_spools(trained, rounded)
    labels = np.concatenate([probe.labels for probe in items])
    for when, spool in (("before", trained), ("after", rounded)):
        loss, correct, count = loss_of(spool, labels)
        cost[f"loss_{when}"] = loss / count if count else None
        cost[f"token_accuracy_{when}"] = correct / count if count else None
    return cost
