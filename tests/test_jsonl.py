"""The report of bad lines: every kind of them, where each is found, and at what cost."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import write_all, write_byte_level

from edgetune import data
from edgetune.data import read_examples, read_rows
from edgetune.errors import ConfigError, DataError
from edgetune.tokenizer import Tokenizer, load_tokenizer

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CHAT = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello, Zoë! 😀"}]
GOOD_ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "Once upon a time"},
    "prompt": {"prompt": "Once upon", "completion": " a time"},
    "chat": {"messages": CHAT},
    "instruction": {"instruction": "Say it", "input": "now", "output": "It."},
    "preference": {"prompt": "Once upon", "chosen": " a time", "rejected": " a dime"},
    "feedback": {"prompt": "Once upon", "completion": " a time", "label": True},
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return write_all(tmp_path_factory.mktemp("tokenizers"))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(path: Path, tokenizer: Tokenizer, *, window: int = 64, skip_bad: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, tokenizer, window, skip_bad=skip_bad)
    message = str(caught.value)
    message.encode("utf-8")
    return message


BAD_LINES: list[tuple[bytes, str]] = [
    (b'{"text": "\xff"}', "is not UTF-8 at byte 11"),
    (b'{"text": "a\x00"}', "has a NUL byte at byte 12"),
    (b'{"text": "a"', "is not JSON"),
    (b"{'text': 'a'}", "is not JSON"),
    (b'{"text": "a"} {"text": "b"}', "is not JSON: Extra data"),
    (b'{"text": "a\tb"}', "is not JSON: Invalid control character"),
    (b'["text"]', "is a list, not a JSON object"),
    (b"[]", "is an empty list, not a JSON object"),
    (b'"text"', "is a string, not a JSON object"),
    (b"null", "is null, not a JSON object"),
    (b"true", "is true or false, not a JSON object"),
    (b"12", "is a number, not a JSON object"),
    (b'{"text": "a", "text": "b"}', 'has the key "text" twice'),
    (b'{"text": {"a": 1, "a": 2}}', 'has the key "a" twice'),
    (b"{" + b"".join(b'"%d":1,' % i for i in range(90_000)) + b'"89999":1}', 'has the key "89999" twice'),
    (b"{" + b",".join(b'"%d":1' % i for i in range(90_000)) + b"}", 'has "0", "1", "2", "3", but a row has'),
    (b'{"' + b"a" * 900_000 + b'": 1, "text": "a"}', 'has the unknown key "aaa'),
    (b'{"text": ' + b"[" * 900 + b"]" * 900 + b"}", 'has a list as "text"'),
    (b'{"messages": [{"role": ' + b"[" * 975 + b"]" * 975 + b"}]}", ""),
    (b'{"text": NaN}', "holds NaN"),
    (b'{"text": -Infinity}', "holds -Infinity"),
    (b'{"text": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    (b'{"text": 1e999}', 'has a number as "text"'),
    (b'{"a":' * 100_000, "is nested too deep"),
    (b'{"text": "' + b"a" * 2**20 + b'"}', "is longer than 1 MiB"),
    (b"{}", "has nothing, but a row has"),
    (b'{"question": "a", "answer": "b"}', 'has "question", "answer", but a row has {"text"} or {"prompt",'),
    (b'{"txt": "a"}', 'has no "text" and has the unknown key "txt" (did you mean "text"?)'),
    (b'{"prompt": "a"}', 'has no "completion"; a prompt row has "prompt", "completion"'),
    (b'{"promt": "a", "completion": "b"}', '(did you mean "prompt"?)'),
    (b'{"prompt": "a", "completion": ""}', 'has an empty "completion"'),
    (b'{"prompt": "a", "completion": " \\n"}', 'has an empty "completion"'),
    (b'{"prompt": null, "completion": "a"}', 'has null as "prompt"; a string is needed'),
    (b'{"prompt": ["a"], "completion": "a"}', 'has a list as "prompt"'),
    (b'{"text": ""}', 'has an empty "text"'),
    (b'{"text": 5}', 'has a number as "text"'),
    (b'{"text": "\\ud800"}', "lone surrogate U+D800"),
    (b'{"\\ud800": 1, "text": "a"}', 'has the unknown key "\\ud800"'),
    (b'{"instruction": "a", "output": ""}', 'has an empty "output"'),
    (b'{"instruction": " ", "output": "a"}', 'has an empty "instruction"'),
    (b'{"instruction": "a", "output": "a", "input": 1}', 'has a number as "input"'),
    (b'{"instruction": "a", "output": "a", "inputs": ""}', 'unknown key "inputs" (did you mean "input"?)'),
    (b'{"messages": []}', 'has an empty list as "messages"'),
    (b'{"messages": "a"}', 'has a string as "messages"'),
    (b'{"messages": ["a"]}', "has a string as messages[0]"),
    (b'{"messages": [{"content": "a"}]}', "has no role in messages[0]; roles are system, user, assistant, tool"),
    (b'{"messages": [{"role": "asistant", "content": "a"}]}', 'the role "asistant" in messages[0] (did you mean'),
    (b'{"messages": [{"role": ["user"], "content": "a"}]}', "has the role"),
    (b'{"messages": [{"role": "user"}]}', 'has no "content" in messages[0]'),
    (b'{"messages": [{"role": "user", "content": null}]}', 'has null as "content" in messages[0]'),
    (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', 'has a list as "content" in messages[0]'),
    (b'{"messages": [{"role": "user", "content": "a", "wieght": 1}]}', 'the unknown key "wieght" in messages[0]'),
    (b'{"messages": [{"role": "user", "content": "a", "weight": 1}]}', 'unknown key "weight" in messages[0], a m'),
    (b'{"messages": [{"role": "user", "content": "a"}]}', "has no assistant message to learn from"),
    (b'{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an assistant message"),
]  # fmt: skip
USER = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": '
BAD_LINES += [
    (USER + b'"", "weight": 1}]}', 'has an empty "content" in messages[1]'),
    (USER + b'"a", "weight": 2}]}', "has the weight 2 in messages[1]"),
    (USER + b'"a", "weight": 0.5}]}', "has the weight 0.5 in messages[1]"),
    (USER + b'"a", "weight": true}]}', "has the weight true in messages[1]"),
    (USER + b'"a", "weight": "1"}]}', 'has the weight "1" in messages[1]'),
    (USER + b'"a", "weight": 0}]}', "has no assistant message to learn from, or each has the weight 0"),
    (USER + b'"a", "tool_calls": "x"}]}', "has tool_calls in messages[1] that are not a list"),
    (USER + b'"a"}], "tools": {}}', 'has "tools" that are not a list of objects'),
    (USER + b'"a"}], "weight": 1}', 'has the unknown key "weight"'),
]
ANSWER, ASKED = b'[{"role": "assistant", "content": "a"}]', b'[{"role": "user", "content": "a"}]'
BAD_LINES += [
    (b'{"prompt": "a", "chosen": "b", "rejected": "b"}', 'has the same "chosen" and "rejected", so there is nothing'),
    (b'{"prompt": "a", "chosen": "b"}', 'has no "rejected"; a preference row has "chosen", "rejected", "prompt"'),
    (b'{"chosen": "b", "rejected": "c"}', 'has no "prompt"'),
    (b'{"prompt": "a", "chosen": "b", "rejected": " "}', 'has an empty "rejected"'),
    (b'{"prompt": "a", "chosen": "b", "rejected": "c", "tools": []}', 'has "tools" beside texts'),
    (b'{"prompt": "a", "chosen": "b", "rejected": ' + ANSWER + b"}", 'has a list as "rejected"; a string is needed'),
    (b'{"prompt": "a", "chosen": ' + ANSWER + b', "rejected": ' + ANSWER + b"}", 'has a string as "prompt" beside'),
    (
        b'{"prompt": ' + ASKED + b', "chosen": ' + ASKED + b', "rejected": ' + ANSWER + b"}",
        'has "chosen" that does not end with a message of the assistant',
    ),
    (b'{"chosen": ' + ANSWER + b', "rejected": []}', 'has no "prompt", and no message in "chosen" before the answer'),
    (
        b'{"chosen": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}], "rejected": '
        b'[{"role": "user", "content": "y"}, {"role": "assistant", "content": "b"}]}',
        'has no "prompt", and "chosen" and "rejected" differ before their last messages',
    ),
    (
        b'{"prompt": ' + ASKED + b', "completion": [{"role": "user", "content": "b"}, {"role": "assistant", "content": '
        b'"a"}], "label": true}',
        'has 2 messages in "completion"; beside a "prompt"',
    ),
    (b'{"prompt": "a", "completion": "b", "label": 1}', 'has 1 as "label"; true is wanted, false is not'),
    (b'{"prompt": "a", "completion": "", "label": true}', 'has an empty "completion"'),
]


@pytest.mark.parametrize(
    ("line", "reason"), BAD_LINES, ids=[f"{i}-{reason[:30]}" for i, (_, reason) in enumerate(BAD_LINES)]
)
def test_bad_lines(line: bytes, reason: str, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """Alone in a file, where the line is the first one; and behind a line of its kind, and twice."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    message = refused(path, tokenizers["smollm2"], window=2**20)
    expected = "begins a JSON array" if line.startswith(b"[") else reason
    assert f"{path}: 1 of 1 line cannot be used, and nothing was read.\n  line 1 " in message
    assert expected in message
    kind = next((kind for kind, row in GOOD_ROWS.items() if set(row) & set(reason.split('"'))), "text")
    for key, of_key in {"messages": "chat", "chosen": "preference", "label": "feedback"}.items():
        if f'"{key}"'.encode() in line:
            kind = of_key
    good = json.dumps(GOOD_ROWS[kind]).encode()
    path.write_bytes(b"\n".join([good, line, good, line, good]) + b"\n")
    message = refused(path, tokenizers["smollm2"], window=2**20)
    assert "2 of 5 lines" in message
    assert "\n  line 2 " in message
    assert "\n  line 4 " in message
    assert len(message) < 3000


@pytest.mark.parametrize("kind", GOOD_ROWS)
@pytest.mark.parametrize("other", GOOD_ROWS)
def test_one_kind_per_file(kind: str, other: str, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD_ROWS[kind], GOOD_ROWS[other])
    if kind == other:
        assert read_rows(path, tokenizers["smollm2"], 128).kind == kind
        return
    assert f"line 2 is a {other} row, but the file has {kind} rows since line 1" in refused(path, tokenizers["smollm2"])


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", "\ufeff".encode("utf-16-le"), "\ufeff".encode("utf-16-be")])
def test_byte_order_mark(mark: bytes, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "a"}\n')
    assert "line 1 starts with a byte order mark" in refused(tmp_path / "a.jsonl", tokenizers["plain"])


def test_last_line_that_is_cut_off(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b')
    assert "line 2 is the last one and is cut off at its byte 11" in refused(path, tokenizers["plain"])
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}')
    assert len(read_rows(path, tokenizers["plain"], 16)) == 2


def test_line_ends_and_blank_lines(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["plain"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}\n')
    plain = [row.input_ids.tolist() for row in read_rows(path, tokenizer, 16)]
    for content in (
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'{"text": "a"}\n{"text": "b"}\n\n \n\r\n\t\n',
        b' {"text": "a"} \n\t{"text": "b"}',
    ):
        path.write_bytes(content)
        assert [row.input_ids.tolist() for row in read_rows(path, tokenizer, 16)] == plain
    path.write_bytes(b"\n" * 500 + b'{"text": "a"}\n')
    assert "500 of 501 lines" in refused(path, tokenizer)
    path.write_bytes(b'\n{"text": "a"}\n\n \n{"text": "b"}\n\n')
    message = refused(path, tokenizer)
    assert "3 of 5 lines" in message
    assert [f"line {n} is blank" in message for n in (1, 2, 3, 4, 5, 6)] == [True, False, True, True, False, False]


def test_twenty_lines_are_listed_and_all_are_counted(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *([{"text": "a"}, {"text": 1}] * 50))
    message = refused(path, tokenizers["plain"])
    assert "50 of 100 lines cannot be used" in message
    assert [int(line.split()[1]) for line in message.splitlines() if line.startswith("  line ")] == [*range(2, 41, 2)]
    assert "and 30 more" in message


def test_a_file_of_something_else_is_refused_in_few_lines(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "how are you,greeting\n" * 60, encoding="utf-8")
    message = refused(path, tokenizers["plain"])
    assert [int(line.split()[1]) for line in message.splitlines() if line.startswith("  line ")] == [1, 2, 3]
    assert "61 of 61 lines" in message and "and 58 more" in message
    assert message.count('write one JSON object per line, for example {"text": "…"}') == 1


def test_skipping_up_to_one_percent(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    good, bad = {"text": "a"}, {"text": ""}
    path = write(tmp_path / "a.jsonl", *[good] * 99, bad, *[good] * 100)
    assert "1 of 200 lines" in refused(path, tokenizers["plain"])
    rows = read_rows(path, tokenizers["plain"], 16, skip_bad=True)
    assert (len(rows), rows.skipped) == (199, 1)
    assert [row.line for row in rows] == [*range(1, 100), *range(101, 201)]
    assert len(read_rows(write(path, *[good] * 198, bad, bad), tokenizers["plain"], 16, skip_bad=True)) == 198
    message = refused(write(path, *[good] * 197, bad, bad, bad), tokenizers["plain"], skip_bad=True)
    assert "3 of 200 lines" in message
    assert "more than the 1% that may be skipped" in message
    assert len(read_examples(write(path, {"prompt": "", "completion": ""}, *[GOOD_ROWS["prompt"]] * 99),
                             tokenizers["plain"], skip_bad=True)) == 99  # fmt: skip


def test_rows_longer_than_the_window(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["bytes"]  # one token per byte, so that lengths are known; "</s>" is one more
    path = write(tmp_path / "a.jsonl", {"prompt": "ab", "completion": "cde"}, {"prompt": "abc", "completion": "defg"})
    message = refused(path, tokenizer, window=7)
    assert "1 of 2 lines" in message
    assert "line 2 has 8 tokens, but a window (max_seq_length) has 7" in message
    assert read_rows(path, tokenizer, 8).longest == 8
    path = write(tmp_path / "a.jsonl", {"messages": CHAT})
    length = read_rows(path, tokenizer, 512).longest
    assert len(read_rows(path, tokenizer, length)) == 1
    assert f"has {length} tokens, but a window (max_seq_length) has {length - 1}" in refused(
        path, tokenizer, window=length - 1
    )


def test_nothing_to_learn(tmp_path: Path) -> None:
    write_byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(tmp_path)  # no end token
    assert "line 1 has a single token" in refused(write(tmp_path / "a.jsonl", {"text": "a"}), tokenizer)
    path = write(tmp_path / "a.jsonl", {"prompt": "", "completion": "a"})
    assert "line 1 leaves nothing to learn" in refused(path, tokenizer)
    row = read_rows(write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}), tokenizer, 16)[0]
    assert row.labels.tolist() == [-100, *tokenizer.encode("b")]


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\r\n\n"])
def test_no_rows(content: bytes, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert "has no rows" in refused(tmp_path / "a.jsonl", tokenizers["plain"])


def test_files_that_cannot_be_read(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["plain"]
    write(tmp_path / "notes.jsonl", {"text": "a"})
    message = refused(tmp_path / "note.jsonl", tokenizer)
    assert f"does not exist. Did you mean {tmp_path / 'notes.jsonl'}?" in message
    assert "does not exist. Check the path." in refused(tmp_path / "no" / "such" / "file", tokenizer)
    assert "does not exist" in refused(tmp_path / "notes.jsonl" / "x", tokenizer)
    assert "is a folder" in refused(tmp_path, tokenizer)
    assert "cannot be read" in refused(tmp_path / ("x" * 5000), tokenizer)
    assert "cannot be read" in refused(tmp_path / "a\0b", tokenizer)
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refused(tmp_path / "pipe", tokenizer)
    assert "is not a regular file" in refused(Path("/dev/zero"), tokenizer)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    path.chmod(0)
    assert "Permission denied" in refused(path, tokenizers["plain"])


def test_window_of_one_token(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_seq_length is 1"):
        read_rows(write(tmp_path / "a.jsonl", {"text": "abc"}), tokenizers["plain"], 1)


@pytest.mark.parametrize("change", ["longer", "shorter", "same length"])
def test_file_that_changes_between_the_passes(
    change: str, tokenizers: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "def"})
    texts = {"longer": ["abc", "defgh", "x"], "shorter": ["abc"], "same length": ["abc", "deg"]}[change]
    check = data.Report.check

    def check_then_change(*args: Any) -> None:
        check(*args)
        write(path, *({"text": text} for text in texts))

    monkeypatch.setattr(data.Report, "check", check_then_change)
    assert "changed while it was read" in refused(path, tokenizers["bytes"])


def peak_bytes(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_without_end_needs_no_memory(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.truncate(2**28)  # sparse: 256 MiB of NUL
    peak = peak_bytes(lambda: refused(path, tokenizers["plain"]))
    assert peak < 6 * 2**20


def test_a_bad_last_line_is_found_before_anything_is_kept(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"text": "Once upon a time " * 40}] * 1000, {"text": ""})
    peak = peak_bytes(lambda: refused(path, tokenizers["plain"], window=512))
    assert peak < 2**20
    write(path, *[{"text": "Once upon a time " * 40}] * 1000)
    rows = read_rows(path, tokenizers["plain"], 512)
    peak = peak_bytes(lambda: read_rows(path, tokenizers["plain"], 512))
    assert peak < 8 * rows.num_tokens + 500 * len(rows) + 2**20


LINES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([json.dumps(row).encode() for row in GOOD_ROWS.values()] + [line for line, _ in BAD_LINES[:16]]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["text", "messages", "role", "content", "prompt", "completion", "weight", "tool_calls", "x"]
                ),
                inner | st.sampled_from(["user", "assistant", "tool"]),
                max_size=4,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)


@FUZZ
@given(lines=st.lists(LINES, max_size=5), end=st.sampled_from([b"", b"\n", b"\r\n"]), skip_bad=st.booleans())
def test_any_file_is_read_or_refused(
    lines: list[bytes], end: bytes, skip_bad: bool, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + end)
    try:
        rows = read_rows(path, tokenizers["smollm2"], 48, skip_bad=skip_bad)
    except DataError as error:
        assert str(path) in str(error)
        str(error).encode()
        return
    assert len(rows) > 0
    assert all(row.num_supervised > 0 and len(row) <= 48 for row in rows)
