"""Texts that are nearly the same, by the exact Jaccard similarity of their 5-grams, without comparing all pairs.

    J(a, b) = |A & B| / |A | B|        A, B the sets of 5-grams; case and white space do not count

Two sets with J >= t share one of the (1 - t) |A| + 1 rarest 5-grams of either, so an index of these alone finds every
pair (prefix filtering: Chaudhuri et al., ICDE 2006; Bayardo et al., WWW 2007), where MinHash would find most. Only the
start of a long text is looked at, and only so many texts are compared: memory stays in bounds on any file.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["MAX_TEXTS", "THRESHOLD", "Match", "near_matches", "similarity"]

THRESHOLD = 0.8
MAX_TEXTS = 20_000  # of a file; the rest is not compared
MAX_CHARACTERS = 4096  # of a text
_N = 5
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that polynomials in it modulo 2^64 lose nothing; 2^64 by the golden ratio
_AT_ONCE = 64  # candidates that are verified together


class Match(NamedTuple):
    """A text that an earlier one is nearly the same as."""

    at: int
    other: int  # where the earlier one is
    similarity: float


def near_matches(
    texts: Sequence[str],
    others: Sequence[str] | None = None,
    *,
    threshold: float = THRESHOLD,
    alike: Callable[[int, int], bool] = lambda at, other: True,
) -> list[Match]:
    """The texts that are nearly the same as an earlier one, each with the first such that was found.

    With `others` they are compared with those instead. Texts and others beyond `MAX_TEXTS` are left out. A pair that is
    not `alike` in what else is known of it does not count.
    """
    texts, known = texts[:MAX_TEXTS], [] if others is None else list(others[:MAX_TEXTS])
    index = _Index([*known, *texts], threshold)
    for at in range(len(known)):
        index.add(at)
    found = []
    for at in range(len(texts)):
        for other, share in index.find(len(known) + at):
            if alike(at, other):
                found.append(Match(at, other, share))
                break
        if others is None:
            index.add(at)
    return found


class _Index:
    """Sets of 5-grams as sorted ranks, rarest first, and for each rank the added sets that have it in their prefix."""

    def __init__(self, texts: Sequence[str], threshold: float) -> None:
        self.threshold = threshold
        grams = [_grams(text) for text in texts]
        _, inverse, counts = np.unique(
            np.concatenate([*grams, np.empty(0, np.uint64)]), return_inverse=True, return_counts=True
        )
        rank = np.empty(len(counts), np.int64)
        rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
        ends = np.cumsum([len(part) for part in grams])
        self.sets = [np.sort(part) for part in np.split(rank[inverse], ends)[: len(grams)]]
        self.holders: dict[int, list[int]] = defaultdict(list)
        self.marked = np.zeros(len(counts), bool)  # those of the set that is looked for

    def _prefix(self, at: int) -> list[int]:
        size = len(self.sets[at])
        prefix: list[int] = self.sets[at][: size - math.ceil(self.threshold * size) + 1].tolist()
        return prefix

    def add(self, at: int) -> None:
        for rank in self._prefix(at):
            self.holders[rank].append(at)

    def find(self, at: int) -> Iterator[tuple[int, float]]:
        """The added sets that are similar enough, and how similar."""
        wanted, candidates = self.sets[at], self._candidates(at)
        while some := list(itertools.islice(candidates, _AT_ONCE)):
            sizes = np.array([len(self.sets[other]) for other in some])
            starts = np.cumsum(sizes) - sizes
            self.marked[wanted] = True
            shared = np.add.reduceat(self.marked[np.concatenate([self.sets[o] for o in some])], starts, dtype=int)
            self.marked[wanted] = False
            similarity = shared / (len(wanted) + sizes - shared)
            for i in np.flatnonzero(similarity >= self.threshold):
                yield some[i], float(similarity[i])

    def _candidates(self, at: int) -> Iterator[int]:
        """The added sets that share one of the rarest 5-grams and are of a fitting size."""
        size, seen = len(self.sets[at]), set()
        for rank in self._prefix(at):
            for other in self.holders.get(rank, ()):
                if other not in seen:
                    seen.add(other)
                    count = len(self.sets[other])
                    if min(size, count) >= self.threshold * max(size, count):
                        yield other


def similarity(one: str, other: str) -> float:
    """J of two texts; 1 where both are empty."""
    a, b = _grams(one), _grams(other)
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared) if len(a) or len(b) else 1.0


def _grams(text: str) -> np.ndarray:
    """The 5-grams of a text as numbers, uint64, each once; a shorter text is one."""
    plain = " ".join(text[:MAX_CHARACTERS].casefold().split())
    codes = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if not codes.size:
        return codes
    codes = np.pad(codes, (0, max(0, _N - len(codes))))
    count = len(codes) - _N + 1
    found = np.zeros(count, np.uint64)
    for k in range(_N):
        found = found * np.uint64(_MULTIPLIER) + codes[k : k + count]
    return np.unique(found)
