"""The cheapest way to classify: frozen features once, and a logistic regression on them. The baseline of any tuning.

    features x = e / |e|,  e the pooled hidden states of the frozen encoder
    W, b = argmin  C sum_i crossentropy(W x_i + b, t_i) + |W|^2 / 2        (scikit-learn's formula), by L-BFGS

C is 100: rows of unit length are weak inputs. Nothing but the embeddings of the rows is kept in memory, [rows, hidden].
Left out: regression, tokens, and decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch reader knows

from edgetune.data.labeled import LabeledRow, LabeledRows, labeled, read_labeled_rows
from edgetune.models.encoder import Encoder, load_encoder
from edgetune.tokenizer import Tokenizer, load_tokenizer
from edgetune.training.encoder_step import Task, held_out_batches, last_hidden

STRENGTH = 100.0
_ITERATIONS = 200
_BATCH_ROWS, _BATCH_POSITIONS = 32, 1024


@dataclass(frozen=True, eq=False)
class FeatureClassifier:
    """A frozen encoder and the logistic regression behind it."""

    encoder: Encoder
    tokenizer: Tokenizer
    classes: tuple[str, ...]
    weight: torch.Tensor  # [classes, hidden]
    bias: torch.Tensor

    def read(self, path: str | Path) -> LabeledRows:
        """Rows to measure on. Raises DataError, also for a class that was not learned, with its line."""
        length = self.encoder.config.max_position_embeddings
        return read_labeled_rows(path, self.tokenizer, length, "classification", classes=self.classes)

    def predict(self, rows: LabeledRows | Sequence[LabeledRow]) -> np.ndarray:
        """The number of the likeliest class of each row, int64 [rows]."""
        features = frozen_features(self.encoder, labeled(rows) if isinstance(rows, LabeledRows) else rows)
        found: np.ndarray = (features @ self.weight.T + self.bias).argmax(1).numpy()
        return found

    def accuracy(self, rows: LabeledRows | Sequence[LabeledRow]) -> float:
        """The share of rows whose class is found."""
        return float(np.mean(self.predict(rows) == [int(row.labels[0]) for row in rows]))


def train_feature_based(base: str | Path, data: str | Path) -> FeatureClassifier:
    """A classifier of the rows of a file (`{"text", "label"}`) on an encoder: a base/ folder or a plain model.

    Raises:
        ModelError: it is a decoder, or damaged.
        DataError: rows cannot be used.
    """
    encoder, tokenizer = load_encoder(base), load_tokenizer(base)
    rows = read_labeled_rows(data, tokenizer, encoder.config.max_position_embeddings, "classification")
    features = frozen_features(encoder, labeled(rows))
    targets = torch.tensor([int(row.labels[0]) for row in labeled(rows)])
    weight, bias = fit(features, targets, len(rows.classes))
    return FeatureClassifier(encoder, tokenizer, rows.classes, weight, bias)


@torch.no_grad()
def frozen_features(
    encoder: Encoder, rows: Sequence[LabeledRow], batch_rows: int = _BATCH_ROWS, positions: int = _BATCH_POSITIONS
) -> torch.Tensor:
    """Pooled hidden states of unit length, float32 [rows, hidden], of so many rows and positions at a time at most."""
    task = Task(encoder, "embedding", {})
    parts = [
        F.normalize(task.pool(last_hidden(encoder, batch, lambda: None), batch["lengths"]))
        for batch in held_out_batches(rows, batch_rows, positions)
    ]
    return torch.cat(parts)


def fit(
    features: torch.Tensor, targets: torch.Tensor, num_classes: int, strength: float = STRENGTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [classes, features] and bias of the logistic regression for targets int64 [n]."""
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, targets) + weight.square().sum() / (
            2 * strength * len(features)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call, unused-ignore]
    return weight.detach(), bias.detach()
