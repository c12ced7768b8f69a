"""The baseline that trains nothing of the model: its frozen features, and a linear classifier on top of them.

    min over W, b of  mean_i -log softmax(W z_i + b)[y_i]  +  l2 / 2 |W|^2        z: features, standardized

Convex, so L-BFGS finds its one solution in seconds. Which features (mean over the prompt's tokens, or the last one) and
which l2 is chosen on a fifth of the training rows, never on those that are evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

_L2 = (1e-4, 1e-3, 1e-2, 1e-1)
_STEPS = 60


@dataclass(frozen=True)
class FeatureHead:
    """`weight` [labels, H] and `bias` [labels] on standardized features of this pooling."""

    pooling: str
    l2: float
    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    @property
    def nbytes(self) -> int:
        """What would be shipped; the standardization folds into it."""
        return self.weight.nbytes + self.bias.nbytes

    def choose(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """The likeliest label of each row."""
        standard = (features[self.pooling] - self.mean) / self.scale
        return np.asarray((standard @ self.weight.T + self.bias).argmax(1))


def fit_head(features: Mapping[str, np.ndarray], labels: np.ndarray, count: int, seed: int) -> FeatureHead:
    """The head for these training rows: features [n, H] by pooling, labels [n] out of `count`."""
    held_out = np.zeros(len(labels), bool)
    held_out[np.random.default_rng(seed).permutation(len(labels))[: max(1, len(labels) // 5)]] = True

    def accuracy(pooling: str, l2: float) -> float:
        kept = {pooling: features[pooling][~held_out]}
        head = _fit(kept[pooling], labels[~held_out], count, pooling, l2)
        return float((head.choose({pooling: features[pooling][held_out]}) == labels[held_out]).mean())

    pooling = max(features, key=lambda name: accuracy(name, _L2[2]))
    l2 = max(_L2, key=lambda value: accuracy(pooling, value))
    return _fit(features[pooling], labels, count, pooling, l2)


def _fit(features: np.ndarray, labels: np.ndarray, count: int, pooling: str, l2: float) -> FeatureHead:
    mean, scale = features.mean(0), features.std(0) + np.float32(1e-6)
    x, y = torch.from_numpy((features - mean) / scale), torch.from_numpy(labels)
    weight, bias = torch.zeros(count, x.shape[1], requires_grad=True), torch.zeros(count, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + bias, y) + l2 / 2 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return FeatureHead(pooling, l2, mean, scale, weight.detach().numpy(), bias.detach().numpy())
