"""Rows as prompts and completions: which text a model is given, and which it learns to say.

A row becomes pieces of text, each learned or not; their token ids are the business of `data`. Chat rows go through
the tokenizer's chat template; instruction rows too where there is one, else through Alpaca's prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from edgetune.data.jsonl import Report, RowError, RowFile, check_row
from edgetune.errors import DataError
from edgetune.tokenizer import Tokenizer

__all__ = ["Example", "Pieces", "prompt_text", "read_examples", "row_pieces"]

# Stanford Alpaca's prompt (github.com/tatsu-lab/stanford_alpaca), for models without a chat template.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# Some templates print the date. A fixed one keeps a resumed run on the same tokens; it is Llama 3.2's own default.
_TEMPLATE_DATE = datetime(2024, 7, 26)

# The keys of a kind that hold answers to one prompt, each of which becomes a sequence.
_ANSWERS = {"prompt": ("completion",), "feedback": ("completion",), "preference": ("chosen", "rejected")}

Pieces = list[tuple[str, bool]]  # the text of a row in pieces, each learned or not


@dataclass(frozen=True)
class Example:
    """What a model is asked and what it should answer, as text.

    A `templated` prompt has its special tokens already: encode it with `add_special_tokens=False`.
    """

    prompt: str
    completion: str
    line: int
    templated: bool


def prompt_text(row: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, str]:
    """The prompt that a model gets for a row, and the completion that it should give; of a chat, the last turn.

    Raises:
        DataError: The row is not well formed, or is plain text, which has no completion.
        ModelError: A chat row, and the tokenizer has no usable chat template.
    """
    try:
        examples = _examples(check_row(row), row, tokenizer, 0)
        if not examples:
            raise RowError("is an answer that is not wanted; there is none to compare with")
        example = examples[-1]
    except RowError as reason:
        raise DataError(f"The row {reason}.") from reason
    return example.prompt, example.completion


def read_examples(path: str | Path, tokenizer: Tokenizer, *, skip_bad: bool = False) -> list[Example]:
    """Prompts and completions of a file, one for each turn that is learned; of answers, those that are wanted.

    Raises:
        DataError: As `read_rows`, or the file holds plain text.
        ModelError: Chat rows, and the tokenizer has no usable chat template.
    """
    file = RowFile(path)
    report = Report(file.path)
    found: list[Example] = []
    for number, row in file:
        try:
            if isinstance(row, RowError):
                raise row
            assert file.kind is not None  # set by the first row that is not bad
            found += _examples(file.kind, row, tokenizer, number)
        except RowError as reason:
            report.add(number, reason)
    report.check(file.num_lines, skip_bad)
    return found


def _examples(kind: str, row: Mapping[str, Any], tokenizer: Tokenizer, line: int) -> list[Example]:
    if kind == "text":
        raise RowError("is plain text, which has no completion to compare with; use a file of another kind")
    try:
        many, plain = row_pieces(kind, row, tokenizer)
    except DataError as error:
        raise RowError(f"cannot be rendered: {error}") from error
    ends = [] if plain else tokenizer.end_tokens
    found = []
    wanted = {"preference": 1, "feedback": int(row.get("label", True))}.get(kind, len(many))
    for pieces in many[:wanted]:
        prompt = ""
        for piece, learned in pieces:
            if learned:
                found.append(Example(prompt, _without_end(piece, ends), line, templated=not plain))
            prompt += piece
    return found


def row_pieces(kind: str, row: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[list[Pieces], bool]:
    """The text of a row that is not plain text, and whether the special tokens of a plain text belong around it."""
    if kind in _ANSWERS:
        return _answer_pieces(row, _ANSWERS[kind], tokenizer)
    if kind == "chat":
        return _chat_pieces(row["messages"], row.get("tools"), tokenizer), False
    instruction, context, output = row["instruction"], row.get("input") or "", row["output"]
    if not tokenizer.has_chat_template:
        prompt = (_ALPACA_INPUT if context else _ALPACA).format(instruction=instruction, input=context)
        return [[(prompt, False), (output, True)]], True
    asked = f"{instruction}\n\n{context}" if context else instruction
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    return _chat_pieces(messages, None, tokenizer), False


def _answer_pieces(row: Mapping[str, Any], keys: Sequence[str], tokenizer: Tokenizer) -> tuple[list[Pieces], bool]:
    """The prompt with each of the answers in turn, as texts or as messages of which the last one is learned."""
    if isinstance(row[keys[0]], str):
        return [[(row["prompt"], False), (row[key], True)] for key in keys], True
    found = []
    for key in keys:
        conversation: list[dict[str, Any]] = [*row.get("prompt", ()), *row[key]]
        messages = [{**message, "weight": 0} for message in conversation[:-1]] + [{**conversation[-1], "weight": 1}]
        found += _chat_pieces(messages, row.get("tools"), tokenizer)
    return found, False


def _chat_pieces(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, tokenizer: Tokenizer
) -> list[Pieces]:
    """A chat as text. What is learned of it is found by rendering the messages before each assistant message with the
    prompt for a generation, and again with the message: the second text less the first is what a model has to say.

    Some templates render an earlier turn otherwise than the last one (Qwen3 drops its thoughts). Then each turn becomes
    a sequence of its own, as it will be met in use.

    Raises:
        RowError: A prompt for a generation is not how the rendered answer begins.
        DataError, ModelError: From the template.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    plain = [_for_template(message) for message in messages[: turns[-1] + 1]]
    rendered = []
    for turn in turns:
        prompt = tokenizer.apply_chat_template(plain[:turn], True, tools=tools, now=_TEMPLATE_DATE)
        text = tokenizer.apply_chat_template(plain[: turn + 1], tools=tools, now=_TEMPLATE_DATE)
        if not text.startswith(prompt):
            raise RowError(
                f"has messages[{turn}], which the chat template does not render as a continuation of the prompt "
                f"before it ({prompt[-40:]!r}); use a template whose generation prompt begins the answer"
            )
        rendered.append((prompt, _until_end(text[len(prompt) :], tokenizer.end_tokens)))
    last = rendered[-1][0]
    if not all(last.startswith(prompt + answer) for prompt, answer in rendered[:-1]):
        return [[(prompt, False), (answer, True)] for prompt, answer in rendered]
    pieces: Pieces = []
    at = 0
    for prompt, answer in rendered:
        pieces += [(prompt[at:], False), (answer, True)]
        at = len(prompt) + len(answer)
    return [pieces]


def _until_end(answer: str, ends: Sequence[str]) -> str:
    """An answer up to and with its end token: what a template writes behind it, nobody generates."""
    for end in ends:
        head, found, rest = answer.rpartition(end)
        if found and not rest.strip():
            return head + found
    return answer


def _without_end(answer: str, ends: Sequence[str]) -> str:
    return next((answer.removesuffix(end) for end in ends if answer.endswith(end)), answer)


def _for_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without what only a trainer reads. Templates want the arguments of a call as an object, and OpenAI's
    files have them as a string.
    """
    plain = {key: value for key, value in message.items() if key != "weight"}
    if message.get("tool_calls"):
        plain["tool_calls"] = [{**call, "function": _with_object(call["function"])} for call in message["tool_calls"]]
    return plain


def _with_object(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RowError(f'has tool_calls whose "arguments" are not JSON: {error}') from error
    return {**function, "arguments": arguments}
