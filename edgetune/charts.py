"""Charts as SVG text, drawn by hand: lines over time and bars in parts, for `bench --plots` and `report`.

A page of plots needs three shapes. Written here they need no library on a device, scale with the page, and take their
colours from CSS, so that one drawing is right in light and in dark. Text comes from files of the user and is escaped.

Left out: what these two drawings do not need, such as logarithmic axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, BAR_HEIGHT = 560, 260, 76  # user units; the page scales them
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 12, 44  # of the plot's frame
# Hues after the colour-blind safe set of Okabe and Ito (2008), darker on light ground and lighter on dark.
STYLE = """
.chart{--c1:#0969b8;--c2:#c2500a;--c3:#00795a;--c4:#a3478b;--c5:#8a6d00;--c6:#3a8fb7;--c7:#7a7f87;--limit:#c62828;
--ink:#1f2328;--faint:#656d76;--grid:#d8dee4;--ground:#ffffff;font-family:system-ui,sans-serif}
@media (prefers-color-scheme:dark){.chart{--c1:#58a6ff;--c2:#ff9e4f;--c3:#3fc79a;--c4:#e08cc8;--c5:#e3c341;
--c6:#8fd0ee;--c7:#9aa2ab;--limit:#ff6b6b;--ink:#e6edf3;--faint:#9198a1;--grid:#30363d;--ground:#0d1117}}
.chart text{font-size:12px;fill:var(--faint)}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round}
.chart .grid{stroke:var(--grid);stroke-width:1}
.chart .rule{stroke:var(--limit);stroke-width:1.5;stroke-dasharray:6 4}
"""


@dataclass(frozen=True)
class Line:
    """Points of one thing over x; a None in `ys` is a gap. `dots` marks each point."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float | None]
    dots: bool = False


@dataclass(frozen=True)
class Rule:
    """A horizontal line across a chart, such as a budget."""

    name: str
    y: float


@dataclass(frozen=True)
class Chart:
    """A drawing with what stands around it: `legend` is (CSS colour, name)."""

    title: str
    svg: str
    height: int
    legend: tuple[tuple[str, str], ...]

    def document(self) -> str:
        """A file of its own: title, legend and drawing, with the colours."""
        rows = [(22 + 18 * i, colour, name) for i, (colour, name) in enumerate(self.legend, 1)]
        head = 14 + 18 * (len(rows) + 1)
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {head + self.height}">',
            f"<style>{STYLE}</style>",
            '<rect width="100%" height="100%" fill="var(--ground)"/>',
            f'<text x="12" y="20" style="font-size:15px;fill:var(--ink)">{escape(self.title)}</text>',
        ]
        for y, colour, name in rows:
            parts.append(f'<rect x="12" y="{y - 9}" width="12" height="10" rx="2" fill="{colour}"/>')
            parts.append(f'<text x="30" y="{y}">{escape(name)}</text>')
        return "\n".join([*parts, f'<g transform="translate(0 {head})">{self.svg}</g>', "</svg>", ""])


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_name: str,
    rules: Sequence[Rule] = (),
    from_zero: bool = True,
    show: Callable[[float], str] = lambda value: f"{value:,.6g}",
) -> Chart | None:
    """Lines over a common axis, with rules across them; `show` writes a y. None where no line has a point.

    `from_zero` starts the y axis there, for amounts; a loss is read better without.
    """
    points = [point for line in lines for piece in _pieces(line) for point in piece]
    if not points:
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points] + [rule.y for rule in rules]
    y_ticks = _ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
    x_ticks = _ticks(min(xs), max(xs))
    frame = _Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts = [*_axes(frame, x_ticks, y_ticks, x_name, show)]
    parts += [f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" {frame.both_ys(rule.y)}/>' for rule in rules]
    for i, line in enumerate(lines, 1):
        parts.extend(_draw(line, f"var(--c{i})", frame))
    legend = [(f"var(--c{i})", line.name) for i, line in enumerate(lines, 1)]
    legend += [("var(--limit)", f"{rule.name} (dashed)") for rule in rules]
    return Chart(title, _svg(title, HEIGHT, parts), HEIGHT, tuple(legend))


def stacked_bar(
    title: str, parts: Sequence[tuple[str, float]], *, limit: Rule | None, show: Callable[[float], str]
) -> Chart | None:
    """One bar of several parts, the largest first, and a limit across it. None where there is nothing to draw.

    Beyond six parts the smallest share one colour.
    """
    known = sorted(((name, size) for name, size in parts if size > 0), key=lambda part: -part[1])
    if not known:
        return None
    if len(known) > 7:
        rest = known[6:]
        known = [*known[:6], (f"{len(rest)} smaller parts", sum(size for _, size in rest))]
    total = sum(size for _, size in known)
    end = max(total, limit.y if limit else 0.0)
    scale = (WIDTH - 28) / end
    drawn, legend, x = [], [], 14.0
    for i, (name, size) in enumerate(known, 1):
        drawn.append(
            f'<rect x="{x:.1f}" y="30" width="{max(size * scale - 1, 0.5):.1f}" height="34" rx="2" fill="var(--c{i})">'
            f"<title>{escape(name)}: {escape(show(size))}</title></rect>"
        )
        legend.append((f"var(--c{i})", f"{name} {show(size)}"))
        x += size * scale
    if limit is not None:
        at = 14 + limit.y * scale
        drawn.append(f'<line class="rule" x1="{at:.1f}" x2="{at:.1f}" y1="22" y2="72"/>')
        anchor = "end" if at > WIDTH / 2 else "start"
        text = escape(f"{limit.name} {show(limit.y)}")
        drawn.append(f'<text x="{at:.1f}" y="16" text-anchor="{anchor}">{text}</text>')
    return Chart(title, _svg(title, BAR_HEIGHT, drawn), BAR_HEIGHT, tuple(legend))


@dataclass(frozen=True)
class _Frame:
    """Data to user units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> str:
        return f"{LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        return f"{HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM):.1f}"

    def both_ys(self, value: float) -> str:
        return f'y1="{self.y(value)}" y2="{self.y(value)}"'


def _svg(title: str, height: int, parts: Iterable[str]) -> str:
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    return f'<svg class="chart" role="img" {size} aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _axes(
    frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float], x_name: str, show: Callable[[float], str]
) -> Iterator[str]:
    for tick in y_ticks:
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" {frame.both_ys(tick)}/>'
        yield f'<text x="{LEFT - 8}" y="{frame.y(tick)}" dy="4" text-anchor="end">{escape(show(tick))}</text>'
    for tick in x_ticks:
        anchor = "end" if tick == x_ticks[-1] else "middle"
        yield f'<text x="{frame.x(tick)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{anchor}">{tick:,.6g}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle:g}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>'


def _draw(line: Line, colour: str, frame: _Frame) -> Iterator[str]:
    """Its pieces, and points that stand alone or are asked for."""
    for piece in _pieces(line):
        if len(piece) > 1:
            path = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in piece)
            yield f'<polyline class="line" stroke="{colour}" points="{path}"/>'
        for x, y in piece if line.dots or len(piece) == 1 else ():
            yield f'<circle cx="{frame.x(x)}" cy="{frame.y(y)}" r="3.5" fill="{colour}"/>'


def _pieces(line: Line) -> list[list[tuple[float, float]]]:
    """A line between its gaps."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.xs, line.ys, strict=True):
        if y is not None and math.isfinite(x) and math.isfinite(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return pieces


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values, about `count` of them, from one not above `low` to one not below `high`: steps of 1, 2 or 5.

    A span of less than a billionth of the values is none: it is drawn as a flat line.
    """
    size = max(abs(low), abs(high))
    if high - low < 1e-9 * max(size, 1.0):
        high = low + (size if size > 1e-9 else 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]
