"""An encoder's graph written, and the gate on it: torch against onnxruntime, on hidden states and embeddings.

    loads, bytes   as for a decoder (`parity`)
    exact          fp32 compute: hidden states and embeddings differ by at most 1e-3, no cosine is below 0.9999
    fast           the int8-activation kernels that a device will run: their cosines are reported

Texts are seeded token ids: one as long as the context, others of many lengths in padded batches, with types. Nothing is
gated on a task, for there are no held-out rows to embed yet. onnxruntime runs the graph in `pieces`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from edgetune.adapters.head import BIAS, WEIGHT, Head
from edgetune.base import EncoderBase
from edgetune.bundle import DATA, MODEL
from edgetune.errors import ExportError, ParityError
from edgetune.exporter import parity
from edgetune.exporter.job import Job, attach_adapter
from edgetune.exporter.merging import BaseWeights, RoundedWeights, use_merged_vectors
from edgetune.exporter.pieces import cut, serialized
from edgetune.graphs import FORMATS
from edgetune.graphs.encoder import encoder_graph
from edgetune.models.encoder import Encoder, load_encoder
from edgetune.models.encoder_config import EncoderConfig

MAX_ABS = 1e-3
MIN_COSINE = 0.9999
_POSITIONS = 1000
_LONGEST = 512  # tokens of the one text that is as long as the context: attention's scores grow with their square
_TEXTS, _LENGTH = 4, 128  # of the other texts: how many in a batch, and the most tokens
_RESULTS = {"last_hidden_state", "embedding", "logits"}

Feeds = dict[str, np.ndarray]
# Of each batch: hidden states [tokens, hidden], embeddings [B, hidden], and logits where there is a head.
Outputs = list[tuple[np.ndarray, ...]]


def write_model(
    job: Job, base: EncoderBase, folder: Path, alpha: float | None, *, accept_loss: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the graph and its weights, then pass the gate: (parity figures, cost of rounding).

    `alpha` is the share of the adapter that the job merges, None where it merges none.
    """
    stored, tuned, model = base.grid or "fp32", job.adapter is not None, folder / MODEL
    source = BaseWeights(base)
    if job.merge or job.weights != stored:
        source = RoundedWeights(base, job.weights, job.adapter, merge=job.merge)
    head = None if job.adapter is None else job.adapter.head
    builder = encoder_graph(
        source, data_file=DATA, slots=[slot.name for slot in job.slots], contrib=job.contrib, head=head
    )
    builder.save(folder, MODEL, {"edgetune.base_sha256": job.base_sha256})
    parity.check_loads(model)
    parity.check_bytes(model, source, builder.sha256)

    texts, encoder = seeded_texts(base.config), load_encoder(base.folder)
    rounding, feeds = None, {}
    if isinstance(source, RoundedWeights) and (job.merge or not source.is_exact):
        encoder, cost = _rounded(job, encoder, model, texts)
        rounding = source.figures() | cost
        if job.adapter is not None and not accept_loss:
            exact = f"keep --weights {stored}" if alpha is None else "leave --merge out"
            _check_rounding(rounding, stored, job.weights, "take --weights fp32" if job.adapter.needs_merge else exact)
    if job.adapter is None or rounding is None:
        feeds = job.feeds(attach_adapter(job, encoder))
    elif not job.merge:
        feeds = job.feeds(job.adapter)
    expected = run_torch(encoder, texts, head)
    figures = _check_exact(expected, run_graph(model, feeds, texts, fp32_compute=True))
    if FORMATS[job.weights].ROUNDS_ACTIVATIONS:
        figures["fast"] = cosines(expected, run_graph(model, feeds, texts, fp32_compute=False))
    return figures | {"adapter": "run" if tuned else "random"}, rounding


def _rounded(job: Job, encoder: Encoder, model: Path, texts: Sequence[Feeds]) -> tuple[Encoder, dict[str, float]]:
    """The encoder of the written weights, with the run's adapter around or in them, and its cosines to the trained."""
    if job.adapter is not None:
        attach_adapter(job, encoder)
    trained = run_torch(encoder, texts)
    rounded = load_encoder(job.base.folder)
    if job.adapter is not None and job.merge:
        use_merged_vectors(rounded, job.adapter)
    parity.use_written_weights(rounded, model, job.weights)
    if job.adapter is not None and not job.merge:
        attach_adapter(job, rounded)
    return rounded, cosines(trained, run_torch(rounded, texts))


def bundle_model(config: EncoderConfig, context_length: int, head: Head | None) -> dict[str, Any]:
    """The fields of `bundle.EncoderModel`."""
    model = {key: getattr(config, key) for key in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")}
    pooling = {"pooling": config.pooling.mode, "normalize": config.pooling.normalize}
    model |= {"max_position_embeddings": context_length} | pooling
    return model if head is None else model | {"objective": head.objective, "classes": list(head.classes)}


def probe_change(model: Path, feeds: Mapping[str, np.ndarray], rows: Sequence[Sequence[int]]) -> float:
    """How far an adapter moves the base's embeddings of probe rows: the largest change of a number by the largest."""
    ids = np.array(rows, np.int64)
    texts = [{"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}]
    ((_, base, *_),) = run_graph(model, {}, texts, fp32_compute=True)
    ((_, tuned, *_),) = run_graph(model, feeds, texts, fp32_compute=True)
    return float(np.abs(tuned - base).max() / np.abs(base).max())


def seeded_texts(config: EncoderConfig) -> list[Feeds]:
    """Inputs of the graph in batches: 1,000 token ids or more, many lengths, padded at the end, with types."""
    rng, longest = np.random.default_rng(0), min(config.max_position_embeddings, _LONGEST)
    groups = [[longest]]
    while sum(map(sum, groups)) < _POSITIONS:
        groups.append(rng.integers(1, min(longest, _LENGTH) + 1, _TEXTS).tolist())
    batches = []
    for group in groups:
        shape = len(group), max(group)
        mask = (np.arange(shape[1]) < np.array(group)[:, None]).astype(np.int64)
        ids, types = (rng.integers(0, limit, shape) * mask for limit in (config.vocab_size, config.type_vocab_size))
        batches.append({"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    return batches


def run_torch(encoder: Encoder, texts: Sequence[Feeds], head: Head | None = None) -> Outputs:
    """Torch's outputs for batches."""
    outputs: Outputs = []
    with torch.no_grad():
        for feeds in texts:
            ids, mask, types = (torch.from_numpy(value) for value in feeds.values())
            hidden = encoder.hidden(ids, mask, types)
            made = [hidden[mask == 1], encoder.pool(hidden, mask)]
            if head is not None:
                seen = made[0] if head.of_tokens else encoder.pool_plain(hidden, mask)
                weight, bias = (torch.from_numpy(head.tensors[name]) for name in (WEIGHT, BIAS))
                made.append(seen @ weight.T + bias)
            outputs.append(tuple(part.numpy() for part in made))
            encoder.weights.unmap()
    return outputs


def run_graph(model: Path, adapter: Mapping[str, np.ndarray], texts: Sequence[Feeds], *, fp32_compute: bool) -> Outputs:
    """The written graph's outputs for batches, a piece of the graph at a time."""
    options = parity.session_options(model.parent, fp32_compute=fp32_compute)
    loaded = onnx.load(model, load_external_data=False)
    if fp32_compute:
        parity.compute_in_fp32(loaded.graph)
    values = [{**feeds, **adapter} for feeds in texts]
    for piece in cut(loaded):
        content = serialized(piece, values[0], loaded)
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for index, known in enumerate(values):
            feeds = {name: known[name] for name in (*piece.inputs, *piece.crossing) if name in known}
            known.update(zip(piece.outputs, session.run(piece.outputs, feeds), strict=True))
            values[index] = {name: value for name, value in known.items() if name in piece.needed | _RESULTS}
        del session
    found: Outputs = []
    for feeds, known in zip(texts, values, strict=True):
        mask = feeds["attention_mask"] == 1
        logits = [known["logits"]] if "logits" in known else []
        logits = [part[mask] if part.ndim == 3 else part for part in logits]  # of each token, else of each text
        found.append((known["last_hidden_state"][mask], known["embedding"], *logits))
    return found


def cosines(expected: Outputs, found: Outputs) -> dict[str, float]:
    """Least and mean cosine of the embeddings of all texts; 0 where one is no number."""
    wanted, got = (np.concatenate([batch[1] for batch in outputs]) for outputs in (expected, found))
    products = (wanted * got).sum(1) / (np.linalg.norm(wanted, axis=1) * np.linalg.norm(got, axis=1))
    products = np.where(np.isfinite(products), products, 0)
    return {"min_cosine": float(products.min()), "mean_cosine": float(products.mean())}


def _check_exact(expected: Outputs, found: Outputs) -> dict[str, Any]:
    """The figures of parity; ParityError where they are beyond the gate."""
    pairs = list(zip(expected, found, strict=True))
    names = ("max_abs_hidden", "max_abs_embedding", "max_abs_logit")[: len(expected[0])]
    worst = {name: _worst([np.abs(a[i] - b[i]).max() for a, b in pairs]) for i, name in enumerate(names)}
    hidden, embedding = worst["max_abs_hidden"], worst["max_abs_embedding"]
    figures = {**worst, **cosines(expected, found)}
    logits = f", logits by {worst['max_abs_logit']:.2e}" if "max_abs_logit" in worst else ""
    texts, rows = (sum(len(outputs[i]) for outputs in expected) for i in (1, 0))
    if max(worst.values()) > MAX_ABS or figures["min_cosine"] < MIN_COSINE:
        raise ParityError(
            f"The exported graph does not compute what torch does: over {rows} tokens of {texts} texts hidden states "
            f"differ by up to {hidden:.2e} and embeddings by {embedding:.2e}{logits} (allowed {MAX_ABS:.0e}), and the "
            f"least cosine of an embedding is {figures['min_cosine']:.6f} (wanted {MIN_COSINE}). Nothing was written. "
            f"Report the model's config.json and the version of onnxruntime as a defect"
        )
    return figures | {"texts": texts, "rows": rows}


def _worst(differences: Sequence[float]) -> float:
    """The largest; infinity where one is no number, which compares as smaller than anything."""
    return float(np.nan_to_num(np.max(differences), nan=np.inf))


def _check_rounding(figures: Mapping[str, Any], stored: str, weights: str, exact: str) -> None:
    """Refuse a rounding that moves a matrix further than the adapter does. Raises ExportError, with what is `exact`."""
    above = [name for name, ratio in figures["error_over_delta"].items() if ratio > 1]
    if not above:
        return
    raise ExportError(
        f"Rounding {stored} weights to {weights} loses the adapter: it moves {len(above)} of "
        f"{len(figures['error_over_delta'])} matrices further than the adapter does, {figures['worst_layer']} "
        f"{figures['max_error_over_delta']:.2f} times as far, and the least cosine of an embedding before and after is "
        f"{figures['min_cosine']:.4f}. Nothing was written. To be exact, {exact}; or write it all the same with "
        f"--accept-loss"
    )
