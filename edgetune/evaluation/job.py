"""What an evaluation starts from: a run's base and training rows, and the held-out rows as prompts and answers.

Everything that does not go together is refused here, before a model is loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgetune.base import weights_sha256
from edgetune.checkpoint import PLAN
from edgetune.data import IGNORED, Row, Rows, read_rows, split_eval
from edgetune.data_check import label_counts
from edgetune.errors import CheckpointError, ConfigError, DataError, ModelError
from edgetune.objectives import sft
from edgetune.planner.plans import Plan
from edgetune.tokenizer import Tokenizer, load_tokenizer
from edgetune.training.run import METRICS, Metrics, Run
from edgetune.weights import sha256_file

AnyRow = TypeVar("AnyRow", bound=Row)
_SEPARATOR = "\n\n"  # between the examples of a prompt, where no chat template divides them


@dataclass(frozen=True)
class Trained:
    """A run that has ended, and what it was trained with."""

    run: Run
    summary: dict[str, Any]
    plan: Plan
    base: Path
    tokenizer: Tokenizer

    @property
    def positions(self) -> int:
        """Those of a micro-batch of the plan: what is evaluated with no more stays inside of its memory."""
        return self.plan.batch_size * self.plan.max_seq_length

    def training_data(self) -> Path | None:
        """The file that the run learned from; None where it is gone, or by its hash, read here, another one by now."""
        path = Path(self.summary["data"])
        return path if path.is_file() and sha256_file(path) == self.summary["data_sha256"] else None

    def learned(self, rows: Rows) -> Rows:
        """Of the rows of that file, those that were not held out."""
        return rows if self.summary["eval_data"] else split_eval(rows, self.plan.eval_fraction, self.plan.seed)[0]

    @property
    def training_seconds(self) -> float:
        """What the run's steps took."""
        return sum(float(line.get("seconds", 0.0)) for line in Metrics(self.run.folder / METRICS).lines())


@dataclass(frozen=True)
class Job(Trained):
    """One evaluation. `training` are the rows that the run learned from; empty where they are gone."""

    rows: Sequence[Row]
    kind: str
    training: Sequence[Row]
    retention: Sequence[Row]
    context: int
    "the most tokens of a sequence: what the model takes, and what fits the plan's memory"

    @property
    def has_answers(self) -> bool:
        return self.kind != "text"

    @cached_property
    def labels(self) -> dict[str, tuple[int, ...]]:
        """The training rows' answers, with their tokens, most frequent first; empty where they are no labels."""
        known = self.training if self.training else self.rows
        spelled = [(self.tokenizer.decode(ids).strip(), ids) for ids in map(answer_ids, known)]
        counts = label_counts([name for name, _ in spelled]) if self.has_answers else None
        most = Counter(spelled)
        ids = {name: max((s for s in most if s[0] == name), key=lambda s: most[s])[1] for name in counts or ()}
        return {name: ids[name] for name, _ in (counts or Counter[str]()).most_common()}

    def label_of(self, rows: Sequence[Row]) -> np.ndarray:
        """Index of each row's label; -1 for one that no training row has."""
        at = {name: index for index, name in enumerate(self.labels)}
        return np.array([at.get(self.tokenizer.decode(answer_ids(row)).strip(), -1) for row in rows])

    def shots(self, most: int | None, seed: int) -> list[Row]:
        """Training rows to put before each held-out one: as many as fit, at most `most`, of the labels in turn."""
        room = self.context - max(map(len, self.rows))
        chosen: list[Row] = []
        for row in self._in_turn(seed):
            size = len(self._example(row))
            if size <= room and (most is None or len(chosen) < most):
                chosen.append(row)
                room -= size
        return chosen

    def _in_turn(self, seed: int) -> list[Row]:
        rng = np.random.default_rng(seed)
        rows = [self.training[i] for i in rng.permutation(len(self.training))]
        seen: Counter[tuple[int, ...]] = Counter()
        rounds = []
        for row in rows:
            answer = answer_ids(row)
            rounds.append(seen[answer] if self.labels else 0)
            seen[answer] += 1
        return [row for _, row in sorted(zip(rounds, rows, strict=True), key=lambda pair: pair[0])]

    def _example(self, row: Row) -> list[int]:
        """A row as it stands before another one: without its first token where that only begins a text."""
        tokenizer = self.tokenizer
        ids: list[int] = row.input_ids.tolist()
        ids = ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
        if tokenizer.has_chat_template and self.kind != "prompt":
            return ids
        while ids and ids[-1] in tokenizer.eos_token_ids:
            ids.pop()
        return [*ids, *tokenizer.encode(_SEPARATOR, add_special_tokens=False)]

    def prompted(self, shots: Sequence[Row]) -> list[Row]:
        """The held-out rows behind examples; supervised where they were."""
        before = [token for row in shots for token in self._example(row)]
        begin = [self.tokenizer.bos_token_id] if self.rows[0].input_ids[0] == self.tokenizer.bos_token_id else []
        made = []
        for row in self.rows:
            ids = [*begin, *before, *row.input_ids[len(begin) :]]
            labels = [*[IGNORED] * (len(begin) + len(before)), *row.labels[len(begin) :]]
            made.append(Row(np.array(ids, np.int32), np.array(labels, np.int32), row.line))
        return made


def read_run(run: Run | str | Path) -> Trained:
    """A run, its plan and its base.

    Raises:
        CheckpointError: it is no run that has ended.
        ModelError: its base is gone, or another one.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    run = Run(folder)
    try:
        summary = run.summary
        plan = Plan.from_dict(json.loads((folder / PLAN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no run that has ended: {error}. Give the folder that `edgetune train` wrote."
        ) from error
    base = Path(summary["base"])
    if not (base / "config.json").is_file() or weights_sha256(base) != summary["base_sha256"]:
        raise ModelError(f"{base} is not the base that {folder} was trained on. Put that one there.")
    return Trained(run, summary, plan, base, load_tokenizer(base))


def read_job(
    trained: Trained, data: str | Path, retention: str | Path | None, max_rows: int | None, skip_bad: bool
) -> Job:
    """Read the rows that a run is judged on.

    Raises:
        DataError: rows cannot be used.
        ConfigError: the rows are of another kind.
    """
    plan, tokenizer = trained.plan, trained.tokenizer
    context = min(plan.model_config.max_position_embeddings, trained.positions) - plan.adapter.virtual_tokens

    def read(path: str | Path) -> Rows:
        rows = read_rows(path, tokenizer, context, skip_bad=skip_bad)
        window = plan.max_seq_length - plan.adapter.virtual_tokens
        return read_rows(path, tokenizer, window, skip_bad=skip_bad) if rows.kind == "text" else rows

    held_out = read(data)
    if held_out.kind not in sft.KINDS:
        raise ConfigError(f"{data} has {held_out.kind} rows; rows to answer were expected: {', '.join(sft.KINDS)}.")
    rows = some(_answered(held_out), max_rows)
    if len(rows) < 2:
        raise DataError(f"{data} has {len(rows)} row; an interval needs at least 2. Add rows.")
    kept = () if retention is None else some(_answered(read(retention)), max_rows)
    training: Sequence[Row] = ()
    if held_out.kind != "text" and (path := trained.training_data()) is not None:
        known = read_rows(path, tokenizer, plan.max_seq_length, skip_bad=True)
        training = trained.learned(known).rows if known.kind == held_out.kind else ()
    return Job(**vars(trained), rows=rows, kind=held_out.kind, training=training, retention=kept, context=context)


def _answered(rows: Rows) -> list[Row]:
    return [row for row in rows if row.num_supervised]


def some(rows: Sequence[AnyRow], max_rows: int | None) -> list[AnyRow]:
    """As many rows, from all over the file."""
    if max_rows is None or len(rows) <= max_rows:
        return list(rows)
    order = np.random.default_rng(0).permutation(len(rows))[:max_rows]
    return [rows[i] for i in sorted(order)]


def answer_ids(row: Row) -> tuple[int, ...]:
    """The tokens of a row that are learned."""
    return tuple(int(token) for token in row.labels[row.labels != IGNORED])


def prompt_ids(row: Row) -> np.ndarray:
    """The tokens before the first that is learned."""
    return row.input_ids[: int(np.argmax(row.labels != IGNORED))]
