"""Embeddings from the bundle of an encoder, on plain onnxruntime: texts in, one vector for each out.

A text is tokenized as the model was trained, special tokens included, and cut where it is longer than the model can
read; a warning says how many were. Texts of similar length share a batch, so that little is padding. An adapter is fed
as in `session`, and swapped without loading the weights again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime

from edgetune.adapter_file import check_probe_change
from edgetune.bundle import AnyBundle, EncoderBundle, load_any_bundle
from edgetune.errors import BundleError, ConfigError, EdgetuneWarning
from edgetune.runtime.native import adapter_tensors, is_file, load_graph
from edgetune.tokenizer import Tokenizer, load_tokenizer

BATCH_TOKENS = 1024  # padding included; attention's scores of a batch stay at 25 MiB for 12 heads of 512 tokens


def embed(
    bundle: EncoderBundle | str | Path,
    texts: Sequence[str],
    *,
    adapter: bool | str | Path = True,
    threads: int | None = None,
) -> np.ndarray:
    """Embeddings float32 [number of texts, hidden_size] in the order of the texts, pooled as the model says.

    Models trained for search may want a prefix before each text, such as E5's "query: ". It is the caller's to write.
    `adapter` and `threads` are those of `open_embedder`, which loads a bundle once for many calls.
    Raises BundleError, AdapterError, ConfigError, DataError for a text that is no Unicode text.
    """
    return open_embedder(bundle, adapter=adapter, threads=threads).embed(texts)


class Embedder:
    """A loaded bundle of an encoder; `open_embedder` makes it."""

    def __init__(self, bundle: EncoderBundle, native: onnxruntime.InferenceSession) -> None:
        self.bundle = bundle
        self._native = native
        self._feeds: dict[str, np.ndarray] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.bundle.folder)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings float32 [number of texts, hidden_size]. Raises ConfigError, DataError, ModelError."""
        return self.embed_ids(self._encode(texts))

    def logits(self, texts: Sequence[str]) -> np.ndarray:
        """What the head for whole texts gives, float32 [number of texts, outputs]. Raises as `embed`."""
        return self._run(self._encode(texts), "logits", max(1, len(self.bundle.model.classes)))

    def token_logits(self, row: Sequence[int]) -> np.ndarray:
        """What the head for tokens gives of a text's token ids, float32 [tokens, outputs]."""
        self._check([row])
        ids = np.array([row], np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), **self._feeds}
        (logits,) = self._native.run(["logits"], inputs)
        found: np.ndarray = logits[0]
        return found

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise ConfigError("texts is one string, which would be embedded letter by letter. Give a list of texts")
        tokenizer, longest = self.tokenizer, self.bundle.model.max_position_embeddings
        rows = [tokenizer.encode(text) for text in texts]
        cut = [index for index, row in enumerate(rows) if len(row) > longest]
        for index in cut:
            rows[index] = tokenizer.encode(texts[index], max_length=longest)
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(rows)} texts are longer than the {longest} tokens that {self.bundle.folder} "
                f"reads, and were cut there. Split them into shorter ones.",
                EdgetuneWarning,
                stacklevel=3,
            )
        return rows

    def embed_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The same of token ids.

        Raises ConfigError where a row is empty or longer than the model reads, or holds an id that the model has not.
        """
        return self._run(rows, "embedding", self.bundle.model.hidden_size)

    def _run(self, rows: Sequence[Sequence[int]], output: str, width: int) -> np.ndarray:
        """An output of the graph, float32 [number of rows, width]."""
        self._check(rows)
        embeddings = np.empty((len(rows), width), np.float32)
        for group in _groups([len(row) for row in rows]):
            shape = len(group), max(len(rows[index]) for index in group)
            ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
            for at, index in enumerate(group):
                ids[at, : len(rows[index])], mask[at, : len(rows[index])] = rows[index], 1
            inputs = {"input_ids": ids, "attention_mask": mask, **self._feeds}
            (embeddings[group],) = self._native.run([output], inputs)
        return embeddings

    def use_adapter(self, adapter: bool | str | Path = True) -> None:
        """Switch to another adapter, given as in `open_embedder`. Raises AdapterError, and keeps what it had then."""
        self._use(adapter, adapter_tensors(self.bundle, adapter))

    def _use(self, adapter: bool | str | Path, tensors: dict[str, np.ndarray]) -> None:
        if is_file(adapter):
            check_probe_change(self.probe_change(tensors), origin=str(adapter))
        self._feeds = tensors

    def probe_change(self, tensors: dict[str, np.ndarray]) -> float:
        """How far adapter tensors move the base's embeddings of the bundle's probe rows: the largest change of a number
        by the largest number.
        """
        before, found = self._feeds, []
        for feeds in ({}, tensors):
            self._feeds = feeds
            found.append(self.embed_ids([row.tolist() for row in self.bundle.probe_rows]))
        self._feeds = before
        base, tuned = found
        with np.errstate(invalid="ignore"):  # infinite numbers: the change is none, which the caller refuses
            return float(np.abs(tuned - base).max() / np.abs(base).max())

    def _check(self, rows: Sequence[Sequence[int]]) -> None:
        model = self.bundle.model
        for row in rows:
            if not 0 < len(row) <= model.max_position_embeddings:
                raise ConfigError(
                    f"a text has {len(row)} tokens; {self.bundle.folder} reads 1 to {model.max_position_embeddings}"
                )
            if min(row) < 0 or max(row) >= model.vocab_size:
                raise ConfigError(
                    f"token ids {min(row)} to {max(row)} are not all of the {model.vocab_size} of the model; use the "
                    f"bundle's own tokenizer"
                )


def open_embedder(
    bundle: EncoderBundle | str | Path,
    *,
    threads: int | None = None,
    fp32_compute: bool = False,
    adapter: bool | str | Path = True,
) -> Embedder:
    """Load the bundle of an encoder; the arguments are those of `session.open_session`.

    Raises BundleError, also for the bundle of a decoder, AdapterError, ConfigError.
    """
    found = bundle if isinstance(bundle, AnyBundle) else load_any_bundle(bundle)
    if not isinstance(found, EncoderBundle):
        raise BundleError(
            f"{found.folder} is the bundle of a decoder ({found.model.model_type}), which continues texts and embeds "
            f"none. Use edgetune.generate(), or export an encoder such as MiniLM"
        )
    tensors = adapter_tensors(found, adapter)
    native = load_graph(found, threads, fp32_compute=fp32_compute)
    embedder = Embedder(found, native)
    embedder._use(adapter, tensors)
    return embedder


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows in batches of similar length, each of at most `BATCH_TOKENS` tokens or one row."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= BATCH_TOKENS:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
