"""Rows against transformers, and the invariants of windows."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_tokenizers import write_all, write_byte_level

from edgetune.data import (
    LENGTH_STEP,
    Row,
    Rows,
    epoch_order,
    pack,
    prompt_text,
    read_examples,
    read_rows,
    split_eval,
    stack,
)
from edgetune.errors import ConfigError, DataError, ModelError
from edgetune.tokenizer import Tokenizer, load_tokenizer

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello, Zoë! 😀"},
    {"role": "user", "content": "Set an alarm"},
    {"role": "assistant", "content": "Done.\nAt seven."},
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return write_all(tmp_path_factory.mktemp("tokenizers"))


def oracle(tokenizer: Tokenizer) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def learned(row: Row, tokenizer: Tokenizer, *, skip: bool = False) -> str:
    return tokenizer.decode([int(label) for label in row.labels if label != -100], skip_special_tokens=skip)


def refused(path: Path, tokenizer: Tokenizer, *, window: int = 64, skip_bad: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, tokenizer, window, skip_bad=skip_bad)
    message = str(caught.value)
    message.encode("utf-8")
    return message


def test_text_rows_equal_transformers_and_lose_no_token(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    texts = ["Once upon a time " * 9, "é", "x" * 31]
    for name in ("plain", "sentencepiece", "llama3"):
        tokenizer, theirs = tokenizers[name], oracle(tokenizers[name])
        rows = read_rows(write(tmp_path / "a.jsonl", *({"text": text} for text in texts)), tokenizer, 16)
        assert rows.kind == "text"
        assert rows.longest == 16
        assert rows.longest_completion == 0
        for line, text in enumerate(texts, start=1):
            of_line = [row for row in rows if row.line == line]
            expected = [*theirs(text)["input_ids"], theirs.eos_token_id]
            assert np.concatenate([row.input_ids for row in of_line]).tolist() == expected
            assert np.concatenate([row.labels for row in of_line]).tolist() == expected
            assert all(2 <= len(row) <= 16 for row in of_line)
        assert rows.num_tokens == sum(len(theirs(text)["input_ids"]) + 1 for text in texts)
        assert rows.num_supervised == rows.num_tokens - len(rows)


@pytest.mark.parametrize("length", range(2, 14))
def test_last_window_of_a_text_never_has_one_token(
    length: int, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    rows = read_rows(write(tmp_path / "a.jsonl", {"text": "x" * (length - 1)}), tokenizers["bytes"], 4)
    assert sum(len(row) for row in rows) == length
    assert min(len(row) for row in rows) >= 2
    assert len(rows) == -(-length // 4)


def test_an_end_token_is_not_added_twice(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["plain"]
    rows = read_rows(write(tmp_path / "a.jsonl", {"text": "a<|im_end|>"}, {"text": "a"}), tokenizer, 16)
    assert rows[0].input_ids.tolist() == rows[1].input_ids.tolist()


def test_completions_are_learned_and_prompts_are_not(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    pairs = [
        ("Once upon", " a time"),
        ("Call ", "Zoë 😀"),
        ("", "alone"),
        ("a\n", "\n\nb"),
        ("naï", "ve café"),
        (" ", " "),
    ]
    pairs = [(prompt, completion) for prompt, completion in pairs if completion.strip()]
    path = write(tmp_path / "a.jsonl", *({"prompt": p, "completion": c} for p, c in pairs))
    for name in ("plain", "bytes", "llama3", "sentencepiece"):
        tokenizer, theirs = tokenizers[name], oracle(tokenizers[name])
        rows = read_rows(path, tokenizer, 64)
        assert rows.kind == "prompt"
        for row, (prompt, completion) in zip(rows, pairs, strict=True):
            before = theirs(prompt)["input_ids"]
            assert row.input_ids[: len(before)].tolist() == before
            assert row.labels.tolist() == [-100] * len(before) + row.input_ids[len(before) :].tolist()
            assert row.labels[-1] == theirs.eos_token_id
            whole = theirs.decode(row.input_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert whole == prompt + completion
            if name != "sentencepiece":  # decoding drops the space before a first word there
                assert learned(row, tokenizer, skip=True) == completion
        assert rows.longest_completion == max(int(np.sum(row.labels != -100)) for row in rows)


def test_a_pair_of_answers_is_two_sequences_in_one_window(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["plain"]
    pairs = [("Once upon", " a time", " a dime"), ("", "yes", "no, never"), ("Call ", "Zoë", "me")]
    path = write(tmp_path / "a.jsonl", *({"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs))
    rows = read_rows(path, tokenizer, 64)
    assert (rows.kind, rows.together, len(rows)) == ("preference", 2, 6)
    for i, (prompt, *answers) in enumerate(pairs):
        for row, answer in zip(rows.rows[2 * i : 2 * i + 2], answers, strict=True):
            assert learned(row, tokenizer, skip=True) == answer and row.labels[-1] == tokenizer.eos_token_id
            alone = write(tmp_path / "b.jsonl", {"prompt": prompt, "completion": answer})
            assert row.input_ids.tolist() == read_rows(alone, tokenizer, 64)[0].input_ids.tolist()
            assert row.line == i + 1
    longest = max(len(rows[i]) + len(rows[i + 1]) for i in (0, 2, 4))
    windows = pack(rows, longest, rows.together)
    assert sorted(row.line for window in windows for row in window.rows[::2]) == [1, 2, 3]
    for window in windows:
        assert [row.line for row in window.rows[::2]] == [row.line for row in window.rows[1::2]]
    message = refused(path, tokenizer, window=longest - 1)
    assert f"has {longest} tokens, its chosen and its rejected sequence together, but a window" in message
    assert [(e.prompt, e.completion) for e in read_examples(path, tokenizer)] == [(p, c) for p, c, _ in pairs]
    assert prompt_text({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer) == ("a", "b")


def test_a_feedback_row_has_the_completion_of_the_row_before(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["plain"]
    given = [("Once upon", " a time", True), ("Call ", "me", False), ("Say ", "it twice", True)]
    path = write(tmp_path / "a.jsonl", *({"prompt": p, "completion": c, "label": w} for p, c, w in given))
    rows = read_rows(path, tokenizer, 64)
    assert [row.desirable for row in rows] == [True, None, False, None, True, None]
    for i, (prompt, completion, _) in enumerate(given):
        own, other = rows[2 * i], rows[2 * i + 1]
        assert learned(own, tokenizer, skip=True) == completion
        assert learned(other, tokenizer, skip=True) == given[i - 1][1]
        start = int(np.argmax(own.labels != -100))
        assert other.input_ids[:start].tolist() == own.input_ids[:start].tolist() == tokenizer.encode(prompt)
        assert set(other.labels[:start].tolist()) <= {-100}
    made = stack(pack(rows, 64, 2))["desirable"]
    assert sorted(made[~np.isnan(made)].tolist()) == [0, 1, 1]
    longest = max(len(rows[i]) + len(rows[i + 1]) for i in (0, 2, 4))
    assert "with its prompt once more and the completion of the row before" in refused(
        path, tokenizer, window=longest - 1
    )
    assert [e.completion for e in read_examples(path, tokenizer)] == [" a time", "it twice"]
    with pytest.raises(DataError, match="is an answer that is not wanted"):
        prompt_text({"prompt": "a", "completion": "b", "label": False}, tokenizer)
    assert "has a single row; feedback is compared" in refused(
        write(tmp_path / "b.jsonl", {"prompt": "a", "completion": "b", "label": True}), tokenizer
    )


def test_answers_as_messages(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """With the prompt for itself or in both lists, as TRL takes both: the sequences of the chats that they are."""
    tokenizer, asked = tokenizers["smollm2"], CHAT[:2]
    answers = [{"role": "assistant", "content": text} for text in ("Hello!", "Go away.")]
    explicit = {"prompt": asked, "chosen": answers[:1], "rejected": answers[1:]}
    implicit = {"chosen": [*asked, answers[0]], "rejected": [*asked, answers[1]]}
    chats = [{"messages": [*asked, answer]} for answer in answers]
    expected = [row.input_ids.tolist() for row in read_rows(write(tmp_path / "c.jsonl", *chats), tokenizer, 128)]
    for row in (explicit, implicit):
        rows = read_rows(write(tmp_path / "a.jsonl", row), tokenizer, 128)
        assert [each.input_ids.tolist() for each in rows] == expected
        assert ["Hello!" in learned(rows[0], tokenizer), "Go away." in learned(rows[1], tokenizer)] == [True, True]
    turns = {"prompt": CHAT[:4], "completion": CHAT[4:], "label": False}
    rows = read_rows(write(tmp_path / "d.jsonl", turns, turns), tokenizer, 256)
    assert "Hello, Zoë" not in learned(rows[0], tokenizer) and "At seven." in learned(rows[0], tokenizer)


@FUZZ
@given(
    prompt=st.text(st.sampled_from("ab \n'é😀1▁")),
    completion=st.text(st.sampled_from("ab \n'é😀1▁"), min_size=1).filter(str.strip),
    name=st.sampled_from(["plain", "bytes", "sentencepiece"]),
)
@example(prompt="a▁", completion="b", name="sentencepiece")
def test_any_seam_keeps_the_text_and_learns_the_completion(
    prompt: str, completion: str, name: str, tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizer = tokenizers[name]
    row = read_rows(write(tmp_path / "a.jsonl", {"prompt": prompt, "completion": completion}), tokenizer, 512)[0]
    ids = row.input_ids.tolist()
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.encode(prompt + completion))
    start = int(np.argmax(row.labels != -100))
    assert row.labels[start:].tolist() == ids[start:]
    before = tokenizer.encode(prompt)
    assert ids[:start] == before[:start]
    if name != "sentencepiece":
        assert ids[:start] == before


@pytest.mark.parametrize("name", ["smollm2", "llama3", "qwen2.5"])
def test_every_assistant_turn_of_a_chat_is_learned(name: str, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer, theirs = tokenizers[name], oracle(tokenizers[name])
    rows = read_rows(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer, 512)
    assert (rows.kind, len(rows)) == ("chat", 1)
    variables = {"date_string": "26 Jul 2024"}
    whole = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=True, **variables)["input_ids"]
    ids = rows[0].input_ids.tolist()
    assert whole[: len(ids)] == ids  # what follows the last end token is not kept
    assert theirs.decode(whole[len(ids) :]).strip() == ""
    end = theirs.eos_token
    assert learned(rows[0], tokenizer) == f"Hello, Zoë! 😀{end}Done.\nAt seven.{end}"
    for turn in (2, 4):  # training starts an answer from the very ids that generation starts from
        prompt = theirs.apply_chat_template(
            CHAT[:turn], tokenize=True, return_dict=True, add_generation_prompt=True, **variables
        )["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert rows[0].labels[len(prompt) - 1] == -100
        assert rows[0].labels[len(prompt)] == ids[len(prompt)]


def test_labels_equal_the_assistant_mask_of_transformers(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = load_tokenizer(write_byte_level(tmp_path, template=marked))
    row = read_rows(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer, 512)[0]
    made = oracle(tokenizer).apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.array(made["assistant_masks"][: len(row)])
    assert mask.sum() > 20
    assert np.array_equal(row.input_ids, made["input_ids"][: len(row)])
    assert np.array_equal(row.labels != -100, mask == 1)
    assert sum(made["assistant_masks"][len(row) :]) == 0


def test_turns_that_a_template_rewrites_become_rows_of_their_own(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    tokenizer, theirs = tokenizers["qwen3"], oracle(tokenizers["qwen3"])
    rows = read_rows(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizer, 512)
    assert [row.line for row in rows] == [1, 1]
    empty_thoughts = "<think>\n\n</think>\n\n"
    for row, turn in zip(rows, (2, 4), strict=True):
        prompt = theirs.apply_chat_template(CHAT[:turn], tokenize=False, add_generation_prompt=True)
        text = theirs.apply_chat_template(CHAT[: turn + 1], tokenize=False)
        assert tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=False) == text.rstrip("\n")
        assert learned(row, tokenizer) == text[len(prompt) :].rstrip("\n")
        assert learned(row, tokenizer) == f"{empty_thoughts}{CHAT[turn]['content']}<|im_end|>"


def test_messages_of_weight_0_are_context_only(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    weighted = [CHAT[0], CHAT[1], {**CHAT[2], "weight": 0}, CHAT[3], {**CHAT[4], "weight": 1}]
    first_only = [*CHAT[:3], CHAT[3], {**CHAT[4], "weight": 0}]
    path = write(tmp_path / "a.jsonl", {"messages": weighted}, {"messages": first_only}, {"messages": CHAT})
    tokenizer = tokenizers["smollm2"]
    rows = read_rows(path, tokenizer, 512)
    assert learned(rows[0], tokenizer) == "Done.\nAt seven.<|im_end|>"
    assert np.array_equal(rows[0].input_ids, rows[2].input_ids)
    assert learned(rows[1], tokenizer) == "Hello, Zoë! 😀<|im_end|>"
    assert len(rows[1]) < len(rows[2])  # nothing behind the last learned turn is computed


def test_calls_of_tools_are_learned(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    function = {"name": "set_alarm", "arguments": '{"at": "7:00"}'}
    messages = [
        CHAT[1],
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "c", "content": "ok"},
        {"role": "assistant", "content": "Set."},
    ]
    tools = [{"type": "function", "function": {"name": "set_alarm", "parameters": {}}}]
    tokenizer = tokenizers["qwen2.5"]
    path = write(tmp_path / "a.jsonl", {"messages": messages, "tools": tools, "parallel_tool_calls": False})
    row = read_rows(path, tokenizer, 512)[0]
    call = '\n<tool_call>\n{"name": "set_alarm", "arguments": {"at": "7:00"}}\n</tool_call>'
    prompt = "<|im_start|>assistant\n"
    assert learned(row, tokenizer) == f"{call.removeprefix(chr(10))}<|im_end|>Set.<|im_end|>"
    text = tokenizer.decode(row.input_ids.tolist(), skip_special_tokens=False)
    assert prompt.rstrip() + call in text
    assert json.dumps(tools[0]) in text
    bad = [messages[0], {**messages[1], "tool_calls": [{"function": {**function, "arguments": "{"}}]}]
    assert '"arguments" are not JSON' in refused(write(path, {"messages": bad}), tokenizer)


def test_instructions_use_the_chat_template_where_there_is_one(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"instruction": "Say hi", "output": "hi"},
        {"instruction": "Say hi", "input": "", "output": "hi"},
        {"instruction": "Say hi", "input": None, "output": "hi"},
    )
    rows = read_rows(path, tokenizers["smollm2"], 512)
    text = tokenizers["smollm2"].decode(rows[0].input_ids.tolist(), skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nAdd\n\n1 and 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>")
    assert learned(rows[0], tokenizers["smollm2"]) == "3<|im_end|>"
    assert rows[1].input_ids.tolist() == rows[2].input_ids.tolist() == rows[3].input_ids.tolist()

    rows = read_rows(path, tokenizers["plain"], 512)
    text = tokenizers["plain"].decode(rows[0].input_ids.tolist(), skip_special_tokens=False)
    assert text.startswith("Below is an instruction that describes a task, paired with an input")
    assert text.endswith("### Instruction:\nAdd\n\n### Input:\n1 and 2\n\n### Response:\n3<|im_end|>")
    assert learned(rows[1], tokenizers["plain"]) == "hi<|im_end|>"
    assert "Input" not in tokenizers["plain"].decode(rows[1].input_ids.tolist())


def test_braces_in_instructions_stay(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    row = {"instruction": "{input} {x}", "input": "{instruction}", "output": "{}"}
    prompt, completion = prompt_text(row, tokenizers["plain"])
    assert "### Instruction:\n{input} {x}\n\n### Input:\n{instruction}\n" in prompt
    assert completion == "{}"


def test_real_instructions(real: Callable[[str], Path], tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    content = json.loads((real("rasbt_instruction") / "instruction-data.json").read_text(encoding="utf-8"))
    path = write(tmp_path / "a.jsonl", *content)
    for name in ("plain", "qwen2.5"):
        tokenizer = tokenizers[name]
        rows = read_rows(path, tokenizer, 1024)
        assert (len(rows), rows.kind, rows.skipped) == (1100, "instruction", 0)
        assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        for row, source in zip(rows, content, strict=True):
            assert learned(row, tokenizer) == source["output"] + "<|im_end|>"
        examples = read_examples(path, tokenizer)
        assert [e.completion for e in examples] == [source["output"] for source in content]
        for asked, row in zip(examples, rows, strict=True):
            ids = tokenizer.encode(asked.prompt, add_special_tokens=not asked.templated)
            assert row.input_ids[: len(ids)].tolist() == ids
            assert row.labels[len(ids)] != -100
        assert sum(window.num_tokens for window in pack(rows, 1024)) == rows.num_tokens
    array = real("rasbt_instruction") / "instruction-data.json"
    assert "begins a JSON array" in refused(array, tokenizers["plain"])
    preference = json.loads((real("rasbt_instruction") / "instruction-data-with-preference.json").read_text())
    assert 'unknown key "chosen"' in refused(write(path, *preference), tokenizers["plain"])


def test_template_that_does_not_continue_its_prompt(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    tokenizer = load_tokenizer(write_byte_level(tmp_path, template=template))
    path = write(tmp_path / "a.jsonl", {"messages": CHAT[1:3]}, {"messages": CHAT})
    message = refused(path, tokenizer, window=512)
    assert "line 1 has messages[1], which the chat template does not render as a continuation" in message
    assert "line 2 has messages[2]" in message


def test_template_that_refuses_a_row_is_reported_with_its_line(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    tokenizer = load_tokenizer(write_byte_level(tmp_path, template=template))
    message = refused(write(tmp_path / "a.jsonl", {"messages": CHAT[1:3]}, {"messages": CHAT}), tokenizer)
    assert "1 of 2 lines" in message
    assert "line 2 cannot be encoded: The chat template" in message
    assert "no system here" in message


def test_template_without_an_end_token_gets_one(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = load_tokenizer(write_byte_level(tmp_path, template=template))
    row = read_rows(write(tmp_path / "a.jsonl", {"messages": CHAT[1:3]}), tokenizer, 128)[0]
    assert learned(row, tokenizer) == "Hello, Zoë! 😀\n<|im_end|>"


def test_chat_rows_without_a_template_say_what_to_do(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        read_rows(write(tmp_path / "a.jsonl", {"messages": CHAT}), tokenizers["plain"], 512)


def test_a_date_in_a_template_does_not_change_the_tokens(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": CHAT})
    row = read_rows(path, tokenizers["llama3"], 512)[0]
    assert "Today Date: 26 Jul 2024" in tokenizers["llama3"].decode(row.input_ids.tolist())


def test_prompts_and_completions(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers["smollm2"]
    found = read_examples(write(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT[1:3]}), tokenizer)
    assert [(e.completion, e.line, e.templated) for e in found] == [
        ("Hello, Zoë! 😀", 1, True), ("Done.\nAt seven.", 1, True), ("Hello, Zoë! 😀", 2, True),
    ]  # fmt: skip
    theirs = oracle(tokenizer)
    assert found[1].prompt == theirs.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)
    assert prompt_text({"messages": CHAT}, tokenizer) == (found[1].prompt, found[1].completion)
    plain = read_examples(write(tmp_path / "a.jsonl", {"prompt": "a", "completion": " b"}), tokenizer)
    assert [(e.prompt, e.completion, e.line, e.templated) for e in plain] == [("a", " b", 1, False)]


def test_plain_text_has_no_completion(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1 is plain text, which has no completion"):
        read_examples(write(tmp_path / "a.jsonl", {"text": "a"}), tokenizers["plain"])
    with pytest.raises(DataError, match="The row is plain text"):
        prompt_text({"text": "a"}, tokenizers["plain"])
    with pytest.raises(DataError, match='The row has no "completion"'):
        prompt_text({"prompt": "a"}, tokenizers["plain"])


def make_rows(lengths: Sequence[int], kind: str = "prompt") -> Rows:
    """Rows with ids that occur once in all of them."""
    numbers = itertools.count(1)
    rows = []
    for line, length in enumerate(lengths, start=1):
        ids = np.array([next(numbers) for _ in range(length)], np.int32)
        labels = np.where(np.arange(length) < length // 3, -100, ids).astype(np.int32)
        rows.append(Row(ids, labels, line))
    return Rows(tuple(rows), kind, "0" * 64, 0)


@FUZZ
@given(lengths=st.lists(st.integers(1, 24), max_size=40), room=st.integers(24, 40))
def test_windows_hold_every_token_once_and_no_label_crosses_rows(lengths: list[int], room: int) -> None:
    rows = make_rows(lengths)
    windows = pack(rows, room)
    of_token = {int(i): row for row in rows for i in row.input_ids}
    seen: list[int] = []
    for window in windows:
        used = window.segment_ids >= 0
        fullest = max(w.num_tokens for w in windows)
        assert window.length == min(-(-fullest // LENGTH_STEP) * LENGTH_STEP, room)
        assert {len(a) for a in (window.input_ids, window.labels, window.position_ids, used)} == {window.length}
        assert window.num_tokens == used.sum()
        assert (window.input_ids[~used] == 0).all()
        assert (window.labels[~used] == -100).all()
        assert (window.position_ids[~used] == 0).all()
        seen += window.input_ids[used].tolist()
        for t in np.flatnonzero(used):
            row = of_token[int(window.input_ids[t])]
            position = int(window.position_ids[t])
            assert row.input_ids[position] == window.input_ids[t]
            last = position == len(row) - 1
            assert window.labels[t] == (-100 if last else row.labels[position + 1])
            if not last:
                assert window.segment_ids[t + 1] == window.segment_ids[t]
                if window.labels[t] != -100:
                    assert window.labels[t] == window.input_ids[t + 1]
            else:
                assert t + 1 == window.length or window.segment_ids[t + 1] != window.segment_ids[t]
        segments = [int(s) for s, _ in itertools.groupby(window.segment_ids[used])]
        assert segments == list(range(len(window.rows)))
    assert sorted(seen) == sorted(of_token)
    assert sum(int((w.labels != -100).sum()) for w in windows) == rows.num_supervised
    # No two windows could be one, so at most one is half empty or more.
    assert sum(2 * window.num_tokens <= room for window in windows) <= 1


@FUZZ
@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=8))
def test_packing_is_within_its_bound_of_the_best(lengths: list[int]) -> None:
    """Against all ways of filling windows of 10, tried one by one."""

    def fewest(rest: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not rest:
            return len(rooms)
        found = fewest(rest[1:], tuple(sorted((*rooms, 10 - rest[0]))))
        for i, room in enumerate(rooms):
            if room >= rest[0] and (i == 0 or rooms[i - 1] != room):
                found = min(found, fewest(rest[1:], tuple(sorted((*rooms[:i], room - rest[0], *rooms[i + 1 :])))))
        return found

    best = fewest(tuple(sorted(lengths, reverse=True)), ())
    assert best <= len(pack(make_rows(lengths), 10)) <= 11 / 9 * best + 1


def test_windows_as_they_are_stacked() -> None:
    batch = stack(pack(make_rows([3, 2, 4]), 6))
    assert {name: array.tolist() for name, array in batch.items()} == {
        "input_ids": [[6, 7, 8, 9, 4, 5], [1, 2, 3, 0, 0, 0]],
        "labels": [[7, 8, 9, -100, 5, -100], [2, 3, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 0, 0, 0]],
        "segment_ids": [[0, 0, 0, 0, 1, 1], [0, 0, 0, -1, -1, -1]],
    }
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}


def test_windows_are_no_longer_than_their_fullest() -> None:
    assert {window.length for window in pack(make_rows([3, 4]), 100)} == {LENGTH_STEP}
    assert {window.length for window in pack(make_rows([9, 8]), 100)} == {2 * LENGTH_STEP}
    assert {window.length for window in pack(make_rows([9, 8]), 20)} == {20}
    assert pack(make_rows([]), 8) == []
    with pytest.raises(DataError, match=r"line 2 has 9 tokens; a window \(max_seq_length\) has 8"):
        pack(make_rows([3, 9]), 8)


def test_packing_depends_on_the_rows_alone() -> None:
    lengths = random.Random(1).choices(range(1, 64), k=500)
    first, second = (pack(make_rows(lengths), 64) for _ in range(2))
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first, second, strict=True))
    assert len(first) <= 1.03 * sum(lengths) / 64


def test_packing_does_work_proportional_to_the_rows() -> None:
    """Measured in comparisons of lengths, not in seconds: 8 times the rows, less than 16 times the calls."""

    class Counted(Row):
        calls = 0

        def __len__(self) -> int:
            Counted.calls += 1
            return len(self.input_ids)

    def calls(count: int) -> int:
        Counted.calls = 0
        rows = [Counted(row.input_ids, row.labels, row.line) for row in make_rows([1 + i % 97 for i in range(count)])]
        pack(rows, 128)
        return Counted.calls

    assert calls(8000) < 16 * calls(1000)


def test_order_of_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 6
    assert np.array_equal(epoch_order(50, 1, 2), orders[5])
    assert np.array_equal(epoch_order(5, 7, 3), np.random.default_rng([7, 3]).permutation(5))


@FUZZ
@given(count=st.integers(2, 30), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 2**32))
def test_evaluation_rows_are_apart_from_training_rows(count: int, fraction: float, seed: int) -> None:
    rows = make_rows([3] * count)
    doubled = Rows(tuple(row for row in rows for _ in range(2)), rows.kind, rows.sha256, rows.skipped)
    train, held_out = split_eval(doubled, fraction, seed)
    assert {row.line for row in train} | {row.line for row in held_out} == set(range(1, count + 1))
    assert not {row.line for row in train} & {row.line for row in held_out}
    assert len(train) + len(held_out) == 2 * count
    assert len(held_out) == 2 * min(max(round(fraction * count), 1), count - 1)
    assert [row.line for row in train] == sorted(row.line for row in train)
    assert (train.kind, train.sha256) == (rows.kind, rows.sha256)
    again = split_eval(doubled, fraction, seed)
    assert [row.line for row in again[1]] == [row.line for row in held_out]


def test_splits_that_are_refused() -> None:
    rows = make_rows([3] * 20)
    assert [len(part) for part in split_eval(rows, 0, 0)] == [20, 0]
    assert [row.line for row in split_eval(rows, 0.3, 1)[1]] != [row.line for row in split_eval(rows, 0.3, 2)[1]]
    for fraction in (1, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="at least 0 and below 1"):
            split_eval(rows, fraction, 0)
    with pytest.raises(DataError, match="One line cannot be split"):
        split_eval(make_rows([3]), 0.5, 0)


def test_counts_of_rows(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "abcd", "completion": "ef"}, {"prompt": "a", "completion": "bcd"})
    rows = read_rows(path, tokenizers["bytes"], 32)
    assert (rows.num_tokens, rows.num_supervised, rows.longest, rows.longest_completion) == (12, 7, 7, 4)
    assert rows[0].input_ids.dtype == rows[0].labels.dtype == np.int32
    assert sum(int((w.labels != -100).sum()) for w in pack(rows, 32)) == rows.num_supervised


def test_import_is_light() -> None:
    code = (
        "import sys, edgetune.data\n"
        "heavy = {'torch', 'transformers', 'jinja2', 'huggingface_hub', 'onnx', 'onnxruntime', 'bitsandbytes'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
