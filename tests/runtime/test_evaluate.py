from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_bundle import (
    CONTEXT,
    EOS,
    VOCAB,
    byte_ids,
    random_adapter,
    random_reference,
    scripted_reference,
    write_bundle,
)

from edgetune.data import IGNORED, Example, Row
from edgetune.errors import ConfigError, DataError
from edgetune.runtime.evaluate import exact_match, mean_nll


def row(length: int, seed: int, supervised: slice) -> Row:
    ids = np.random.default_rng(seed).integers(0, VOCAB, length).astype(np.int32)
    labels = np.full(length, IGNORED, np.int32)
    labels[supervised] = ids[supervised]
    return Row(ids, labels, line=1)


def test_nll_equals_a_second_implementation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.runtime.session.CHUNK", 7)
    reference, adapter = random_reference(2), random_adapter(3)
    folder = write_bundle(tmp_path / "bundle", reference, adapter)
    # The whole row, its first label included, which nothing predicts; a completion; a single last token.
    rows = [row(20, 0, slice(0, 20)), row(13, 1, slice(9, 13)), row(9, 2, slice(8, 9))]
    for active in (True, False):
        losses = []
        for one in rows:
            logits = reference.logits(one.input_ids.tolist(), adapter if active else None)
            for t in range(1, len(one.input_ids)):
                if one.labels[t] != IGNORED:
                    chances = np.exp(logits[t - 1]) / np.exp(logits[t - 1]).sum()
                    losses.append(-np.log(chances[one.labels[t]]))
        result = mean_nll(folder, rows, adapter=active)
        assert result["nll"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert (result["tokens"], result["rows"]) == (19 + 4 + 1, 3)


def test_exact_match_counts_right_answers_and_shows_wrong_ones(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", scripted_reference([*byte_ids("Q" + '{"a": 1}\n'), EOS]))
    examples = [
        Example("Q", '{"a": 1}', line=1, templated=False),
        Example("Q", ' {"a": 2}', line=2, templated=False),
        Example("Q", '{"a": 1} ', line=3, templated=True),
    ]
    result = exact_match(folder, examples)
    assert (result["correct"], result["total"], result["accuracy"]) == (2, 3, pytest.approx(2 / 3))
    assert result["misses"] == [{"prompt": "Q", "wanted": '{"a": 2}', "got": '{"a": 1}'}]
    assert exact_match(folder, examples[:1], max_new_tokens=4)["correct"] == 0


def test_a_templated_prompt_gets_no_special_tokens(tmp_path: Path) -> None:
    # Positions count from the first token of the prompt, so one more token before it shifts the answer.
    folder = write_bundle(tmp_path / "bundle", scripted_reference([*byte_ids("Qab"), EOS]), bos=True)
    assert exact_match(folder, [Example("Q", "ab", line=1, templated=True)])["correct"] == 1
    assert exact_match(folder, [Example("Q", "b", line=1, templated=False)])["correct"] == 1


def test_nothing_to_evaluate_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "bundle", random_reference())
    with pytest.raises(DataError, match="no examples"):
        exact_match(folder, [])
    with pytest.raises(DataError, match="none of 1 rows"):
        mean_nll(folder, [row(5, 0, slice(0, 1))])
    with pytest.raises(ConfigError, match=f"context of {CONTEXT}"):
        mean_nll(folder, [row(CONTEXT + 3, 0, slice(0, 9))])
