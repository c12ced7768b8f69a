"""Lines of a JSON Lines file to checked rows: what a row may look like, and what is said when it does not.

Everything that can be wrong with a line is found here, or raised as a `RowError` by the caller, so that one report
can list every bad line of a file. Lines are read one at a time and are at most 1 MiB long, so that no file, however
damaged, needs much memory. The first row that is of a known kind fixes the kind of the file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from edgetune.errors import DataError

__all__ = ["KINDS", "Report", "RowError", "RowFile", "check_row"]

_MAX_LINE_BYTES = 2**20
_LISTED = 20  # bad lines that a report names; the rest is a count
_LISTED_OF_ALL = 3  # where every line is bad, most likely by one mistake
_LISTED_KEYS = 4  # of a row; a row may have a hundred thousand
_MAX_SKIPPED = 0.01  # of all lines


class RowError(ValueError):
    """Why a row cannot be used, as the end of a sentence that begins with "line 12"."""


class Kind(NamedTuple):
    """The keys of a row: those it must have, and those it may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


KINDS = {
    "text": Kind(("text",)),
    "prompt": Kind(("prompt", "completion")),
    # "parallel_tool_calls" is in OpenAI's files and says how to call their API; it has no meaning here.
    "chat": Kind(("messages",), ("tools", "parallel_tool_calls")),
    "instruction": Kind(("instruction", "output"), ("input",)),
    # As TRL writes them: texts, or lists of messages; preference rows of messages may have the prompt in both lists.
    "preference": Kind(("chosen", "rejected"), ("prompt", "tools")),
    "feedback": Kind(("prompt", "completion", "label"), ("tools",)),
    # For encoders and their heads: see `labeled`.
    "label": Kind(("text", "label")),
    "tokens": Kind(("tokens", "labels")),
    "pair": Kind(("anchor", "positive"), ("negative",)),
}

# Objective -> the one kind of rows of it, where nothing else learns from such rows.
KIND_OF = {
    "classification": "label", "regression": "label", "token-classification": "tokens", "embedding": "pair"
}  # fmt: skip

# The keys that a message of each role may have besides "role" and "content".
_ROLES: dict[str, tuple[str, ...]] = {
    "system": ("name",),
    "user": ("name",),
    "assistant": ("name", "weight", "tool_calls"),
    "tool": ("name", "tool_call_id"),
}


class RowFile:
    """Iterates over (line number, row or `RowError`); blank lines at the end do not count.

    `kind`, `num_lines` and `sha256` are those of what was read so far.

    Raises:
        DataError: There is no such file, or it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.kind: str | None = None
        self.kind_line = 0
        self.num_lines = 0
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        with _open(self.path) as file:
            blank = 0  # how many lines before this one are blank
            try:
                for number, line in enumerate(self._lines(file), start=1):
                    if line is not None and not line.strip(b" \t\r\n"):
                        blank += 1
                        continue
                    for skipped in range(number - blank, number):
                        yield skipped, RowError("is blank; only the end of a file may be")
                    self.num_lines += blank + 1
                    blank = 0
                    yield number, self._row(number, line)
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error.strerror}. Check the disk.") from error

    def _lines(self, file: BinaryIO) -> Iterator[bytes | None]:
        """Lines with their line ends; None stands for one that is too long."""
        while line := file.readline(_MAX_LINE_BYTES + 1):
            self._digest.update(line)
            too_long = len(line) > _MAX_LINE_BYTES
            while too_long and not line.endswith(b"\n") and (line := file.readline(_MAX_LINE_BYTES)):
                self._digest.update(line)
            yield None if too_long else line

    def _row(self, number: int, line: bytes | None) -> dict[str, Any] | RowError:
        try:
            if line is None:
                raise RowError(f"is longer than {_MAX_LINE_BYTES // 2**20} MiB; make several rows of it")
            row = _parse(number, line)
            kind = _kind_of(row, self.kind, self.kind_line)
            if self.kind is None:
                self.kind, self.kind_line = kind, number
            _CHECKS[kind](row)
        except RowError as reason:
            return reason
        except RecursionError:
            return RowError("is nested too deep")
        return row


class Report:
    """Collects bad lines and says, at the end, whether what is left may be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._lines: list[str] = []

    def add(self, number: int, reason: RowError) -> None:
        self.count += 1
        if len(self._lines) < _LISTED:
            self._lines.append(f"  line {number} {reason}")

    def check(self, num_lines: int, skip_bad: bool) -> None:
        """Raises:
        DataError: A line is bad, or with `skip_bad` more than 1 % are, or no line is good.
        """
        if num_lines == 0:
            raise DataError(
                f'{self.path} has no rows. Write one JSON object per line, for example {{"text": "…"}}, with a "label" '
                "beside it where a head learns classes."
            )
        if self.count == 0 or (skip_bad and self.count <= _MAX_SKIPPED * num_lines):
            return
        lines = self._lines[: _LISTED_OF_ALL if self.count == num_lines else None]
        more = self.count - len(lines)
        listed = "\n".join([*lines, *([f"  and {more} more"] if more else [])])
        step = (
            f"That is more than the {_MAX_SKIPPED:.0%} that may be skipped. Correct these lines."
            if skip_bad
            else f"Correct these lines, or skip them with --skip-bad (skip_bad=True) where they are at most "
            f"{_MAX_SKIPPED:.0%} of all."
        )
        count = f"{self.count} of {num_lines} {'line' if num_lines == 1 else 'lines'}"
        raise DataError(f"{self.path}: {count} cannot be used, and nothing was read.\n{listed}\n{step}")


def check_row(row: Mapping[str, Any]) -> str:
    """The kind of a single row that is well formed.

    Raises:
        RowError: It is not.
    """
    kind = _kind_of(row)
    _CHECKS[kind](row)
    return kind


def _kind_of(row: Mapping[str, Any], wanted: str | None = None, wanted_line: int = 0) -> str:
    """The kind of a row by its keys; `wanted` is what the file has been since line `wanted_line`.

    Raises:
        RowError: It is of another kind or of none; the reason names the keys.
    """
    complete = [name for name, kind in KINDS.items() if set(kind.required) <= row.keys()]
    complete.sort(key=lambda name: -len(KINDS[name].required))  # {"prompt", "completion", "label"} is a prompt row too
    kind = wanted or (complete[0] if complete else _nearest_kind(row))
    keys = KINDS[kind].required + KINDS[kind].optional
    missing = [key for key in KINDS[kind].required if key not in row]
    extra = [key for key in row if key not in keys]
    if wanted is not None and complete and complete[0] != wanted:
        raise RowError(f"is a {complete[0]} row, but the file has {wanted} rows since line {wanted_line}")
    problems = [f'has no "{key}"' for key in missing]
    for key in extra[:_LISTED_KEYS]:
        near = difflib.get_close_matches(key, missing or keys, n=1)
        problems.append(f"has the unknown key {_shown(key)}" + (f' (did you mean "{near[0]}"?)' if near else ""))
    if problems:
        allowed = ", ".join(f'"{key}"' for key in keys)
        raise RowError(f"{' and '.join(problems)}; a {kind} row has {allowed}")
    return kind


def _nearest_kind(row: Mapping[str, Any]) -> str:
    """The kind that a row of no kind was probably meant to be."""
    found = list(row)[:_LISTED_KEYS]
    scores = {
        name: sum(bool(difflib.get_close_matches(key, kind.required + kind.optional, n=1)) for key in found)
        for name, kind in KINDS.items()
    }
    best = max(scores, key=lambda name: scores[name])
    if scores[best] == 0:
        known = " or ".join("{" + ", ".join(f'"{key}"' for key in kind.required) + "}" for kind in KINDS.values())
        raise RowError(f"has {', '.join(map(_shown, found)) or 'nothing'}, but a row has {known}")
    return best


def _parse(number: int, line: bytes) -> dict[str, Any]:
    """One JSON object, strictly: no duplicate keys, no NaN."""
    if number == 1 and line.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise RowError("starts with a byte order mark; save the file as UTF-8 without one")
    if b"\0" in line:
        raise RowError(f"has a NUL byte at byte {line.index(0) + 1}; save the file as UTF-8 text")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(f"is not UTF-8 at byte {error.start + 1}") from error
    if number == 1 and text.lstrip().startswith("["):
        raise RowError("begins a JSON array; write one object per line instead: jq -c '.[]' rows.json > rows.jsonl")
    try:
        row = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if not line.endswith(b"\n"):
            raise RowError(f"is the last one and is cut off at its byte {len(line)} ({error.msg})") from error
        form = '; write one JSON object per line, for example {"text": "…"}' if number == 1 else ""
        raise RowError(f"is not JSON: {error.msg} at character {error.pos + 1}{form}") from error
    except RowError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise RowError(f"is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RowError(f"is {_type_name(row)}, not a JSON object")
    return row


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RowError(f"has the key {_shown(key)} twice or more")
    return row


def _no_constant(name: str) -> NoReturn:
    raise RowError(f"holds {name}, which JSON does not have")


def _check_text(row: Mapping[str, Any]) -> None:
    _string(row, "text", empty=False)


def _check_prompt(row: Mapping[str, Any]) -> None:
    _string(row, "prompt", empty=True)
    _string(row, "completion", empty=False)


def _check_instruction(row: Mapping[str, Any]) -> None:
    _string(row, "instruction", empty=False)
    _string(row, "output", empty=False)
    if row.get("input") is not None:
        _string(row, "input", empty=True)


def _check_chat(row: Mapping[str, Any]) -> None:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise RowError(f'has {_type_name(messages)} as "messages"; a list of messages is needed')
    for i, message in enumerate(messages):
        _check_message(f"messages[{i}]", message)
    if messages[0]["role"] == "assistant":
        raise RowError("begins with an assistant message, to which nothing leads; begin with a system or user message")
    if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
        raise RowError("has no assistant message to learn from, or each has the weight 0")
    _check_tools(row)


def _check_tools(row: Mapping[str, Any]) -> None:
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError('has "tools" that are not a list of objects')


def _check_preference(row: Mapping[str, Any]) -> None:
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        _check_prompt_messages(row)
        for key in ("chosen", "rejected"):
            _check_answer(row, key)
        if "prompt" not in row and row["chosen"][:-1] != row["rejected"][:-1]:
            raise RowError('has no "prompt", and "chosen" and "rejected" differ before their last messages')
    else:
        _check_no_messages(row)
        for key in ("prompt", "chosen", "rejected"):
            _string(row, key, empty=key == "prompt")
    if row["chosen"] == row["rejected"]:
        raise RowError('has the same "chosen" and "rejected", so there is nothing to prefer')


def _check_feedback(row: Mapping[str, Any]) -> None:
    if not isinstance(row["label"], bool):
        raise RowError(f'has {_shown(row["label"])} as "label"; true is wanted, false is not')
    if isinstance(row["completion"], list):
        _check_prompt_messages(row)
        _check_answer(row, "completion")
    else:
        _check_no_messages(row)
        _check_prompt(row)


def _check_prompt_messages(row: Mapping[str, Any]) -> None:
    prompt = row.get("prompt", [])
    if not isinstance(prompt, list):
        raise RowError(
            f'has {_type_name(prompt)} as "prompt" beside lists of messages; make all of them lists, or none'
        )
    for i, message in enumerate(prompt):
        _check_message(f"prompt[{i}]", message)
    _check_tools(row)


def _check_answer(row: Mapping[str, Any], key: str) -> None:
    """Checks for messages that end with the assistant's: that one alone where the prompt stands for itself."""
    messages = row[key]
    for i, message in enumerate(messages):
        _check_message(f"{key}[{i}]", message)
    if not messages or messages[-1]["role"] != "assistant":
        raise RowError(f'has "{key}" that does not end with a message of the assistant, which is what is learned')
    if "prompt" in row and len(messages) > 1:
        raise RowError(
            f'has {len(messages)} messages in "{key}"; beside a "prompt" it is the assistant\'s answer alone'
        )
    if "prompt" not in row and len(messages) < 2:
        raise RowError(f'has no "prompt", and no message in "{key}" before the answer')


def _check_no_messages(row: Mapping[str, Any]) -> None:
    if "tools" in row:
        raise RowError('has "tools" beside texts; they go with messages')


def _check_message(name: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise RowError(f"has {_type_name(message)} as {name}; a message is an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        near = difflib.get_close_matches(str(role), _ROLES, n=1)
        meant = f' (did you mean "{near[0]}"?)' if near else f"; roles are {', '.join(_ROLES)}"
        raise RowError(f"has {'no role' if role is None else 'the role ' + _shown(role)} in {name}{meant}")
    for key in message.keys() - {"role", "content", *_ROLES[role]}:
        near = difflib.get_close_matches(key, ("content", *_ROLES[role]), n=1)
        meant = f' (did you mean "{near[0]}"?)' if near else ""
        raise RowError(f"has the unknown key {_shown(key)} in {name}, a message of the {role}{meant}")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError(f"has the weight {_shown(weight)} in {name}; 0 leaves the message out of the loss, 1 keeps it")
    calls = message.get("tool_calls")
    if calls is not None:
        _check_tool_calls(name, calls)
    # A message that only calls a tool has null for its content in OpenAI's files.
    if not (calls and message.get("content") is None):
        _string(message, "content", empty=role != "assistant" or bool(calls) or not weight, where=f" in {name}")


def _check_tool_calls(name: str, calls: Any) -> None:
    for call in calls if isinstance(calls, list) and calls else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f'has tool_calls in {name} that are not a list of {{"function": {{"name", "arguments"}}}}')


def _string(row: Mapping[str, Any], key: str, *, empty: bool, where: str = "") -> None:
    """Checks for a string that can be written as UTF-8, and not only spaces unless `empty`."""
    if key not in row:
        raise RowError(f'has no "{key}"{where}')
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f'has {_type_name(value)} as "{key}"{where}; a string is needed')
    if not empty and not value.strip():
        raise RowError(f'has an empty "{key}"{where}')


def _check_tokens(row: Mapping[str, Any]) -> None:
    tokens, labels = row["tokens"], row["labels"]
    if not (isinstance(tokens, list) and tokens and all(isinstance(token, str) and token for token in tokens)):
        raise RowError('has "tokens" that are not a list of words')
    if not isinstance(labels, list) or len(labels) != len(tokens):
        count = len(labels) if isinstance(labels, list) else "no list of"
        raise RowError(f'has {len(tokens)} "tokens" and {count} "labels"; each word needs one')


def _check_pair(row: Mapping[str, Any]) -> None:
    for key in ("anchor", "positive", "negative"):
        if key in row or key != "negative":
            _string(row, key, empty=False)


_CHECKS = {
    "text": _check_text, "prompt": _check_prompt, "chat": _check_chat, "instruction": _check_instruction,
    "preference": _check_preference, "feedback": _check_feedback,
    "label": _check_text, "tokens": _check_tokens, "pair": _check_pair,
}  # fmt: skip


def _shown(value: object) -> str:
    """A value from a file, short and with nothing in it that a terminal would obey."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _type_name(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, (list, dict, str)) and not value:
        return f"an empty {names[type(value)].split()[-1]}"
    return names.get(type(value), "a number")


def _open(path: Path) -> BinaryIO:
    """The file, open for reading bytes, if it is a regular one."""
    try:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        near = _near_files(path)
        hint = f"Did you mean {' or '.join(near)}?" if near else "Check the path."
        raise DataError(f"The data file {path} does not exist. {hint}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{str(path)[:200]!r} cannot be read: {reason}. Check the path and its permissions.") from error
    if is_folder:
        raise DataError(f"{path} is a folder. Give one JSON Lines file in it.")
    raise DataError(f"{path} is not a regular file, and rows are read twice. Write them to a file first.")


def _near_files(path: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3)]
