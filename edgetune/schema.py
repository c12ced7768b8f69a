"""Strict tables: a mapping read from TOML or JSON becomes a frozen dataclass, or a list of everything wrong with it.

The dataclass is the schema. A field's type says what the value must be, exactly (a bool is not an int, "3GB" is not a
number), and a `Key` in its annotation adds meaning, range and choices:

    total_mib: Annotated[int, Key("RAM of the device", low=1, high=1 << 24)]

Known types are bool, int, float, str, date, another dataclass or one of several, tuple[X, ...], dict[str, X], and
X | None. A field
without a default is required; a key without a field is refused, with the field that was probably meant.

Left out: rules between two values. They belong to whoever owns the dataclass.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Key:
    """What a field means and may be. `auto` is called where the value says "auto" and the reader allows that."""

    doc: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    auto: Callable[[], Any] | None = None


_NO_KEY = Key("")
_WORDS = {str: "a string of printable characters", bool: "true or false", datetime.date: "a date such as 2026-09-20"}


class Reader:
    """Reads one document. `problems` collects what is wrong, each with the path of its key."""

    def __init__(self, *, allow_auto: bool = False) -> None:
        self.problems: list[str] = []
        self._allow_auto = allow_auto
        self._readings: dict[Callable[[], Any], Any] = {}

    def read(self, made: type[_Made], values: Mapping[str, Any], at: tuple[str, ...] = ()) -> _Made | None:
        """An instance of the dataclass `made`, or None where `problems` says why not."""
        hints = get_type_hints(made, include_extras=True)
        fields = {field.name: field for field in dataclasses.fields(made)}  # type: ignore[arg-type]
        before = len(self.problems)
        self.problems += [_unknown(key, at, list(fields)) for key in values if key not in fields]
        arguments = {}
        for name, field in fields.items():
            hint, key = _split(hints[name])
            if name in values:
                value = self._reading(key) if values[name] == "auto" and key.auto and self._allow_auto else values[name]
                arguments[name] = self._value(value, hint, key, (*at, name))
            elif field.default is MISSING and field.default_factory is MISSING:
                self.problems.append(f"{'.'.join((*at, name))}: missing; {_expected(hint, key)}")
        return made(**arguments) if len(self.problems) == before else None

    def _reading(self, key: Key) -> Any:
        """Each "auto" is read once, so that two fields that mean the same thing agree."""
        assert key.auto is not None
        if key.auto not in self._readings:
            self._readings[key.auto] = key.auto()
        return self._readings[key.auto]

    def _value(self, value: Any, hint: Any, key: Key, at: tuple[str, ...]) -> Any:
        options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        if value is None and NoneType in options:
            return None
        hint = _fitting([option for option in options if option is not NoneType], value)
        if dataclasses.is_dataclass(hint) and isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
            return self.read(hint, value, at)  # type: ignore[arg-type]
        if get_origin(hint) is dict and isinstance(value, Mapping):
            return {name: self._value(one, get_args(hint)[1], key, (*at, str(name))) for name, one in value.items()}
        if get_origin(hint) is tuple and isinstance(value, (list, tuple)):
            return tuple(self._value(one, get_args(hint)[0], key, (*at, str(i))) for i, one in enumerate(value))
        if hint is float and type(value) is int and abs(value) < 1 << 53:
            value = float(value)
        if not _fits(value, hint, key):
            self.problems.append(f"{'.'.join(at)}: found {_shown(value)}; {_expected(hint, key)}{_meant(value, key)}")
        return value


def _split(hint: Any) -> tuple[Any, Key]:
    if get_origin(hint) is not Annotated:
        return hint, _NO_KEY
    inner, *extras = get_args(hint)
    return inner, next((extra for extra in extras if isinstance(extra, Key)), _NO_KEY)


def _fitting(options: list[Any], value: Any) -> Any:
    """The only type, or of several dataclasses the first that has a field for every key."""
    for option in options if isinstance(value, Mapping) else ():
        if dataclasses.is_dataclass(option) and value.keys() <= {field.name for field in dataclasses.fields(option)}:
            return option
    return options[0]


def _fits(value: Any, hint: Any, key: Key) -> bool:
    """Whether a scalar is exactly of its type and in its range."""
    if type(value) is not hint:
        return False
    if hint in (int, float):
        return math.isfinite(value) and key.low <= value <= key.high
    if hint is str:
        return value in key.choices if key.choices else value.isprintable()
    return True


def _unknown(key: str, at: tuple[str, ...], known: list[str]) -> str:
    close = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.6)
    hint = f"did you mean {'.'.join((*at, close[0]))}?" if close else f"known here: {', '.join(known)}"
    return f"{'.'.join((*at, _cut(key)))}: unknown key; {hint}"


def _meant(value: Any, key: Key) -> str:
    close = difflib.get_close_matches(value[:100], key.choices, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and abs(value) > 1 << 64:  # repr of a huge integer may be refused
        return "an integer beyond 64 bits"
    return _cut(repr(value))


def _cut(text: str) -> str:
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 60 else text[:57] + "..."


def _expected(hint: Any, key: Key) -> str:
    if get_origin(hint) in (Union, UnionType):
        hint = next(option for option in get_args(hint) if option is not NoneType)
    meaning = f": {key.doc}" if key.doc else ""
    if hint in (int, float):
        number = "an integer" if hint is int else "a finite number"
        limits = f" from {key.low:,} to {key.high:,}" if math.isfinite(key.high) else ""
        return f"expected {number}{limits}{meaning}"
    if hint is str and key.choices:
        return f"expected one of {', '.join(key.choices)}"
    if dataclasses.is_dataclass(hint) or get_origin(hint) is dict:
        return f"expected a table{meaning}"
    if get_origin(hint) is tuple:
        return f"expected a list{meaning}"
    return f"expected {_WORDS[hint]}{meaning}"
