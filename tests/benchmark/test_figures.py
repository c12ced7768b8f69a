"""The arithmetic of the benchmark, on figures made up here, and the page cache against what the kernel says."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.benchmark import measuring, timeline
from edgetune.benchmark.measuring import (
    Settings,
    latency,
    measure_comparison,
    measure_loads,
    measure_soak,
    measure_speed,
)
from edgetune.benchmark.page_cache import drop_from_cache, resident_bytes
from edgetune.benchmark.soaking import Soak
from edgetune.benchmark.timeline import Timeline
from edgetune.memory import anonymous_bytes

seconds = st.floats(1e-6, 10)
passes = st.integers(2, 9).flatmap(
    lambda count: st.lists(st.lists(seconds, min_size=count, max_size=count), min_size=1, max_size=6)
)


@given(passes, st.integers(1, 4096))
def test_latency_is_numpys_and_the_standard_librarys(found: list[list[float]], prompt_tokens: int) -> None:
    figures = latency(found, prompt_tokens)
    each = np.array([token for one in found for token in one[1:]]) * 1e3
    for share in (50, 90, 95, 99):
        assert figures[f"p{share}_ms"] == pytest.approx(np.quantile(each, share / 100))
    if len(each) > 1:
        inclusive = statistics.quantiles(each, n=100, method="inclusive")
        assert [figures[f"p{share}_ms"] for share in (90, 99)] == pytest.approx([inclusive[89], inclusive[98]])
    first = np.median([one[0] for one in found])
    rates = np.array([1 / np.mean(one[1:]) for one in found])
    assert figures["time_to_first_token_ms"] == pytest.approx(first * 1e3)
    assert figures["prompt_tokens_per_second"] == pytest.approx(prompt_tokens / first)
    assert figures["generation_tokens_per_second"] == pytest.approx(np.median(rates))
    assert figures["variation_percent"] == pytest.approx(100 * rates.std() / rates.mean(), abs=1e-6)


@pytest.mark.parametrize(
    ("lengths", "main"), [((16, 128, 512), 128), ((16,), 16), ((100, 150), 150), ((64, 192), 192), ((127, 129), 129)]
)
def test_the_main_length(lengths: tuple[int, ...], main: int) -> None:
    assert Settings(lengths, 8, 1, 0, 1, 4096).main_prompt_tokens == main


# ---- what is asked of workers, whose times are known here


class Scripted:
    """Stands for a worker: 100 ms to the first token, then 3 ms with the adapter and 2 without, in `slow` twice that.

    A load takes 10 ms and 700 bytes, 40 ms and 900 bytes after its files were dropped from the page cache.
    """

    asked: list[tuple[str, int, int, bool]]
    dropped = False

    def __init__(self, folder: Path, threads: int) -> None:
        self.name, self.factor = folder.name, 2 if folder.name == "slow" else 1

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load(self) -> dict[str, Any]:
        cold, Scripted.dropped = Scripted.dropped, False
        return {
            "load_ms": self.factor * (40 if cold else 10), "check_ms": 4, "load_peak_bytes": 900 if cold else 700,
            "floor_bytes": 5, "has_adapter": True, "machine": {},
        }  # fmt: skip

    def generate(self, prompt_tokens: int, new_tokens: int, *, adapter: bool = True) -> list[float]:
        self.asked.append((self.name, prompt_tokens, new_tokens, adapter))
        return [0.1 * self.factor] + [self.factor * (0.003 if adapter else 0.002)] * (new_tokens - 1)

    def memory(self) -> dict[str, Any]:
        return {"peak_memory_bytes": 1000 * self.factor, "series": {}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, bool]]:
    """Every pass that is asked of a worker: bundle, tokens of the prompt, new ones, adapter."""
    monkeypatch.setattr(measuring, "Worker", Scripted)
    Scripted.asked, Scripted.dropped = [], False
    return Scripted.asked


def test_the_overhead_is_that_of_the_adapter_and_runs_are_those_asked_for(
    asked: list[tuple[str, int, int, bool]],
) -> None:
    found = measure_speed(Path("fast"), Settings((16, 100), 2, 2, 1, 1, 80))
    assert found["adapter_overhead_percent"] == pytest.approx(50)
    assert [entry["p50_ms"] for entry in found["past"]] == [pytest.approx(3), None], "a context of 80 holds 64 + 16"
    turns = [("fast", 100, 2, True), ("fast", 100, 2, False)]
    assert asked == [("fast", 16, 2, True)] * 3 + turns[:1] + turns * 2 + [("fast", 64, 17, True)] * 2
    asked.clear()
    short = measure_speed(Path("fast"), Settings((16,), 2, 1, 0, 1, 79))
    assert [entry["p50_ms"] for entry in short["past"]] == [None, None]


def test_loads_are_cold_and_warm(asked: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(paths: list[Path]) -> None:
        assert paths == [Path("fast/a"), Path("fast/b")]
        Scripted.dropped = True

    monkeypatch.setattr(measuring, "drop_from_cache", drop)
    found = measure_loads(Path("fast"), ["a", "b"], 1, 5)
    assert (found["cold_load_ms"], found["load_ms"], found["load_peak_bytes"]) == (40, 10, 900)
    assert (found["loads"]["cold_ms"], found["loads"]["warm_ms"]) == ([40] * 3, [10] * 3)


def test_bundles_are_compared_in_turns(asked: list[tuple[str, int, int, bool]]) -> None:
    found = measure_comparison(Path("slow"), Path("fast"), Settings((16,), 5, 3, 1, 1, 80))
    assert [name for name, *_ in asked] == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    wanted = {
        "time_to_first_token_ms": (200, 100), "generation_tokens_per_second": (1 / 0.006, 1 / 0.003),
        "prompt_tokens_per_second": (80, 160), "p50_ms": (6, 3), "load_ms": (20, 10), "load_peak_bytes": (700, 700),
        "peak_memory_bytes": (2000, 1000),
    }  # fmt: skip
    for key, (this, other) in wanted.items():
        assert found[key] == pytest.approx({"this": this, "other": other, "ratio": this / other}), key


def test_a_ratio_is_the_median_of_turns_and_not_that_of_medians() -> None:
    assert measuring._ratio([2, 9, 3], [1, 3, 2]) == {"this": 3, "other": 2, "ratio": 2}


def test_a_soak_leaves_prompts_out(asked: object) -> None:
    found = measure_soak(Path("fast"), Settings((16,), 5, 1, 0, 1, 80), 0.01, print)
    assert found["burst_tokens_per_second"] == pytest.approx(1 / 0.003)
    assert found["sustained_tokens_per_second"] == pytest.approx(1 / 0.003)


# ---- soak


def soak(rates: list[float], *, every_s: float, total_s: float, sys: Path = Path("/nowhere")) -> Soak:
    """Passes of 10 tokens at these rates, one ending every so many seconds."""
    made = Soak(total_s, sys)
    for i, rate in enumerate(rates, 1):
        made.add(i * every_s, 10, 10 / rate)
    return made


def test_a_soak_compares_the_first_and_the_last_minute() -> None:
    # 600 s, a pass every 5 s: 100 tokens/s in the first minute, 50 in the last, 80 between.
    rates = [100.0] * 12 + [80.0] * 96 + [50.0] * 12
    figures = soak(rates, every_s=5, total_s=600).figures()
    assert (figures["burst_tokens_per_second"], figures["sustained_tokens_per_second"]) == pytest.approx((100, 50))
    assert (figures["sustained_ratio"], figures["slowed"]) == (pytest.approx(0.5), True)
    assert (figures["seconds"], figures["window_s"], figures["interval_s"]) == (600, 60, 10)
    assert len(figures["generation_tokens_per_second"]) == 60
    assert figures["clock_mhz"] is None and figures["temperature_c"] is None


def test_a_short_soak_compares_its_halves_and_leaves_gaps() -> None:
    figures = soak([40.0, 38.0], every_s=2.5, total_s=5).figures()
    assert (figures["window_s"], figures["slowed"]) == (2.5, False)
    assert figures["generation_tokens_per_second"] == [None, None, pytest.approx(40), None, None]
    one = soak([30.0], every_s=7, total_s=5).figures()
    assert one["sustained_ratio"] == 1


def test_a_rate_is_tokens_over_time_and_not_the_mean_of_rates() -> None:
    made = Soak(2)
    made.add(0.5, 10, 1.0)
    made.add(1.0, 30, 1.0)
    made.add(2.0, 30, 2.0)
    assert made.figures()["burst_tokens_per_second"] == pytest.approx(40 / 2)


def test_clock_and_temperature_are_the_highest_that_the_kernel_tells(tmp_path: Path) -> None:
    for name, text in {
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000\n",
        "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
        "class/thermal/thermal_zone0/temp": "47500\n",
        "class/thermal/thermal_zone1/temp": "broken",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    figures = soak([20.0] * 4, every_s=1, total_s=4, sys=tmp_path).figures()
    assert figures["clock_mhz"] == [2400.0] * 4
    assert figures["temperature_c"] == [47.5] * 4


# ---- page cache


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system has no posix_fadvise")
def test_a_file_on_disk_leaves_the_page_cache(tmp_path: Path) -> None:
    file, empty = tmp_path / "file", tmp_path / "empty"
    file.write_bytes(os.urandom(300_001))
    empty.touch()
    assert resident_bytes(file) == -(-300_001 // mmap.PAGESIZE) * mmap.PAGESIZE
    assert resident_bytes(empty) == 0
    reason = drop_from_cache([file, empty])
    assert (reason is None) == (resident_bytes(file) <= 2 * mmap.PAGESIZE)
    if reason is not None:
        assert "stay in memory after posix_fadvise" in reason
    file.read_bytes()
    assert resident_bytes(file) >= 300_001
    if reason is None:
        assert drop_from_cache([empty, file]) is None, "each of them is dropped"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system has no /dev/shm")
def test_a_file_system_in_memory_is_told() -> None:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        (folder / "file").write_bytes(os.urandom(1 << 20))
        assert "1.0 MiB of 1.0 MiB stay in memory" in (drop_from_cache([folder / "file"]) or "")
    finally:
        shutil.rmtree(folder)


def test_what_cannot_be_dropped_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such file" in (drop_from_cache([tmp_path / "gone"]) or "")
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert "no posix_fadvise" in (drop_from_cache([]) or "")


# ---- memory over time


def test_a_long_series_stays_short_and_keeps_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MOST_SAMPLES", 8)
    monkeypatch.setattr(timeline, "FIRST_INTERVAL_S", 0.001)
    before = anonymous_bytes()
    with Timeline() as made:
        made.mark("ballast")
        ballast = np.ones(8 << 20, np.uint8)
        deadline = time.monotonic() + 20
        while made.series()["seconds"][-1:] < [0.03] and time.monotonic() < deadline:
            time.sleep(0.005)
        del ballast
    series = made.series()
    assert 2 <= len(series["seconds"]) < 8
    assert series["seconds"] == sorted(series["seconds"]) and series["seconds"][-1] >= 0.03
    assert max(series["anonymous_bytes"]) > before + (6 << 20)
    assert series["moments"][0]["name"] == "ballast"
