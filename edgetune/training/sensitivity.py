"""How many directions the loss asks of each linear: the effective rank of the gradient by its weight, before a run.

For LoRA with B = 0 the gradients are d_A = 0 and d_B = s G A^T, with G [out, in] that by the frozen weight. With
orthonormal rows A is a random projection of G to the r dimensions that it has itself, so of the singular values of d_B,
summed over the steps as both stay what they are,

    p_i = sigma_i / sum_j sigma_j        effective rank = exp(-sum_i p_i log p_i)

(Roy and Vetterli, "The effective rank", EUSIPCO 2007) is a count of directions from 1 to r: that of G itself at
r = in, and with a smaller r lower where G has as many directions or more. So the exact gradient of the planned engine
measures every linear at once, in the memory of a training run. `adapters.allocation` makes ranks of it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.adapters.allocation import allocate
from edgetune.adapters.attach import AdaptedLinear
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.checkpoint import latest_checkpoint
from edgetune.device import DeviceProfile
from edgetune.errors import BudgetError, ConfigError
from edgetune.planner.plans import Plan, TrainConfig
from edgetune.planner.sensitivity import plan_pass
from edgetune.training.backprop import Rule
from edgetune.training.conduct import conduct_run
from edgetune.training.crew import using
from edgetune.training.loop import checked_inputs
from edgetune.training.progress import Progress
from edgetune.training.run import CHECKPOINTS
from edgetune.training.torch_trainer import TorchTrainer

__all__ = ["allocate_ranks", "measure_directions"]


def allocate_ranks(
    base: str | Path,
    device: str | Path | DeviceProfile,
    *,
    data: str | Path,
    adapter: LoraConfig,
    config: TrainConfig | None = None,
    **wishes: Any,
) -> LoraConfig:
    """The adapter with the ranks that its `adapter_budget` holds, for `plan` and then `train`.

    Args:
        base: the base/ folder.
        device: as for `plan`.
        data: the rows that will be learned.
        adapter: its `adapter_budget` in bytes; ranks, target modules and alpha are left open.
        config: the training that is wanted.
        wishes: the other ones of `plan`: eval_data, retention_data, kl_data, budget, skip_bad.

    Raises:
        BudgetError: the pass does not fit the device, or the adapter's budget holds no linear.
        ConfigError: settings contradict each other.
        DataError, DeviceError, ModelError: from reading rows, profile and base.
    """
    made = plan_pass(base, device, data=data, adapter=adapter, config=config, **wishes)
    inputs = {"eval_data": wishes.get("eval_data"), "skip_bad": wishes.get("skip_bad", False)}
    return allocate(adapter, open_base(Path(base)).config, measure_directions(made, base, data=data, **inputs))


def measure_directions(
    plan: Plan, base: str | Path, *, data: str | Path, eval_data: str | Path | None = None, skip_bad: bool = False,
    work: str | Path | None = None, on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Place -> effective rank of the gradient by its weight, over the steps of a plan that `plan_pass` made.

    Its files lie in a temporary folder inside `work`, and are removed.

    Raises:
        BudgetError: the budget was used up before the end.
        ConfigError: the pass was stopped, or no step had a finite gradient.
        DataError, ModelError: as `train`.
    """
    base, data, eval_data = Path(base), Path(data), None if eval_data is None else Path(eval_data)
    with tempfile.TemporaryDirectory(prefix=".edgetune-pass-", dir=work) as name, using(plan.threads):
        folder = Path(name)
        run = conduct_run(
            plan, folder, lambda: checked_inputs(plan, base, data, eval_data, skip_bad), _Trainer,
            resume=False, force=True, enforce="governor", one_slice=False, on_progress=on_progress,
        )  # fmt: skip
        last, _ = latest_checkpoint(folder / CHECKPOINTS)
        updates = last.state["updates"] if last else 0
        if run.stopped == "budget":
            raise BudgetError("the pass that measures each linear used up the budget. Give the run more --budget.")
        if last is None or run.stopped != "done" or not updates:
            raise ConfigError(f"the pass that measures each linear ended at {run.stopped}, with {updates} good steps.")
        return {place: effective_rank(gradient) for place, gradient in last.tensors("optim").items()}


def effective_rank(matrix: np.ndarray) -> float:
    """That of its singular values; 1 where all are 0."""
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values[values > 0] / max(values.sum(), np.finfo(values.dtype).tiny)
    return math.exp(-float((shares * np.log(shares)).sum()))


class _Directions(Rule):
    """The exact gradient by B, summed over the steps; no update."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(trainer.decoder, trainer.parameters, trainer.plan, trainer.cache)
        self.optimizer.moments.clear()  # the sums lie where they would
        self.layers = [module for module in trainer.decoder.modules() if isinstance(module, AdaptedLinear)]
        self.sums = {layer.slot.place: np.zeros(layer.tensors["lora_B"].shape, np.float32) for layer in self.layers}
        for layer in self.layers:
            a = layer.tensors["lora_A"].data
            a.copy_(torch.linalg.qr(a.T).Q.T)

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """Add the gradients."""
        for layer in self.layers:
            gradient = layer.tensors["lora_B"].grad
            assert gradient is not None
            self.sums[layer.slot.place] += gradient.numpy()
        self.drop()

    def tensors(self) -> dict[str, np.ndarray]:
        """The sums."""
        return self.sums

    def load(self, tensors: Mapping[str, np.ndarray], updates: int) -> None:
        """Give them back."""
        self.sums = {place: value.copy() for place, value in tensors.items()}


class _Trainer(TorchTrainer):
    """A run that measures and holds nothing out."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.rule = _Directions(self)

    def evaluation_is_due(self) -> bool:
        return False
