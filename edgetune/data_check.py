"""What is in a file of rows, before it is trained on: duplicates, leakage, labels, lengths, what a window cuts.

Every finding is a figure with examples and their lines; none is an error. What `read_rows` refuses is refused here too,
with the lines. Exact means the same strings and the same answer. Near means that prompts, or texts, share four fifths
of their 5-grams (`data.near`); a near duplicate also has the same answer, or a near one.

A row has an answer where it has a completion, an output, a label or a last turn of an assistant. Answers count as
labels where they are short and few: at most `LABEL_CHARACTERS` each, and on average in two rows or more. Of feedback
the verdict is the answer, to prompt and completion.

What `check_data` returns, ready for JSON:

    data, kind, rows, sha256, skipped     of the file
    duplicates    exact, near: rows that repeat an earlier one; compared: rows that were; examples: line, of, similarity
    conflicts     prompts: prompts with several answers; rows: those that have them; examples: lines
    labels        null, or distinct, counts (label -> rows, most frequent first), singletons, balance: entropy of the
                  labels by that of as many equally frequent ones, 1 where all are
    lengths       unit (tokens with a tokenizer, else characters), min, p50, p95, max, mean, total,
                  histogram: [up_to, rows], in doubling steps
    window        null without a tokenizer, or max_seq_length, windows, fill: share of their positions that hold tokens,
                  cut: texts that take several windows, too_long: rows that training refuses, too_long_lines; of rows
                  for a trained head or embeddings windows and fill are null, and cut are texts that lose their end
    eval          null, or all of the above of the held-out rows, and unseen_labels (label -> lines)
    leakage       null, or of the held-out rows: exact, prompts: others with the same prompt, near: others again;
                  share: all of these; examples
    findings      sentences, the gravest first; empty where nothing was found
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.data import Rows, pack, read_rows
from edgetune.data.jsonl import KIND_OF, Report, RowError, RowFile
from edgetune.data.near import MAX_TEXTS, THRESHOLD, near_matches, similarity
from edgetune.planner.wishes import DEFAULT_WINDOW, WINDOW_STEP
from edgetune.tokenizer import Tokenizer

__all__ = ["LABEL_CHARACTERS", "check_data", "label_counts"]

LABEL_CHARACTERS = 64
_EXAMPLES = 10
_NO_WINDOW = 1 << 30  # tokens: rows are read whole
_IMBALANCE = 10  # times as many rows of one label as of another


@dataclass(frozen=True)
class _Line:
    number: int
    text: str  # all of the row
    prompt: str | None
    answer: str | None
    texts: tuple[str | list[str], ...]  # those that are encoded each for itself, as a string or words; see `labeled`

    @property
    def whole(self) -> tuple[str, str | None]:
        """What makes rows the same; a number or a verdict is none of the text."""
        return self.text, self.answer

    @property
    def compared(self) -> str:
        """What nearness goes by: long answers that repeat would make different rows alike."""
        return self.prompt or self.text


def check_data(
    data: str | Path,
    *,
    eval_data: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    context_length: int | None = None,
    max_seq_length: int | None = None,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Examine a file of rows, alone and beside the held-out ones; see the module for what is returned.

    Args:
        data: JSON Lines.
        eval_data: held-out rows, also compared with those of `data`.
        tokenizer: the model's; without it lengths are in characters and there is no window.
        context_length: the most tokens that the model takes.
        max_seq_length: tokens of a window. None is what a plan takes: the longest row, of texts `DEFAULT_WINDOW`.
        skip_bad: leave bad lines out, up to 1 % of them.

    Raises:
        DataError: a file or a line of it cannot be used; the first twenty bad lines are named.
    """
    limits = context_length, max_seq_length
    lines, result = _examine(Path(data), tokenizer, limits, skip_bad)
    result |= {"eval": None, "leakage": None}
    if eval_data is not None:
        held_out, result["eval"] = _examine(Path(eval_data), tokenizer, limits, skip_bad)
        result["eval"]["unseen_labels"] = _unseen(result["labels"], held_out)
        result["leakage"] = _leakage(lines, held_out)
    return result | {"findings": _findings(result)}


def label_counts(answers: Sequence[str | None]) -> Counter[str] | None:
    """How often each answer stands, most frequent first; None where they are no labels."""
    counts = Counter(answer.strip() for answer in answers if answer is not None)
    few = 1 < len(counts) <= len(answers) / 2 and sum(counts.values()) == len(answers)
    return counts if few and max(map(len, counts)) <= LABEL_CHARACTERS else None


def _examine(
    path: Path, tokenizer: Tokenizer | None, limits: tuple[int | None, int | None], skip_bad: bool
) -> tuple[list[_Line], dict[str, Any]]:
    file = RowFile(path)
    lines = _read(file, skip_bad)
    window, lengths = None, [len(line.text) for line in lines]
    if tokenizer is not None and file.kind in KIND_OF.values():
        texts = [_encoded_length(text, tokenizer) for line in lines for text in line.texts]
        window, lengths = _cut(texts, *limits), texts
    elif tokenizer is not None:
        rows = read_rows(path, tokenizer, _NO_WINDOW, skip_bad=skip_bad)
        lengths = [len(row) for row in rows]
        window = _window(rows, partial(read_rows, path, tokenizer, skip_bad=skip_bad), *limits)
    return lines, {
        "data": str(path), "kind": file.kind, "rows": len(lines), "sha256": file.sha256,
        "skipped": file.num_lines - len(lines),
        "duplicates": _duplicates(lines), "conflicts": _conflicts(lines), "labels": _labels(lines),
        "lengths": {"unit": "tokens" if window else "characters"} | _lengths(lengths), "window": window,
    }  # fmt: skip


def _read(file: RowFile, skip_bad: bool) -> list[_Line]:
    report, lines = Report(file.path), []
    for number, row in file:
        if isinstance(row, RowError):
            report.add(number, row)
        else:
            lines.append(_Line(number, "\n".join(_strings(row)), *_parts(row), _texts(row)))
    report.check(file.num_lines, skip_bad)
    return lines


def _strings(value: Any) -> list[str]:
    """Every string in a row, in its order; keys and roles are none of its text."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [part for key, part in value.items() if key != "role"]
    return [text for part in value for text in _strings(part)] if isinstance(value, list) else []


def _parts(row: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What is asked and what is answered; None where a row has no such part."""
    if "messages" in row:
        *before, last = (
            message for message in row["messages"] if message["role"] != "system"
        )  # that stands in each row
        return "\n".join(_strings(before)), last["content"] if last["role"] == "assistant" else None
    answer = next((row[key] for key in ("label", "completion", "output", "chosen") if key in row), None)
    keys = ("prompt", "instruction", "input", "text", *(["completion"] if "label" in row else []))
    asked = [text for key in keys for text in _strings(row.get(key))]
    return (None, None) if answer is None else ("\n".join(asked), "\n".join(_strings(answer)) or json.dumps(answer))


def _texts(row: Mapping[str, Any]) -> tuple[str | list[str], ...]:
    """What rows for a trained head or embeddings have encoded."""
    return tuple(row[key] for key in ("text", "tokens", "anchor", "positive", "negative") if key in row)


def _encoded_length(text: str | list[str], tokenizer: Tokenizer) -> int:
    """Tokens, special ones included."""
    return len(tokenizer.encode(text) if isinstance(text, str) else tokenizer.encode_words(text, _NO_WINDOW)[0])


def _duplicates(lines: Sequence[_Line]) -> dict[str, Any]:
    first: dict[tuple[str, str | None], int] = {}
    exact = [
        (line.number, first[line.whole], 1.0)
        for line in lines
        if first.setdefault(line.whole, line.number) != line.number
    ]
    repeats = {number for number, *_ in exact}
    once = [line for line in lines if line.number not in repeats]

    def alike(at: int, other: int) -> bool:
        one, two = once[at].answer or "", once[other].answer or ""
        return one == two or similarity(one, two) >= THRESHOLD

    matches = near_matches([line.compared for line in once], alike=alike)
    near = [(once[match.at].number, once[match.other].number, match.similarity) for match in matches]
    return {
        "exact": len(exact), "near": len(near), "compared": min(len(once), MAX_TEXTS) + len(exact),
        "examples": _examples([*exact[: _EXAMPLES // 2], *near[: _EXAMPLES // 2]]),
    }  # fmt: skip


def _examples(found: Sequence[tuple[int, int, float]]) -> list[dict[str, Any]]:
    return [{"line": line, "of": other, "similarity": round(similarity, 3)} for line, other, similarity in found]


def _conflicts(lines: Sequence[_Line]) -> dict[str, Any]:
    asked: dict[str, list[_Line]] = defaultdict(list)
    for line in lines:
        if line.prompt:
            asked[line.prompt].append(line)
    several = [same for same in asked.values() if len({line.answer for line in same}) > 1]
    return {
        "prompts": len(several), "rows": sum(map(len, several)),
        "examples": [[line.number for line in same[:_EXAMPLES]] for same in several[:_EXAMPLES]],
    }  # fmt: skip


def _labels(lines: Sequence[_Line]) -> dict[str, Any] | None:
    counts = label_counts([line.answer for line in lines])
    if counts is None:
        return None
    shares = np.array(list(counts.values())) / counts.total()
    return {
        "distinct": len(counts), "counts": dict(counts.most_common()),
        "singletons": sum(count == 1 for count in counts.values()),
        "balance": float(-(shares * np.log(shares)).sum() / math.log(len(counts))),
    }  # fmt: skip


def _lengths(lengths: Sequence[int]) -> dict[str, Any]:
    values = np.array(lengths)
    steps = 2 ** np.arange(4, max(5, int(values.max()).bit_length() + 1))
    upto = np.searchsorted(steps, values)
    histogram = [[int(step), int((upto == i).sum())] for i, step in enumerate(steps)]
    return {
        "min": int(values.min()), "p50": float(np.median(values)), "p95": float(np.percentile(values, 95)),
        "max": int(values.max()), "mean": float(values.mean()), "total": int(values.sum()),
        "histogram": [bar for bar in histogram if bar[1]],
    }  # fmt: skip


def _window(
    rows: Rows, cut: Callable[[int], Rows], context_length: int | None, max_seq_length: int | None
) -> dict[str, Any]:
    """`cut` reads texts again, for windows of so many tokens."""
    is_text = rows.kind == "text"
    units = [rows.rows[at : at + rows.together] for at in range(0, len(rows), rows.together)]
    sizes = [sum(map(len, unit)) for unit in units]
    needed = -(-max(sizes) // WINDOW_STEP) * WINDOW_STEP
    most = min(context_length or needed, DEFAULT_WINDOW if is_text else needed)
    length = max_seq_length or most
    long = [unit for unit, size in zip(units, sizes, strict=True) if size > length]
    short = [row for unit, size in zip(units, sizes, strict=True) if size <= length for row in unit]
    fitting = cut(length) if is_text and long else short
    windows = pack(fitting, length, rows.together)
    positions = sum(window.length for window in windows)
    return {
        "max_seq_length": length, "windows": len(windows),
        "fill": sum(window.num_tokens for window in windows) / positions if positions else 0.0,
        "cut": len(long) if is_text else 0, "too_long": 0 if is_text else len(long),
        "too_long_lines": [] if is_text else [unit[0].line for unit in long[:_EXAMPLES]],
    }  # fmt: skip


def _cut(lengths: Sequence[int], context_length: int | None, max_seq_length: int | None) -> dict[str, Any]:
    """What a window does to texts of so many tokens that have one each."""
    length = max_seq_length or context_length or max(lengths)
    return {
        "max_seq_length": length, "windows": None, "fill": None, "cut": sum(size > length for size in lengths),
        "too_long": 0, "too_long_lines": [],
    }  # fmt: skip


def _unseen(labels: Mapping[str, Any] | None, held_out: Sequence[_Line]) -> dict[str, list[int]]:
    """Labels that no training row has, with the first lines of the held-out rows that do."""
    found: dict[str, list[int]] = defaultdict(list)
    for line in held_out if labels else ():
        if line.answer is not None and labels is not None and line.answer.strip() not in labels["counts"]:
            found[line.answer.strip()].append(line.number)
    return {label: numbers[:_EXAMPLES] for label, numbers in found.items()}


def _leakage(lines: Sequence[_Line], held_out: Sequence[_Line]) -> dict[str, Any]:
    known = {line.whole: line.number for line in reversed(lines)}
    prompts = {line.prompt: line.number for line in reversed(lines) if line.prompt}
    exact = [(line.number, known[line.whole], 1.0) for line in held_out if line.whole in known]
    rest = [line for line in held_out if line.whole not in known]
    asked = [(line.number, prompts[line.prompt], 1.0) for line in rest if line.prompt in prompts]
    rest = [line for line in rest if line.prompt not in prompts]
    matches = near_matches([line.compared for line in rest], [line.compared for line in lines])
    near = [(rest[match.at].number, lines[match.other].number, match.similarity) for match in matches]
    return {
        "exact": len(exact), "prompts": len(asked), "near": len(near),
        "share": (len(exact) + len(asked) + len(near)) / len(held_out),
        "examples": _examples([line for found in (exact, asked, near) for line in found[: _EXAMPLES // 2]]),
    }  # fmt: skip


def _findings(result: Mapping[str, Any]) -> list[str]:
    """Sentences on what is worth a look."""
    found = []
    leakage, held_out = result["leakage"], result["eval"]
    if leakage and leakage["share"]:
        ways = {"exact": "exactly", "prompts": "by the prompt alone", "near": "nearly"}
        line = leakage["examples"][0]
        found.append(
            f"{leakage['share']:.1%} of the held-out rows are among the training rows: {_ways(leakage, ways)}, such as "
            f"line {line['line']} (training line {line['of']}). Figures on them are too good: take them out of one of "
            "the two files."
        )
    if held_out and held_out["unseen_labels"]:
        labels = held_out["unseen_labels"]
        found.append(
            f"No training row has {_many(len(labels), 'label')} of the held-out rows: {_listed(list(labels))}. Add "
            "training rows with that."
        )
    for part, name in ((result, "training"), (held_out, "held-out")):
        if part:
            found += _findings_of(part, name)
    return found


def _findings_of(part: Mapping[str, Any], name: str) -> list[str]:
    found, labels, window = [], part["labels"], part["window"]
    if window and window["too_long"]:
        found.append(
            f"{name.capitalize()} rows of more than {window['max_seq_length']} tokens"
            f"{', both texts together' if part['kind'] == 'preference' else ''}: {window['too_long']:,}, on lines "
            f"{_listed(window['too_long_lines'])}. Training refuses them: shorten them."
        )
    if window and window["cut"]:
        found.append(
            f"{_many(window['cut'], f'{name} text')} of more than {window['max_seq_length']} tokens: "
            + ("the end is not read." if window["windows"] is None else "cut into windows that do not see each other.")
        )
    if part["conflicts"]["prompts"]:
        lines = part["conflicts"]["examples"][0]
        found.append(
            f"{_many(part['conflicts']['prompts'], f'{name} prompt')} with several answers, such as on lines "
            f"{_listed(lines)}. Keep one answer, unless all are right."
        )
    duplicates = part["duplicates"]
    if duplicates["exact"] or duplicates["near"]:
        line = duplicates["examples"][0]
        found.append(
            f"{name.capitalize()} rows like an earlier one: "
            f"{_ways(duplicates, {'exact': 'exactly', 'near': 'nearly'})}, such as line {line['line']} (line "
            f"{line['of']}). What is there twice counts twice: leave it out."
        )
    if labels:
        counts = list(labels["counts"].values())
        if counts[0] >= _IMBALANCE * counts[-1]:
            names = list(labels["counts"])
            found.append(
                f"{_many(counts[0], f'{name} row')} with the label {_shown(names[0])}, {counts[-1]:,} with "
                f"{_shown(names[-1])}. A rare label is learned badly, and accuracy hides that: look at macro-F1 too."
            )
    return found


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _ways(counts: Mapping[str, Any], ways: Mapping[str, str]) -> str:
    """How many of each way, without those of none."""
    return ", ".join(f"{counts[name]:,} {how}" for name, how in ways.items() if counts[name])


def _listed(values: Sequence[object]) -> str:
    shown = [_shown(value) if isinstance(value, str) else str(value) for value in values[:5]]
    return ", ".join(shown) + (" …" if len(values) > 5 else "")


def _shown(text: str) -> str:
    """A text of a file, short and with nothing in it that a terminal would obey."""
    quoted = json.dumps(text, ensure_ascii=False) if text.isprintable() else json.dumps(text)
    return quoted if len(quoted) <= 40 else quoted[:37] + "…"
