"""What the head of an encoder's bundle says of a text: a class with its probability, or a number.

classification         softmax over the classes
regression             the number itself
token-classification   softmax for each token of the text; of a word's tokens the first one counts
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.bundle import EncoderBundle
from edgetune.errors import BundleError
from edgetune.runtime.embedding import Embedder, open_embedder


def predict(
    bundle: EncoderBundle | str | Path,
    texts: Sequence[str],
    *,
    adapter: bool | str | Path = True,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """For each text `label`, `probability` and the `probabilities` of all classes, the likeliest first.

    Of a regression `value`; of tokens `tokens`, each with its `word`, `label` and `probability`.

    Raises:
        BundleError: it has no head.
        AdapterError, ConfigError, DataError: as `embed`.
    """
    return predict_with(open_embedder(bundle, adapter=adapter, threads=threads), texts)


def predict_with(embedder: Embedder, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The same with a bundle that is loaded. Raises as `predict`."""
    model = embedder.bundle.model
    if model.objective is None:
        raise BundleError(
            f"{embedder.bundle.folder} has no head: it gives embeddings. Train one with --objective classification, "
            "and export that run."
        )
    if model.objective == "token-classification":
        return [_of_tokens(embedder, text) for text in texts]
    logits = embedder.logits(texts)
    if model.objective == "regression":
        return [{"value": float(row[0])} for row in logits]
    return [_of_classes(row, model.classes) for row in logits]


def _of_classes(logits: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    shares = _softmax(logits)
    order = np.argsort(-shares, kind="stable")
    named = {classes[index]: float(shares[index]) for index in order}
    label = classes[order[0]]
    return {"label": label, "probability": named[label], "probabilities": named}


def _of_tokens(embedder: Embedder, text: str) -> dict[str, Any]:
    words = text.split()
    longest, classes = embedder.bundle.model.max_position_embeddings, embedder.bundle.model.classes
    ids, words_of = embedder.tokenizer.encode_words(words, longest)
    found = []
    for at, (word, logits) in enumerate(zip(words_of, embedder.token_logits(ids), strict=True)):
        if word is not None and (at == 0 or words_of[at - 1] != word):
            shares = _softmax(logits)
            best = int(shares.argmax())
            found.append({"word": words[word], "label": classes[best], "probability": float(shares[best])})
    return {"tokens": found}


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.exp(logits - logits.max())
    shares /= shares.sum()
    return shares
