"""The data files of the sample: which rows stand in which file, and how a row is written.

personal_train.jsonl     what is tuned on: own contacts, places, devices, routines and log entries; and some of the
                         base's own requests, so that these are not forgotten
personal_eval.jsonl      the same own words, in phrasings that no training row has
own_intents_eval.jsonl   requests of the base's own intents that no row of its pre-training had
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from sample import personal
from sample.text import AFTER, BEFORE_ANY, BEFORE_COMMAND, JOINTS, SLOT, Row, draw_rows

PRETRAIN_SEED, OWN_SEED, TRAIN_SEED, HELD_OUT_SEED, REHEARSAL_SEED = 1, 2, 3, 4, 5
OWN_ROWS, TRAIN_ROWS, HELD_OUT_ROWS, REHEARSAL_ROWS = 400, 700, 330, 1200


@cache
def data_files() -> dict[str, tuple[Row, ...]]:
    """File name -> rows, in the order in which they are written."""
    own = tuple(islice(draw_rows(OWN_SEED), OWN_ROWS))
    held_out = personal.draw("held_out", HELD_OUT_ROWS, HELD_OUT_SEED)
    # Rehearsal rows share no sentence with the base's evaluation, and no template with the held-out phrasings.
    known = frozenset(row.request for row in own)
    taken = {template for row in held_out for template in bare_templates(row)}
    rehearsal = (row for row in draw_rows(REHEARSAL_SEED, without=known) if taken.isdisjoint(bare_templates(row)))
    return {
        "personal_train.jsonl": (*personal.draw("train", TRAIN_ROWS, TRAIN_SEED), *islice(rehearsal, REHEARSAL_ROWS)),
        "personal_eval.jsonl": tuple(held_out),
        "own_intents_eval.jsonl": own,
    }


def bare_templates(row: Row) -> list[str]:
    """The templates of a row's requests, of which a joined one has several, less slot names and polite words.

    "please call {name}" and "call {contact} now" are one sentence: "call {}".
    """
    words = SLOT.sub("{}", row.template)
    for joint in sorted(JOINTS, key=len, reverse=True):
        words = words.replace(joint, JOINTS[0])
    return [_without_politeness(part) for part in words.split(JOINTS[0])]


def _without_politeness(words: str) -> str:
    for before in sorted({*BEFORE_COMMAND, *BEFORE_ANY}, key=len, reverse=True):
        words = words.removeprefix(before + " ")
    for after in sorted(AFTER, key=len, reverse=True):
        words = words.removesuffix(" " + after)
    return words


def pretraining_rows() -> Iterator[Row]:
    """The endless stream that the base is trained on; no sentence of own_intents_eval.jsonl is in it."""
    return draw_rows(PRETRAIN_SEED, without=frozenset(row.request for row in data_files()["own_intents_eval.jsonl"]))


def to_line(row: Row) -> str:
    """A row in the format of OpenAI's fine-tuning files."""
    chat = [{"role": "user", "content": row.request}, {"role": "assistant", "content": row.action}]
    return json.dumps({"messages": chat}, ensure_ascii=False) + "\n"


def write_data(folder: Path) -> None:
    for name, rows in data_files().items():
        (folder / name).write_text("".join(map(to_line, rows)), encoding="utf-8")
