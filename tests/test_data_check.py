"""What `data check` finds, against counts by hand and a comparison of all pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, write_model

import edgetune as et
from edgetune.cli import verbs
from edgetune.data import pack, read_rows
from edgetune.data.near import near_matches, similarity
from edgetune.data_check import label_counts
from edgetune.errors import DataError
from edgetune.tokenizer import load_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def jaccard(one: str, other: str) -> float:
    """By the definition, on strings."""
    sets = []
    for text in (one, other):
        plain = " ".join(text.casefold().split())
        sets.append({plain[i : i + 5] for i in range(max(1, len(plain) - 4))} if plain else set())
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1]) if sets[0] | sets[1] else 1.0


def texts(seed: int, count: int = 150) -> list[str]:
    """Sentences of few words, some of them changed a little; empty, short and non-ASCII ones too."""
    rng = np.random.default_rng(seed)
    words = ["turn", "the", "lamp", "on", "off", "kitchen", "Straße", "now", "please", "日本語", "a"]
    made = ["", " ", "abc", "ABC", "abcd"]
    while len(made) < count:
        if rng.random() < 0.4:
            changed = made[rng.integers(len(made))]
            at = rng.integers(len(changed) + 1)
            made.append((changed[:at] + "x" + changed[at + 1 :]) if rng.random() < 0.7 else changed.upper() + " ")
        else:
            made.append(" ".join(rng.choice(words, rng.integers(1, 25))))
    return made


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_texts_are_those_that_all_pairs_give(threshold: float) -> None:
    some = texts(0)
    others = [*texts(1), *(text[2:] for text in some[::4]), *(text.swapcase() for text in some[::7])]
    for found, earlier in (
        (near_matches(some, threshold=threshold), lambda at: some[:at]),
        (near_matches(some, others, threshold=threshold), lambda at: others),
    ):
        wanted = {at for at, text in enumerate(some) if text.strip() and any(
            other.strip() and jaccard(text, other) >= threshold for other in earlier(at)
        )}  # fmt: skip
        assert {match.at for match in found} == wanted and len(found) == len(wanted) > 5
        for at, other, share in found:
            assert (
                share
                == pytest.approx(jaccard(some[at], earlier(at)[other]))
                == similarity(some[at], earlier(at)[other])
            )


def test_a_pair_that_is_not_alike_does_not_count() -> None:
    same = ["turn the lamp on"] * 3
    assert [match[:2] for match in near_matches(same)] == [(1, 0), (2, 0)]
    assert [match[:2] for match in near_matches(same, alike=lambda at, other: (at, other) == (2, 1))] == [(2, 1)]


def test_answers_are_labels_where_they_are_short_and_few() -> None:
    assert label_counts(["a", "b ", "a", "b"]) == {"a": 2, "b": 2}
    assert label_counts(["a", "b", "c"]) is None, "each of its own"
    assert label_counts(["a", "a"]) is None, "one alone"
    assert label_counts(["a" * 65, "b"] * 2) is None, "long"
    assert label_counts(["a", "a", "b", None]) is None, "not on each row"


def test_duplicates_conflicts_and_labels(tmp_path: Path) -> None:
    asked = [("turn the kitchen lamp on", "on"), ("turn the kitchen lamp off", "off")] * 2
    asked += [("Turn the kitchen  lamp ON", "on"), ("turn the kitchen lamp on", "off"), ("ring my mother", "call")]
    asked += [("never mind", "off")] * 2 + [("good night", "off")] * 12
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in asked]
    found = et.check_data(write(tmp_path / "rows.jsonl", rows))
    assert (found["rows"], found["kind"], found["eval"], found["window"]) == (21, "prompt", None, None)
    assert found["duplicates"]["exact"] == 2 + 1 + 11
    assert found["duplicates"]["near"] == 2, "line 5 of 1 by its case, line 6 of 2: the same answer to nearly the same"
    assert {"line": 5, "of": 1, "similarity": 1.0} in found["duplicates"]["examples"]
    assert found["conflicts"] == {"prompts": 1, "rows": 3, "examples": [[1, 3, 6]]}
    labels = found["labels"]
    assert labels["counts"] == {"off": 17, "on": 3, "call": 1} and labels["singletons"] == 1
    shares = np.array([17, 3, 1]) / 21
    assert labels["balance"] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(3))
    assert found["lengths"]["max"] == len("turn the kitchen lamp off\noff")
    assert "14 exactly, 2 nearly, such as line 3 (line 1)." in found["findings"][1]
    assert [sentence[:30] for sentence in found["findings"]] == [
        "1 training prompt with several", "Training rows like an earlier ", '17 training rows with the labe',
    ]  # fmt: skip


def test_leakage_and_labels_that_only_the_held_out_rows_have(tmp_path: Path) -> None:
    train = [{"text": f"this is row {word}, and it goes on for a while"} for word in ("one", "two", "ten")]
    asked = [("play some quiet music in the garden", "play"), ("lock the front door", "lock")] * 2
    data = write(tmp_path / "train.jsonl", [{"prompt": p, "completion": c} for p, c in asked])
    held_out = [asked[0], (asked[1][0], "unlock"), (asked[0][0] + "s", "play"), ("what is the time", "clock")]
    eval_data = write(tmp_path / "eval.jsonl", [{"prompt": p, "completion": c} for p, c in [*held_out, *held_out]])
    found = et.check_data(data, eval_data=eval_data)
    leakage = found["leakage"]
    assert (leakage["exact"], leakage["prompts"], leakage["near"], leakage["share"]) == (2, 2, 2, 0.75)
    assert leakage["examples"][0] == {"line": 1, "of": 1, "similarity": 1.0}
    assert found["eval"]["unseen_labels"] == {"unlock": [2, 6], "clock": [4, 8]}
    assert (
        "75.0% of the held-out rows are among the training rows: 2 exactly, 2 by" in found["findings"][0]
        and '"unlock", "clock"' in found["findings"][1]
    )
    plain = et.check_data(write(tmp_path / "text.jsonl", train), eval_data=write(tmp_path / "e.jsonl", train[:1]))
    assert plain["labels"] is None and plain["leakage"]["exact"] == 1 and plain["leakage"]["prompts"] == 0


def test_of_feedback_the_verdict_is_the_answer(tmp_path: Path) -> None:
    said = [("ring home", "calling", True), ("ring home", "I will not", False), ("ring home", "calling", False)]
    rows = [{"prompt": p, "completion": c, "label": label} for p, c, label in [*said, said[1]]]
    found = et.check_data(write(tmp_path / "rows.jsonl", rows))
    assert found["duplicates"]["exact"] == 1, "line 4; line 3 says another thing of the same text"
    assert found["conflicts"] == {"prompts": 1, "rows": 2, "examples": [[1, 3]]}
    assert found["labels"]["counts"] == {"false": 3, "true": 1}


def test_values_are_part_of_a_row(tmp_path: Path) -> None:
    rows = [{"text": "the same", "label": value} for value in (0.5, 2, 0.5)]
    found = et.check_data(write(tmp_path / "rows.jsonl", rows), eval_data=write(tmp_path / "e.jsonl", rows[1:2]))
    assert (found["duplicates"]["exact"], found["conflicts"]["rows"], found["leakage"]["exact"]) == (1, 3, 1)
    other = et.check_data(tmp_path / "rows.jsonl", eval_data=write(tmp_path / "o.jsonl", [rows[0] | {"label": 9}]))
    assert (other["leakage"]["exact"], other["leakage"]["prompts"], other["leakage"]["share"]) == (0, 1, 1.0)
    assert "by the prompt alone, such as line 1 (training line 1)" in other["findings"][0]


def test_a_pair_has_to_fit_with_both_its_texts(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))  # a token a byte
    rows = [{"prompt": "q", "chosen": "a" * 30, "rejected": "b" * count} for count in (3, 30)]
    found = et.check_data(
        write(tmp_path / "rows.jsonl", rows), tokenizer=load_tokenizer(model), max_seq_length=50
    )  # fmt: skip
    assert found["lengths"]["max"] < 50 and found["window"]["too_long_lines"] == [2]
    wanted = "Training rows of more than 50 tokens, both texts together: 1, on lines 2. Training refuses them"
    assert found["findings"][0].startswith(wanted)


def test_a_system_prompt_makes_no_rows_alike(tmp_path: Path) -> None:
    def chat(asked: str) -> dict[str, Any]:
        system = {"role": "system", "content": "You are the assistant of a house and answer in JSON. " * 5}
        return {"messages": [system, {"role": "user", "content": asked}, {"role": "assistant", "content": "ok"}]}

    rows = [chat("lights off"), chat("lock the door"), chat("play music")]
    found = et.check_data(write(tmp_path / "rows.jsonl", rows))
    assert found["duplicates"]["near"] == 0 and found["conflicts"]["prompts"] == 0


def test_lengths_and_what_the_window_cuts(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))  # a token a byte
    tokenizer = load_tokenizer(model)
    data = write(tmp_path / "text.jsonl", [{"text": "a" * count} for count in (3, 40, 200, 700)])
    found = et.check_data(data, tokenizer=tokenizer, context_length=256)
    assert found["lengths"]["unit"] == "tokens" and found["lengths"]["total"] == 943 + 4
    assert found["lengths"]["histogram"] == [[16, 1], [64, 1], [256, 1], [1024, 1]]
    window = found["window"]
    windows = pack(read_rows(data, tokenizer, 256), 256)
    assert window["max_seq_length"] == 256 and window["cut"] == 1 and window["too_long"] == 0
    assert window["windows"] == len(windows)
    assert window["fill"] == pytest.approx(947 / sum(each.length for each in windows))
    asked = [{"prompt": "q" * count, "completion": "a"} for count in (10, 50, 90)]
    data = write(tmp_path / "asked.jsonl", asked)
    window = et.check_data(data, tokenizer=tokenizer, context_length=256, max_seq_length=64)["window"]
    assert (window["cut"], window["too_long"], window["too_long_lines"]) == (0, 1, [3])
    with pytest.raises(DataError, match="line 3 has 92 tokens"):
        read_rows(data, tokenizer, 64)


@pytest.mark.parametrize(
    ("rows", "lengths"),
    [
        ([{"text": "a" * count, "label": "yes"} for count in (3, 40, 70)], [3, 40, 70]),
        ([{"text": "a" * count, "label": count / 2} for count in (3, 70)], [3, 70]),
        ([{"tokens": ["ab", "c" * count], "labels": ["x", "y"]} for count in (3, 70)], [5, 72]),
        ([{"anchor": "a" * 70, "positive": "b", "negative": "c" * 80}], [70, 1, 80]),
    ],
)
def test_rows_of_a_trained_head_are_counted_in_tokens(
    rows: list[dict[str, Any]], lengths: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))  # a token a byte
    data = write(tmp_path / "rows.jsonl", rows)
    found = et.check_data(data, tokenizer=load_tokenizer(model), context_length=256, max_seq_length=64)
    assert (found["lengths"]["unit"], found["lengths"]["total"]) == ("tokens", sum(lengths))
    cut = sum(length > 64 for length in lengths)
    window = {"max_seq_length": 64, "windows": None, "fill": None, "cut": cut, "too_long": 0, "too_long_lines": []}
    assert found["window"] == window
    assert f"{cut} training text{'s' * (cut > 1)} of more than 64 tokens: the end is not read." in found["findings"]
    with pytest.raises(SystemExit, match="0"):
        verbs.main(["data", "check", str(data), "--model", str(model)])
    assert "each text up to" in capsys.readouterr().out


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ended:
            verbs.main(["data", "check", *words])
        return int(str(ended.value.code))

    model = write_model(tmp_path / "model", tiny_config("llama"))
    data = write(tmp_path / "rows.jsonl", [{"prompt": "ask", "completion": "say"}, {"prompt": "a", "completion": "b"}])
    assert run(str(data), "--eval-data", str(data), "--model", str(model)) == 0
    shown = capsys.readouterr().out
    assert "2 exact, 0 prompts, 0 near" in shown and "1 of 16 tokens, 62% full" in shown
    assert run(str(data), "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["findings"] == []
    assert run(str(data), "--max-seq-length", "64") == 2
    data.write_text(data.read_text() + '{"prompt": 3, "completion": "b"}\n')
    assert run(str(data), "--json") == 1
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["error"] == "DataError" and 'line 3 has a number as "prompt"' in answer["message"]
