"""Train an attached network on its user's rows: planned, held to a budget, resumable to the bit.

    run/  adapter_config.json  adapter_model.safetensors  plan.json  metrics.jsonl  summary.json  checkpoints/

The loop is the usual one: shuffled batches, the user's loss, clipping, an optimizer, a schedule. The order of the rows
is a function of (seed, epoch) and torch's random numbers of (seed, step), dropout of the network's own layers included,
so a resumed run ends with the bytes of one that was never stopped. A step whose loss or gradient is not finite changes
nothing and is counted.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune import __version__
from edgetune.checkpoint import PLAN, Checkpoint, latest_checkpoint, save_checkpoint
from edgetune.device import DeviceProfile
from edgetune.errors import CheckpointError, ConfigError
from edgetune.memory import Meter
from edgetune.modules.attached import AttachedModule
from edgetune.modules.budget import ENFORCEMENTS
from edgetune.modules.plan import Loss, ModulePlan, as_rows, mean_loss, plan_module
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner.plans import TrainConfig
from edgetune.training.optimizer import Optimizer, clip_gradients
from edgetune.training.run import CHECKPOINTS, METRICS, SUMMARY, Metrics, Run, open_run, write_json
from edgetune.training.schedule import learning_rate
from edgetune.training.stop import DataLimit, Guard, Stopped, is_out_of_memory

FORMAT_VERSION = 1
EPOCHS = 20.0
RATE = 25  # of a language model's, whose tensors are a thousand times larger
_SETTINGS = {
    "batch_size", "gradient_accumulation_steps", "num_epochs", "max_steps", "optimizer", "learning_rate",
    "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "seed",
}  # fmt: skip


def train_module(
    attached: AttachedModule,
    inputs: torch.Tensor | Sequence[torch.Tensor],
    targets: torch.Tensor,
    device: DeviceProfile | str | Path,
    *,
    loss: Loss,
    out: str | Path,
    config: TrainConfig | None = None,
    enforce: str = "governor",
    resume: bool = False,
    force: bool = False,
) -> Run:
    """Train the adapter inside the device's budget and write a run folder; `attached` has the new adapter.

    Args:
        attached: what `attach` gave.
        inputs: the rows, [rows, …], one tensor for each input of the network.
        targets: what `loss` compares with, [rows, …].
        device: the profile, its id or its file.
        loss: of the network's output and the targets of a batch, a mean over its rows, such as
            `torch.nn.functional.cross_entropy`.
        out: the run folder.
        config: settings; what is left open is 20 epochs, batches of at most 16 and 25 times the optimizer's rate for
            language models. What speaks of windows, blocks or objectives is refused; nothing is held out.
        enforce: "governor" stops at the budget; "rlimit" also lets allocations beyond it fail.
        resume: go on where the folder's last checkpoint stands.
        force: replace what an earlier run left in the folder.

    `run.stopped` is "done", "budget", "signal" or "nonfinite"; all but the last can be resumed.

    Raises:
        BudgetError: the plan does not fit; nothing is written.
        DataError: inputs, targets or loss are none.
        ConfigError: a setting means nothing here, or `out` cannot be written.
        CheckpointError: a checkpoint is of another network, rows or settings, or the folder is in use.
    """
    settings = _settings(config or TrainConfig())
    if enforce not in ENFORCEMENTS:
        raise ConfigError(f"enforce = {enforce!r}; choose from {', '.join(ENFORCEMENTS)}.")
    rows = as_rows(inputs, targets)
    plan = plan_module(
        attached, inputs, targets, device, loss=loss, batch_size=settings.batch_size,
        optimizer=settings.optimizer or "adamw",
    )  # fmt: skip
    folder, training = Path(out), attached.training
    with (
        Meter(plan.budget_bytes) as meter,
        Guard(meter, hold_budget=True) as guard,
        open_run(folder, resume=resume, force=force),
    ):
        trainer = _Trainer(attached, rows, loss, plan, settings, folder)
        trainer.restore(latest_checkpoint(folder / CHECKPOINTS)[0])
        write_json(folder / PLAN, {"format_version": FORMAT_VERSION, **plan.to_dict(), "settings": trainer.settings})
        try:
            attached.train()
            stopped = trainer.run(guard, DataLimit(plan.budget_bytes) if enforce == "rlimit" else None)
        finally:
            attached.train(training)
        attached.save(folder)
        write_json(folder / SUMMARY, trainer.summary(stopped, meter, enforce))
    return Run(folder)


def _settings(config: TrainConfig) -> TrainConfig:
    """Raises ConfigError."""
    config = config.checked()
    wrong = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in _SETTINGS and getattr(config, field.name) != field.default
    ]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)} means nothing for a network of your own. Leave it out.")
    return config


class _Trainer:
    """A run between its first step and its last."""

    def __init__(
        self, attached: AttachedModule, rows: tuple[tuple[torch.Tensor, ...], torch.Tensor], loss: Loss,
        plan: ModulePlan, settings: TrainConfig, folder: Path,
    ) -> None:  # fmt: skip
        self.attached, (self.inputs, self.targets), self.loss = attached, rows, loss
        self.plan, self.config, self.folder = plan, settings, folder
        self.parameters = attached.trainable()
        self.optimizer = Optimizer(plan.optimizer, self.parameters, weight_decay=settings.weight_decay)
        self.metrics = Metrics(folder / METRICS)
        self.accumulated = settings.gradient_accumulation_steps or 1
        self.steps_per_epoch = math.ceil(len(self.targets) / (plan.batch_size * self.accumulated))
        epochs = settings.num_epochs or EPOCHS
        self.max_steps = settings.max_steps or math.ceil(epochs * self.steps_per_epoch)
        self.peak_rate = settings.learning_rate or RATE * OPTIMIZERS[plan.optimizer].learning_rate
        self.step = self.skipped = 0
        self.base_sha256 = attached.base_sha256

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint has to agree with."""
        return {
            "base_sha256": self.base_sha256, "rows": len(self.targets), "max_steps": self.max_steps,
            "batch_size": self.plan.batch_size, "gradient_accumulation_steps": self.accumulated,
            "optimizer": self.plan.optimizer, "learning_rate": self.peak_rate,
            **{name: getattr(self.config, name) for name in (
                "weight_decay", "max_grad_norm", "seed", "warmup_ratio", "lr_scheduler_type"
            )},
            "adapter": dataclasses.asdict(self.attached.config) | {
                "target_modules": list(self.attached.config.target_modules or ())
            },
        }  # fmt: skip

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Stand where a checkpoint does. Raises CheckpointError where it is of another run."""
        if checkpoint is not None:
            other = [key for key, value in self.settings.items() if checkpoint.state["settings"].get(key) != value]
            if other:
                raise CheckpointError(
                    f"{checkpoint.folder} was written with another {', '.join(other)}. Resume with the network, rows "
                    f"and settings of the run, or begin another one with force=True."
                )
            tensors = checkpoint.tensors("adapter")
            for name, value in self.parameters.items():
                value.data.copy_(torch.from_numpy(tensors[name]))
            self.optimizer.load(checkpoint.tensors("optim"), int(checkpoint.state["updates"]))
            self.step, self.skipped = checkpoint.step, int(checkpoint.state["skipped"])
        self.metrics.start(self.step, self.step)

    def run(self, guard: Guard, limit: DataLimit | None) -> str:
        """Steps until the last one or until the run has to stop; why it ended."""
        stopped, in_a_row = "done", 0
        while self.step < self.max_steps:
            try:
                in_a_row = 0 if self._step(guard, limit) else in_a_row + 1
            except Stopped as reason:
                stopped = reason.reason
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                stopped = "budget"
            if stopped == "done" and in_a_row == 20:
                stopped = "nonfinite"
            if stopped != "done":
                break
            if self.step % self.steps_per_epoch == 0 and self.step < self.max_steps:
                self._save()
        self.optimizer.drop_gradients()
        self._save()
        return stopped

    def _step(self, guard: Guard, limit: DataLimit | None) -> bool:
        """One optimizer step; whether it changed anything."""
        start = time.perf_counter()
        batches = self._batches()
        self.optimizer.drop_gradients()
        total = 0.0
        seed = int(np.random.SeedSequence([self.config.seed, self.step]).generate_state(1, np.uint64)[0] >> 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for batch in batches:
                guard.check()
                at = torch.from_numpy(batch)
                if limit is None:
                    total += self._backward(at, sum(map(len, batches)))
                else:
                    with limit:
                        total += self._backward(at, sum(map(len, batches)))
        for value in self.parameters.values():
            if value.grad is None:  # a layer that forward() did not come to
                value.grad = torch.zeros_like(value)
        norm = clip_gradients(self.parameters.values(), self.config.max_grad_norm)
        rate = learning_rate(
            self.step, peak=self.peak_rate, warmup_steps=int(self.config.warmup_ratio * self.max_steps),
            max_steps=self.max_steps, schedule=self.config.lr_scheduler_type,
        )  # fmt: skip
        finite = math.isfinite(total) and math.isfinite(norm)
        if finite:
            self.optimizer.step(rate)
        self.skipped += not finite
        self.step += 1
        self.metrics.append(
            step=self.step, loss=total if finite else None, grad_norm=norm if finite else None, learning_rate=rate,
            seconds=time.perf_counter() - start,
        )  # fmt: skip
        return finite

    def _batches(self) -> list[np.ndarray]:
        """The rows of the step, by micro-batch."""
        epoch, index = divmod(self.step, self.steps_per_epoch)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(self.targets))
        count = self.plan.batch_size * self.accumulated
        mine = order[index * count : (index + 1) * count]
        return [mine[at : at + self.plan.batch_size] for at in range(0, len(mine), self.plan.batch_size)]

    def _backward(self, at: torch.Tensor, rows: int) -> float:
        """Add a micro-batch's share of the gradients; its share of the loss."""
        value = mean_loss(self.attached, [part[at] for part in self.inputs], self.targets[at], self.loss)
        share = value * (len(at) / rows)
        share.backward()
        return float(share.detach())

    def _save(self) -> None:
        adapter = {name: value.detach().numpy() for name, value in self.parameters.items()}
        state = {
            "step": self.step, "best_step": None, "updates": self.optimizer.updates, "skipped": self.skipped,
            "settings": self.settings,
        }  # fmt: skip
        save_checkpoint(self.folder / CHECKPOINTS, state, {"adapter": adapter, "optim": self.optimizer.tensors()})

    def summary(self, stopped: str, meter: Meter, enforce: str) -> dict[str, Any]:
        """The certificate."""
        losses = [line["loss"] for line in self.metrics.lines() if line["loss"] is not None][-self.steps_per_epoch :]
        return {
            "format_version": FORMAT_VERSION, "edgetune_version": __version__, "stopped": stopped,
            "device": self.plan.device, "simulated": self.plan.simulated, "steps": self.step,
            "skipped_steps": self.skipped, "train_loss": float(np.mean(losses)) if losses else None,
            "budget_bytes": self.plan.budget_bytes, "predicted_peak_bytes": self.plan.predicted_peak_bytes,
            "measured_peak_bytes": meter.peak_bytes, "enforcement": enforce,
            "trainable_parameters": sum(value.numel() for value in self.parameters.values()),
            "frozen_bytes": self.attached.frozen_nbytes, "settings": self.settings,
        }  # fmt: skip
