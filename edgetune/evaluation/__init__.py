"""Is fine-tuning worth it: the base, prompted, under a trained head, and tuned, on the same held-out rows.

A run that trained a classifier is evaluated by `classified`: it has no prompt and no loss of tokens.

All ways run on the engine that trained, over the same frozen weights, in micro-batches no larger than the plan's. The
result, ready for JSON:

    run, data, rows, kind, metric     what was evaluated; metric is the one that the verdict goes by: accuracy where
                                      answers are labels, exact_match where any way answers some rows, else loss
    labels, unseen_labels             how many the training rows have (null: none), held-out rows of others
    ways                              base, prompt, head, tuned: each null where it cannot be, or
        loss, perplexity, exact_match, accuracy, macro_f1, out_of_scope_recall
                                      value, low, high (95 %); null where the rows do not have it. loss is nats per
                                      supervised token; accuracy chooses among the labels by greedy decoding
        seconds, seconds_per_row      of answering here;  training_seconds  of what was fitted or tuned before
        bytes                         shipped beside the base;  prompt_tokens  of examples before each row
    shots                             examples in the prompt
    head                              pooling and l2 that were chosen; null
    gains                             way -> of `tuned` over it, by the metric: value, low, high; above 0 is better
    retention                         null, or rows, before, after: loss with interval; change: after - before
    leaked_rows                       held-out rows that stand among the training rows; they are counted all the same
    measured_peak_bytes, budget_bytes     anonymous + swap of this process, and the plan's budget
    choice, verdict                   the way to take, and the sentence that says why
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import MODEL, load_adapter
from edgetune.errors import ConfigError
from edgetune.evaluation import classified
from edgetune.evaluation.head import FeatureHead, fit_head
from edgetune.evaluation.job import Job, Trained, prompt_ids, read_job, read_run
from edgetune.evaluation.metrics import Answers, bootstrap
from edgetune.evaluation.scoring import Scorer
from edgetune.evaluation.verdict import explain_choice
from edgetune.evaluation.ways import Way, compare
from edgetune.memory import Meter
from edgetune.models.decoder import load_decoder
from edgetune.training.crew import using
from edgetune.training.run import Run

__all__ = ["evaluate"]


def evaluate(
    run: Run | str | Path,
    data: str | Path,
    *,
    retention: str | Path | None = None,
    shots: int | None = None,
    max_rows: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Compare a run with what needs no tuning, on held-out rows; see the module for what is returned.

    Args:
        run: a run that has ended, or its folder: a decoder's that continues texts, or a classifier's.
        data: held-out rows, JSON Lines, of the kind that the run was trained on.
        retention: rows of what the base could do before.
        shots: at most so many examples in the prompt; None is as many as the window holds, 0 leaves that way out.
        max_rows: evaluate on so many rows of each file, chosen from all over it; None is all.
        seed: chooses the examples, and the rows that the head is chosen on.
        skip_bad: leave bad rows out, up to 1 % of a file.

    Raises:
        CheckpointError: `run` is no run that has ended.
        ModelError: its base is gone, or another one.
        DataError: rows cannot be used, or of a classifier have a class that it did not learn.
        ConfigError: `max_rows` is below 2, the rows are of another kind than answers or texts, or the run learned to
            give values, rewards, classes of tokens or embeddings.
        AdapterError: the adapter does not fit its base.
    """
    if max_rows is not None and max_rows < 2:
        raise ConfigError(f"max_rows = {max_rows}; an interval needs at least 2 rows.")
    trained = read_run(run)
    judge = _classes if classified.is_classifier(trained) else _texts
    with using(trained.plan.threads), Meter() as meter:
        result = judge(trained, data, retention, shots, max_rows, seed, skip_bad)
    result = {
        "run": str(trained.run.folder), "data": str(data), **result,
        "measured_peak_bytes": meter.peak_bytes, "budget_bytes": trained.plan.budget_bytes,
    }  # fmt: skip
    return result | {"verdict": explain_choice(result)}


def _texts(
    trained: Trained, data: str | Path, retention: str | Path | None, shots: int | None, max_rows: int | None,
    seed: int, skip_bad: bool,
) -> dict[str, Any]:  # fmt: skip
    """Of a run that continues texts."""
    job = read_job(trained, data, retention, max_rows, skip_bad)
    ways, before, shot_rows, head = _untuned(job, shots, seed)
    ways["tuned"], after = _tuned(job)
    truth = job.label_of(job.rows) if job.labels else None
    return {
        "rows": len(job.rows), "kind": job.kind, **compare(ways, truth, list(job.labels)), "shots": shot_rows,
        "head": head and {"pooling": head.pooling, "l2": head.l2}, "retention": _forgotten(before, after),
        "leaked_rows": _leaked(job),
    }  # fmt: skip


def _classes(
    trained: Trained, data: str | Path, retention: str | Path | None, shots: int | None, max_rows: int | None,
    seed: int, skip_bad: bool,
) -> dict[str, Any]:  # fmt: skip
    """Of a run that classifies them."""
    job = classified.read_job(
        trained, data, retention=retention, shots=shots, max_rows=max_rows, skip_bad=skip_bad
    )  # fmt: skip
    return {
        "rows": len(job.rows), "kind": "label", **compare(classified.ways_of(job, seed), job.truth, job.classes),
        "shots": 0, "head": None, "retention": None, "leaked_rows": job.leaked,
    }  # fmt: skip


def _untuned(
    job: Job, shots: int | None, seed: int
) -> tuple[dict[str, Way | None], Answers | None, int, FeatureHead | None]:
    """The ways that leave the model as it is, the retention rows by it, how many examples were used, and the head."""
    scorer = Scorer(load_decoder(job.base), job.positions)
    ways: dict[str, Way | None] = {"base": _answer(job, scorer, job.rows), "prompt": None, "head": None}
    chosen = job.shots(shots, seed) if job.has_answers else []
    if chosen:
        rows = job.prompted(chosen)
        ways["prompt"] = _answer(job, scorer, rows, prompt_tokens=len(rows[0]) - len(job.rows[0]))
    head = None
    if job.labels and job.training:
        head, ways["head"] = _head(job, scorer, seed)
    return ways, _retained(job, scorer), len(chosen), head


def _tuned(job: Job) -> tuple[Way, Answers | None]:
    decoder = load_decoder(job.base)
    config, tensors = load_adapter(job.run.folder, decoder.config)
    load_tensors(attach(decoder, config), tensors)
    scorer = Scorer(decoder, job.positions)
    size = (job.run.folder / MODEL).stat().st_size
    return _answer(job, scorer, job.rows, training_seconds=job.training_seconds, nbytes=size), _retained(job, scorer)


def _answer(job: Job, scorer: Scorer, rows: Any, **costs: Any) -> Way:
    """The rows by one decoder."""
    started = time.perf_counter()
    nll, exact = scorer.tokens(rows)
    seconds, label = time.perf_counter() - started, None
    if job.labels:
        started = time.perf_counter()
        label = scorer.choose([prompt_ids(row) for row in rows], list(job.labels.values()))
        seconds = time.perf_counter() - started
    tokens = np.array([row.num_supervised for row in rows])
    return Way(Answers(nll, tokens, exact if job.has_answers else None, label), seconds, **costs)


def _head(job: Job, scorer: Scorer, seed: int) -> tuple[FeatureHead, Way]:
    started = time.perf_counter()
    features = scorer.features([prompt_ids(row) for row in job.training])
    head = fit_head(features, job.label_of(job.training), len(job.labels), seed)
    fitted = time.perf_counter()
    label = head.choose(scorer.features([prompt_ids(row) for row in job.rows]))
    tokens = np.array([row.num_supervised for row in job.rows])
    seconds = time.perf_counter() - fitted
    return head, Way(Answers(None, tokens, None, label), seconds, fitted - started, head.nbytes)


def _retained(job: Job, scorer: Scorer) -> Answers | None:
    if not job.retention:
        return None
    nll, _ = scorer.tokens(job.retention)
    return Answers(nll, np.array([row.num_supervised for row in job.retention]), None, None)


def _forgotten(before: Answers | None, after: Answers | None) -> dict[str, Any] | None:
    if before is None or after is None or before.nll is None or after.nll is None:
        return None
    tokens = before.tokens

    def mean(nll: np.ndarray) -> Callable[[np.ndarray], float]:
        return lambda rows: float(nll[rows].sum() / tokens[rows].sum())

    values = {"before": before.nll, "after": after.nll, "change": after.nll - before.nll}
    return {"rows": len(tokens)} | {name: bootstrap(mean(nll), len(tokens)) for name, nll in values.items()}


def _leaked(job: Job) -> int:
    known = {row.input_ids.tobytes() for row in job.training}
    return sum(row.input_ids.tobytes() in known for row in job.rows)
