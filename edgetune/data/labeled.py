"""Rows for a trained head: a text with a label, words with one each, or texts that belong together.

| kind | row | objective |
|---|---|---|
| label | `{"text", "label"}`: a class as a string or an integer, or any number | classification; regression |
| tokens | `{"tokens", "labels"}`: words, and a class for each | token-classification |
| pair | `{"anchor", "positive"}` or `{"anchor", "positive", "negative"}` | embedding |

Classes come from the rows that are learned, in their order (numbers by size, words by letter); a class that only other
rows have is a bad line there. A text is tokenized as its model was trained, special tokens included, and cut where it
is too long. Of a word's tokens the first bears its class, as in Hugging Face's examples.

As in `data`, a file is read twice: the first pass finds every bad line, the second keeps arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.data import IGNORED, Row, Rows
from edgetune.data.jsonl import KIND_OF, KINDS, Report, RowError, RowFile
from edgetune.errors import ConfigError, DataError
from edgetune.tokenizer import Tokenizer

__all__ = ["KIND_OF", "LabeledRow", "LabeledRows", "labeled", "read_labeled_rows", "with_targets"]

_SHOWN = 8  # classes that an error names

_Texts = list[list[int]]


@dataclass(frozen=True, eq=False)
class LabeledRow(Row):
    """The texts of a row one after the other, so many tokens each, and what they should give.

    `labels` is the number of the class [1], the value float32 [1], the class of every token [n] with -100 where none is
    learned, or nothing [0]. For a decoder see `with_targets`.
    """

    labels: npt.NDArray[Any]
    lengths: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class LabeledRows(Rows):
    """The rows of a file. `classes` are the names of the class numbers; `cut` texts lost their end."""

    rows: tuple[LabeledRow, ...]
    classes: tuple[str, ...]
    cut: int


def read_labeled_rows(
    path: str | Path,
    tokenizer: Tokenizer,
    max_seq_length: int,
    objective: str,
    *,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
) -> LabeledRows:
    """Reads and checks a whole JSON Lines file.

    Args:
        path: the file.
        tokenizer: makes the ids.
        max_seq_length: tokens that a text may have; longer ones are cut there.
        objective: a key of `KIND_OF`.
        classes: those that the rows may have, where they are known; None collects them here.
        skip_bad: leave bad lines out, as long as they are at most 1 % of all.

    Raises:
        DataError: the file or a line of it cannot be used, a class is not among `classes`, or there is only one class.
            The first twenty bad lines are named, all are counted.
        ConfigError: `max_seq_length` is below 3: two special tokens and one of the text.
    """
    if max_seq_length < 3:
        raise ConfigError(f"max_seq_length is {max_seq_length}; a text needs at least 3 tokens, two special ones.")
    reader = _Reader(tokenizer, max_seq_length, objective, classes)
    file = RowFile(path)
    seen: set[str] = set()
    report = Report(file.path)
    for _, _, names in reader.rows(file, report):
        seen.update(name for name in names if isinstance(name, str))
    report.check(file.num_lines, skip_bad)
    found = tuple(sorted(seen, key=_order)) if classes is None else tuple(classes)
    if classes is None and objective in _CLASSED and len(found) < 2:
        raise DataError(f"{path} has a single class, {found[0]}, so that nothing can be told apart. Add other rows.")
    number = {name: index for index, name in enumerate(found)}
    again, rows = RowFile(path), []
    reader.cut = 0
    for line, texts, names in reader.rows(again, Report(file.path)):
        ids = np.concatenate([np.array(text, np.int32) for text in texts])
        labels = np.array(_NUMBERED[objective](names, number))
        rows.append(LabeledRow(ids, labels, line, lengths=tuple(map(len, texts))))
    if again.sha256 != file.sha256:
        raise DataError(f"{path} changed while it was read. Wait until it is written, then start again.")
    assert file.kind is not None
    return LabeledRows(tuple(rows), file.kind, file.sha256, report.count, found, reader.cut)


def labeled(rows: Rows) -> tuple[LabeledRow, ...]:
    """The rows of a file that `read_labeled_rows` read, by their type."""
    return tuple(row for row in rows if isinstance(row, LabeledRow))


def with_targets(rows: Rows) -> Rows:
    """The rows for a decoder, whose head sees the last token of each: nothing is learned of the tokens, and `target` is
    the number of the class, or the value; of the answers of a preference 1 and 0.
    """

    def made(index: int, row: Row) -> Row:
        if row.target is not None:
            return row
        target = float(row.labels[0]) if isinstance(row, LabeledRow) else 1.0 - index % 2
        return replace(row, labels=np.full(len(row), IGNORED, np.int32), target=target)

    return replace(rows, rows=tuple(made(index, row) for index, row in enumerate(rows)))


class _Reader:
    """How the rows of one objective become texts and names of classes."""

    def __init__(self, tokenizer: Tokenizer, longest: int, objective: str, classes: Sequence[str] | None) -> None:
        self.tokenizer, self.longest, self.objective = tokenizer, longest, objective
        self.classes = None if classes is None else frozenset(classes)
        self.cut = 0

    def rows(self, file: RowFile, report: Report) -> Iterator[tuple[int, _Texts, list[Any]]]:
        """(line, token ids of each text, what they should give) of the good lines; bad ones go into the report."""
        for number, row in file:
            try:
                if isinstance(row, RowError):
                    raise row
                self._check_kind(file)
                yield number, *self._read(row)
            except RowError as reason:
                report.add(number, reason)

    def _check_kind(self, file: RowFile) -> None:
        """Raises DataError for a file of other rows: its lines are all good, and none is what was meant."""
        wanted = KIND_OF[self.objective]
        if file.kind != wanted:
            keys = ", ".join(f'"{key}"' for key in KINDS[wanted].required)
            raise DataError(
                f"{file.path} has {file.kind} rows since line {file.kind_line}; the objective {self.objective} learns "
                f"from {wanted} rows, {{{keys}}}. Write such rows, or choose the --objective that learns from these."
            )

    def _read(self, row: Mapping[str, Any]) -> tuple[_Texts, list[Any]]:
        kind = KIND_OF[self.objective]
        if kind == "pair":
            return [self._text(row[key]) for key in ("anchor", "positive", "negative") if key in row], []
        if kind == "tokens":
            texts, names = self._words(row["tokens"], [_name(label) for label in row["labels"]])
        elif self.objective == "regression":
            return [self._text(row["text"])], [_value(row["label"])]
        else:
            texts, names = [self._text(row["text"])], [_name(row["label"])]
        self._check(name for name in names if name is not None)
        return texts, names

    def _check(self, names: Iterator[str]) -> None:
        unseen = [] if self.classes is None else [name for name in names if name not in self.classes]
        if unseen and self.classes is not None:
            known = ", ".join(sorted(self.classes, key=_order)[:_SHOWN]) + (" …" if len(self.classes) > _SHOWN else "")
            raise RowError(f"has the label {unseen[0]!r}, which no row to learn from has; they have {known}")

    def _text(self, text: str) -> list[int]:
        try:
            ids = self.tokenizer.encode(text)
            if len(ids) > self.longest:
                self.cut += 1
                ids = self.tokenizer.encode(text, max_length=self.longest)
        except DataError as error:
            raise RowError(f"cannot be encoded: {error}") from error
        return ids

    def _words(self, words: list[str], names: list[str]) -> tuple[_Texts, list[str | None]]:
        """One text of several words: its ids, and the class of each token, None where none is learned."""
        try:
            ids, words_of = self.tokenizer.encode_words(words, self.longest)
        except DataError as error:
            raise RowError(f"cannot be encoded: {error}") from error
        self.cut += max((word for word in words_of if word is not None), default=-1) < len(words) - 1
        firsts = [
            None if word is None or (at and words_of[at - 1] == word) else names[word]
            for at, word in enumerate(words_of)
        ]
        if all(name is None for name in firsts):
            raise RowError("has no word with a token of its own")
        return [ids], firsts


_CLASSED = ("classification", "token-classification")


def _numbers(names: Sequence[str | None], number: Mapping[str, int]) -> npt.NDArray[Any]:
    return np.array([IGNORED if name is None else number[name] for name in names], np.int32)


def _values(values: Sequence[float], _: Mapping[str, int]) -> npt.NDArray[Any]:
    return np.array(values, np.float32)


# Objective -> what a row should give, as numbers.
_NUMBERED: dict[str, Callable[[Any, Mapping[str, int]], npt.NDArray[Any]]] = {
    "classification": _numbers, "token-classification": _numbers, "regression": _values, "embedding": _values
}  # fmt: skip


def _name(label: Any) -> str:
    """The name of a class."""
    if isinstance(label, bool) or not isinstance(label, (str, int)) or label == "":
        raise RowError(f"has the label {label!r:.40}; the name of a class was expected, a string or an integer")
    return str(label)


def _value(label: Any) -> float:
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
        raise RowError(f"has the label {label!r:.40}; a finite number was expected")
    return float(label)


def _order(name: str) -> tuple[bool, int, str]:
    """Integers first, by size; then words."""
    is_number = name.lstrip("-").isdecimal() and len(name) < 19
    return not is_number, int(name) if is_number else 0, name
