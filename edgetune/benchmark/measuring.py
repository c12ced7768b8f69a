"""What is measured, as orders to worker processes, and the figures that come of it.

Medians stand for a speed, because one run that was disturbed should not move it; percentiles are over single tokens,
linear between two of them (numpy's default). What is compared is measured in turns, so that a machine that slows down
slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import numpy as np

from edgetune.benchmark.page_cache import drop_from_cache
from edgetune.benchmark.process import Worker
from edgetune.benchmark.soaking import Soak

PERCENTILES = (50, 90, 95, 99)
PAST_TOKENS = (64, 1024)  # where the time of one token is measured
PAST_STEPS = 16
MOST_LOADS = 3

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How much is measured. `prompt_tokens` ascend."""

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    runs: int
    warmup: int
    threads: int
    context_length: int

    @property
    def main_prompt_tokens(self) -> int:
        """The length that the figures at the top are of: the one nearest to 128."""
        return min(self.prompt_tokens, key=lambda count: (abs(count - 128), -count))


def latency(passes: Sequence[Sequence[float]], prompt_tokens: int) -> dict[str, float]:
    """Figures of several passes, each the seconds to its first token and of every token after it."""
    first = median(seconds[0] for seconds in passes)
    rates = [(len(seconds) - 1) / sum(seconds[1:]) for seconds in passes]
    each_ms = 1e3 * np.concatenate([seconds[1:] for seconds in passes])
    return {
        "time_to_first_token_ms": 1e3 * first,
        "prompt_tokens_per_second": prompt_tokens / first,
        "generation_tokens_per_second": median(rates),
        **{f"p{share}_ms": float(np.percentile(each_ms, share)) for share in PERCENTILES},
        "variation_percent": 100 * pstdev(rates) / fmean(rates),
    }


def measure_loads(folder: Path, files: Iterable[str], threads: int, runs: int) -> dict[str, Any]:
    """Opening the bundle, each time in a fresh process: after its files were dropped from the page cache, and warm."""
    paths, cold, warm, reason = [folder / name for name in files], [], [], None
    for _ in range(min(runs, MOST_LOADS)):
        if reason is None:
            reason = drop_from_cache(paths)
        if reason is None:
            cold.append(_load(folder, threads))
        warm.append(_load(folder, threads))
    return {
        "load_ms": median(load["load_ms"] for load in warm),
        "check_ms": median(load["check_ms"] for load in warm),
        "cold_load_ms": None if reason else median(load["load_ms"] for load in cold),
        "load_peak_bytes": max(load["load_peak_bytes"] for load in cold + warm),
        "loads": {
            "warm_ms": [load["load_ms"] for load in warm],
            "cold_ms": [] if reason else [load["load_ms"] for load in cold],
            "cold_reason": reason,
        },
    }


def _load(folder: Path, threads: int) -> dict[str, Any]:
    with Worker(folder, threads) as worker:
        return worker.load()


def measure_speed(folder: Path, settings: Settings) -> dict[str, Any]:
    """Prefill and decode at each length, what the adapter costs at the main one, and memory, in one process.

    Lengths ascend, so a length's peak is that of the load and of passes no longer than its own.
    """
    lengths, main, overhead = [], {}, None
    with Worker(folder, settings.threads) as worker:
        loaded = worker.load()
        for count in settings.prompt_tokens:
            is_main = count == settings.main_prompt_tokens
            tuned, base = _passes(worker, settings, count, base_too=is_main and loaded["has_adapter"])
            peaks = worker.memory()
            series = peaks.pop("series")
            lengths.append({"prompt_tokens": count, **latency(tuned, count), **peaks})
            if is_main:
                main = {name: value for name, value in lengths[-1].items() if name != "prompt_tokens"}
                if base:
                    overhead = _overhead_percent(tuned, base)
        past = [_past(worker, settings, count) for count in PAST_TOKENS]
        if any(entry["p50_ms"] is not None for entry in past):
            series = worker.memory()["series"]
    return {
        **main, "adapter_overhead_percent": overhead, "floor_bytes": loaded["floor_bytes"], "lengths": lengths,
        "past": past, "memory": series, "machine": loaded["machine"],
    }  # fmt: skip


def _passes(
    worker: Worker, settings: Settings, prompt_tokens: int, *, base_too: bool
) -> tuple[list[list[float]], list[list[float]]]:
    """Passes as the bundle is used, and in turns with them the base's alone."""
    shape = (prompt_tokens, settings.new_tokens)
    for _ in range(settings.warmup):
        worker.generate(*shape)
    tuned, base = [], []
    for _ in range(settings.runs):
        tuned.append(worker.generate(*shape))
        if base_too:
            base.append(worker.generate(*shape, adapter=False))
    return tuned, base


def _overhead_percent(tuned: list[list[float]], base: list[list[float]]) -> float:
    """Time of a token with against without the adapter, by the medians over all of them."""
    with_adapter, without = (median(token for seconds in one for token in seconds[1:]) for one in (tuned, base))
    return 100 * (with_adapter / without - 1)


def _past(worker: Worker, settings: Settings, past_tokens: int) -> dict[str, Any]:
    """Time of one token with so many before it; None where the context holds no such place."""
    entry: dict[str, Any] = {"past_tokens": past_tokens, "p50_ms": None}
    if past_tokens + PAST_STEPS <= settings.context_length:
        passes = [worker.generate(past_tokens, PAST_STEPS + 1)[1:] for _ in range(settings.runs)]
        entry["p50_ms"] = 1e3 * median(token for seconds in passes for token in seconds)
    return entry


def measure_soak(folder: Path, settings: Settings, seconds: float, say: Say) -> dict[str, Any]:
    """Generate without a pause for so long, in a process of its own."""
    shape = (settings.main_prompt_tokens, settings.new_tokens)
    with Worker(folder, settings.threads) as worker:
        worker.load()
        worker.generate(*shape)
        soak, start = Soak(seconds), time.monotonic()
        while (now := time.monotonic() - start) < seconds:
            rest = worker.generate(*shape)[1:]
            if soak.add(time.monotonic() - start, len(rest), sum(rest)):
                say(f"soak: {now:,.0f} of {seconds:,.0f} s, {soak.last_rate:,.1f} tokens/s")
        return {**soak.figures(), "memory": worker.memory()["series"]}


def measure_comparison(folder: Path, other: Path, settings: Settings) -> dict[str, Any]:
    """Two bundles in turns: figure -> `this` and `other` (medians) and `ratio`, the median of this / other by turn."""
    shape, folders = (settings.main_prompt_tokens, settings.new_tokens), (folder, other)
    figures: list[list[dict[str, float]]] = [[], []]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(one, settings.threads)) for one in folders]
        peaks = [worker.load() for worker in workers]
        for worker in workers:
            for _ in range(settings.warmup):
                worker.generate(*shape)
        for turn in range(settings.runs):
            for side in (0, 1) if turn % 2 == 0 else (1, 0):  # neither is always the first
                figures[side].append(latency([workers[side].generate(*shape)], shape[0]))
        for peak, worker in zip(peaks, workers, strict=True):
            peak |= worker.memory()
    names = ("time_to_first_token_ms", "prompt_tokens_per_second", "generation_tokens_per_second", "p50_ms")
    compared = {name: _ratio(*([one[name] for one in side] for side in figures)) for name in names}
    for name in ("load_peak_bytes", "peak_memory_bytes"):
        compared[name] = _ratio(*([peak[name]] for peak in peaks))
    loads: list[list[float]] = [[], []]
    for _ in range(min(settings.runs, MOST_LOADS)):
        for side, one in enumerate(folders):
            loads[side].append(_load(one, settings.threads)["load_ms"])
    compared["load_ms"] = _ratio(*loads)
    return {"prompt_tokens": shape[0], "new_tokens": shape[1], "runs": settings.runs, **compared}


def _ratio(this: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(this, other, strict=True)]
    return {"this": median(this), "other": median(other), "ratio": median(ratios)}
