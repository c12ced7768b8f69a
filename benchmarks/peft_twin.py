"""The same model in transformers + PEFT + bitsandbytes: the peer that edgetune's training is compared with.

To compare numbers it is given what edgetune has (`peft_model`): the codes of the base (as bitsandbytes' own
`Linear4bit`, or dequantized where the grid is not one of bitsandbytes'), the dequantized embedding and head, and the
same initial adapter through its own files. To compare cost it is what its users have (`qlora_model`). Its optimizer,
clipping and checkpointing are torch's.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgetune.adapters.base import save_adapter
from edgetune.adapters.lora import LoraConfig
from edgetune.base import Base, open_base

if TYPE_CHECKING:
    from edgetune.planner import Plan
    from edgetune.training.backprop import Path as Walk

Batch = dict[str, np.ndarray]


def transformers_model(folder: Path) -> nn.Module:
    """The dense or Linear4bit twin of a base/ folder, float32, without an adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    base = open_base(folder)
    hf = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hf.pop("quantization_config", None)
    config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    with torch.no_grad():
        for name in base.config.vectors():
            model.get_parameter(name).copy_(torch.from_numpy(base.weights.float32(name)))
        for name in base.config.matrices():
            if base.grid_of(name) == "nf4" and name in base.config.linears():
                _place(model, name, _linear4bit(base, name))
            else:
                model.get_parameter(f"{name}.weight").copy_(torch.from_numpy(base.dequantize(name)))
    model.is_loaded_in_4bit = base.grid == "nf4"  # PEFT asks for it before it wraps a Linear4bit
    return model


def _place(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _linear4bit(base: Base, name: str) -> nn.Module:
    import bitsandbytes as bnb

    rows, columns = base.shape(name)
    bias = f"{name}.bias" in base.weights
    layer = bnb.nn.Linear4bit(columns, rows, bias=bias, compute_dtype=torch.float32, quant_type="nf4", device="cpu")
    at = f"{name}.weight"
    stats = {key: torch.from_numpy(base.weights.array(key).copy()) for key in base.weights if key.startswith(f"{at}.")}
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        torch.from_numpy(base.weights.array(at).copy()), stats, requires_grad=False, device="cpu", module=layer
    )
    if bias:
        layer.bias = nn.Parameter(torch.from_numpy(base.vector(f"{name}.bias")), requires_grad=False)
    return layer


def peft_model(folder: Path, config: LoraConfig, tensors: dict[str, np.ndarray]) -> nn.Module:
    """The twin with this adapter, loaded by PEFT from the files that edgetune writes; ready to be trained."""
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as adapter, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers 5.23 for what will be renamed
        save_adapter(Path(adapter), config, tensors)
        return PeftModel.from_pretrained(transformers_model(folder), adapter, is_trainable=True).train()


def qlora_model(folder: Path, config: LoraConfig, *, checkpointing: bool) -> nn.Module:
    """QLoRA as PEFT's users set it up, computed in float32; ready to be trained.

    folder: an nf4 base/ with dense embeddings, which transformers loads as its own; its codes stay mapped.
    checkpointing: every block runs again in backward, `use_reentrant=False`.

    Checkpointing makes transformers ask for the gradient of the embedding's output, which nobody uses: that is undone.
    """
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as above
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model.disable_input_require_grads()
        settings = peft.LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora, task_type="CAUSAL_LM",
            target_modules=list(config.target_modules), layers_to_transform=list(config.layers_to_transform),
        )  # fmt: skip
        return peft.get_peft_model(model, settings).train()


def take_embeddings(model: nn.Module, folder: Path) -> None:
    """Overwrite the embedding and the head by those of a base/ folder, dequantized."""
    base = open_base(folder)
    with torch.no_grad():
        for name in base.config.matrices().keys() - base.config.linears().keys():
            weight = model.get_submodule(f"base_model.model.{name}").weight
            weight.copy_(torch.from_numpy(base.dequantize(name)))


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Its trainable tensors under edgetune's names."""
    return {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): value
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def loss_sum(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Summed cross-entropy of a stacked micro-batch (labels already shifted).

    Where windows hold several segments or padding, a mask keeps those apart; whole windows need none.
    """
    ids, labels, positions, segments = (
        torch.from_numpy(batch[key]) for key in ("input_ids", "labels", "position_ids", "segment_ids")
    )
    apart = {}
    if segments.any():
        mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
        apart = {"position_ids": positions, "attention_mask": _masks(model, mask)}
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **apart).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


def _masks(model: nn.Module, mask: torch.Tensor) -> Any:
    """The mask as the model takes it: one for each kind of layer where some have a sliding window."""
    window = getattr(model.config, "sliding_window", None)
    if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
        return mask
    return {"full_attention": mask, "sliding_attention": mask.triu(1 - window)}


@dataclass
class PeftTrainer:
    """One optimizer step at a time over given micro-batches."""

    model: nn.Module
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    fused: bool = False

    def __post_init__(self) -> None:
        self.parameters = peft_parameters(self.model)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), weight_decay=self.weight_decay, foreach=False, fused=self.fused
        )

    def gradients(self, batches: Sequence[Batch]) -> float:
        """Fill the gradients; returns the mean loss per supervised token over all micro-batches."""
        self.optimizer.zero_grad()
        supervised = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        mean = 0.0
        for batch in batches:
            loss = loss_sum(self.model, batch) / supervised
            loss.backward()
            mean += loss.item()
        return mean

    def update(self, rate: float) -> None:
        nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()


def rate_of(plan: Plan, step: int) -> float:
    """The learning rate of a step of edgetune's run, for a plan that knows how many it has."""
    from edgetune.training.schedule import learning_rate

    assert plan.max_steps is not None and plan.warmup_steps is not None
    return learning_rate(
        step, peak=plan.learning_rate, warmup_steps=plan.warmup_steps, max_steps=plan.max_steps,
        schedule=plan.lr_scheduler_type,
    )  # fmt: skip


def compare(
    folder: Path,
    batches_of: Callable[[int], list[Batch]],
    *,
    steps: int,
    config: LoraConfig | None = None,
    same_adapter: bool = False,
    model: nn.Module | None = None,
    walk: Walk | None = None,
    fast_positions: int = 0,
) -> list[dict[str, float]]:
    """Train edgetune and PEFT side by side; per step both losses and the largest relative difference of a gradient.

    folder: a base/ folder; batches_of: the micro-batches of a step. A gradient's relative difference is
    |ours - theirs| / |theirs| over one tensor; where theirs is zero (lora_A before the first update) it is |ours|.

    Each side goes its own way, and Adam's first updates make a step of full size even from a gradient that is nothing
    but rounding. `same_adapter` hands ours to PEFT before every step, so that the gradients alone are compared.

    model: PEFT's model with the slots of this adapter; None makes the twin of the folder.
    walk: how edgetune goes through the blocks; None computes one of them again, with small tiles of the loss.
    fast_positions: the rows of products that are fast, in the loss too; 0: none.
    """
    from edgetune.adapters.attach import attach
    from edgetune.models.decoder import load_decoder
    from edgetune.training.backprop import Path as Walk
    from edgetune.training.backprop import loss_and_gradients
    from edgetune.training.optimizer import Optimizer, clip_gradients
    from edgetune.training.schedule import learning_rate

    decoder = load_decoder(folder)
    resolved = (config or LoraConfig(r=8)).resolved(decoder.config)
    decoder.workspace.fast_positions = decoder.workspace.fast_loss_rows = fast_positions
    parameters = attach(decoder, resolved, seed=1)
    initial = {name: value.detach().numpy() for name, value in parameters.items()}
    peer = PeftTrainer(peft_model(folder, resolved, initial) if model is None else model)
    walk = walk or Walk(resolved.first_block, 1)
    optimizer = Optimizer("adamw", parameters, weight_decay=0.0)
    rows = []
    for step in range(steps):
        batches = batches_of(step)
        for name in parameters if same_adapter else ():
            peer.parameters[name].data.copy_(parameters[name].data)
        loss = loss_and_gradients(decoder, batches, walk, dropout_key=(0, step), check=lambda: None)
        theirs = peer.gradients(batches)
        difference = max(_relative(parameters[name].grad, peer.parameters[name].grad) for name in parameters)
        rows.append({"loss": loss, "peft_loss": theirs, "gradient_difference": difference})
        rate = learning_rate(step, peak=2e-3, warmup_steps=2, max_steps=steps, schedule="cosine")
        clip_gradients(parameters.values(), 1.0)
        optimizer.step(rate)
        peer.update(rate)
    return rows


def _relative(ours: torch.Tensor | None, theirs: torch.Tensor | None) -> float:
    assert ours is not None and theirs is not None
    norm = theirs.norm()
    return float((ours - theirs).norm() / (norm if norm else 1.0))
