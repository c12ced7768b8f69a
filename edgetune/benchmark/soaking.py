"""A soak: does the speed hold under minutes of load?

Tokens per second over intervals, the first minute (burst) against the last (sustained). Every pass has the same prompt
and the same number of tokens, so that a growing cache does not look like heat. Beside them stand the clock and the
temperature that the kernel reports, where it does: a rate that falls with the clock is heat, one that falls alone is
another program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MOST_INTERVALS = 60
MINUTE_S = 60.0
SLOWED_BELOW = 0.9  # of the first minute's speed; two equal minutes on a shared machine differ by a few percent
_CLOCKS = "devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"  # kHz
_TEMPERATURES = "class/thermal/thermal_zone*/temp"  # 1/1000 degree Celsius


class Soak:
    """Collects passes; `figures` is what came of them. An interval is a second at least, and a 60th of the soak."""

    def __init__(self, seconds: float, sys: Path = Path("/sys")) -> None:
        self._seconds, self._sys = seconds, sys
        self.interval_s = max(1.0, seconds / MOST_INTERVALS)
        self._passes: list[tuple[float, int, float]] = []
        self._sensors: list[tuple[float | None, float | None]] = []

    def add(self, end_s: float, tokens: int, seconds: float) -> bool:
        """One pass: when it ended, its tokens after the first and how long they took. Whether an interval is over."""
        self._passes.append((end_s, tokens, seconds))
        over = end_s >= (len(self._sensors) + 1) * self.interval_s
        while end_s >= (len(self._sensors) + 1) * self.interval_s:
            self._sensors.append((self._highest(_CLOCKS, 1e3), self._highest(_TEMPERATURES, 1e3)))
        return over

    @property
    def last_rate(self) -> float:
        """Tokens per second of the last pass."""
        _, tokens, seconds = self._passes[-1]
        return tokens / seconds

    def figures(self) -> dict[str, Any]:
        """`burst_` and `sustained_tokens_per_second` (first and last minute, or halves of a shorter soak), their ratio,
        whether it `slowed` by more than a tenth, and the series; None stands where an interval saw no pass end, or for
        what the kernel does not tell.
        """
        last_end = self._passes[-1][0]
        window = min(MINUTE_S, last_end / 2)
        burst = _rate(p for p in self._passes if p[0] <= max(window, self._passes[0][0]))
        sustained = _rate(p for p in self._passes if p[0] > last_end - window)
        assert burst is not None and sustained is not None, "the first and the last pass are always inside"
        count = max(1, len(self._sensors))
        rates = [_rate(p for p in self._passes if i <= p[0] / self.interval_s < i + 1) for i in range(count)]
        clocks, temperatures = ([sensor[kind] for sensor in self._sensors] for kind in (0, 1))
        return {
            "seconds": last_end,
            "passes": len(self._passes),
            "window_s": window,
            "burst_tokens_per_second": burst,
            "sustained_tokens_per_second": sustained,
            "sustained_ratio": sustained / burst,
            "slowed": sustained / burst < SLOWED_BELOW,
            "interval_s": self.interval_s,
            "generation_tokens_per_second": rates,
            "clock_mhz": _told(clocks),
            "temperature_c": _told(temperatures),
        }

    def _highest(self, pattern: str, scale: float) -> float | None:
        """The highest of the kernel's files that match, or None where there is none that can be read."""
        found = []
        for path in self._sys.glob(pattern):
            try:
                found.append(int(path.read_text()) / scale)
            except (OSError, ValueError):
                continue
        return max(found, default=None)


def _rate(passes: Iterable[tuple[float, int, float]]) -> float | None:
    found = list(passes)
    return sum(tokens for _, tokens, _ in found) / sum(seconds for *_, seconds in found) if found else None


def _told(values: Sequence[float | None]) -> list[float | None] | None:
    return None if all(value is None for value in values) else list(values)
