"""How good a bundle is, measured on the graph that ships: exact answers, and likelihood under teacher forcing.

Both go through the session of `generate`, so the figures include the kernels and the rounding of the device's path.
One row at a time: memory does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.bundle import Bundle
from edgetune.data import IGNORED, Example, Row
from edgetune.errors import DataError
from edgetune.runtime.generate import Sampling, complete
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer

SHOWN_MISSES = 20


def exact_match(
    bundle: Bundle | str | Path,
    examples: Iterable[Example],
    *,
    max_new_tokens: int = 128,
    adapter: bool | str | Path = True,
    threads: int | None = None,
) -> dict[str, Any]:
    """Answer every example greedily and count the answers that equal the completion, outer white space aside.

    Returns `correct`, `total`, `accuracy`, and `misses`: prompt, wanted and got of the first twenty wrong answers.
    Raises DataError where there is no example, ConfigError for a prompt that the context cannot hold, and what
    `open_session` raises.
    """
    session = open_session(bundle, threads=threads, adapter=adapter)
    tokenizer = load_tokenizer(session.bundle.folder)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    correct = total = 0
    misses: list[dict[str, str]] = []
    for example in examples:
        ids = tokenizer.encode(example.prompt, add_special_tokens=not example.templated)
        answer = complete(session, tokenizer, ids, sampling).text.strip()
        wanted = example.completion.strip()
        total += 1
        correct += answer == wanted
        if answer != wanted and len(misses) < SHOWN_MISSES:
            misses.append({"prompt": example.prompt, "wanted": wanted, "got": answer})
    if not total:
        raise DataError("there are no examples to answer; give rows with a prompt and a completion")
    return {"correct": correct, "total": total, "accuracy": correct / total, "misses": misses}


def mean_nll(
    bundle: Bundle | str | Path,
    rows: Iterable[Row],
    *,
    adapter: bool | str | Path = True,
    threads: int | None = None,
    fp32_compute: bool = False,
) -> dict[str, Any]:
    """Mean negative log-likelihood per supervised token under teacher forcing.

        nll = -1/n sum_t log softmax(logits_t)[label_{t+1}]     over the n positions whose next label is supervised

    Returns `nll` in nats, `tokens` = n and `rows`. Raises DataError where no token is supervised, ConfigError for a row
    longer than the context, and what `open_session` raises.
    """
    session = open_session(bundle, threads=threads, fp32_compute=fp32_compute, adapter=adapter)
    total, tokens, count = 0.0, 0, 0
    for row in rows:
        session.reset()
        start = 0
        targets = row.labels[1:]
        prompt_length = int((targets != IGNORED).argmax()) + 1  # the tokens before the first that is learned
        for logits in session.logits(row.input_ids[:-1], prompt_length):
            labels = targets[start : start + len(logits)]
            start += len(logits)
            total += _nll_sum(logits, labels)
            tokens += int(np.count_nonzero(labels != IGNORED))
        count += 1
    if not tokens:
        raise DataError(f"none of {count} rows has a supervised token; give rows with a text or a completion")
    return {"nll": total / tokens, "tokens": tokens, "rows": count}


def _nll_sum(logits: np.ndarray, labels: np.ndarray) -> float:
    """Sum over supervised positions of log(sum(exp(logits))) - logits[label]; logits [n, vocab_size], labels [n]."""
    kept = labels != IGNORED
    scores = logits[kept].astype(np.float64)
    if not len(scores):
        return 0.0
    largest = scores.max(1)
    log_sums = largest + np.log(np.exp(scores - largest[:, None]).sum(1))
    return float((log_sums - scores[np.arange(len(scores)), labels[kept]]).sum())
