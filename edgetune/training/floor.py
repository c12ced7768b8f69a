"""What the torch engine costs before any model: `python -m edgetune.training.floor` prints its anonymous bytes.

It imports what a training run imports and takes one step on a model of a few hundred weights, because much is only
loaded or reserved at the first step. `memory.measure_floor` runs it in a process of its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import jinja2.sandbox  # noqa: F401 - rows of chats need it
import numpy as np
import safetensors.numpy  # noqa: F401 - checkpoints need it
import torch

from edgetune.adapters.attach import attach
from edgetune.adapters.lora import LoraConfig
from edgetune.memory import anonymous_bytes, trim_allocator
from edgetune.models.decoder import load_decoder
from edgetune.models.llama import config_from_hf
from edgetune.training import backprop
from edgetune.training import loop as _loop  # noqa: F401 - imported for what it costs
from edgetune.training.optimizer import Optimizer, clip_gradients
from edgetune.weights import TensorInfo, write_safetensors

_HF = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "tie_word_embeddings": True,
}  # fmt: skip


def write_tiny_model(folder: Path) -> None:
    """A Llama of ones: its numbers do not matter, the operators it calls do."""
    config = config_from_hf(_HF)
    shapes = {f"{name}.weight": shape for name, shape in config.matrices().items()} | config.vectors()
    infos = {name: TensorInfo("F32", tuple(shape)) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", infos, lambda name: np.ones(infos[name].shape, np.float32))
    (folder / "config.json").write_text(json.dumps(_HF), encoding="utf-8")


def first_step(folder: Path) -> None:
    """One step of training: forward, a recomputed and a kept block, loss, backward, clipping, update."""
    decoder = load_decoder(folder)
    parameters = attach(decoder, LoraConfig().resolved(decoder.config))
    ids = np.zeros((1, 8), np.int64)
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids, "segment_ids": ids}
    walk = backprop.Path(first_block=0, recompute_layers=1)
    backprop.loss_and_gradients(decoder, [batch], walk, dropout_key=(0, 0), check=lambda: None)
    clip_gradients(parameters.values(), 1.0)
    Optimizer("adamw_8bit", parameters, weight_decay=0.0).step(1e-3)


def main(threads: int) -> None:
    """Take the step and print the bytes."""
    torch.set_num_threads(threads)
    trim_allocator()
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_model(Path(folder))
        first_step(Path(folder))
    sys.stdout.write(f"{anonymous_bytes()}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
