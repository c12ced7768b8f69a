"""A run on the torch engine: the decoder, its adapter, the step rule, and what saves time where memory is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.head import SCORE, save_with_head, score_shapes
from edgetune.adapters.head import initialize as initialize_head
from edgetune.linear import FrozenLinear
from edgetune.memory import give_back
from edgetune.models.decoder import load_decoder
from edgetune.models.places import Score
from edgetune.objectives import has_head, objective_of, sft
from edgetune.planner.job import filled, may_come_down
from edgetune.training import backprop
from edgetune.training.anchor import Anchor
from edgetune.training.crew import Crew, using
from edgetune.training.features import FeatureCache
from edgetune.training.forward import Batch, Tally, evaluate, start_virtual_tokens
from edgetune.training.initialization import initialize
from edgetune.training.inputs import Inputs
from edgetune.training.pace import Pace
from edgetune.training.progress import Progress
from edgetune.training.reference import Reference
from edgetune.training.rules import STEP_RULES
from edgetune.training.run import FEATURES, REFERENCE, memory_file_system, on_disk
from edgetune.training.stop import Guard, is_out_of_memory
from edgetune.training.trainer import Trainer


class TorchTrainer(Trainer):
    """See `Trainer`."""

    def __init__(
        self, inputs: Inputs, folder: Path, guard: Guard, limit: AbstractContextManager[None],
        pace: Pace, on_progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        super().__init__(inputs, folder, guard, limit, pace, on_progress)
        plan = inputs.plan
        positions = plan.batch_size * max((window.length for window in inputs.learned), default=0)
        head_dim = plan.model_config.head_dim
        free = may_come_down(plan.adapter, plan.step_rule, plan.objective, plan.threads, positions, head_dim)
        self.crew = Crew(plan.threads, free=free)
        self.decoder = load_decoder(inputs.base)
        # Rotary tables, before allocations are limited: numpy crashes in a ufunc that is refused its buffers.
        self.decoder.context(max((window.length for window in inputs.every), default=0))
        workspace = self.decoder.workspace
        workspace.tile_weights = plan.tile_weights
        if plan.fast_products:
            workspace.fast_positions = positions
            supervised = max((window.num_supervised for window in inputs.learned), default=0)
            workspace.fast_loss_rows = min(
                sft.TILE_TOKENS, filled(min(supervised * plan.batch_size, positions), plan.threads)
            )
        workspace.offload_to = on_disk(folder) if plan.activation_offloading else None
        self.parameters = attach(self.decoder, plan.adapter, plan.seed)
        if plan.adapter.virtual_tokens:
            start_virtual_tokens(self.decoder, plan.seed)
        if has_head(plan.objective):
            shapes = score_shapes(plan.objective, plan.classes, self.decoder.config.hidden_size)
            weight = nn.Parameter(torch.from_numpy(initialize_head(shapes, plan.seed)[SCORE]))
            self.parameters[SCORE], self.decoder.score = weight, Score(weight)
        self.first_block = plan.adapter.first_block
        held = self.decoder.blocks[len(self.decoder.layers) - plan.dequantized_layers :]
        self.held = [layer for block in held for layer in block.modules() if isinstance(layer, FrozenLinear)]
        self.cache: FeatureCache | None = None
        if plan.feature_cache_bytes and self.first_block:
            self.cache = FeatureCache(
                folder / FEATURES, self.decoder, self.first_block, plan.feature_cache_bytes,
                inputs.identity["base_sha256"],
            )  # fmt: skip
        self.objective = objective_of(plan)
        self.reference: Reference | None = None
        if self.objective.needs_reference:
            self.reference = Reference(folder / REFERENCE, inputs)
        self.rule = STEP_RULES[plan.step_rule].Rule(self.decoder, self.parameters, plan, self.cache)
        if inputs.anchors:
            assert isinstance(self.rule, backprop.Rule), "the config refuses others"
            self.rule.anchor = Anchor(self.decoder, inputs.anchors, plan, self.cache)

    def initialize(self) -> None:
        initialize(self.decoder, self.inputs, self.limit, self.tell)

    @property
    def filled(self) -> bool:
        """Whether this process added to the feature cache, or measured the reference."""
        measured = self.reference is not None and self.reference.num_measured > 0
        return measured or (self.cache is not None and self.cache.num_written > 0)

    def check_step(self) -> None:
        """The same inside a step, whose threads may change meanwhile."""
        self.check()
        self.crew.look()

    def read_on_demand(self) -> None:
        self.decoder.read_on_demand()

    def release(self) -> None:
        """Give back what a step holds; one that was not finished begins again."""
        self.rule.drop()
        self.decoder.workspace.clear()
        give_back()

    def fill_cache(self) -> None:
        """Run the reference once over all rows, where the objective needs that; then the frozen lower blocks, where the
        plan caches that and the storage takes it.
        """
        if self.state.step >= self.max_steps and not self.evaluation_is_due():
            return
        if self.reference is not None:
            self.inputs = self.reference.add(self.decoder.workspace, self.limit, self.check, self.tell)
            self.batches.task.windows = self.inputs.windows
        if self.cache is None or self.state.step >= self.max_steps:
            return
        if kind := memory_file_system(self.folder):
            self.no_cache(f"{self.folder} lies on {kind}, whose files are memory")
            return
        try:
            with self.limit:
                self.cache.fill(self.inputs.every, self.check, self.tell)
        except OSError as error:
            if is_out_of_memory(error):
                raise
            self.no_cache(error.strerror)

    def no_cache(self, reason: str | None) -> None:
        """Go on without it, which changes no bit."""
        assert self.cache is not None
        self.cache.forget()
        self.tell(f"no feature cache, the frozen blocks run in every step: {reason}")

    def measure(self, batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
        tally = Tally()
        with using(self.plan.threads):
            loss = evaluate(
                self.decoder, batches, check=self.check, first_block=self.first_block, features=self.cache,
                objective=self.objective, tally=tally,
            )  # fmt: skip
        return loss, tally.figures

    def tensors(self) -> dict[str, np.ndarray]:
        """The adapter as it is now; views, not copies."""
        return {name: value.detach().numpy() for name, value in self.parameters.items()}

    def write_adapter(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Adapter and head in PEFT's files."""
        if self.decoder.score is None:
            super().write_adapter(tensors)
            return
        plan = self.plan
        save_with_head(
            self.folder, plan.adapter, tensors, self.decoder.config.model_type, plan.objective,
            str(self.inputs.paths["base"]),
        )  # fmt: skip

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        load_tensors(self.parameters, tensors)

    def versions(self) -> dict[str, str]:
        return super().versions() | {"torch": torch.__version__}
