from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, Rule, _ticks, line_chart, stacked_bar

values = st.floats(-1e9, 1e9)
points = st.lists(st.tuples(values, st.one_of(st.none(), values, st.just(math.nan))), min_size=1, max_size=30)


@given(values, st.floats(0, 1e9))
def test_ticks_are_even_round_and_enclose(low: float, span: float) -> None:
    ticks = _ticks(low, low + span)
    little = 1e-6 * max(1, abs(low), span)
    assert ticks[0] <= low + little and ticks[-1] >= low + span - little
    assert 2 <= len(ticks) <= 12
    steps = {f"{after - before:.3g}" for before, after in itertools.pairwise(ticks)}
    assert len(steps) == 1 and float(steps.pop()) > 0


@given(points, values)
def test_everything_is_drawn_inside_the_frame(found: list[tuple[float, float | None]], limit: float) -> None:
    line = Line("a", [x for x, _ in found], [y for _, y in found], dots=True)
    chart = line_chart("t", [line], x_name="x", rules=[Rule("limit", limit)])
    real = [y for _, y in found if y is not None and math.isfinite(y)]
    if not real:
        assert chart is None
        return
    assert chart is not None
    dots = re.findall(r'<circle cx="([\d.-]+)" cy="([\d.-]+)"', chart.svg)
    assert len(dots) == len(real)
    (rule,) = re.findall(r'class="rule" [^>]*y1="([\d.-]+)"', chart.svg)
    assert TOP - 0.1 <= float(rule) <= HEIGHT - BOTTOM + 0.1
    for x, y in dots:
        assert LEFT - 0.1 <= float(x) <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= float(y) <= HEIGHT - BOTTOM + 0.1


def test_a_gap_breaks_a_line_and_a_lone_point_is_a_dot() -> None:
    chart = line_chart("t", [Line("a", [0, 1, 2, 3, 4], [1.0, 2.0, None, 3.0, None])], x_name="x")
    assert chart is not None
    assert chart.svg.count("<polyline") == 1 and chart.svg.count("<circle") == 1


def test_larger_is_higher_and_later_is_to_the_right() -> None:
    chart = line_chart("t", [Line("a", [0, 10], [0.0, 5.0])], x_name="x")
    assert chart is not None
    (path,) = re.findall(r'points="([^"]*)"', chart.svg)
    assert path == f"{LEFT:.1f},{HEIGHT - BOTTOM:.1f} {WIDTH - RIGHT:.1f},{TOP:.1f}"


def test_a_line_has_the_colour_of_its_name() -> None:
    chart = line_chart("t", [Line(name, [0, 1], [0.0, 5.0]) for name in "ab"], x_name="x")
    assert chart is not None
    assert chart.legend == tuple(zip(re.findall(r'stroke="(.*?)" points', chart.svg), "ab", strict=True))


def test_an_axis_of_amounts_starts_at_zero_and_one_of_losses_need_not() -> None:
    line = Line("a", [0, 1], [100.0, 101.0])
    amounts, losses = (line_chart("t", [line], x_name="x", from_zero=zero) for zero in (True, False))
    assert amounts is not None and losses is not None
    assert ">0</text>" in amounts.svg.replace(f'y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">0</text>', "")
    assert ">99</text>" in losses.svg or ">100</text>" in losses.svg


def test_parts_of_a_bar_have_the_widths_of_their_sizes() -> None:
    parts = [("a", 10.0), ("none", 0.0), ("b", 30.0)] + [(f"small{i}", 1.0) for i in range(10)]
    chart = stacked_bar("t", parts, limit=Rule("budget", 100.0), show=lambda size: f"{size:g} B")
    assert chart is not None
    widths = [float(width) + 1 for width in re.findall(r'width="([\d.]+)" height="34"', chart.svg)]
    assert [width / widths[0] for width in widths] == pytest.approx([1, 1 / 3, *[1 / 30] * 4, 6 / 30], abs=0.01)
    (limit,) = re.findall(r'class="rule" x1="([\d.]+)"', chart.svg)
    assert float(limit) == WIDTH - 14, "beyond the parts, and inside the drawing"
    assert re.findall(r'rx="2" fill="(.*?)"', chart.svg) == [colour for colour, _ in chart.legend]
    names = [name for _, name in chart.legend]
    assert names[:2] == ["b 30 B", "a 10 B"] and names[-1] == "6 smaller parts 6 B"
    assert stacked_bar("t", [("a", 0)], limit=None, show=str) is None


def test_text_is_escaped_and_a_file_of_its_own_is_xml() -> None:
    evil = "<script>&\"'"
    lines = [Line(evil, [0, 1], [1.0, 2.0])]
    charts = [
        line_chart(evil, lines, x_name=evil, rules=[Rule(evil, 3)]),
        stacked_bar(evil, [(evil, 1)], limit=Rule(evil, 3), show=lambda size: evil),
    ]
    for chart in charts:
        assert chart is not None
        root = ElementTree.fromstring(chart.document())
        assert evil in "".join(root.itertext())
        assert not root.findall(".//{*}script")
