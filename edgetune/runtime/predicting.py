"""What the head of a bundle says of a text: a class with its probability, or a number.

classification         softmax over the classes
regression             the number itself
token-classification   softmax for each token of the text; of a word's tokens the first one counts
reward                 the number itself, of a prompt with its answer: the end token is added, as in training
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.bundle import AnyBundle, Bundle, EncoderBundle, load_any_bundle
from edgetune.errors import BundleError
from edgetune.runtime.embedding import Embedder, open_embedder
from edgetune.runtime.session import open_any_session
from edgetune.tokenizer import load_tokenizer


def predict(
    bundle: AnyBundle[Any] | str | Path,
    texts: Sequence[str],
    *,
    adapter: bool | str | Path = True,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """For each text `label`, `probability` and the `probabilities` of all classes, the likeliest first.

    Of a regression or a reward `value`; of tokens `tokens`, each with its `word`, `label` and `probability`.

    Raises:
        BundleError: it has no head.
        AdapterError, ConfigError, DataError: as `embed`.
    """
    found = bundle if isinstance(bundle, AnyBundle) else load_any_bundle(bundle)
    if isinstance(found, Bundle):
        return _predict_by_decoder(found, texts, adapter, threads)
    assert isinstance(found, EncoderBundle)
    return predict_with(open_embedder(found, adapter=adapter, threads=threads), texts)


def _predict_by_decoder(
    bundle: Bundle, texts: Sequence[str], adapter: bool | str | Path, threads: int | None
) -> list[dict[str, Any]]:
    """What the head says of the last token of each text, which is cut at the context."""
    model = bundle.model
    if model.objective is None:
        raise BundleError(
            f"{bundle.folder} has no trained head: it continues texts. Use edgetune.generate(), or train with "
            "--objective classification and export that run."
        )
    tokenizer, found = load_tokenizer(bundle.folder), []
    session = open_any_session(bundle, threads, adapter=adapter)
    room = session.context_length - session.start
    ends = [tokenizer.eos_token_id] if model.objective == "reward" and tokenizer.eos_token_id is not None else []
    for text in texts:
        session.reset()
        found.append(session.forward([*tokenizer.encode(text, max_length=room - len(ends)), *ends]))
    return [_of_classes(row, model.classes) if model.classes else {"value": float(row[0])} for row in found]


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
