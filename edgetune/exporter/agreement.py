"""How far two sets of logits are apart, and on which sequences that is asked. Numbers only: no torch, no onnxruntime.

Held-out rows come first, in a seeded order, for a file is often sorted by what its rows are about; seeded token ids
fill up what they lack to 1,000 positions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.data import IGNORED, Row

MIN_POSITIONS = 1000
TASK_POSITIONS = 8192  # held-out positions for the task metric: one point is then some eighty tokens
_ROW_LENGTH = 128  # of seeded rows
_BATCH_POSITIONS = 256
_LOGITS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Probe:
    """A sequence to compare on: ids [n], and labels [n], the id that position t should predict or -100."""

    ids: np.ndarray
    labels: np.ndarray

    @property
    def prompt_length(self) -> int:
        """The tokens before the first that is learned; all of them where none is."""
        learned = self.labels != IGNORED
        return int(learned.argmax()) + 1 if learned.any() else len(self.ids)


def probes(rows: Sequence[Row], vocab_size: int, context_length: int) -> tuple[list[Probe], list[Probe]]:
    """(what parity is measured on, all held-out probes for the task metric), both drawn without order from the rows.

    The first list holds at least 1,000 positions; seeded token ids fill it up where rows do not.
    """
    rng = np.random.default_rng(0)
    held_out: list[Probe] = []
    for index in rng.permutation(len(rows)):
        row = rows[index]
        held_out.append(Probe(row.input_ids.astype(np.int64), np.append(row.labels[1:], IGNORED).astype(np.int64)))
        if num_positions(held_out) >= TASK_POSITIONS:
            break
    chosen: list[Probe] = []
    for probe in held_out:
        if num_positions(chosen) < MIN_POSITIONS:
            chosen.append(probe)
    while num_positions(chosen) < MIN_POSITIONS:
        ids = rng.integers(0, vocab_size, min(_ROW_LENGTH, context_length))
        chosen.append(Probe(ids, np.full(len(ids), IGNORED)))
    return chosen, held_out


def num_positions(items: Sequence[Probe]) -> int:
    """Positions of all probes together."""
    return sum(len(probe.ids) for probe in items)


def batches(items: Sequence[Probe], *, alone: bool = False) -> Iterator[tuple[np.ndarray, list[Probe]]]:
    """Ids [B, T] and their probes, each `alone` or as many as fit.

    Rows end in padding, which no earlier position of a causal model sees.
    """
    at = 0
    while at < len(items):
        group = [items[at]]
        while not alone and at + len(group) < len(items):
            longest = max(len(probe.ids) for probe in [*group, items[at + len(group)]])
            if longest * (len(group) + 1) > _BATCH_POSITIONS:
                break
            group.append(items[at + len(group)])
        ids = np.zeros((len(group), max(len(probe.ids) for probe in group)), np.int64)
        for row, probe in zip(ids, group, strict=True):
            row[: len(probe.ids)] = probe.ids
        yield ids, group
        at += len(group)


class Spool:
    """Logits [positions, vocab_size] of all positions of some probes, in a file: written in tiles, read in ranges.

    A vocabulary of 128k makes 1,000 positions half a gigabyte, so they are never in memory together. `ids` are the
    batches [B, T] that the tiles are of, and `prompt_lengths` [B] what their probes have.
    """

    def __init__(self, path: Path, items: Sequence[Probe], vocab_size: int, *, alone: bool = False) -> None:
        plan = list(batches(items, alone=alone))
        self.ids = [ids for ids, _ in plan]
        self.prompt_lengths = [np.array([probe.prompt_length for probe in group]) for _, group in plan]
        lengths = [[len(probe.ids) for probe in group] for _, group in plan]
        starts = iter(accumulate((n for group in lengths for n in group), initial=0))
        self._rows = [[(next(starts), n) for n in group] for group in lengths]
        self._path, self._vocab_size, self._count = path, vocab_size, num_positions(items)
        self._file = path.open("wb")
        weakref.finalize(self, self._file.close)

    def write(self, batch: int, columns: slice, logits: np.ndarray, first: int = 0) -> None:
        """Logits [B, t, columns] of a batch, from its position `first` on; those of padding are left out."""
        for (start, length), row in zip(self._rows[batch], logits, strict=True):
            for at, values in enumerate(row[: length - first], start + first):
                self._file.seek(4 * (at * self._vocab_size + columns.start))
                self._file.write(np.ascontiguousarray(values, np.float32).data)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All positions in ranges, with their logits [n, vocab_size]."""
        self._file.flush()
        step = max(1, _LOGITS_AT_ONCE // self._vocab_size)
        for start in range(0, self._count, step):
            rows = slice(start, min(start + step, self._count))
            count, offset = (rows.stop - start) * self._vocab_size, 4 * start * self._vocab_size
            yield rows, np.fromfile(self._path, np.float32, count, offset=offset).reshape(-1, self._vocab_size)


class Agreement:
    """How far logits [n, vocab] are from expected ones: largest difference, equal top-1, mean KL(expected || got).

    The spread is that of the expected ones: their standard deviation around the mean of their position, which a softmax
    does not see; of a single output, whose mean counts, the root of its mean square.
    """

    def __init__(self) -> None:
        self.rows, self._worst, self._equal, self._kl, self._variance = 0, 0.0, 0, 0.0, 0.0

    def add(self, expected: np.ndarray, got: np.ndarray) -> None:
        worst = float(np.abs(expected - got).max())
        # NaN compares as smaller than anything, and a graph that returns it must not pass.
        self._worst = float("inf") if not np.isfinite(worst) else max(self._worst, worst)
        self._equal += int((expected.argmax(-1) == got.argmax(-1)).sum())
        logp, logq = _log_softmax(expected), _log_softmax(got)
        self._kl += float((np.exp(logp) * (logp - logq)).sum())
        alone = expected.shape[-1] == 1
        variances = np.square(expected, dtype=np.float64) if alone else expected.var(-1, dtype=np.float64)
        self._variance += float(variances.sum())
        self.rows += len(expected)

    def figures(self) -> dict[str, Any]:
        return {
            "max_abs_logit": self._worst, "top1_agreement": self._equal / self.rows,
            "kl": max(self._kl, 0.0) / self.rows,  # below zero it is the noise of float32 sums
            "logit_spread": (self._variance / self.rows) ** 0.5, "rows": self.rows,
        }  # fmt: skip


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def compare(expected: Spool, got: Spool) -> dict[str, Any]:
    """Agreement of two spools of the same probes; of the first ones where `got` has fewer."""
    agreement = Agreement()
    for (_, wanted), (_, found) in zip(expected.blocks(), got.blocks(), strict=False):
        agreement.add(wanted[: len(found)], found)
    return agreement.figures()


def loss_of(logits: np.ndarray, labels: np.ndarray) -> tuple[float, int, int]:
    """(summed NLL in nats, correct top-1, count) over the supervised ones of `logits` [n, vocab], labels [n]."""
    at = np.flatnonzero(labels != IGNORED)
    if not len(at):
        return 0.0, 0, 0
    chosen, targets = logits[at], labels[at]
    nll = -_log_softmax(chosen)[np.arange(len(at)), targets].sum()
    return float(nll), int((chosen.argmax(-1) == targets).sum()), len(at)


def task_of(items: Sequence[Probe], spool: Spool) -> np.ndarray:
    """The sums of `loss_of` over all probes of a spool."""
    labels, totals = np.concatenate([probe.labels for probe in items]), np.zeros(3)
    for rows, logits in spool.blocks():
        totals += loss_of(logits, labels[rows])
    return totals


def rounding_cost(items: Sequence[Probe], trained: Spool, rounded: Spool) -> dict[str, Any]:
    """What rounding did to the trained model: agreement of both spools; loss and accuracy on held-out rows, or None."""
    cost = compare(trained, rounded)
    for when, spool in (("before", trained), ("after", rounded)):
        loss, correct, count = task_of(items, spool)
        cost[f"loss_{when}"] = loss / count if count else None
        cost[f"token_accuracy_{when}"] = correct / count if count else None
    return cost
