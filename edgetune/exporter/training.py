"""The training graphs of a bundle, and `training.json`, by which a client in any language runs them.

They are written beside the inference graph over its data file, so a bundle that can be personalized holds its weights
once. What is refused here would train around other weights than those that ship, or with none of the rules of `graphs`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from edgetune import __version__
from edgetune.bundle import DATA, TRAINING, TRAINING_MANIFEST
from edgetune.errors import ExportError
from edgetune.exporter.job import Job
from edgetune.graphs import training
from edgetune.graphs.builder import Builder
from edgetune.graphs.decoder import Matrices
from edgetune.models.config import DecoderConfig
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner.plans import TrainConfig

FORMAT_VERSION = 1

# What a client does, in order. Values have the names of the graphs' inputs and outputs; `name.next` takes the place of
# `name`.
LOOP = {
    "weights": [
        f"Map {DATA}. `tensors` says where each lies in it: dtype, shape, offset and bytes. A graph's inputs have the "
        "tensor's name; those of forward and backward without `model.layers.i.`. Where an input has more dimensions "
        "than the tensor, give it the input's shape: the bytes are the same.",
        "Feed every input. A linear without an adapter gets one of rank 0, [in_features, 0] and [0, out_features].",
    ],
    "adapter": [
        "lora_A [in_features, r] begins uniform in -1/sqrt(in_features) .. 1/sqrt(in_features), lora_B "
        "[r, out_features] with zeros. scaling is lora_alpha / r.",
        "The inference graph takes lora_A, and lora_B times scaling. Where a slot of it (edgetune.json) has several "
        "modules, their lora_A stand side by side there, and their lora_B along the diagonal.",
        "NAME.safetensors holds the tensors of the inference graph, float32, and in its metadata under the key "
        "`edgetune` a JSON text: format_version 1; base_sha256, grid and tokenizer_sha256 of edgetune.json; r; "
        "lora_alpha; slots, the names of those that it fills.",
    ],
    "micro_batch": [
        "input_ids, position_ids, segment_ids and labels are int64 [B, T]. Several rows may lie in a window: positions "
        "begin at 0 in each, segment_ids number them, -1 is padding. labels are those of the next token, -100 where "
        "nothing is learned; flat they are [B * T].",
        "start gives x, and mask.k, cos.k and sin.k for each kind k of attention.",
        "forward for every block i from 0, with its weights, its adapter tensors, and mask, cos and sin of the kind "
        "model_config.layer_kinds[i]: keep x for the backward pass, then x = y.",
        "head_start gives hidden and targets of the M positions that have a label. Where M is 0, skip what follows.",
        "highest [M, 1] = -infinity; total, of_target [M, 1] and weighted [M, hidden_size] = 0.",
        "head_tile for ranges of rows of the matrix `head`, in any number: head.* are its rows from first_row on. Each "
        "takes the four sums and gives their next values.",
        "head_end with scale = 1 / (labels of all micro-batches of the step): loss_sum, and dy = dx.",
        "backward for every block from the last to the first with an adapter, with the x that was kept: add each "
        "<tensor>.gradient to what the step's other micro-batches gave, then dy = dx.",
    ],
    "step": [
        "Run all micro-batches. The step's loss is the sum of loss_sum times scale.",
        "grad_norm is the root of the sum of squares of all gradients. Where loss or grad_norm is not finite, leave "
        "the step out, and stop after 20 such steps in a row.",
        "learning_rate of step s of n, counted from 0, where w is warmup_ratio * n, rounded: peak * (s + 1) / w while "
        "s < w, then by lr_scheduler_type; cosine is peak * (1 + cos(pi * (s - w) / (n - w))) / 2.",
        "optimizer.<name> for each adapter tensor: moments begin with zeros; updates is the number of this update, "
        "from 1; gradients are clipped to max_grad_norm inside. What comes out takes the tensor's and the moments' "
        "place.",
    ],
    "evaluation": [
        "As a micro-batch up to head_start; then loss_tile and loss_end, which give no gradient. The loss of held-out "
        "rows is the sum of loss_sum by the number of their labels.",
    ],
}  # fmt: skip


def check_trainable(job: Job) -> None:
    """Raises ExportError where no training graphs can be written for what is exported."""
    stored = job.base.grid or "fp32"
    if not isinstance(job.base.config, DecoderConfig):
        raise ExportError(
            f"{job.base.folder} is an encoder; training graphs predict next tokens. Leave --with-training off, and "
            "train it with `edgetune train`."
        )
    if job.adapter is not None:
        job.adapter.method.CAPABILITIES.require("train_ort", ExportError)
    if job.head is not None:
        raise ExportError(
            f"The run has a trained head ({job.head.objective}), and training graphs predict next tokens. Leave "
            "--with-training off, and train it with `edgetune train`."
        )
    if job.merge:
        raise ExportError("A merged bundle takes no adapter, so it has nothing to train. Leave --merge off.")
    if stored not in training.FORMATS_TRAINED:
        raise ExportError(
            f"{job.base.folder} is on the {stored} grid, which no standard operator dequantizes, so it cannot be "
            "trained by plain graphs. Quantize the original model with --grid int4 for a bundle that trains."
        )
    if job.weights != stored:
        raise ExportError(
            f"Training graphs train around the weights that ship: the base is stored as {stored}, not as "
            f"{job.weights}. Export it with --weights {stored}."
        )


def write_training(job: Job, builder: Builder, source: Matrices, folder: Path) -> None:
    """Write `training/` of a bundle, whose inference graph and data file `builder` has written."""
    place, config = folder / TRAINING, job.decoder.config
    place.mkdir()
    head = training.head_name(config)
    graphs = training.training_graphs(config, source.format_of, job.context_length)
    for name, graph in graphs.items():
        graph.save_graph(place / f"{name}.onnx")
    described = {
        "format_version": FORMAT_VERSION, "edgetune_version": __version__,
        "model_config": config.to_dict(), "context_length": job.context_length,
        "data_file": DATA, "tensors": builder.described(), "head": f"{head}.weight",
        "graphs": {
            name: {"file": f"{name}.onnx", **dict(zip(("inputs", "outputs"), graph.signature(), strict=True))}
            for name, graph in graphs.items()
        },
        "optimizers": {
            name: {"learning_rate": OPTIMIZERS[name].learning_rate, "moments": list(OPTIMIZERS[name].rule.MOMENTS)}
            for name in training.OPTIMIZERS_WRITTEN
        },
        "defaults": _defaults(), "loop": LOOP,
    }  # fmt: skip
    (place / TRAINING_MANIFEST).write_text(json.dumps(described, indent=1), encoding="utf-8")


def _defaults() -> dict[str, Any]:
    """What `edgetune personalize` trains with where nothing is set."""
    kept = ("lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "eval_fraction", "seed")
    values = dataclasses.asdict(TrainConfig())
    return {"r": 8, "lora_alpha": 16, "optimizer": "adamw"} | {key: values[key] for key in kept}
