"""What a page is made of: headings over text, tables, charts, and what is missing with the command that makes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.charts import Chart
from edgetune.memory import format_mib

NOTHING = "–"
MOST_NARROW_COLUMNS = 3


@dataclass(frozen=True)
class Card:
    """One figure at the top. `basis` is measured, predicted, or empty for what is simply so."""

    label: str
    value: str
    basis: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Text:
    """A sentence; `tone` is empty, good or bad."""

    text: str
    tone: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Missing:
    """What no file holds, and the command that would make it."""

    text: str
    command: str
    kind: str = "missing"


@dataclass(frozen=True)
class Table:
    """Rows of text, the head first. `folded` is shown on demand; `words` are set as words and not as figures."""

    title: str
    rows: Sequence[Sequence[str]]
    folded: bool = False
    words: bool = False
    kind: str = "table"

    @property
    def wide(self) -> bool:
        """Whether it needs the whole width of a page."""
        return len(self.rows[0]) > MOST_NARROW_COLUMNS


@dataclass(frozen=True)
class Drawing:
    """A chart and a sentence on how to read it."""

    chart: Chart
    note: str = ""
    kind: str = "chart"


Block = Text | Missing | Table | Drawing


@dataclass(frozen=True)
class Section:
    """A heading and what is under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def wide(self) -> bool:
        """Whether it gets the whole width: it has a chart, a wide table or a gap, beside which others would be lost."""
        return any(
            block.wide if isinstance(block, Table) else isinstance(block, (Drawing, Missing)) for block in self.blocks
        )


def number(values: Any, key: str) -> float | None:
    """A finite number of an object read from JSON, else None."""
    value = values.get(key) if isinstance(values, dict) else None
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def mib(value: float | None) -> str:
    """Bytes for people."""
    return NOTHING if value is None else format_mib(value)


def shown(value: float | None, pattern: str) -> str:
    """A number by a format, or a dash."""
    return NOTHING if value is None else pattern.format(value)
