"""The state of a run and what is done with it: a step, an evaluation, a checkpoint, the end."""

from __future__ import annotations

import math
import platform
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune import __version__
from edgetune.adapters.base import MODEL, save_adapter
from edgetune.adapters.lora import KAIMING
from edgetune.checkpoint import PLAN, Checkpoint, latest_checkpoint, read_checkpoint, save_checkpoint
from edgetune.errors import ConfigError
from edgetune.memory import format_mib
from edgetune.training.batches import Batches, in_batches
from edgetune.training.inputs import Inputs
from edgetune.training.pace import Pace
from edgetune.training.progress import Progress
from edgetune.training.run import (
    CHECKPOINTS,
    METRICS,
    SUMMARY,
    Metrics,
    write_json,
)
from edgetune.training.schedule import learning_rate
from edgetune.training.stop import Guard, NearBudget, Stopped, is_out_of_memory
from edgetune.weights import sha256_file

if TYPE_CHECKING:
    from edgetune.training.forward import Batch
    from edgetune.training.rules import StepRule

MAX_SKIPPED_IN_A_ROW = 20
EVALUATIONS = 10  # of a run, each followed by a checkpoint
CHECKPOINT_STEPS = 50  # the most steps that a crash can cost
_RECENT_STEPS = 20  # the progress bar's speed is their median


@dataclass
class _State:
    """What a checkpoint knows beside tensors."""

    step: int = 0  # completed ones, skipped ones included
    updates: int = 0
    evaluated_step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    best_figures: dict[str, float] = field(default_factory=dict)  # of the objective, beside that loss
    retention_before: float | None = None  # the held-out loss of the retention rows before the first step
    retention_loss: float | None = None  # and with the adapter that is kept
    skipped: int = 0
    skipped_in_a_row: int = 0
    checkpoint_seconds: float = 0.0  # the longest so far
    peak_bytes: int = 0
    peak_rss_bytes: int = 0


class Trainer(ABC):
    """One run: its state, and what is done with it. An engine's own trainer adds the model and how it is computed."""

    rule: StepRule
    held: Sequence[Any] = ()  # what keeps dequantized weights, and can let go of them

    def __init__(
        self, inputs: Inputs, folder: Path, guard: Guard, limit: AbstractContextManager[None],
        pace: Pace, on_progress: Callable[[Progress], None] | None,
    ) -> None:  # fmt: skip
        plan = inputs.plan
        assert plan.max_steps is not None and plan.warmup_steps is not None
        self.plan, self.inputs, self.folder = plan, inputs, folder
        self.max_steps, self.warmup_steps = plan.max_steps, plan.warmup_steps
        self.evaluate_every = max(1, plan.max_steps // EVALUATIONS)
        self.guard, self.meter, self.limit, self.on_progress = guard, guard.meter, limit, on_progress
        self.pace = pace
        self.batches = Batches(
            inputs.windows, batch_size=plan.batch_size,
            gradient_accumulation_steps=plan.gradient_accumulation_steps, seed=plan.seed,
            retention=inputs.retention, retention_share=plan.retention_share or 0.0,
        )  # fmt: skip
        self.state = _State()
        self.updating = False  # inside an update the parameters are of no step
        self.metrics = Metrics(folder / METRICS)
        self.loss: float | None = None  # of the last step
        self.recent: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS)  # tokens and seconds of the last steps

    @abstractmethod
    def tensors(self) -> dict[str, np.ndarray]:
        """The adapter as it is now, under PEFT's names; views, not copies."""

    @abstractmethod
    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Make these the adapter."""

    @abstractmethod
    def measure(self, batches: Iterable[Batch]) -> tuple[float, dict[str, float]]:
        """The mean loss over held-out windows, not finite where there is nothing; and the objective's figures."""

    def held_out(self) -> Iterable[Batch]:
        """The held-out rows in micro-batches; empty where there are none."""
        return in_batches(self.inputs.eval_windows, self.plan.batch_size)

    def write_adapter(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write the adapter's files into the run's folder."""
        save_adapter(self.folder, self.plan.adapter, tensors, str(self.inputs.paths["base"]))

    @abstractmethod
    def release(self) -> None:
        """Give back what a step holds; one that was not finished begins again."""

    def initialize(self) -> None:
        """Give a new run's adapter the first values that the model or the rows decide; refused where none are computed.

        Raises:
            ConfigError: the adapter asks for such values, or they cannot be had.
        """
        asked = getattr(self.plan.adapter, "init_lora_weights", None)
        if asked not in (None, KAIMING):
            raise ConfigError(f"init_lora_weights = {asked!r} is for decoders on the torch engine. Leave it out.")

    def fill_cache(self) -> None:  # noqa: B027 - an engine may have none
        """What comes once before the first step, such as to compute what does not change in a run."""

    def read_on_demand(self) -> None:  # noqa: B027
        """Read no weights ahead: in a cgroup pages on their way from disk count, and cannot be dropped."""

    @property
    def filled(self) -> bool:
        """Whether this process added to such a cache."""
        return False

    def check_step(self) -> None:
        """As `check`, inside a step."""
        self.check()

    def versions(self) -> dict[str, str]:
        """What computed this."""
        return {"edgetune": __version__, "numpy": np.__version__, "python": platform.python_version()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint was made."""
        known = {name: checkpoint.state[name] for name in asdict(self.state)}
        self.state = _State(**known)
        self.load(checkpoint.tensors("adapter"))
        self.rule.load(checkpoint.tensors("optim"), self.state.updates)

    @property
    def done(self) -> tuple[int, int]:
        """Steps made, and the last one that was evaluated."""
        return self.state.step, self.state.evaluated_step

    def check(self) -> None:
        """Raise `Stopped` where the run should not go on; called between blocks."""
        self.guard.check()
        self.pace.check(self.state.checkpoint_seconds)

    def run(self) -> str:
        """Train to the last step or to whatever stops the run before; returns how it ended."""
        write_json(self.folder / PLAN, self.plan.to_dict())
        self.metrics.start(*self.done)
        self.save()
        stopped = "budget"
        try:
            self.fill_cache()
            self.meter.near.clear()  # it may have been near while the rows were read
            for layer in self.held:
                layer.hold()
            self.guard.may_shrink = self.may_shrink
            while True:
                try:
                    return self.to_the_end()
                except NearBudget:
                    kept_layers = self.rule.kept_layers if self.held else self.rule.kept_layers // 2
                except (MemoryError, RuntimeError, OSError) as error:
                    if not is_out_of_memory(error) or self.updating or not self.may_shrink:
                        raise
                    kept_layers = 0
                self.shrink(kept_layers)  # here, where nothing holds the frames of the step any more
        except Stopped as stop:
            stopped = stop.reason
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
        if stopped == "budget":
            self.release()  # for what is written at the end
            if self.may_shrink:
                self.shrink(0)  # so that it may fit when it goes on
        return stopped

    def to_the_end(self) -> str:
        """Steps, evaluations and checkpoints."""
        if self.inputs.retention_eval and self.state.retention_before is None:
            self.state.retention_before = self.state.retention_loss = self.measure_retention()
            self.metrics.append(step=0, eval_loss=None, retention_loss=self.state.retention_before)
            self.save()
        while True:
            self.check()
            if self.evaluation_is_due():
                self.evaluate()
                self.save()
            if self.state.step >= self.max_steps or self.improves_no_more():
                return "done"
            self.one_step()
            if self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                return "nonfinite"
            if self.state.step % CHECKPOINT_STEPS == 0 and not self.evaluation_is_due():
                self.save()

    @property
    def may_shrink(self) -> bool:
        """Whether there is something to give up that changes no bit."""
        return self.rule.kept_layers > 0 or bool(self.held)

    def shrink(self, kept_layers: int) -> None:
        """Let no block keep dequantized weights, and only so many their activations, which changes no bit; an
        unfinished step begins again.

        The plan in the run's folder follows, so that a resumed run does not meet its budget again.
        """
        before = self.plan.recompute_layers
        recompute_layers = before + self.rule.kept_layers - kept_layers
        self.rule.keep_layers(kept_layers)
        for layer in self.held:
            layer.release()
        self.held, held = [], self.plan.dequantized_layers
        self.release()
        self.plan = replace(self.plan, recompute_layers=recompute_layers, dequantized_layers=0)
        self.meter.near.clear()
        self.guard.may_shrink = self.may_shrink
        write_json(self.folder / PLAN, self.plan.to_dict())
        self.metrics.append(
            step=self.state.step, recompute_layers=recompute_layers, recompute_layers_before=before,
            dequantized_layers_before=held, now_bytes=self.meter.now_bytes,
        )  # fmt: skip
        self.tell(
            f"step {self.state.step}: no room left, from here on {recompute_layers} blocks run again, not {before}"
            + (f", and {held} dequantize their weights in every step" if held else "")
        )

    def evaluation_is_due(self) -> bool:
        """Whether this step ends with an evaluation, and has not had it; the last one does."""
        step = self.state.step
        return self.state.evaluated_step < step and (step % self.evaluate_every == 0 or step >= self.max_steps)

    def improves_no_more(self) -> bool:
        """Whether as many evaluations as the plan has patience for found no lower held-out loss."""
        best, patience = self.state.best_step, self.plan.early_stopping_patience
        if best is None or patience is None:
            return False
        return self.state.evaluated_step - best >= patience * self.evaluate_every

    def one_step(self) -> None:
        """One step over all its micro-batches, or none where loss or gradient is not finite."""
        self.pace.begin_step(self.state.checkpoint_seconds)
        started = self.pace.clock()
        plan, step = self.plan, self.state.step
        batches, num_tokens = self.batches.of_step(step)
        with self.limit:
            loss, norm = self.rule.gradient(batches, (plan.seed, step), self.check_step)
        idle_seconds = self.pace.end_step(self.check)
        rate = learning_rate(
            step, peak=plan.learning_rate, warmup_steps=self.warmup_steps, max_steps=self.max_steps,
            schedule=plan.lr_scheduler_type,
        )  # fmt: skip
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.updating = True
            self.rule.update(rate)
            self.updating = False
        else:
            self.rule.drop()
        self.state.step += 1
        self.state.updates += finite
        self.state.skipped += not finite
        self.state.skipped_in_a_row = 0 if finite else self.state.skipped_in_a_row + 1
        seconds = self.pace.clock() - started
        self.recent.append((num_tokens, seconds))
        self.metrics.append(
            step=self.state.step, loss=loss if finite else None, grad_norm=norm if finite else None, learning_rate=rate,
            tokens=num_tokens, seconds=seconds, now_bytes=self.meter.now_bytes, **(self.rule.figures if finite else {}),
            **({} if idle_seconds is None else {"idle_seconds": idle_seconds}),
        )  # fmt: skip
        self.loss = loss if finite else self.loss
        late = self.pace.warning()
        self.tell(late if finite else f"step {self.state.step}: loss or gradient is not finite, skipped")

    def evaluate(self) -> None:
        """Loss over the held-out rows; the best so far is remembered with its step, where a checkpoint follows."""
        if not (self.inputs.eval_windows or self.inputs.eval_rows or self.inputs.retention_eval):
            self.state.evaluated_step = self.state.step
            return
        started = self.pace.clock()
        with self.limit:
            loss, figures = self.measure(self.held_out())
        retention = self.measure_retention()
        self.pace.end_evaluation(started, self.check)
        self.state.evaluated_step = self.state.step  # here, so that one that was stopped is made again
        told = {f"eval_{name}": value for name, value in figures.items()} if math.isfinite(loss) else {}
        beside = {"retention_loss": retention} if self.inputs.retention_eval else {}
        self.metrics.append(step=self.state.step, eval_loss=loss if math.isfinite(loss) else None, **told, **beside)
        if math.isfinite(loss) and (self.state.best_loss is None or loss < self.state.best_loss):
            self.state.best_step, self.state.best_loss, self.state.best_figures = self.state.step, loss, told
        if self.state.best_step in (None, self.state.step):  # the adapter that is kept if the run ends here
            self.state.retention_loss = retention
        self.tell()

    def measure_retention(self) -> float | None:
        """The loss over the held-out retention rows; None where there are none, or it is not finite."""
        if not self.inputs.retention_eval:
            return None
        with self.limit:
            loss, _ = self.measure(in_batches(self.inputs.retention_eval, self.plan.batch_size))
        return loss if math.isfinite(loss) else None

    def save(self) -> None:
        """A checkpoint of the last completed step; a non-finite adapter is none."""
        if not self.is_finite():
            return
        self.state.peak_bytes = max(self.state.peak_bytes, self.meter.peak_bytes)
        self.state.peak_rss_bytes = max(self.state.peak_rss_bytes, self.meter.peak_rss_bytes)
        about = {"identity": self.inputs.identity, "paths": self.inputs.paths, "versions": self.versions()}
        state = {**asdict(self.state), **about}
        tensors = {"adapter": self.tensors(), "optim": self.rule.tensors()}
        started = self.pace.clock()
        save_checkpoint(self.folder / CHECKPOINTS, state, tensors)
        self.state.checkpoint_seconds = max(self.state.checkpoint_seconds, self.pace.clock() - started)

    def is_finite(self) -> bool:
        return all(np.isfinite(value).all() for value in self.tensors().values())

    def finish(self, stopped: str, enforcement: Mapping[str, Any]) -> None:
        """Write what is kept: the best adapter where one was evaluated, else the last finite one; then the summary.

        `enforcement` is what the certificate says of it.
        """
        checkpoints = self.folder / CHECKPOINTS
        finite = self.is_finite()
        if self.updating or not finite:
            stopped = stopped if finite else "nonfinite"
            last, _ = latest_checkpoint(checkpoints)
            assert last is not None, "a run begins with a checkpoint"
            self.restore(last)
        self.save()
        best = self.state.best_step
        tensors = self.tensors() if best is None else read_checkpoint(checkpoints, best).tensors("adapter")
        self.write_adapter(tensors)
        write_json(self.folder / SUMMARY, self.summary(stopped, enforcement))
        if stopped == "budget" and self.state.step == 0:
            self.tell(
                f"the budget of {format_mib(self.plan.budget_bytes)} was used up before the first step "
                f"(peak {format_mib(self.meter.peak_bytes)}); the adapter is the untrained one"
            )

    def summary(self, stopped: str, enforcement: Mapping[str, Any]) -> dict[str, Any]:
        """The certificate: the plan, and what was measured."""
        state = self.state
        return {
            **self.plan.to_dict(),
            "measured_peak_bytes": state.peak_bytes,
            "measured_peak_rss_bytes": state.peak_rss_bytes,
            **enforcement,
            "shrunk": [line for line in self.metrics.lines() if "recompute_layers" in line],
            **({"id2label": {str(i): label for i, label in enumerate(self.plan.classes)}} if self.plan.classes else {}),
            "stopped": stopped,
            "signal": self.guard.signal,
            "steps": state.step,
            "skipped_steps": state.skipped,
            "emulated": self.pace.emulates,
            **self.metrics.figures(emulated=self.pace.emulates),
            "eval_loss": state.best_loss,
            **state.best_figures,
            "best_step": state.best_step,
            "retention_loss_before": state.retention_before,
            "retention_loss": state.retention_loss,
            "trainable_parameters": sum(value.size for value in self.tensors().values()),
            "adapter_bytes": (self.folder / MODEL).stat().st_size,
            "adapter_sha256": sha256_file(self.folder / MODEL),
            **self.inputs.paths,
            **{name: value for name, value in self.inputs.identity.items() if name != "plan"},
            "versions": self.versions(),
        }

    def tell(self, note: str | None = None) -> None:
        """Report where the run stands, or something that happened."""
        if self.on_progress is None:
            return
        seconds = statistics.median(seconds for _, seconds in self.recent) if self.recent else None
        tokens = statistics.fmean(tokens for tokens, _ in self.recent) if self.recent else None
        self.on_progress(
            Progress(
                step=self.state.step,
                steps=self.max_steps,
                loss=self.loss,
                eval_loss=self.state.best_loss,
                tokens_per_second=None if seconds is None or tokens is None else tokens / seconds,
                now_bytes=self.meter.now_bytes,
                peak_bytes=self.meter.peak_bytes,
                budget_bytes=self.plan.budget_bytes,
                seconds_left=None if seconds is None else seconds * (self.max_steps - self.state.step),
                note=note,
            )
        )
