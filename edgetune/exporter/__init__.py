"""A run, a base or a model in; a bundle folder for stock onnxruntime out, whole or not at all.

The graph is built over the base's mapped bytes and streamed to disk tensor by tensor. Unmerged, the codes in the file
are the codes that the adapter was trained around, unless another format is asked for, and any adapter of that base
fits the graph. The parity gate of `parity` then decides whether the folder may appear.

`runtime.adapters` puts further adapters into a bundle.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch

from edgetune import __version__
from edgetune.adapter_file import check_probe_change, probe_rows, write_adapter
from edgetune.base import EncoderBase
from edgetune.bundle import (
    ADAPTER,
    DATA,
    FORMAT_VERSION,
    GENAI_CONFIG,
    MANIFEST,
    MODEL,
    SHARE_BUFFER,
    Bundle,
    EncoderBundle,
    load_any_bundle,
    sweep_lines,
)
from edgetune.device import DeviceProfile
from edgetune.errors import ExportError
from edgetune.exporter import agreement, encoder, parity
from edgetune.exporter.job import Job, attach_adapter, read_job
from edgetune.exporter.merging import BaseWeights, RoundedWeights, use_merged_vectors
from edgetune.exporter.sweep import choose_alpha
from edgetune.exporter.training import check_trainable, write_training
from edgetune.graphs import FORMATS
from edgetune.graphs.decoder import decoder_graph
from edgetune.hub import model_folder
from edgetune.memory import Meter, trim_allocator
from edgetune.models.config import DecoderConfig
from edgetune.output import folder_in_progress
from edgetune.weights import sha256_file

# onnxruntime-genai allocates its cache for this many positions where a client does not say.
_GENAI_LENGTH = 2048


def export(
    source: Any,
    *,
    out: str | Path,
    weights: str | None = None,
    device: DeviceProfile | str | Path | None = None,
    merge: bool = False,
    alpha: float | None = None,
    slots: str = "all",
    accept_loss: bool = False,
    eval_data: str | Path | None = None,
    retention_data: str | Path | None = None,
    with_training: bool = False,
    force: bool = False,
) -> Bundle | EncoderBundle:
    """Write a bundle folder and return it, an EncoderBundle for an encoder; `bundle.summary()` has the figures.

    Args:
        source: a run (`Run` or its folder), a base/ folder, a model folder or a Hub id.
        out: the folder to write.
        weights: a key of `graphs.FORMATS`. None takes what the device's profile names, or without a device, or where
            the base is on another grid than the profile's, what the base is stored in. What its bytes do not give is
            rounded again, and the cost is measured.
        device: the profile, its id or its file that chooses the default; an EdgetuneWarning says where weights are
            slow on it. None takes that of the run's plan.
        merge: fold the run's adapter into the weights and round them again.
        alpha: the share of the adapter's change that is merged, above 0 and up to 1; None chooses it by the rows
            of `retention_data` and the held-out ones, or takes 1 where there are none of the former.
        slots: "all" lets the graph take any adapter of the base; "adapter" only those of the linears that the run's
            adapter is in, which spares the others' calls for every token.
        accept_loss: write a bundle whose rounding moved a weight further than training did, or costs the task, by
            rounded weights or by int8 activations.
        eval_data: held-out rows (JSON Lines) for the parity gate; None takes those of the run.
        retention_data: rows of what the base could do already and the merged model should still do.
        with_training: add the graphs that `personalize` trains with on the device.
        force: replace an existing bundle.

    Raises:
        ExportError: the source is none of these, base, adapter and weights do not go together, or rounding loses
            what was trained; the sweep of a merge is in its notes.
        ParityError: the graph does not compute what was trained; nothing is written.
        ConfigError, DeviceError, ModelError, AdapterError, DataError: from what is read and where it is written.
    """
    if not merge and (alpha is not None or retention_data is not None):
        raise ExportError(
            "alpha and retention_data say how an adapter is merged. Give them with --merge, or not at all."
        )
    if alpha is not None and not 0 < alpha <= 1:
        raise ExportError(f"alpha = {alpha}; a number above 0, the base, and up to 1, as trained, was expected.")
    if slots not in ("all", "adapter") or (merge and slots != "all"):
        raise ExportError(
            f"slots = {slots!r}{' with merge' if merge else ''}; a graph takes adapters in all linears or in those of "
            f"the adapter, and none where that is merged. Give all or adapter, or leave it out."
        )
    out = Path(out)
    trim_allocator()
    folder = getattr(source, "folder", None) or model_folder(source)
    with (
        folder_in_progress(out, MANIFEST, force=force) as temporary,
        Meter() as meter,
        # Beside the output: logits are compared through files, which need the disk that the bundle needs anyway.
        tempfile.TemporaryDirectory(prefix=f".{out.name}.work-", dir=temporary.parent) as work,
    ):
        job = read_job(Path(folder), Path(work), weights, merge, eval_data, device, retention_data)
        if slots == "adapter":
            if job.adapter is None:
                raise ExportError(f"slots = 'adapter', and {folder} has none. Export a run, or leave it out.")
            job = replace(job, any_adapter=False)
        if with_training:
            check_trainable(job)
        merged = share = None
        if merge and job.adapter is not None:
            merged = choose_alpha(job, job.adapter, alpha, Path(work))
            share = merged["alpha"]
            job = replace(job, adapter=job.adapter.weakened(share))
        try:
            if isinstance(job.base, EncoderBase):
                figures, rounding = encoder.write_model(job, job.base, temporary, share, accept_loss=accept_loss)
            else:
                figures, rounding = _write_model(
                    job, temporary, Path(work), share, accept_loss=accept_loss, with_training=with_training
                )
        except ExportError as error:
            if merged is not None and (table := list(sweep_lines(merged))):
                error.add_note("\n".join(table))  # what the advice to merge more or less is weighed by
            raise
        adapters = _write_adapter(job, temporary, Path(work))
        _write_companions(job, temporary)
        _write_manifest(job, temporary, figures, rounding, adapters, merged, meter.peak_rss_bytes)
    return load_any_bundle(out)


def _write_model(
    job: Job, folder: Path, work: Path, alpha: float | None, *, accept_loss: bool, with_training: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Write the graph and its weights, then pass the parity gate: (parity figures, cost of rounding).

    `alpha` is the share of the trained adapter that the job merges, None where it merges none.
    """
    base = job.decoder
    config, stored = base.config, base.grid or "fp32"
    source = BaseWeights(base)
    if job.merge or job.weights != stored:
        source = RoundedWeights(base, job.weights, job.adapter, merge=job.merge)
    builder = decoder_graph(
        source, data_file=DATA, context_length=job.context_length, slots=job.slots,
        contrib=job.contrib, head=job.head,
    )  # fmt: skip
    marks = {SHARE_BUFFER: "1"} if job.writes_cache_in_place else {}
    builder.save(folder, MODEL, {"edgetune.base_sha256": job.base_sha256} | marks)
    model = folder / MODEL
    parity.check_loads(model)
    parity.check_bytes(model, source, builder.sha256, () if job.head is None else ("lm_head",))
    if with_training:
        write_training(job, builder, source, folder)

    items, held_out = agreement.probes(job.rows, config.vocab_size, job.row_length)
    tuned, rounding = job.adapter is not None, None
    decoder = job.open_decoder()
    if isinstance(source, RoundedWeights) and (job.merge or not source.is_exact):
        if tuned:
            attach_adapter(job, decoder)
        trained = parity.spool_logits(decoder, items, work / "trained")
        decoder = job.open_decoder()
        if job.adapter is not None and job.merge:
            use_merged_vectors(decoder, job.adapter)
        parity.use_written_weights(decoder, model, job.weights)
        if tuned and not job.merge:
            attach_adapter(job, decoder)
        expected = parity.spool_logits(decoder, items, work / "rounded")
        rounding = source.figures() | agreement.rounding_cost(items, trained, expected)
        if job.adapter is not None and not accept_loss:
            parity.check_rounding(
                rounding, stored, job.weights, alpha=alpha, needs_merge=job.adapter.needs_merge
            )  # fmt: skip
    feeds = job.feeds(job.adapter) if job.adapter else {}
    if rounding is None or not tuned:
        feeds = job.feeds(attach_adapter(job, decoder))
        expected = parity.spool_logits(decoder, items, work / "expected")
    del decoder
    fast = FORMATS[job.weights].ROUNDS_ACTIVATIONS
    gated = held_out if tuned else []
    figures = parity.check_logits(
        model, _seen(job), feeds, items, expected, work, fast=fast, held_out=gated, accept_loss=accept_loss
    )
    figures |= {"adapter": "run" if tuned else "random", "held_out_rows": len(job.rows)}
    return figures, rounding


def _write_adapter(job: Job, folder: Path, work: Path) -> dict[str, Any]:
    """The run's adapter beside the graph: its two files, and the manifest's entry. Empty where there is none."""
    if job.adapter is None or job.merge:
        return {}
    adapter, rows = job.bound(job.adapter), _probe_rows(job)
    if isinstance(job.base, EncoderBase):
        change = encoder.probe_change(folder / MODEL, adapter.tensors, rows)
    else:
        change = parity.probe_change(folder / MODEL, _seen(job), adapter.tensors, rows, work)
    check_probe_change(change, origin="the run's adapter")
    write_adapter(folder, ADAPTER, adapter)
    return {ADAPTER: {"binding": asdict(adapter.binding), "probe_change": change}}


def _seen(job: Job) -> DecoderConfig:
    """The config as the gate sees it: as many logits as the graph has, which are a trained head's outputs."""
    config = job.decoder.config
    return config if job.head is None else replace(config, vocab_size=job.head.outputs)


def _probe_rows(job: Job) -> list[list[int]]:
    return [] if job.merge else probe_rows(job.base.config.vocab_size, job.row_length)


def _write_companions(job: Job, folder: Path) -> None:
    """The tokenizer's files, and for a decoder what onnxruntime-genai reads."""
    for path in job.tokenizer.files if job.tokenizer else []:
        shutil.copyfile(path, folder / path.name)
    if not isinstance(job.base, EncoderBase) and job.head is None:
        (folder / GENAI_CONFIG).write_text(json.dumps(_genai_config(job), indent=1), encoding="utf-8")


def _genai_config(job: Job) -> dict[str, Any]:
    """`genai_config.json`. onnxruntime-genai refuses keys that it does not know, so nothing else may stand here."""
    config, ends = job.decoder.config, list(job.eos_token_ids)
    special = {"bos_token_id": job.bos_token_id, "pad_token_id": ends[0] if ends else None}
    return {
        "model": {
            "type": config.model_type, "vocab_size": config.vocab_size, "context_length": job.context_length,
            "eos_token_id": ends, **{key: value for key, value in special.items() if value is not None},
            "decoder": {
                "filename": MODEL, "hidden_size": config.hidden_size, "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "session_options": {"log_id": "edgetune", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids", "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits", "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": min(job.context_length, _GENAI_LENGTH), "do_sample": False,
            "past_present_share_buffer": job.writes_cache_in_place,
        },
    }  # fmt: skip


def _bundle_model(job: Job) -> dict[str, Any]:
    """The fields of `bundle.BundleModel`."""
    model = {key: getattr(job.decoder.config, key) for key in (
        "model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim",
    )}  # fmt: skip
    return model | {
        "max_position_embeddings": job.context_length, "bos_token_id": job.bos_token_id,
        "eos_token_ids": list(job.eos_token_ids),
        **({} if job.head is None else {"objective": job.head.objective, "classes": list(job.head.classes)}),
    }  # fmt: skip


def _write_manifest(
    job: Job,
    folder: Path,
    figures: Mapping[str, Any],
    rounding: Mapping[str, Any] | None,
    adapters: Mapping[str, Any],
    merged: Mapping[str, Any] | None,
    peak_rss_bytes: int,
) -> None:
    if isinstance(job.base, EncoderBase):
        model = encoder.bundle_model(job.base.config, job.context_length, job.adapter.head if job.adapter else None)
    else:
        model = _bundle_model(job)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format_version": FORMAT_VERSION, "edgetune_version": __version__,
        "model": model, "grid": job.base.grid, "weights": job.weights, "merged": job.merge,
        "base_sha256": job.base_sha256,
        "tokenizer_sha256": job.tokenizer_sha256,
        "slots": [asdict(slot) for slot in job.slots],
        "adapters": dict(adapters), "default_adapter": next(iter(adapters), None),
        "probe_rows": _probe_rows(job), "merge": merged,
        "parity": dict(figures), "rounding": None if rounding is None else dict(rounding),
        "peak_rss_bytes": peak_rss_bytes, "files": files,
        "versions": {
            "onnxruntime": onnxruntime.__version__, "onnx_ir": onnx_ir.__version__, "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
