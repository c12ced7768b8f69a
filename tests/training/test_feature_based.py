"""The feature-based baseline: its optimum against the formula's gradient, its features against the module's forward."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoder import encoder_hf, write_encoder

from edgetune.data.labeled import labeled
from edgetune.errors import DataError
from edgetune.training.feature_based import fit, frozen_features, train_feature_based


def test_the_optimum_has_no_gradient() -> None:
    rng = np.random.default_rng(0)
    x, targets, strength = rng.standard_normal((40, 7)), rng.integers(0, 3, 40), 2.5
    weight, bias = fit(torch.from_numpy(x).float(), torch.from_numpy(targets), 3, strength)
    logits = x @ weight.numpy().T + bias.numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    off = shares - np.eye(3)[targets]
    assert np.abs(strength * off.T @ x + weight.numpy()).max() < 1e-2
    assert np.abs(off.sum(0)).max() < 1e-2


def test_frozen_features_are_the_embeddings_and_tell_classes_apart(tmp_path: Path) -> None:
    model = write_encoder(tmp_path / "model", encoder_hf(), normalize=True)
    rows = [{"text": letter * (1 + i % 4) + " k", "label": letter} for i in range(12) for letter in "az"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = train_feature_based(model, data)
    read = made.read(data)
    features = frozen_features(made.encoder, labeled(read))
    ids = torch.from_numpy(read.rows[5].input_ids).long()[None]
    with torch.no_grad():
        torch.testing.assert_close(features[5], made.encoder(ids, torch.ones_like(ids))[0], atol=1e-5, rtol=0)
    assert made.classes == ("a", "z")
    assert made.accuracy(read) == 1.0
    data.write_text('{"text": "a", "label": "a"}\n{"text": "b", "label": "other"}\n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"line 2 has the label 'other', which no row to learn from has; they have a, z"
    ):
        made.read(data)
