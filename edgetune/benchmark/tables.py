"""The result of `bench` as a table, for a terminal and in Markdown.

Measured and predicted figures stand in columns of their own. The rows are made once, here, and drawn twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edgetune.memory import MIB, format_mib

Result = dict[str, Any]
Rows = list[tuple[str, ...]]  # the first is the head

_UNKNOWN = "-"


def explain(result: Result) -> str:
    """For people at a terminal: what was measured here, what is predicted, the verdict on the device."""
    lines = [title(result), f"measured here ({place(result)})"]
    for name, rows in tables(result).items():
        lines += ["", *([name] if name else []), *_aligned(rows)]
    lines += [f"note: {notice}" for notice in result["notices"]]
    return "\n".join(lines)


def markdown(result: Result) -> str:
    """The same as a Markdown document."""
    lines = [f"# {title(result)}", "", f"Measured on {place(result)}, {when(result)}."]
    for name, rows in tables(result).items():
        lines += ["", *([f"## {name}", ""] if name else []), *_piped(rows)]
    lines += [line for notice in result["notices"] for line in ("", f"Note: {notice}.")]
    return "\n".join(lines) + "\n"


def title(result: Result) -> str:
    """What was benched, in a line."""
    return (
        f"{result['bundle']} ({result['weights']}, {format_mib(result['bundle_bytes'])}): {result['prompt_tokens']} "
        f"prompt and {result['new_tokens']} new tokens, {result['runs']} run{'s' if result['runs'] > 1 else ''}"
    )


def place(result: Result) -> str:
    """Where it was measured."""
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {result['threads']} of {machine['cores']} cores, onnxruntime {machine['onnxruntime']}, "
        f"Python {machine['python']}"
    )


def when(result: Result) -> str:
    """When it was measured."""
    return f"{result['measured_at'][:16].replace('T', ' ')} UTC"


def tables(result: Result) -> dict[str, Rows]:
    """Every table of a result by its heading; a part that was not run has none."""
    found = {"": _figures(result), "Lengths": _lengths(result)}
    if result["soak"] is not None:
        found["Soak"] = _soak(result["soak"])
    if result["compare"] is not None:
        found[f"Beside {result['compare']['bundle']}, in turns"] = _compared(result)
    found[f"Verdict for {result['device']}"] = _verdict(result)
    if result["gates"]:
        found["Gates"] = _gates(result["gates"])
    return found


def _figures(result: Result) -> Rows:
    """Measured and predicted side by side; the predicted column is there where something is predicted."""
    predicted, energy, device = result["predicted"], result["energy"], result["device"]
    overhead, cold = result["adapter_overhead_percent"], result["cold_load_ms"]
    without = "no default adapter" if result.get("adapters") else "no adapter"
    load_peak, floor = format_mib(result["load_peak_bytes"]), format_mib(result["floor_bytes"])
    rows: list[tuple[str, str, str]] = [
        ("load, cold page cache", _text(cold, "{:,.0f} ms"), _UNKNOWN),
        ("load, warm", f"{result['load_ms']:,.0f} ms, {result['check_ms']:,.0f} of it hashes", _UNKNOWN),
        ("load peak", f"{load_peak}, {floor} of it floor", _UNKNOWN),
        _both(result, "time to first token", "time_to_first_token_ms", "{:,.1f} ms"),
        ("prompt", f"{result['prompt_tokens_per_second']:,.1f} tokens/s", _UNKNOWN),
        _both(result, "generation", "generation_tokens_per_second", "{:,.1f} tokens/s"),
        (
            "  sustained, when hot",
            _text(result["soak"] and result["soak"]["sustained_tokens_per_second"], "{:,.1f} tokens/s"),
            _text(predicted.get("sustained_tokens_per_second"), "{:,.1f} tokens/s"),
        ),
        (
            "per token p50 / p90 / p99",
            " / ".join(f"{result[f'p{share}_ms']:.2f}" for share in (50, 90, 99)) + " ms",
            _UNKNOWN,
        ),
        *(
            (f"  after {entry['past_tokens']:,} tokens", _text(entry["p50_ms"], "{:.2f} ms"), _UNKNOWN)
            for entry in result["past"]
        ),
        ("peak memory, anonymous", format_mib(result["peak_memory_bytes"]), _UNKNOWN),
        ("  file-backed", format_mib(result["peak_file_backed_bytes"]), _UNKNOWN),
        ("adapter overhead", without if overhead is None else f"{overhead:+.1f} %", _UNKNOWN),
        ("energy per token", _UNKNOWN, _text(energy["mj_per_token"], "{:,.3g} mJ")),
        ("battery for 1,000 tokens", _UNKNOWN, _text(energy["battery_percent_per_1000_tokens"], "{:.2g} %")),
    ]  # fmt: skip
    return [("", "measured here", f"predicted for {device}"), *rows]


def _both(result: Result, name: str, key: str, pattern: str) -> tuple[str, str, str]:
    return name, _text(result[key], pattern), _text(result["predicted"].get(key), pattern)


def _lengths(result: Result) -> Rows:
    head = ("prompt", "first token", "prompt tokens/s", "tokens/s", "p50", "p90", "p99", "peak memory")
    rows: Rows = [head]
    rows += [
        (
            f"{length['prompt_tokens']:,}", f"{length['time_to_first_token_ms']:,.1f} ms",
            *(f"{length[key]:,.1f}" for key in ("prompt_tokens_per_second", "generation_tokens_per_second")),
            *(f"{length[f'p{share}_ms']:.2f} ms" for share in (50, 90, 99)), format_mib(length["peak_memory_bytes"]),
        )
        for length in result["lengths"]
    ]  # fmt: skip
    if result["predicted_lengths"]:
        rows[0] = (*head, "predicted first token", "predicted tokens/s")
        for i, length in enumerate(result["predicted_lengths"], 1):
            first = _text(length["time_to_first_token_ms"], "{:,.1f} ms")
            rows[i] = (*rows[i], first, _text(length["generation_tokens_per_second"], "{:,.1f}"))
    return rows


def _soak(soak: Result) -> Rows:
    window = f"{soak['window_s']:.3g} s"
    clocks, temperatures = soak["clock_mhz"], soak["temperature_c"]
    rows: Rows = [
        ("", "measured here"),
        (f"first {window}", f"{soak['burst_tokens_per_second']:,.1f} tokens/s"),
        (f"last {window}", f"{soak['sustained_tokens_per_second']:,.1f} tokens/s"),
        ("sustained over burst", f"{soak['sustained_ratio']:.2f}{', SLOWED' if soak['slowed'] else ''}"),
        ("clock, first to last", _ends(clocks, "{:,.0f} MHz")),
        ("temperature, first to last", _ends(temperatures, "{:.0f} °C")),
    ]
    return rows


def _ends(values: Sequence[float | None] | None, pattern: str) -> str:
    """The first and the last of a sensor's values."""
    if values is None:
        return "not told by this kernel"
    return " to ".join(_text(value, pattern) for value in (values[0], values[-1]))


def _compared(result: Result) -> Rows:
    compared = result["compare"]
    formats: dict[str, Callable[[float], str]] = {
        "load_ms": "{:,.0f} ms".format, "time_to_first_token_ms": "{:,.1f} ms".format,
        "prompt_tokens_per_second": "{:,.1f}".format, "generation_tokens_per_second": "{:,.1f}".format,
        "p50_ms": "{:.2f} ms".format, "load_peak_bytes": format_mib, "peak_memory_bytes": format_mib,
    }  # fmt: skip
    rows: Rows = [("", "this", "other", "this / other")]
    for name, form in formats.items():
        entry = compared[name]
        rows.append((name, form(entry["this"]), form(entry["other"]), f"{entry['ratio']:.3f}"))
    sizes = (result["bundle_bytes"], compared["bundle_bytes"])
    return [*rows, ("bundle_bytes", *map(format_mib, sizes), f"{sizes[0] / sizes[1]:.3f}")]


def _verdict(result: Result) -> Rows:
    rows: Rows = [("target", "measured", "predicted", "wanted", "verdict", "basis")]
    for name, entry in result["verdict"].items():
        word = {True: "pass", False: "FAIL", None: "unknown"}[entry["pass"]]
        value, wanted = (_of_target(name, entry[key]) for key in ("value", "wanted"))
        measured, predicted = (value if entry["basis"] == kind else _UNKNOWN for kind in ("measured", "predicted"))
        rows.append((name, measured, predicted, wanted, word, entry["basis"]))
    return rows


def _gates(gates: Sequence[Result]) -> Rows:
    rows: Rows = [("fails if", "found", "gate")]
    for gate in gates:
        found = _UNKNOWN if gate["value"] is None else f"{gate['value']:,.6g}"
        rows.append((gate["gate"], found, "FAILED" if gate["failed"] else "passed"))
    return rows


def _of_target(name: str, value: float | None) -> str:
    if value is None:
        return _UNKNOWN
    return f"{value / MIB:,.1f} MiB" if name.endswith("_bytes") else f"{value:,.1f}"


def _text(value: float | None, pattern: str) -> str:
    return _UNKNOWN if value is None else pattern.format(value)


def _aligned(rows: Rows) -> Iterator[str]:
    """The first column to the left, the others to the right, none wider than it must be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()


def _piped(rows: Rows) -> Iterator[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.strip().replace('|', '&#124;') for cell in cells)} |"

    yield line(rows[0])
    yield f"|{'---|' * 1}{'---:|' * (len(rows[0]) - 1)}"
    for row in rows[1:]:
        yield line(row)
