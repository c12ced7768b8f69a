"""A benchmark as charts: latency, memory over time, the soak."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgetune.benchmark.results import write_text
from edgetune.charts import Chart, Line, Rule, line_chart
from edgetune.memory import MIB


def plots(result: dict[str, Any]) -> dict[str, Chart]:
    """Name -> chart, of what was run."""
    soak = result["soak"]
    charts = {"latency": _latency(result), "memory": memory_chart("Memory while it is measured", result["memory"])}
    if soak is not None:
        charts["soak"] = _soak(soak)
        charts["soak-memory"] = memory_chart("Memory during the soak", soak["memory"])
    return {name: chart for name, chart in charts.items() if chart is not None}


def save_plots(result: dict[str, Any], folder: Path) -> None:
    """Write each chart as an SVG file of its own. Raises ConfigError where the folder cannot be written."""
    for name, chart in plots(result).items():
        write_text(folder / f"{name}.svg", chart.document())


def memory_chart(title: str, series: dict[str, Any]) -> Chart | None:
    """Anonymous and file-backed memory over time, in MiB."""
    lines = [
        Line(name, series["seconds"], [size / MIB for size in series[key]])
        for name, key in (("anonymous + swap, MiB", "anonymous_bytes"), ("file-backed, MiB", "file_backed_bytes"))
    ]
    return line_chart(title, lines, x_name="seconds")


def _latency(result: dict[str, Any]) -> Chart | None:
    lengths = result["lengths"]
    xs = [length["prompt_tokens"] for length in lengths]
    lines = [
        Line(f"p{share} of a token, ms", xs, [length[f"p{share}_ms"] for length in lengths], dots=True)
        for share in (50, 90, 99)
    ]
    return line_chart("Time of a generated token", lines, x_name="tokens of the prompt")


def _soak(soak: dict[str, Any]) -> Chart | None:
    rates = soak["generation_tokens_per_second"]
    ends = [(i + 1) * soak["interval_s"] for i in range(len(rates))]
    return line_chart(
        f"Speed during {soak['seconds']:,.0f} s without a pause",
        [Line("tokens/s", ends, rates)],
        x_name="seconds",
        rules=[Rule(f"the first {soak['window_s']:.3g} s", soak["burst_tokens_per_second"])],
    )
