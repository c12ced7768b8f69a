"""The packaged sample is what the scripts in `sample/` make, and its held-out rows are held out."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from random import Random

import pytest

import edgetune.sample
from edgetune.models import load_config
from edgetune.sample import BASE, OWN_INTENTS_EVAL, PERSONAL_EVAL, PERSONAL_TRAIN
from edgetune.tokenizer import load_tokenizer
from edgetune.weights import open_weights
from sample import personal
from sample.datasets import bare_templates, data_files, pretraining_rows, to_line
from sample.text import INTENTS, Row, draw_rows, resolve
from sample.values import SLOTS, time

PACKAGED = Path(edgetune.sample.__file__).parent


def test_the_packaged_files_stay_below_six_megabytes() -> None:
    sizes = {path: path.stat().st_size for path in PACKAGED.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.name for path in sizes} >= {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
        "personal_train.jsonl", "personal_eval.jsonl", "own_intents_eval.jsonl",
    }  # fmt: skip
    assert sum(sizes.values()) <= 6_000_000, sizes


def test_the_base_is_a_llama_of_one_to_three_million_parameters_in_two_bytes() -> None:
    assert load_config(BASE).model_type == "llama"
    weights = open_weights(BASE)
    assert {info.dtype for info in weights.values()} <= {"BF16", "F16"}
    assert 1_000_000 <= sum(info.nbytes for info in weights.values()) // 2 <= 3_000_000


@pytest.mark.parametrize("path", [PERSONAL_TRAIN, PERSONAL_EVAL, OWN_INTENTS_EVAL], ids=lambda path: path.stem)
def test_a_data_file_is_what_the_generator_writes(path: Path) -> None:
    assert path.read_text(encoding="utf-8").splitlines(keepends=True) == [to_line(r) for r in data_files()[path.name]]


def test_the_same_seed_draws_the_same_rows_and_another_seed_does_not() -> None:
    assert list(islice(draw_rows(7), 500)) == list(islice(draw_rows(7), 500))
    assert list(islice(draw_rows(7), 500)) != list(islice(draw_rows(8), 500))


@pytest.mark.parametrize("name", ["personal_train.jsonl", "personal_eval.jsonl", "own_intents_eval.jsonl"])
def test_every_action_is_one_json_object_with_a_known_verb(name: str) -> None:
    known = {i.action["do"] for i in INTENTS} | {t.action["do"] for t in personal.TOPICS} | {"all"}
    for row in data_files()[name]:
        action = json.loads(row.action)
        assert action["do"] in known
        assert {step["do"] for step in action.get("steps", [])} <= known - {"all"}
        assert "{" not in row.request, "a slot was left empty"


def test_no_sentence_template_of_the_held_out_phrasings_is_in_a_training_row() -> None:
    held_out, train = data_files()["personal_eval.jsonl"], data_files()["personal_train.jsonl"]
    assert len(held_out) >= 300
    assert len({row.request for row in held_out}) == len(held_out)
    taught, asked = ({words for row in rows for words in bare_templates(row)} for rows in (train, held_out))
    assert len(asked) >= 60
    assert not taught & asked


@pytest.mark.parametrize(
    ("template", "bare"),
    [
        ("please call {name}", ["call {}"]),
        ("hey can you go to {place} and then call {name} now", ["go to {}", "call {}"]),
        ("so what's on my calendar {day} and also {room} lights on", ["what's on my calendar {}", "{} lights on"]),
    ],
)
def test_templates_are_compared_without_slots_politeness_and_joints(template: str, bare: list[str]) -> None:
    assert bare_templates(Row(template, "", "")) == bare


def test_every_own_word_of_the_held_out_rows_is_taught_in_training() -> None:
    held_out, train = (
        " | ".join(row.request for row in data_files()[f"personal_{part}.jsonl"]) for part in ("eval", "train")
    )
    for words in (personal.CONTACTS, personal.PLACES, personal.DEVICES, personal.ROUTINES, personal.ENTRIES):
        assert [word for word in words if word not in train] == []
        assert [word for word in words if word not in held_out] == []


def test_the_base_has_never_seen_an_own_word_or_what_it_stands_for() -> None:
    own = [word for words in (personal.CONTACTS, personal.PLACES, personal.DEVICES, personal.ENTRIES) for word in words]
    own += [*personal.ROUTINES, *personal.CONTACTS.values(), *personal.PLACES.values(), *personal.ENTRIES.values()]
    own += personal.DEVICES.values()
    seen = "\n".join(f" {row.request} \n {row.action} " for row in islice(pretraining_rows(), 50_000))
    assert [words for words in own if f" {words} " in seen or f'"{words}"' in seen] == []


def test_no_held_out_request_of_the_base_is_in_its_pretraining() -> None:
    held_out = {row.request for row in data_files()["own_intents_eval.jsonl"]}
    assert held_out & {row.request for row in islice(draw_rows(1), 50_000)}, "the test could not fail"
    assert not held_out & {row.request for row in islice(pretraining_rows(), 50_000)}


def test_every_phrasing_names_exactly_the_slots_of_its_action() -> None:
    rng = Random(0)
    tables = [(i.action, i.phrasings, SLOTS) for i in INTENTS]
    tables += [(t.action, t.train + t.held_out, personal.SLOTS_OF_MINE) for t in personal.TOPICS]
    for action, phrasings, slots in tables:
        wanted = sorted(value for value in action.values() if isinstance(value, str) and value.startswith("{"))
        for phrasing in phrasings:
            for _ in range(8):
                named = sorted(word for word in resolve(phrasing, rng).split() if "{" in word)
                assert named == wanted, phrasing
        assert all(value.strip("{}") in slots for value in wanted)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("12 am", "00:00"), ("12 pm", "12:00"), ("1 pm", "13:00"), ("quarter to 1", "12:45"), ("half past 12", "12:30")],
)
def test_times_mean_what_they_say(said: str, meant: str) -> None:
    rng = Random(3)
    drawn = dict(time(rng) for _ in range(20_000))
    assert drawn[said] == meant


def test_a_chat_row_is_short_and_ends_with_the_end_token() -> None:
    tokenizer = load_tokenizer(BASE)
    for name, rows in data_files().items():
        for row in rows:
            text = tokenizer.apply_chat_template(json.loads(to_line(row))["messages"])
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert len(ids) <= 96, (name, row.request)
            assert ids[-1] == tokenizer.eos_token_id
            assert ids.count(tokenizer.eos_token_id) == 1
