"""A run on the `ort` engine: numpy and onnxruntime alone.

The adapter lies as the graphs take it, A [in, r] and B [r, out], which is the transpose of PEFT's tensors; outside of
this module it has PEFT's shapes. Optimizers work element by element, so neither they nor the clipping see a difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgetune.adapter_file import by_linear
from edgetune.adapters import lora
from edgetune.adapters.lora import LoraConfig
from edgetune.bundle import load_bundle
from edgetune.data import IGNORED
from edgetune.errors import AdapterError
from edgetune.optimizers import OPTIMIZERS
from edgetune.personalizer.graphs import Adapter, Arrays, Batch, Check, TrainingGraphs, read_description
from edgetune.planner.plans import Plan
from edgetune.training.batches import in_batches
from edgetune.training.inputs import Inputs
from edgetune.training.pace import Pace
from edgetune.training.progress import Progress
from edgetune.training.stop import Guard
from edgetune.training.trainer import Trainer


def num_supervised(batch: Batch) -> int:
    """Positions of a micro-batch that have a label."""
    return int(np.count_nonzero(batch["labels"] != IGNORED))


class Backprop:
    """The exact gradient by a bundle's graphs, clipped, and an optimizer's graph: a `StepRule`."""

    figures: Mapping[str, float] = {}

    def __init__(self, graphs: TrainingGraphs, parameters: Arrays, config: LoraConfig, plan: Plan) -> None:
        self.graphs, self.parameters, self.plan = graphs, parameters, plan
        self.first_block = config.first_block
        self.adapter = Adapter(plan.model_config, parameters, config.scaling)
        kinds = OPTIMIZERS[plan.optimizer].rule.MOMENTS
        self.moments = {kind: {name: np.zeros_like(p) for name, p in parameters.items()} for kind in kinds}
        self.gradients: Arrays = {}
        self.norm, self.updates = 0.0, 0

    def gradient(self, batches: Sequence[Batch], key: tuple[int, int], check: Check) -> tuple[float, float]:
        """Leaves the gradients here; nothing is random."""
        self.drop()
        supervised = max(1, sum(map(num_supervised, batches)))
        loss_sum = 0.0
        for batch in batches:
            loss_sum += self.graphs.gradients(
                batch, self.adapter, self.first_block, 1 / supervised, check, self.gradients
            )
        self.norm = math.sqrt(sum(float(np.vdot(value, value)) for value in self.gradients.values()))
        return loss_sum / supervised, self.norm

    def update(self, learning_rate: float) -> None:
        """The optimizer's step, tensor by tensor; a step without a supervised token has no gradients."""
        self.updates += 1
        numbers = {
            "weight_decay": self.plan.weight_decay, "grad_norm": self.norm, "max_grad_norm": self.plan.max_grad_norm,
        }  # fmt: skip
        values: Arrays = {name: np.array([value], np.float32) for name, value in numbers.items()}
        values["updates"] = np.array([self.updates], np.int64)
        for name, parameter in self.parameters.items():
            gradient = self.gradients.get(name)
            own_rate = learning_rate * self.plan.adapter.lr_ratio(name.rpartition(".")[2])
            values["learning_rate"] = np.array([own_rate], np.float32)
            values |= {"parameter": parameter, "gradient": np.zeros_like(parameter) if gradient is None else gradient}
            tensors = {"parameter": parameter} | {kind: of[name] for kind, of in self.moments.items()}
            buffers = {f"{kind}.next": self.graphs.buffers(f"{kind}.next", parameter.shape) for kind in tensors}
            self.graphs.optimizer(values | tensors, buffers)
            for kind, tensor in tensors.items():
                tensor[...] = buffers[f"{kind}.next"]
        self.drop()

    def drop(self) -> None:
        """Leave the step out."""
        self.gradients.clear()

    @property
    def kept_layers(self) -> int:
        """Blocks that do not run again: their backward takes what forward has kept."""
        return min(self.graphs.kept_layers, self.plan.model_config.num_hidden_layers - self.first_block)

    def keep_layers(self, count: int) -> None:
        """Which changes no bit."""
        self.graphs.kept_layers = count

    def tensors(self) -> Arrays:
        """The optimizer's moments."""
        return {f"{kind}.{name}": value for kind, of in self.moments.items() for name, value in of.items()}

    def load(self, tensors: Mapping[str, np.ndarray], updates: int) -> None:
        """Take back what `tensors` gave after that many updates."""
        self.updates = updates
        for name, kept in self.tensors().items():
            kept[...] = tensors[name]


class OrtTrainer(Trainer):
    """See `Trainer`; the base of its inputs is a bundle."""

    rule: Backprop

    def __init__(
        self, inputs: Inputs, folder: Path, guard: Guard, limit: AbstractContextManager[None],
        pace: Pace, on_progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        super().__init__(inputs, folder, guard, limit, pace, on_progress)
        plan = inputs.plan
        self.bundle = load_bundle(inputs.base)
        description = read_description(self.bundle)
        config = plan.adapter
        assert isinstance(config, LoraConfig), "the planner refuses the others"
        self.parameters = initial(config, plan)
        kept = plan.model_config.num_hidden_layers - config.first_block - plan.recompute_layers
        graphs = TrainingGraphs(description, plan.threads, plan.optimizer, plan.arena_bytes, kept)
        self.rule = Backprop(graphs, self.parameters, config, plan)
        self.active_loss: float | None = None

    def fill_cache(self) -> None:
        """What the adapter that is in use, or the base alone, makes of the held-out rows: what a new one is held to."""
        batches = in_batches(self.inputs.eval_windows, self.plan.batch_size)
        tensors = by_linear(self.bundle.adapter_tensors(), self.bundle.slots)
        active = Adapter(self.plan.model_config, tensors, 1.0)  # the scaling is in lora_B there
        loss = mean_loss(self.rule.graphs, batches, active, self.check)
        self.active_loss = loss if math.isfinite(loss) else None

    def summary(self, stopped: str, enforcement: Mapping[str, Any]) -> dict[str, Any]:
        """The certificate, and what decides whether the adapter is used."""
        return {
            **super().summary(stopped, enforcement), "grid": self.bundle.manifest["grid"],
            "active_adapter": self.bundle.default_adapter, "active_loss": self.active_loss, "adopted": None,
        }  # fmt: skip

    def tensors(self) -> Arrays:
        return {name: value.T for name, value in self.parameters.items()}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        if {name: value.T.shape for name, value in tensors.items()} != {n: v.shape for n, v in self.parameters.items()}:
            raise AdapterError("the tensors of a checkpoint are not those of the adapter. Train anew with --force.")
        for name, value in self.parameters.items():
            value[...] = tensors[name].T

    def measure(self, batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
        return mean_loss(self.rule.graphs, batches, self.rule.adapter, self.check), {}

    def release(self) -> None:
        self.rule.drop()
        self.rule.graphs.release()

    def versions(self) -> dict[str, str]:
        return super().versions() | {"onnxruntime": onnxruntime.__version__}


def initial(config: LoraConfig, plan: Plan) -> Arrays:
    """The adapter before the first step, as the torch engine begins with it for the same seed, transposed."""
    return {
        f"{slot.place}.{name}": np.ascontiguousarray(value.T)
        for index, slot in enumerate(lora.slots(config, plan.model_config))
        for name, value in lora.initialize(slot, config, np.random.default_rng([plan.seed, index]), None).items()
    }


def mean_loss(graphs: TrainingGraphs, batches: Iterable[Batch], adapter: Adapter, check: Check) -> float:
    """Mean loss per supervised token, in nats; NaN where nothing is supervised."""
    total, supervised = 0.0, 0
    for batch in batches:
        total += graphs.loss_sum(batch, adapter, check)
        supervised += num_supervised(batch)
    return total / supervised if supervised else math.nan
