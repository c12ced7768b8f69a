"""Is fine-tuning worth it, of a run that trained a classifier: see `evaluation` for what is returned.

    base     each text by the class whose name it is nearest to: the cosine of their embeddings. Encoders alone, and
             names that have letters
    head     frozen features and a logistic regression on the training rows: of an encoder `training.feature_based`,
             of a decoder `evaluation.head`
    tuned    the run's adapter and head

A held-out class that no row to learn from has is a bad line, as in training.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import MODEL
from edgetune.adapters.head import SCORE, load_with_head
from edgetune.data.labeled import LabeledRow, labeled, read_labeled_rows
from edgetune.errors import ConfigError, DataError
from edgetune.evaluation.head import fit_head
from edgetune.evaluation.job import Trained, some
from edgetune.evaluation.metrics import Answers
from edgetune.evaluation.scoring import Scorer
from edgetune.evaluation.ways import Way
from edgetune.models.decoder import load_decoder
from edgetune.models.encoder import Encoder, load_encoder
from edgetune.models.encoder_config import EncoderConfig
from edgetune.objectives import ENCODER_OBJECTIVES, has_head
from edgetune.training.crew import using
from edgetune.training.encoder_step import Task, held_out_batches, last_hidden
from edgetune.training.feature_based import fit, frozen_features

OBJECTIVE = "classification"


@dataclass(frozen=True)
class Job:
    """One evaluation. `training` are the rows that the run learned from; empty where they are gone."""

    trained: Trained
    rows: Sequence[LabeledRow]
    training: Sequence[LabeledRow]
    names: tuple[LabeledRow, ...]
    "the names of the classes as texts; none where they are no words"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.trained.plan.classes

    @property
    def truth(self) -> np.ndarray:
        return _classes_of(self.rows)

    @property
    def is_encoder(self) -> bool:
        return isinstance(self.trained.plan.model_config, EncoderConfig)

    @property
    def leaked(self) -> int:
        """Held-out rows that stand among the training rows."""
        known = {row.input_ids.tobytes() for row in self.training}
        return sum(row.input_ids.tobytes() in known for row in self.rows)


def is_classifier(trained: Trained) -> bool:
    """Whether a run is evaluated here.

    Raises:
        ConfigError: it has a head, or is an encoder's, and classifies no texts.
    """
    plan = trained.plan
    if not isinstance(plan.model_config, EncoderConfig) and not has_head(plan.objective):
        return False
    if plan.objective != OBJECTIVE:
        metric = getattr(ENCODER_OBJECTIVES.get(plan.objective), "METRIC", "reward_accuracy")
        raise ConfigError(
            f"{trained.run.folder} was trained for {plan.objective}; eval compares runs of --objective {OBJECTIVE} and "
            f"those that continue texts. The summary of this run has eval_loss and eval_{metric} of its held-out rows; "
            "--eval-data of train names others."
        )
    return True


def read_job(
    trained: Trained, data: str | Path, *, retention: object, shots: int | None, max_rows: int | None, skip_bad: bool
) -> Job:
    """Read the rows that a run is judged on.

    Raises:
        ConfigError: `retention` or `shots` are given, which need a model that continues texts.
        DataError: rows cannot be used, or have a class that was not learned.
    """
    if retention is not None or shots:
        what = "retention" if retention is not None else f"shots = {shots}"
        raise ConfigError(
            f"{what}: a classifier continues no text, so it has no prompt and forgets none. Leave it out."
        )
    plan, tokenizer = trained.plan, trained.tokenizer
    length = plan.max_seq_length - plan.adapter.virtual_tokens

    def read(path: str | Path, skip_bad: bool) -> Any:
        return read_labeled_rows(path, tokenizer, length, OBJECTIVE, classes=plan.classes, skip_bad=skip_bad)

    rows = some(labeled(read(data, skip_bad)), max_rows)
    if len(rows) < 2:
        raise DataError(f"{data} has {len(rows)} row; an interval needs at least 2. Add rows.")
    training: Sequence[LabeledRow] = ()
    if (path := trained.training_data()) is not None:
        training = labeled(trained.learned(read(path, True)))
    names: tuple[LabeledRow, ...] = ()
    if all(any(letter.isalpha() for letter in name) for name in plan.classes):
        spelled = (tokenizer.encode(name.replace("_", " "), max_length=length) for name in plan.classes)
        names = tuple(
            LabeledRow(np.array(ids, np.int32), np.array([number], np.int32), 0, lengths=(len(ids),))
            for number, ids in enumerate(spelled)
        )
    return Job(trained, rows, training, names)


def ways_of(job: Job, seed: int) -> dict[str, Way | None]:
    """Every way that there is, answered."""
    untuned = _encoder_ways(job) if job.is_encoder else _decoder_ways(job, seed)
    started = time.perf_counter()
    label = _tuned_encoder(job) if job.is_encoder else _tuned_decoder(job)
    seconds = time.perf_counter() - started
    size = (job.trained.run.folder / MODEL).stat().st_size
    return untuned | {"tuned": Way(_answers(label), seconds, job.trained.training_seconds, size)}


def _encoder_ways(job: Job) -> dict[str, Way | None]:
    encoder = load_encoder(job.trained.base)
    encoder.workspace.tile_weights = job.trained.plan.tile_weights
    batch = job.trained.plan.batch_size, job.trained.positions
    ways: dict[str, Way | None] = {"base": None, "prompt": None, "head": None}
    started = time.perf_counter()
    features = frozen_features(encoder, job.rows, *batch)
    seconds = time.perf_counter() - started
    if job.names:
        started = time.perf_counter()
        names = frozen_features(encoder, job.names, *batch)
        label = (features @ names.T).argmax(1).numpy()
        ways["base"] = Way(_answers(label), seconds + time.perf_counter() - started, nbytes=names.nbytes)
    if job.training:
        started = time.perf_counter()
        known = frozen_features(encoder, job.training, *batch)
        with using(1):  # products so small that threads would wait for each other
            weight, bias = fit(known, torch.from_numpy(_classes_of(job.training)), len(job.classes))
        fitted = time.perf_counter()
        label = (features @ weight.T + bias).argmax(1).numpy()
        spent = seconds + time.perf_counter() - fitted
        ways["head"] = Way(_answers(label), spent, fitted - started, weight.nbytes + bias.nbytes)
    return ways


@torch.no_grad()
def _tuned_encoder(job: Job) -> np.ndarray:
    trained = job.trained
    encoder = load_encoder(trained.base)
    encoder.workspace.tile_weights = trained.plan.tile_weights
    task = Task(encoder, OBJECTIVE, _with_adapter(encoder, trained))
    found = [
        task.outputs(last_hidden(encoder, batch, lambda: None), batch).argmax(1).numpy()
        for batch in held_out_batches(job.rows, trained.plan.batch_size, trained.positions)
    ]
    return np.concatenate(found)


def _with_adapter(encoder: Encoder, trained: Trained) -> dict[str, nn.Parameter]:
    """The head of a run whose adapter is put into the encoder."""
    config, tensors, head = load_with_head(trained.run.folder, encoder.config, trained.summary)
    assert head is not None, "a classifier has one"
    load_tensors(attach(encoder, config), tensors)
    return {name: nn.Parameter(torch.from_numpy(value)) for name, value in head.tensors.items()}


def _decoder_ways(job: Job, seed: int) -> dict[str, Way | None]:
    ways: dict[str, Way | None] = {"base": None, "prompt": None, "head": None}
    if job.training:
        scorer = Scorer(load_decoder(job.trained.base), job.trained.positions)
        started = time.perf_counter()
        features = scorer.features([row.input_ids for row in job.training])
        head = fit_head(features, _classes_of(job.training), len(job.classes), seed)
        fitted = time.perf_counter()
        label = head.choose(scorer.features([row.input_ids for row in job.rows]))
        ways["head"] = Way(_answers(label), time.perf_counter() - fitted, fitted - started, head.nbytes)
    return ways


def _tuned_decoder(job: Job) -> np.ndarray:
    decoder = load_decoder(job.trained.base)
    config, tensors, head = load_with_head(job.trained.run.folder, decoder.config, job.trained.summary)
    assert head is not None, "a classifier has one"
    load_tensors(attach(decoder, config), tensors)
    last = Scorer(decoder, job.trained.positions).features([row.input_ids for row in job.rows])["last"]
    return np.asarray((last @ head.tensors[SCORE].T).argmax(1))


def _answers(label: np.ndarray) -> Answers:
    return Answers(None, np.ones(len(label), np.int64), None, label)


def _classes_of(rows: Sequence[LabeledRow]) -> np.ndarray:
    return np.array([int(row.labels[0]) for row in rows])
