"""A run of an encoder on the torch engine: its adapter, its head, and the metric of held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.head import head_shapes, initialize, save_with_head
from edgetune.linear import FrozenLinear
from edgetune.memory import give_back
from edgetune.models.encoder import load_encoder
from edgetune.planner.encoders import TextFacts
from edgetune.training.encoder_step import RowBatches, Rule, Task, evaluate, held_out_batches
from edgetune.training.forward import Batch
from edgetune.training.inputs import Inputs
from edgetune.training.pace import Pace
from edgetune.training.progress import Progress
from edgetune.training.stop import Guard
from edgetune.training.trainer import Trainer


class EncoderTrainer(Trainer):
    """See `Trainer`."""

    def __init__(
        self, inputs: Inputs, folder: Path, guard: Guard, limit: AbstractContextManager[None],
        pace: Pace, on_progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        super().__init__(inputs, folder, guard, limit, pace, on_progress)
        plan = inputs.plan
        self.batches = RowBatches(
            inputs.rows, batch_size=plan.batch_size, gradient_accumulation_steps=plan.gradient_accumulation_steps,
            seed=plan.seed,
        )  # fmt: skip
        self.encoder = load_encoder(inputs.base)
        self.encoder.workspace.tile_weights = plan.tile_weights
        self.parameters = attach(self.encoder, plan.adapter, plan.seed)
        shapes = head_shapes(plan.objective, plan.classes, self.encoder.config.hidden_size)
        head = {name: nn.Parameter(torch.from_numpy(value)) for name, value in initialize(shapes, plan.seed).items()}
        self.parameters |= head
        self.task = Task(self.encoder, plan.objective, head)
        held = self.encoder.blocks[len(self.encoder.blocks) - plan.dequantized_layers :]
        self.held = [layer for block in held for layer in block.modules() if isinstance(layer, FrozenLinear)]
        self.rule = Rule(self.encoder, self.task, self.parameters, plan)

    def release(self) -> None:
        """Give back what a step holds; one that was not finished begins again."""
        self.rule.drop()
        self.encoder.workspace.clear()
        give_back()

    @torch.no_grad()
    def fill_cache(self) -> None:
        """Multiply once with as many rows as the largest micro-batch has.

        MKL packs into buffers that it keeps, and keeps those too that turn out too small. With the largest first there
        is one of each: 2.9 in the place of 9.6 MiB after 600 micro-batches of MiniLM, one text each.
        """
        most, take = self.most_positions(), self.encoder.workspace.take
        layers = (layer for layer in self.encoder.blocks[-1].modules() if isinstance(layer, FrozenLinear))
        with self.limit:
            for layer in layers:
                x = take(most, layer.in_features, "inner").zero_()
                y = take(most, layer.out_features, "d_inner").zero_()
                for rows, weight in layer.tiles():
                    torch.mm(x, weight.T, out=y[:, rows])
                    x.addmm_(y[:, rows], weight)

    def most_positions(self) -> int:
        """Tokens of the run's largest micro-batch."""
        facts = TextFacts(tuple(self.inputs.rows), tuple(self.inputs.eval_rows))
        per_step = self.batches.windows_per_step
        return facts.most_positions(self.plan.batch_size, self.max_steps * per_step, self.plan.seed)

    def held_out(self) -> Iterable[Batch]:
        """Micro-batches no larger than those that are learned."""
        return held_out_batches(self.inputs.eval_rows, self.plan.batch_size, self.most_positions())

    def measure(self, batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
        loss, metric = evaluate(self.encoder, self.task, batches, self.check)
        return loss, {self.task.objective.METRIC: metric}

    def write_adapter(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Adapter and head in PEFT's files."""
        plan = self.plan
        save_with_head(
            self.folder, plan.adapter, tensors, self.encoder.config.model_type, plan.objective,
            str(self.inputs.paths["base"]),
        )  # fmt: skip

    def tensors(self) -> dict[str, np.ndarray]:
        """Adapter and head as they are now; views, not copies."""
        return {name: value.detach().numpy() for name, value in self.parameters.items()}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        load_tensors(self.parameters, tensors)

    def versions(self) -> dict[str, str]:
        return super().versions() | {"torch": torch.__version__}
