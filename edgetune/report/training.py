"""The part of a report that a run folder gives: memory against the budget, concessions, loss, speed, certificate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from edgetune.charts import Line, Rule, line_chart, stacked_bar
from edgetune.memory import MIB, format_mib
from edgetune.report.artifacts import RunFiles
from edgetune.report.blocks import Block, Card, Drawing, Missing, Section, Table, Text, mib, number, shown

MOST_POINTS = 300  # of a line; longer ones are drawn as means
_FAR = 3  # times the peak: a budget beyond that would press what was measured flat, and is told in words
_HELD_BY = {
    "none": "nothing held it: it was measured alone",
    "governor": "held by the governor, which samples every 4 ms and stops the run at the budget",
    "rlimit": "held by the governor and by RLIMIT_DATA, which lets allocations beyond it fail",
    "cgroup": "held by the kernel: the process was in a cgroup of exactly the budget",
}
_ENDS = {
    "done": "ran to its last step",
    "budget": "stopped at the budget, with a checkpoint",
    "signal": "was stopped by a signal, with a checkpoint",
    "slice": "ended with its slice, with a checkpoint",
    "nonfinite": "stopped because loss or gradient was not finite",
}


def run_cards(run: RunFiles) -> list[Card]:
    """The figures of a run that count."""
    plan, summary = run.plan, run.summary
    cards = [
        Card("Budget", format_mib(plan.budget_bytes), detail=f"{plan.budget_name}, {plan.device}"),
        Card("Peak memory", format_mib(plan.predicted_peak_bytes), "predicted", "anonymous + swap"),
    ]
    if summary is not None:
        speed = number(summary, "tokens_per_second")
        cards += [
            Card("Peak memory", mib(number(summary, "measured_peak_bytes")), "measured", "anonymous + swap"),
            Card("Held-out loss", shown(number(summary, "eval_loss"), "{:.4f}"), "measured", _loss_of(run)),
            Card("Training", shown(speed, "{:,.0f} tokens/s"), "measured", _where(run)),
            Card(
                "Adapter",
                mib(number(summary, "adapter_bytes")),
                detail=f"{plan.method}, {plan.adapter.brief}".rstrip(", "),
            ),
        ]
    return cards


def run_sections(run: RunFiles) -> Iterator[Section]:
    """Everything that a run folder holds."""
    yield Section("Memory against the budget", list(_memory(run)))
    yield Section("Loss", list(_loss(run)))
    yield Section("Speed of training", list(_speed(run)))
    yield Section("What was conceded to the budget", list(_conceded(run)))


def run_details(run: RunFiles) -> Section:
    """Settings, versions and hashes."""
    versions = [] if run.summary is None else [_versions(run.summary)]
    return Section("How it was trained", [_settings(run), *versions])


def _versions(summary: dict[str, Any]) -> Table:
    hashes = {name: value for name, value in summary.items() if name.endswith("_sha256") and value}
    versions = summary.get("versions")
    rows = [("", "")] + [(name, str(value)) for name, value in _items(versions)]
    return Table(
        "Versions and hashes", rows + [(name, str(value)) for name, value in hashes.items()], folded=True, words=True
    )


def _memory(run: RunFiles) -> Iterator[Block]:
    plan, summary = run.plan, run.summary
    peak = None if summary is None else number(summary, "measured_peak_bytes")
    if summary is None:
        yield _no_summary(run)
    elif peak is not None:
        inside = peak <= plan.budget_bytes
        enforcement = str(summary.get("enforcement"))
        yield Text(
            f"The measured peak of {format_mib(peak)} is {'inside' if inside else 'BEYOND'} the budget of "
            f"{format_mib(plan.budget_bytes)}; {_HELD_BY.get(enforcement, enforcement)}. It was predicted as "
            f"{format_mib(plan.predicted_peak_bytes)}, {100 * (plan.predicted_peak_bytes / peak - 1):+.1f} % off.",
            "good" if inside else "bad",
        )
    if plan.simulated:
        yield Text(f"Simulated on this machine: {plan.device} does not run this engine itself, its floor is torch's.")
    drawing = _memory_over_time(run, peak)
    if drawing is not None:
        yield drawing
    far = _far_budget(run, peak)
    parts = stacked_bar(
        "Parts of the predicted peak",
        list(plan.parts.items()),
        limit=None if far else Rule("budget", plan.budget_bytes),
        show=format_mib,
    )
    if parts is not None:
        note = f"At the {plan.peak_moment} of a step. The floor is the process before any model."
        yield Drawing(parts, " ".join(filter(None, (note, far))))
    largest = sorted(plan.parts.items(), key=lambda part: -part[1])
    rows = [("part", "predicted", "share")]
    rows += [(name, format_mib(size), f"{size / plan.predicted_peak_bytes:.1%}") for name, size in largest]
    yield Table("Every part", rows, folded=True)
    yield from _shrunk(run)


def _memory_over_time(run: RunFiles, peak: float | None) -> Drawing | None:
    plan = run.plan
    steps, sizes = _series(run.steps, "now_bytes")
    lines = [_line("after each step, MiB, measured", steps, [size / MIB for size in sizes])]
    if steps:
        ends = (steps[0], steps[-1])
        if peak is not None:
            lines.append(Line("measured peak, MiB", ends, [peak / MIB] * 2))
        lines.append(Line("predicted peak, MiB", ends, [plan.predicted_peak_bytes / MIB] * 2))
    far = _far_budget(run, peak)
    chart = line_chart(
        "Anonymous + swap memory over the run",
        lines,
        x_name="step",
        rules=[] if far else [Rule("budget", plan.budget_bytes / MIB)],
        from_zero=not far,
    )
    note = "A step's own peak lies above what is in use after it."
    return None if chart is None else Drawing(chart, " ".join(filter(None, (note, far))))


def _far_budget(run: RunFiles, peak: float | None) -> str:
    """What is said of a budget that is too far above the peak to be drawn with it; nothing of one that is not."""
    budget, highest = run.plan.budget_bytes, max(run.plan.predicted_peak_bytes, peak or 0)
    if budget <= _FAR * highest:
        return ""
    return f"The budget is not drawn: {format_mib(budget)}, {budget / highest:.0f} times the peak."


def _shrunk(run: RunFiles) -> Iterator[Block]:
    """What the governor gave up while the run went on."""
    events = run.summary.get("shrunk") if run.summary is not None else None
    if isinstance(events, list) and events:
        rows = [("step", "blocks computed again before", "after", "in use")]
        rows += [
            (
                shown(number(event, "step"), "{:,}"), shown(number(event, "recompute_layers_before"), "{:,}"),
                shown(number(event, "recompute_layers"), "{:,}"), mib(number(event, "now_bytes")),
            )
            for event in events
        ]  # fmt: skip
        yield Table("Given up near the budget, which changes no bit of the result", rows)


def _conceded(run: RunFiles) -> Iterator[Block]:
    if not run.plan.concessions:
        yield Text("Nothing: the plan trains with every setting as it was wished.")
        return
    rows: list[tuple[str, ...]] = [("setting", "wanted", "given", "why")]
    conceded = [(c.setting, c.wanted, c.given, c.reason) for c in run.plan.concessions]
    # A list of modules has no spaces to break a line at.
    rows += [tuple(re.sub(r",(?=\S)", ", ", text) for text in texts) for texts in conceded]
    yield Table("", rows, words=True)


def _loss(run: RunFiles) -> Iterator[Block]:
    lines = [
        _line("training rows", *_series(run.steps, "loss")),
        Line("held-out rows", *_series(run.evaluations, "eval_loss"), dots=True),
    ]
    chart = line_chart(f"Loss, {_loss_of(run)}", [line for line in lines if line.xs], x_name="step", from_zero=False)
    if chart is None:
        yield Missing("No step has been made yet.", f"edgetune train --resume {run.folder}")
        return
    thinned = f" Training losses are means of {-(-len(run.steps) // MOST_POINTS)} steps."
    yield Drawing(chart, thinned.strip() if len(run.steps) > MOST_POINTS else "")
    if run.summary is not None:
        best, skipped = run.summary.get("best_step"), number(run.summary, "skipped_steps")
        yield Table(
            "",
            [
                ("", "measured"),
                ("training loss, last steps", shown(number(run.summary, "train_loss"), "{:.4f}")),
                ("held-out loss, best", shown(number(run.summary, "eval_loss"), "{:.4f}")),
                *_figures(run.summary),
                ("adapter taken from step", "the last" if best is None else f"{best}"),
                ("steps skipped as not finite", shown(skipped, "{:,}")),
            ],
        )
    if not run.evaluations:
        yield Missing("Nothing was held out, so there is no evaluation.", "edgetune train … --eval-data held-out.jsonl")


def _loss_of(run: RunFiles) -> str:
    return "nats per token" if run.plan.objective == "sft" else f"of {run.plan.objective}"


def _figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What the objective told of the held-out rows beside its loss."""
    told = [name for name in summary if name.startswith("eval_") and name not in ("eval_loss", "eval_fraction")]
    names = [name for name in told if isinstance(summary[name], float)]
    return [(f"held-out {name[5:].replace('_', ' ')}", f"{summary[name]:.4f}") for name in names]


def _speed(run: RunFiles) -> Iterator[Block]:
    timed = [(line["step"], number(line, "tokens"), number(line, "seconds")) for line in run.steps]
    steps = [step for step, tokens, seconds in timed if tokens is not None and seconds]
    rates = [tokens / seconds for _, tokens, seconds in timed if tokens is not None and seconds]
    chart = line_chart("Tokens per second", [_line("tokens/s, measured", steps, rates)], x_name="step")
    if chart is None:
        yield Text("No step has been timed yet.")
        return
    yield Drawing(chart, "Tokens that are no padding over the seconds of each step.")
    median = None if run.summary is None else number(run.summary, "measured_step_seconds")
    yield Table(
        "",
        [
            ("", f"measured, {_where(run)}", f"predicted for {run.plan.device}"),
            ("seconds per step", shown(median, "{:.3g}"), f"{run.plan.predicted_step_seconds:.3g}"),
            ("energy of the run", "not measured", shown(run.plan.predicted_energy_mwh, "{:,.3g} mWh")),
        ],
    )


def _settings(run: RunFiles) -> Table:
    plan, summary = run.plan, run.summary or {}
    rows = [
        ("", ""),
        ("model", plan.model),
        ("device", plan.device),
        ("grid, engine, step rule", f"{plan.grid}, {plan.engine}, {plan.step_rule}"),
        ("adapter", f"{plan.method}, {plan.adapter.brief}".rstrip(", ")),
        ("on", plan.adapter.where(plan.model_config)),
        ("objective", ", ".join(plan.objective_words)),
        ("step", f"{plan.batch_size} x {plan.gradient_accumulation_steps} windows of {plan.max_seq_length} tokens"),
        ("blocks computed again", f"{plan.recompute_layers}"),
        ("optimizer", f"{plan.optimizer}, learning rate {plan.learning_rate:g}, {plan.lr_scheduler_type}"),
        ("steps", f"{shown(number(summary, 'steps'), '{:,}')} of {shown(plan.max_steps, '{:,}')}"),
        ("seed, threads", f"{plan.seed}, {plan.threads}"),
    ]
    if summary:
        stopped = str(summary.get("stopped"))
        rows.append(("end", _ENDS.get(stopped, stopped)))
    return Table("", rows, words=True)


def _no_summary(run: RunFiles) -> Missing:
    return Missing(
        "The run has not ended in order, so it has no certificate yet: no measured peak and no enforcement.",
        f"edgetune train --resume {run.folder}",
    )


def _where(run: RunFiles) -> str:
    emulated = run.summary is not None and run.summary.get("emulated") is True
    return f"emulating {run.plan.device}" if emulated else "on this machine"


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The steps that have this number, and the numbers."""
    pairs = [(line["step"], value) for line in lines if (value := number(line, key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _line(name: str, xs: Sequence[int], ys: Sequence[float]) -> Line:
    """A line of at most `MOST_POINTS`: means of neighbours where there are more."""
    width = -(-len(xs) // MOST_POINTS) or 1
    groups = [slice(start, start + width) for start in range(0, len(xs), width)]
    return Line(name, [sum(xs[g]) / len(xs[g]) for g in groups], [sum(ys[g]) / len(ys[g]) for g in groups])


def _items(values: Any) -> list[tuple[str, Any]]:
    return list(values.items()) if isinstance(values, dict) else []
