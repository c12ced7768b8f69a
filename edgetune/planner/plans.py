"""What a plan is: the wishes that it starts from, the numbers that it fixes, its JSON and its table for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Annotated, Any

from edgetune import __version__
from edgetune.adapters import METHODS
from edgetune.adapters.config import AdapterConfig
from edgetune.errors import ConfigError
from edgetune.memory import format_mib
from edgetune.models import ModelConfig
from edgetune.models.encoder_config import EncoderConfig
from edgetune.objectives import ENCODER_OBJECTIVES, OBJECTIVES, has_head
from edgetune.optimizers import OPTIMIZERS
from edgetune.schema import Key, Reader

__all__ = ["Concession", "Plan", "TrainConfig"]

FORMAT_VERSION = 1
STEP_RULES = ("backprop", "mezo")
_EVERY: dict[str, ModuleType] = {**OBJECTIVES, **ENCODER_OBJECTIVES}
# Setting of an objective -> the objectives that have it.
OBJECTIVE_SETTINGS = {
    name: [other for other, module in OBJECTIVES.items() if name in module.SETTINGS]
    for module in OBJECTIVES.values()
    for name in module.SETTINGS
}


@dataclass(frozen=True)
class TrainConfig:
    """What the user asks of training. None means "not set": the plan chooses, and may concede it to the budget."""

    objective: Annotated[
        str,
        Key(f"{', '.join(OBJECTIVES)}, or of an encoder {', '.join(ENCODER_OBJECTIVES)}", choices=tuple(_EVERY)),
    ] = "sft"
    temperature: Annotated[float | None, Key("softens teacher and student of distill", 1e-3, 1e3)] = None
    distill_weight: Annotated[
        float | None, Key("share of the teacher in the loss of distill; the rest is the rows'", 0, 1)
    ] = None
    beta: Annotated[
        float | None, Key("how hard dpo and kto hold to the base; of orpo, the odds ratio's weight", 1e-6, 1e6)
    ] = None
    label_smoothing: Annotated[float | None, Key("share of pairs that dpo takes for labeled wrongly", 0, 0.5)] = None
    batch_size: Annotated[int | None, Key("windows of one forward pass (micro-batch)", 1, 4096)] = None
    gradient_accumulation_steps: Annotated[int | None, Key("micro-batches of an optimizer step", 1, 1 << 20)] = None
    max_seq_length: Annotated[int | None, Key("tokens of a window", 2, 1 << 20)] = None
    recompute_layers: Annotated[int | None, Key("blocks computed again in backward", 0, 1 << 16)] = None
    activation_offloading: Annotated[bool | None, Key("keep the inputs of the blocks on disk, beside the run")] = None
    fast_products: Annotated[bool | None, Key("the processor's widest vectors; their code takes memory")] = None
    step_rule: Annotated[
        str | None, Key("backprop, or mezo: inference memory, but it learns slowly", choices=STEP_RULES)
    ] = None
    num_epochs: Annotated[float | None, Key("passes over the rows", 1e-6, 1e6)] = None
    max_steps: Annotated[int | None, Key("optimizer steps, whatever the epochs", 1, 1 << 40)] = None
    optimizer: Annotated[str | None, Key(f"one of {', '.join(OPTIMIZERS)}", choices=tuple(OPTIMIZERS))] = None
    learning_rate: Annotated[float | None, Key("peak of the schedule; unset, the method's own", 1e-12, 100)] = None
    lr_scheduler_type: Annotated[str, Key("after the warm-up", choices=("cosine", "linear", "constant"))] = "cosine"
    warmup_ratio: Annotated[float, Key("share of the steps over which the rate rises", 0, 1)] = 0.03
    weight_decay: Annotated[float, Key("decay of the adapter's weights", 0, 100)] = 0.0
    max_grad_norm: Annotated[float, Key("gradients are clipped to this norm", 1e-12, 1e12)] = 1.0
    eval_fraction: Annotated[float, Key("share of the rows held out where no other rows are given", 0, 0.9)] = 0.1
    early_stopping_patience: Annotated[
        int | None, Key("end after so many evaluations, ten of a run, without a lower held-out loss", 1, 1 << 20)
    ] = None
    retention_share: Annotated[float | None, Key("share of the retention rows among a step's windows", 1e-3, 0.9)] = (
        None
    )
    kl_weight: Annotated[
        float | None, Key("how much the divergence from the base on --kl-data adds to the loss", 1e-6, 1e6)
    ] = None
    seed: Annotated[int, Key("fixes the adapter's start, the order of the rows and dropout", 0, (1 << 63) - 1)] = 0

    def checked(self) -> TrainConfig:
        """The same config.

        Raises:
            ConfigError: values are of another type or out of range; the message lists all of them.
        """
        reader = Reader()
        made = reader.read(TrainConfig, dataclasses.asdict(self))
        if made is None:
            raise ConfigError("the training settings cannot be used:\n" + _listed(reader.problems))
        made._check_objective()
        made._check_beside()
        return made

    @property
    def objective_settings(self) -> dict[str, Any]:
        """Every setting that belongs to some objective: this one's with its defaults filled in, the others' None."""
        defaults, given = _EVERY[self.objective].SETTINGS, {name: getattr(self, name) for name in OBJECTIVE_SETTINGS}
        return {name: defaults.get(name) if value is None else value for name, value in given.items()}

    def _check_objective(self) -> None:
        known = _EVERY[self.objective].SETTINGS
        for name, of in OBJECTIVE_SETTINGS.items():
            if name not in known and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} = {getattr(self, name):g} goes with objective {' or '.join(of)}; this one is "
                    f"{self.objective}. Leave one of the two out."
                )

    def _check_beside(self) -> None:
        if self.objective in ENCODER_OBJECTIVES or has_head(self.objective):
            asked = [name for name in ("retention_share", "kl_weight") if getattr(self, name) is not None]
            if asked:
                raise ConfigError(
                    f"{', '.join(asked)} cannot be set with objective {self.objective}: a trained head has neither. "
                    "Put rows to stay good at among those of --data."
                )
            return
        needs = OBJECTIVES[self.objective].Objective
        if self.retention_share is not None and (needs.needs_reference or needs.needs_teacher):
            raise ConfigError(
                f"retention_share = {self.retention_share:g}; {self.objective} learns from what a model said of its "
                "rows, and of others nothing is recorded. Hold to the base with --kl-data instead."
            )
        if self.kl_weight is not None and self.step_rule == "mezo":
            raise ConfigError(
                f"kl_weight = {self.kl_weight:g}; it needs gradients, and mezo has none. Leave step_rule out, or mix "
                "rows in with --retention-data."
            )


@dataclass(frozen=True)
class Concession:
    """A setting that the budget changed, and why."""

    setting: str
    wanted: str
    given: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """Every number that the trainer uses, and where every byte of its peak goes."""

    format_version: int
    edgetune_version: str
    device: str
    model: str
    model_config: ModelConfig
    engine: str
    simulated: bool
    """The device does not run this engine itself; this machine stands in for it."""
    grid: str
    budget_name: str
    """foreground, background, given (a number of MiB) or min."""
    budget_bytes: int
    device_budget_bytes: int
    """What the profile allows in the foreground; `budget_bytes` may be more only where the user set it."""
    reserve_bytes: int
    """What the prediction may be off by: the plan leaves that much of the budget free."""
    floor_bytes: int
    """The process after its imports and before any model."""
    parts: dict[str, int]
    """Part -> bytes at the moment of the peak; the floor is one, and they add up to `predicted_peak_bytes`."""
    peak_moment: str
    predicted_peak_bytes: int
    file_backed_bytes: int
    """The mapped base: in the page cache, not in the budget."""
    fits: bool
    concessions: tuple[Concession, ...]
    method: Annotated[str, Key("the adapter's", choices=tuple(METHODS))]
    adapter: AdapterConfig
    objective: str
    beta: float | None
    """None, as the others of its kind, where the objective has no such setting."""
    label_smoothing: float | None
    temperature: float | None
    distill_weight: float | None
    classes: tuple[str, ...]
    """Of a classification: the names of the class numbers, as the rows gave them."""
    step_rule: str
    """backprop, or mezo, whose optimizer is sgd."""
    optimizer: str
    batch_size: int
    gradient_accumulation_steps: int
    max_seq_length: int
    recompute_layers: int
    """Blocks, from the lowest adapted one on, that are computed again in backward; the rest keep their activations."""
    tile_weights: int
    """Weights that are dequantized at once, of a block's matrix or of the head."""
    activation_offloading: bool
    """The inputs of the blocks go to a file beside the run, in every step."""
    dequantized_layers: int
    """Blocks, from the top, whose weights stay dequantized in float32 from the first step to the last."""
    fast_products: bool
    """Products whose shapes come in every step use the processor's widest vectors, where that is exact; their code
    takes memory (`edgetune.products`)."""
    arena_bytes: int
    """The range of addresses that training graphs allocate in, of which `parts` has what is touched; 0 of torch."""
    feature_cache_bytes: int
    """The most storage that a cache of the frozen lower blocks' outputs takes; 0 is no cache."""
    max_steps: int | None
    """None until the rows are known: see `with_steps`."""
    num_epochs: float
    """Counts where the user set no `max_steps`."""
    warmup_steps: int | None
    warmup_ratio: float
    learning_rate: float
    lr_scheduler_type: str
    weight_decay: float
    max_grad_norm: float
    eval_fraction: float
    early_stopping_patience: int | None
    retention_share: float | None
    """None where there are no retention rows."""
    kl_weight: float | None
    """None where nothing holds the model to its base."""
    seed: int
    threads: int
    predicted_step_seconds: float
    predicted_run_seconds: float | None
    predicted_energy_mwh: float | None
    fits_training_window: bool | None
    """Whether the run ends within the seconds that the profile grants per day; None while its length is unknown."""
    slice_seconds: int
    """The longest uninterrupted run that the profile grants; `train` keeps to it where asked for one slice."""
    grace_seconds: float
    """From the end of a slice to the kill."""
    num_slices: int | None
    """Slices that the run takes; None while its length is unknown, and where no step ends inside one."""

    @property
    def exceeds_device(self) -> bool:
        """Whether the peak is above what the device allows: the user asked for a larger budget."""
        return self.predicted_peak_bytes + self.reserve_bytes > self.device_budget_bytes

    @property
    def objective_words(self) -> list[str]:
        """The objective and its settings, for people."""
        return [self.objective, *(f"{name} {getattr(self, name):g}" for name in _EVERY[self.objective].SETTINGS)]

    @property
    def unit(self) -> str:
        """What a micro-batch is made of, before its tokens are told."""
        return "rows of up to" if isinstance(self.model_config, EncoderConfig) else "windows of"

    def with_steps(self, num_windows: int) -> Plan:
        """The plan with `max_steps` and `warmup_steps` filled in for so many windows of the task; what is set already
        stays.
        """
        steps = self.max_steps
        if steps is None:
            per_step = self.batch_size * self.gradient_accumulation_steps * (1 - (self.retention_share or 0.0))
            steps = max(1, math.ceil(self.num_epochs * num_windows / per_step))
        warmup = round(self.warmup_ratio * steps) if self.warmup_steps is None else self.warmup_steps
        return replace(self, max_steps=steps, warmup_steps=warmup)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_dict` gave, also after a way through JSON.

        Raises:
            ConfigError: a key is missing, unknown or of another type, the format is newer, or the parts do not add up.
        """
        version = values.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise ConfigError(
                f"this plan has format_version {version}, of edgetune {values.get('edgetune_version')}; "
                f"edgetune {__version__} reads up to {FORMAT_VERSION}. Upgrade edgetune, or plan again."
            )
        reader = Reader()
        method, adapter = values.get("method"), values.get("adapter")
        if method in METHODS and isinstance(adapter, Mapping):
            values = {**values, "adapter": reader.read(METHODS[method].Config, adapter, ("adapter",))}
        made = reader.read(cls, values)
        if made is None:
            raise ConfigError("this is not a plan:\n" + _listed(reader.problems))
        if sum(made.parts.values()) != made.predicted_peak_bytes:
            raise ConfigError(
                f"the parts of this plan add up to {sum(made.parts.values())} bytes, its predicted_peak_bytes is "
                f"{made.predicted_peak_bytes}. It was changed by hand: plan again."
            )
        return made

    def explain(self) -> str:
        """The plan for people: what runs, where every MiB goes, what was conceded and why, how long it takes."""
        return "\n".join([*self._settings(), "", *self._peak(), "", *self._conceded(), "", *self._time()])

    def _settings(self) -> Iterator[str]:
        where = "simulated here: phones and watches have no torch" if self.simulated else "runs there as it is"
        yield f"{self.model} for {self.device}: {self.method} on the {self.grid} grid, engine {self.engine} ({where})"
        brief = f"{self.adapter.brief}, " if self.adapter.brief else ""
        yield f"  adapter     {brief}on {self.adapter.where(self.model_config)}"
        windows = f"{self.batch_size} x {self.gradient_accumulation_steps} {self.unit} {self.max_seq_length} tokens"
        again = f"{self.recompute_layers} blocks computed again"
        if self.step_rule == "mezo":
            again = "two forward passes for each (mezo)"
        disk = ", inputs of the blocks on disk" if self.activation_offloading else ""
        yield f"  step        {windows}, {again}, {self.tile_weights:,} weights dequantized at once{disk}"
        if self.dequantized_layers:
            yield f"              the weights of {self.dequantized_layers} blocks stay dequantized: the budget has room"
        if self.objective != "sft":
            yield f"  objective   {', '.join(self.objective_words)}"
        if self.retention_share is not None:
            yield f"  retention   {self.retention_share:.3g} of the windows are retention rows"
        if self.kl_weight is not None:
            yield f"  base        held to it by {self.kl_weight:g} times the divergence, one micro-batch more a step"
        yield f"  optimizer   {self.optimizer}, learning rate {self.learning_rate:g}"
        if self.fast_products:
            yield "  products    with the processor's widest vectors"
        if self.feature_cache_bytes:
            yield (
                f"  cache       the {self.adapter.first_block} lowest blocks run once over all rows; what they give "
                f"takes {format_mib(self.feature_cache_bytes)} of storage while the run goes on"
            )

    def _peak(self) -> Iterator[str]:
        yield (
            f"Predicted peak {format_mib(self.predicted_peak_bytes)} of {format_mib(self.budget_bytes)} "
            f"({self.budget_name} budget), anonymous + swap, at the {self.peak_moment} of a step"
        )
        for part, size in sorted(self.parts.items(), key=lambda item: -item[1]):
            yield f"  {part:<17} {format_mib(size):>10} {size / self.predicted_peak_bytes:6.1%}"
        yield f"  kept free, for what the prediction may be off by: {format_mib(self.reserve_bytes)}"
        yield f"  mapped from files, not in the budget: {format_mib(self.file_backed_bytes)}"
        if self.exceeds_device:
            yield f"  MORE than the {format_mib(self.device_budget_bytes)} that {self.device} allows"

    def _conceded(self) -> Iterator[str]:
        yield "Conceded to the budget" if self.concessions else "Nothing was conceded to the budget."
        for concession in self.concessions:
            yield f"  {concession.setting}: {concession.wanted} -> {concession.given}  ({concession.reason})"

    def _time(self) -> Iterator[str]:
        yield f"Predicted for {self.device}: {self.predicted_step_seconds:.3g} s per step"
        if self.predicted_run_seconds is None or self.predicted_energy_mwh is None:
            yield "  the whole run: unknown without --data or --max-steps"
            return
        slices = f"in {self.num_slices} slice{'' if self.num_slices == 1 else 's'}"
        if self.num_slices is None:
            slices = f"NO step ends inside a slice of {self.slice_seconds} s"
        inside = "inside" if self.fits_training_window else "NOT inside"
        yield (
            f"  {self.max_steps:,} steps in {_duration(self.predicted_run_seconds)}, "
            f"{self.predicted_energy_mwh:,.0f} mWh, {inside} the training window of one day, {slices}"
        )


def _listed(problems: list[str]) -> str:
    return "\n".join(f"  {problem}" for problem in problems[:20])


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
