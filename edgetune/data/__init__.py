"""Rows of training data: a JSON Lines file to token ids and labels, and those to windows of a fixed length.

A file is read twice. The first pass checks every line, down to its length in tokens, and keeps nothing; the second
fills arrays whose size is known by then. So a file with a bad last line is refused in bounded memory, and the rows of
a good one take eight bytes a token.

| kind | row | learned |
|---|---|---|
| text | `{"text"}` | every token; a long text is cut into windows |
| prompt | `{"prompt", "completion"}` | the completion and the end token |
| chat | `{"messages": [{"role", "content"}, …]}`: OpenAI's file | assistant messages whose `weight` is not 0 |
| instruction | `{"instruction", "input", "output"}` | the output and the end token |
| preference | `{"prompt", "chosen", "rejected"}`: texts, or messages | each answer and its end token |
| feedback | `{"prompt", "completion", "label"}`: the same, with true or false | the completion and the end token |

A preference row gives two sequences that are packed together, so that a step sees both or neither. A feedback row does
so too: its second one is the same prompt with the completion of the row before, which KTO measures with.

`prompts` turns rows into text. The ids before a completion are those that generation starts from, so training sees
what generation will see.

Left out: content that is not text, and texts that try to be special tokens: a literal "</s>" in a row is the token.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgetune.data.jsonl import KIND_OF, Report, RowError, RowFile
from edgetune.data.prompts import Example, Pieces, prompt_text, read_examples, row_pieces
from edgetune.errors import ConfigError, DataError
from edgetune.tokenizer import Tokenizer

__all__ = [
    "IGNORED", "Example", "Row", "Rows", "Window",
    "epoch_order", "pack", "prompt_text", "read_examples", "read_rows", "split_eval", "stack", "units",
]  # fmt: skip

IGNORED = -100  # the label of a position that is not learned, as everywhere in this field

# Kinds whose rows are units of several sequences, and of how many.
UNITS = {"preference": 2, "feedback": 2}

LENGTH_STEP = 16  # of a window: whole vectors, on any processor (see `training.crew`)

_SPLIT_STREAM = 2**31  # keeps the random numbers of `split_eval` apart from those of any epoch


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence. Position t is learned if `labels[t]` is not -100; labels are not shifted."""

    input_ids: npt.NDArray[np.int32]  # [n]
    labels: npt.NDArray[np.int32]  # [n]
    line: int
    desirable: bool | None = None  # the label of a feedback row
    teacher: tuple[npt.NDArray[Any], npt.NDArray[Any]] | None = None  # [num_supervised, k]: see `data.teacher`
    target: float | None = None  # what a trained head should say of the whole sequence: see `data.labeled`
    reference: float | None = None  # the log-probability, in nats, that a reference model gives to what is learned
    prompt_length: int | None = None  # None: the tokens before the first that is learned

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        """Predictions that are learned; the first token of a row is never predicted. One where there is a target."""
        return 1 if self.target is not None else int(np.count_nonzero(self.labels[1:] != IGNORED))


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a file. A line can give several: a text is cut into windows, a chat sometimes into turns."""

    rows: tuple[Row, ...]
    kind: str  # a key of edgetune.data.jsonl.KINDS
    sha256: str  # of the bytes of the file
    skipped: int  # bad lines left out

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @cached_property
    def num_tokens(self) -> int:
        return sum(len(row) for row in self.rows)

    @cached_property
    def num_supervised(self) -> int:
        return sum(row.num_supervised for row in self.rows)

    @property
    def together(self) -> int:
        """How many rows in turn are one unit, which no window divides."""
        return UNITS.get(self.kind, 1)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max((len(row) for row in self.rows), default=0)

    @cached_property
    def longest_completion(self) -> int:
        """Tokens from the first learned one to the end of the row, the largest such number; 0 for text rows, which
        may be cut anywhere.
        """
        if self.kind == "text":
            return 0
        return max((len(row) - int(np.argmax(row.labels != IGNORED)) for row in self.rows), default=0)


@dataclass(frozen=True, eq=False)
class Window:
    """Rows side by side in `length` positions, the rest padding. The arrays are made when they are asked for.

    Each row begins with the positions of `virtual_tokens` that a prompt or prefix is trained for; their ids are 0.
    """

    rows: tuple[Row, ...]
    length: int
    virtual_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows."""
        return sum(len(row) for row in self.rows)

    @property
    def num_supervised(self) -> int:
        """Positions whose next token is learned."""
        return sum(row.num_supervised for row in self.rows)

    @property
    def input_ids(self) -> npt.NDArray[np.int64]:
        """[length]; padding is 0."""
        return self._filled([row.input_ids for row in self.rows], before=0, padding=0)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """[length]; what position t should predict, -100 where nothing is learned. The last position of a row
        predicts nothing.
        """
        parts = [np.append(row.labels[1:], IGNORED) for row in self.rows]
        return self._filled(parts, before=IGNORED, padding=IGNORED)

    @property
    def position_ids(self) -> npt.NDArray[np.int64]:
        """[length]; from 0 in each row; padding is 0."""
        positions = [np.arange(len(row) + self.virtual_tokens) for row in self.rows]
        return self._joined(positions, 0)

    @property
    def segment_ids(self) -> npt.NDArray[np.int64]:
        """[length]; the number of the row in this window; padding is -1."""
        return self._joined([np.full(len(row) + self.virtual_tokens, i) for i, row in enumerate(self.rows)], -1)

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """[length]; that of each row, 0 where it has none and in padding."""
        parts = [np.full(len(row) + self.virtual_tokens, row.prompt_length or 0) for row in self.rows]
        return self._joined(parts, 0)

    def of_rows(self, key: str, count: int) -> npt.NDArray[np.float64]:
        """[count]; a value of each row, NaN where it has none and beyond the last."""
        values = [getattr(row, key) for row in self.rows] + [None] * (count - len(self.rows))
        return np.array([np.nan if value is None else float(value) for value in values])

    def _filled(self, parts: Sequence[npt.NDArray[Any]], *, before: int, padding: int) -> npt.NDArray[np.int64]:
        virtual = np.full(self.virtual_tokens, before)
        return self._joined([np.concatenate([virtual, part]) for part in parts], padding)

    def _joined(self, parts: Sequence[npt.NDArray[Any]], padding: int) -> npt.NDArray[np.int64]:
        rest = self.length - sum(map(len, parts))
        return np.concatenate([*parts, np.full(rest, padding)]).astype(np.int64)


def read_rows(path: str | Path, tokenizer: Tokenizer, max_seq_length: int, *, skip_bad: bool = False) -> Rows:
    """Reads and checks a whole JSON Lines file.

    Args:
        path: The file.
        tokenizer: Makes the ids.
        max_seq_length: Tokens of a window. Longer text rows are cut; any other longer row is an error, and so are two
            sequences that belong together and are longer together.
        skip_bad: Leave bad lines out, as long as they are at most 1 % of all.

    Raises:
        DataError: The file or a line of it cannot be used. The first twenty bad lines are named, all are counted.
        ModelError: Chat rows, and the tokenizer has no usable chat template.
        ConfigError: `max_seq_length` is below 2.
    """
    if max_seq_length < 2:
        raise ConfigError(f"max_seq_length is {max_seq_length}; a window needs at least 2 tokens, one to predict one.")
    file = RowFile(path)
    report = Report(file.path)
    num_tokens = sum(len(ids) for _, ids, *_ in _sequences(file, report, tokenizer, max_seq_length))
    report.check(file.num_lines, skip_bad)
    assert file.kind is not None  # a file without a good row does not pass the check

    input_ids, labels = np.empty((2, num_tokens), np.int32)
    rows, at = [], 0
    again = RowFile(path)
    for line, ids, targets, label in _sequences(again, Report(file.path), tokenizer, max_seq_length):
        end = at + len(ids)
        if end > num_tokens:
            break
        input_ids[at:end], labels[at:end] = ids, targets
        rows.append(Row(input_ids[at:end], labels[at:end], line, label))
        at = end
    if again.sha256 != file.sha256:
        raise DataError(f"{path} changed while it was read. Wait until it is written, then start again.")
    if file.kind == "feedback":
        rows = _with_mismatched(rows, file.path, max_seq_length)
    return Rows(tuple(rows), file.kind, file.sha256, report.count)


def _with_mismatched(rows: Sequence[Row], path: Path, max_seq_length: int) -> list[Row]:
    """Every row, and behind it its prompt with the completion of the row before; before the first one is the last.

    Raises:
        DataError: There is one row alone, or the two are longer together than a window.
    """
    if len(rows) < 2:
        raise DataError(f"{path} has a single row; feedback is compared with that on other prompts. Add rows.")
    report = Report(path)
    found = []
    for row, before in zip(rows, [rows[-1], *rows[:-1]], strict=True):
        start, other = (int(np.argmax(each.labels != IGNORED)) for each in (row, before))
        ids, labels = (
            np.concatenate([getattr(row, name)[:start], getattr(before, name)[other:]])
            for name in ("input_ids", "labels")
        )
        if len(row) + len(ids) > max_seq_length:
            report.add(row.line, RowError(_too_long(len(row) + len(ids), max_seq_length, "feedback")))
        found += [row, Row(ids, labels, row.line)]
    report.check(len(rows), skip_bad=False)
    return found


def _sequences(
    file: RowFile, report: Report, tokenizer: Tokenizer, max_seq_length: int
) -> Iterator[tuple[int, list[int], list[int], bool | None]]:
    """(line, input_ids, labels, desirable) of every sequence of the good lines; the bad ones go into the report."""
    for number, row in file:
        try:
            if isinstance(row, RowError):
                raise row
            assert file.kind is not None  # set by the first row that is not bad
            _check_kind(file.kind, file)
            made = _encode_row(file.kind, row, tokenizer, max_seq_length)
        except RowError as reason:
            report.add(number, reason)
            continue
        for ids, labels in made:
            yield number, ids, labels, row["label"] if file.kind == "feedback" else None


def _check_kind(kind: str, file: RowFile) -> None:
    """Raises DataError for a file of rows that nothing continues; `labeled` reads these."""
    objectives = [name for name, own in KIND_OF.items() if own == kind]
    if objectives:
        raise DataError(
            f"{file.path} has {kind} rows since line {file.kind_line}, and these are for --objective "
            f"{' or '.join(objectives)} alone. Train with that, or write rows of another kind."
        )


def _encode_row(
    kind: str, row: Mapping[str, Any], tokenizer: Tokenizer, max_seq_length: int
) -> list[tuple[list[int], list[int]]]:
    try:
        if kind == "text":
            return _encode_text(row["text"], tokenizer, max_seq_length)
        many, add_special_tokens = row_pieces(kind, row, tokenizer)
        made = [_encode_pieces(pieces, tokenizer, add_special_tokens) for pieces in many]
    except DataError as error:
        raise RowError(f"cannot be encoded: {error}") from error
    lengths = [len(ids) for ids, _ in made]
    needed = sum(lengths) if kind == "preference" else max(lengths)
    if needed > max_seq_length:
        raise RowError(_too_long(needed, max_seq_length, kind))
    return made


def _too_long(needed: int, max_seq_length: int, kind: str) -> str:
    of = {
        "preference": ", its chosen and its rejected sequence together",
        "feedback": ", with its prompt once more and the completion of the row before",
    }
    return f"has {needed} tokens{of.get(kind, '')}, but a window (max_seq_length) has {max_seq_length}"


def _encode_text(text: str, tokenizer: Tokenizer, max_seq_length: int) -> list[tuple[list[int], list[int]]]:
    """A text and its end token in windows. A last window of one token, which could predict nothing, gets another
    from the window before.
    """
    ids = _ended(tokenizer.encode(text), tokenizer)
    if len(ids) < 2:
        raise RowError("has a single token, so that nothing can be predicted")
    cuts = [*range(0, len(ids), max_seq_length), len(ids)]
    if cuts[-1] - cuts[-2] == 1:
        cuts[-2] -= 1
    return [(ids[a:b], ids[a:b]) for a, b in itertools.pairwise(cuts)]


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] in tokenizer.eos_token_ids) else [*ids, end]


def _encode_pieces(pieces: Pieces, tokenizer: Tokenizer, add_special_tokens: bool) -> tuple[list[int], list[int]]:
    """Ids and labels of a row whose last piece is learned; the end token is added where the row has none."""
    text = ""
    ids: list[int] = []
    labels: list[int] = []
    for piece, learned in pieces:
        text += piece
        longer = _extended(ids, text, piece, tokenizer, add_special_tokens)
        kept = _common(ids, longer)
        labels[kept:] = longer[kept:] if learned else [IGNORED] * (len(longer) - kept)
        ids = longer
    ended = _ended(ids, tokenizer)
    labels += ended[len(ids) :]
    if all(label == IGNORED for label in labels[1:]):
        raise RowError("leaves nothing to learn: its completion has no tokens of its own")
    return ended, labels


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _extended(ids: list[int], text: str, piece: str, tokenizer: Tokenizer, add_special_tokens: bool) -> list[int]:
    """Ids of `text`, of which `ids` are those of all but its last piece: if possible they go on from `ids` as they
    are, because generation will go on from them.

    A tokenizer may merge characters across the seam, or put a space before a piece that stands alone. Then the piece is
    encoded alone, and behind a line break that is taken off again, and the first result that decodes to the text is
    used. If none does, the ids of the whole text are.
    """
    whole = tokenizer.encode(text, add_special_tokens)
    if whole[: len(ids)] == ids:
        return whole
    wanted = tokenizer.decode(whole, skip_special_tokens=False)
    for anchor in ("", "\n"):
        skipped = len(tokenizer.encode(anchor, add_special_tokens=False)) if anchor else 0
        joined = ids + tokenizer.encode(anchor + piece, add_special_tokens=False)[skipped:]
        if tokenizer.decode(joined, skip_special_tokens=False) == wanted:
            return joined
    return whole


def split_eval(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Training rows and evaluation rows, each in the order of the file. All rows of a line stay together, and at least
    one line is in either part. The same rows, fraction and seed give the same parts.

    Raises:
        ConfigError: `fraction` is not in [0, 1); 0 gives no evaluation rows.
        DataError: There is a single line, which cannot be in both parts.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"The evaluation fraction is {fraction}; it must be at least 0 and below 1, for example 0.1.")
    if fraction == 0:
        return rows, replace(rows, rows=())
    lines = sorted({row.line for row in rows})
    if len(lines) < 2:
        raise DataError("One line cannot be split into training and evaluation rows. Add rows, or evaluate on none.")
    count = min(max(round(fraction * len(lines)), 1), len(lines) - 1)
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(len(lines))
    chosen = {lines[i] for i in order[:count]}
    return (
        replace(rows, rows=tuple(row for row in rows if row.line not in chosen)),
        replace(rows, rows=tuple(row for row in rows if row.line in chosen)),
    )


def pack(rows: Rows | Sequence[Row], max_seq_length: int, together: int = 1, virtual_tokens: int = 0) -> list[Window]:
    """Rows side by side in windows, long rows first, each where it leaves the least room (best-fit decreasing: at most
    11/9 of the fewest windows possible, plus one; Johnson 1974). The result depends on nothing but the rows.

    So many rows in turn stay `together` in one window. Every window is as long as the fullest one, rounded up to a
    multiple of `LENGTH_STEP` where `max_seq_length` allows. Each row takes `virtual_tokens` positions more than it has
    tokens.

    Raises:
        DataError: A row, or what stays together, is longer than `max_seq_length` with these.
    """
    bins: list[list[Row]] = []
    with_room: dict[int, list[int]] = {}  # room left -> the windows that have it
    rooms: list[int] = []  # the keys of with_room, sorted; at most max_seq_length of them
    for unit in sorted(units(rows, together), key=_num_tokens, reverse=True):
        length = _num_tokens(unit) + virtual_tokens * len(unit)
        if length > max_seq_length:
            virtual = f", {virtual_tokens} virtual ones for each row among them" if virtual_tokens else ""
            raise DataError(
                f"The row of line {unit[0].line} has {length} tokens{virtual}; a window (max_seq_length) has "
                f"{max_seq_length}. Read the file again for this window."
            )
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, index = max_seq_length, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            index = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        bins[index].extend(unit)
        room -= length
        if room and room not in with_room:
            insort(rooms, room)
        if room:
            with_room.setdefault(room, []).append(index)
    fullest = max((_num_tokens(rows_of_bin) + virtual_tokens * len(rows_of_bin) for rows_of_bin in bins), default=0)
    length = min(-(-fullest // LENGTH_STEP) * LENGTH_STEP, max_seq_length)
    return [Window(tuple(rows_of_bin), length, virtual_tokens) for rows_of_bin in bins]


def units(rows: Rows | Sequence[Row], together: int) -> list[tuple[Row, ...]]:
    """So many rows in turn at a time."""
    every = tuple(rows)
    return [every[start : start + together] for start in range(0, len(every), together)]


def _num_tokens(rows: Sequence[Row]) -> int:
    return sum(map(len, rows))


def stack(windows: Sequence[Window]) -> dict[str, npt.NDArray[Any]]:
    """A micro-batch: "input_ids", "labels", "position_ids" and "segment_ids", each int64 [batch, length].

    Where rows have them, also "reference", "desirable" and "target", float64 [batch, the most rows of a window], NaN
    for none; and "teacher_ids" int64 and "teacher_logps" float32 of all learned positions in turn, [M, k]; and
    "prompt_lengths" int64 [batch, length], 0 where a row has none.
    """
    names = ("input_ids", "labels", "position_ids", "segment_ids")
    made: dict[str, npt.NDArray[Any]] = {
        name: np.stack([getattr(window, name) for window in windows]) for name in names
    }
    most = max(len(window.rows) for window in windows)
    for key in ("reference", "desirable", "target"):
        if any(getattr(row, key) is not None for window in windows for row in window.rows):
            made[key] = np.stack([window.of_rows(key, most) for window in windows])
    taught = [row.teacher for window in windows for row in window.rows if row.teacher is not None]
    if any(row.prompt_length is not None for window in windows for row in window.rows):
        made["prompt_lengths"] = np.stack([window.prompt_lengths for window in windows])
    if taught:
        made["teacher_ids"] = np.concatenate([ids for ids, _ in taught], dtype=np.int64)
        made["teacher_logps"] = np.concatenate([logps for _, logps in taught], dtype=np.float32)
    return made


def epoch_order(num_windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of the windows in an epoch, from its number alone, so that a resumed run finds its place."""
    return np.random.default_rng([seed, epoch]).permutation(num_windows)
