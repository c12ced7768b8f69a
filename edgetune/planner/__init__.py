"""The planner: from a model, a device and wishes to a plan that fits the device's budget, or a refusal.

It starts from what the user asked for, and from defaults where nothing was asked. While the peak does not fit, it goes
down the ladder of concessions (`ladder`). What the user set is never conceded; where that makes the job too large,
`BudgetError` says what would fit. Recomputation alone is taken back at the end, as far as the budget then allows,
because it costs nothing but time; what is left then keeps weights dequantized, which saves a little more.

Step time and energy follow from the profile by a roofline over the engine's own work (`work.step_work`,
`ort_work.step_work`): they are predictions for the device, not for the machine that plans.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgetune import __version__, host
from edgetune.adapters import METHODS
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.head import SCORE, score_shapes
from edgetune.adapters.lora import LoraConfig
from edgetune.base import AnyBase, EncoderBase, open_any_base
from edgetune.data import Rows, read_rows, split_eval
from edgetune.data.labeled import KIND_OF, LabeledRows, read_labeled_rows, with_targets
from edgetune.device import DeviceProfile, load_device
from edgetune.errors import BudgetError, ConfigError
from edgetune.grids import GRIDS
from edgetune.hub import model_folder
from edgetune.memory import FLOOR_BYTES, MIB, format_mib, give_back, measure_floor
from edgetune.models.config import DecoderConfig
from edgetune.objectives import OBJECTIVES, has_head, with_needed
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner import ort_parts, ort_work
from edgetune.planner.beside import NONE, Beside
from edgetune.planner.costs import FREE_SHARE, copied_bytes, feature_bytes, peak_parts, spare_bytes, stored_bytes
from edgetune.planner.encoders import TextFacts, TextWishes, check_encoder, read_text_facts
from edgetune.planner.job import Job
from edgetune.planner.ladder import SETTINGS, Choice, descend
from edgetune.planner.plans import FORMAT_VERSION, Concession, Plan, TrainConfig
from edgetune.planner.wishes import ORT_HAS, ORT_OPTIMIZERS, RowFacts, Windows, Wishes
from edgetune.planner.work import lower_work, reference_work, step_work
from edgetune.tokenizer import load_tokenizer

__all__ = ["Concession", "Plan", "TrainConfig", "plan", "why_untrainable"]

# Engine -> the parts of its peak, and the work of a step.
ENGINES = {"torch": peak_parts, "ort": ort_parts.peak_parts}
STEP_WORK = {"torch": step_work, "ort": ort_work.step_work}
DEFAULT_EPOCHS = 3.0
DEFAULT_TEACHER_TOKENS = 64  # of each position, where no record says how many
# The prediction may be off by this share of the whole, and this one of what is above the floor.
MARGIN, MARGIN_ABOVE_FLOOR = 0.02, 0.05
# What SmolLM2-135M takes above the floor with everything conceded: no model of usual size takes less.
LEAST_ROOM = 16 * MIB


def plan(
    model: str | Path,
    device: str | Path | DeviceProfile,
    *,
    data: str | Path | Rows | None = None,
    eval_data: str | Path | None = None,
    retention_data: str | Path | None = None,
    kl_data: str | Path | None = None,
    adapter: AdapterConfig | None = None,
    config: TrainConfig | None = None,
    grid: str | None = None,
    engine: str | None = None,
    budget: str | int = "foreground",
    skip_bad: bool = False,
) -> Plan:
    """Fit the training of an adapter into a device's memory budget.

    Args:
        model: a model folder, a base/ folder or a Hub id.
        device: a profile, its id or its TOML file.
        data: rows to learn from; with them the window, the number of steps and the time of the run are known.
        eval_data: rows to evaluate on; None is the `eval_fraction` of the data.
        retention_data: rows to stay good at, mixed in at `retention_share`, 0.25 where that is not set.
        kl_data: texts on which the base holds the model, by `kl_weight`, 1 where that is not set.
        adapter: the adapter that is wanted; what it leaves open may be conceded.
        config: the training that is wanted; what it leaves open may be conceded.
        grid: "int4" or "nf4"; None is that of a base/ folder, else the device's.
        engine: "torch" or "ort"; None is torch, and ort where torch does not fit and its floor is the reason.
        budget: "foreground", "background", MiB as an int, or "min": the fewest MiB that this job fits.
        skip_bad: leave bad rows out, up to 1 %.

    Raises:
        BudgetError: nothing fits; the message says what is missing and what would fit.
        ConfigError: a setting is out of its range, or engine, grid or budget are unknown.
        DataError, DeviceError, ModelError: from reading rows, profile and model.
    """
    if engine not in (None, *ENGINES):
        raise ConfigError(f"engine = {engine!r}; edgetune {__version__} has {', '.join(ENGINES)}.")
    profile = device if isinstance(device, DeviceProfile) else load_device(device)
    base = open_any_base(model_folder(model))
    named_budget = read_budget(budget, profile)
    beside = Beside.of(retention_data, kl_data)
    config = beside.completed(config or TrainConfig()).checked()
    if data is not None:
        beside.check(config)
    if eval_data is not None:  # then all of `data` is learned
        config = replace(config, eval_fraction=0.0)
    wishes = _wishes(base, data, eval_data, adapter or LoraConfig(), config, engine, skip_bad, beside)

    def made(engine: str) -> Plan:
        on_grid = _grid("int4" if engine == "ort" and grid is None and base.grid is None else grid, base, profile)
        source = Source(str(model), base.folder, on_grid, stored_bytes(base, on_grid), copied_bytes(base))
        return make(source, profile, replace(wishes, engine=engine), *named_budget)

    try:
        return made(engine or "torch")
    except BudgetError as refusal:
        floors = {name: measure_floor(name, _threads(profile)) for name in ENGINES}
        if engine is not None or isinstance(wishes, TextWishes) or floors["ort"] >= floors["torch"]:
            raise
        try:
            other = made("ort")
        except (BudgetError, ConfigError):
            raise refusal from None
    floor, allowed = format_mib(floors["torch"]), format_mib(other.budget_bytes)
    why = f"torch does not fit: its floor alone is {floor}, {allowed} are allowed"
    return replace(other, concessions=(Concession("engine", "torch", "ort", why), *other.concessions))


def _wishes(
    base: AnyBase[Any], data: str | Path | Rows | None, eval_data: str | Path | None, adapter: AdapterConfig,
    config: TrainConfig, engine: str | None, skip_bad: bool, beside: Beside,
) -> Wishes:  # fmt: skip
    """What was asked for, of the rows that were given."""
    if not isinstance(base, EncoderBase):
        if config.objective not in OBJECTIVES:
            raise ConfigError(
                f"objective = {config.objective!r} takes an encoder, and {base.folder} is a decoder "
                f"({base.config.model_type}). Give a model such as MiniLM; a decoder has {', '.join(OBJECTIVES)}."
            )
        if config.objective == "classification" and data is None:
            raise ConfigError("objective = 'classification' needs rows: its classes come from them. Give --data.")
        resolved = adapter.resolved(base.config)
        if config.kl_weight is not None and resolved.prompt_positions is not None:
            raise ConfigError(
                f"kl_weight = {config.kl_weight:g}; it is measured on texts, and {resolved.method} changes positions "
                "of a prompt, which these do not have. Choose another adapter, or give rows to --retention-data."
            )
        facts = read_facts(data, eval_data, base.folder, base.config, config, skip_bad, resolved, beside)
        return Wishes(base.config, adapter, config, facts)
    check_encoder(config, adapter, engine, data is not None)
    assert data is not None and (isinstance(data, (str, Path, LabeledRows)))
    return TextWishes(
        base.config, adapter, config, read_text_facts(data, eval_data, base.folder, base.config, config, skip_bad)
    )


@dataclass(frozen=True)
class Source:
    """What is trained on: a base as it will be on its grid, or the bundle of one."""

    name: str
    folder: Path
    """With the tokenizer."""
    grid: str
    file_backed_bytes: int
    copied_bytes: int = 0
    active_adapter_bytes: int = 0


def make(source: Source, profile: DeviceProfile, wishes: Wishes, budget_name: str, budget_bytes: int | None) -> Plan:
    """The plan for wishes whose rows are read; see `plan`. Bytes None is the smallest budget.

    Raises:
        BudgetError, ConfigError: as `plan`.
    """
    check_engine(wishes, source.grid)
    threads = _threads(profile)
    costs = _Costs(source, threads, measure_floor(wishes.engine, threads), wishes, profile.storage.free_mib * MIB)
    if budget_bytes is None:  # the least number of MiB; from here on as if that had been given
        *_, smallest = descend(wishes.start(), wishes.freedom)
        budget_bytes = -(-costs.needed_bytes(smallest) // MIB) * MIB
    walked = list(_walk(wishes, costs, budget_bytes))
    if costs.needed_bytes(walked[-1]) > budget_bytes:
        raise BudgetError(_refusal(wishes, costs, budget_bytes, profile, budget_name, Path(source.name).name))
    choice = walked[-1]
    choice = _less_recomputation(wishes, costs, choice, budget_bytes)
    if wishes.engine == "torch" and not choice.adapter.thaws:
        choice = _more_dequantized(costs, choice, budget_bytes)
    concessions = _concessions(walked, choice, costs, budget_name, budget_bytes)
    return _made(source, profile, wishes, costs, choice, budget_name, budget_bytes, concessions)


def check_engine(wishes: Wishes, grid: str) -> None:
    """Raises ConfigError for what the engine does not train, or the ort engine's graphs do not have."""
    METHODS[wishes.adapter.method].CAPABILITIES.require(f"train_{wishes.engine}", ConfigError)
    if wishes.adapter.own and (decay := wishes.config.weight_decay):
        raise ConfigError(
            f"weight_decay = {decay}; {wishes.adapter.method} trains the model's own tensors, which decay would draw "
            "to zero, not to what they were. Leave it out, or train another adapter."
        )
    if wishes.engine != "ort":
        return
    asked = vars(wishes.adapter) | vars(wishes.config)
    refused = [name for name, values in ORT_HAS.items() if asked[name] not in values]
    if refused:
        raise ConfigError(
            f"{', '.join(refused)} cannot be set here: training graphs learn by sft from one file, know one rank and "
            "an adapter that does nothing at first, and have neither dropout nor a file for what a step keeps. Leave "
            "that out, or use `edgetune train` (engine torch)."
        )
    if (optimizer := asked["optimizer"]) not in (None, *ORT_OPTIMIZERS):
        raise ConfigError(f"optimizer = {optimizer!r}; training graphs have {', '.join(ORT_OPTIMIZERS)}.")
    if grid == "nf4":
        raise ConfigError("grid = 'nf4'; no standard operator dequantizes it, so the ort engine takes int4 alone.")


def _threads(profile: DeviceProfile) -> int:
    return min(profile.compute.threads, host.threads())


def _grid(grid: str | None, base: AnyBase[Any], profile: DeviceProfile) -> str:
    if grid is not None and grid not in GRIDS:
        raise ConfigError(f"grid = {grid!r}; choose from {', '.join(GRIDS)}.")
    if grid is not None and base.grid not in (None, grid):
        raise ConfigError(f"{base.folder} is on the {base.grid} grid already, not on {grid}. Leave --grid out.")
    return base.grid or grid or profile.runtime.grid


def read_budget(budget: str | int, profile: DeviceProfile) -> tuple[str, int | None]:
    """The budget's name and its bytes on a device; `min` has none before the plan is made.

    Raises:
        ConfigError: it is none of foreground, background, min, or MiB that the device has.
    """
    memory = profile.memory
    named = {"foreground": memory.budget_mib, "background": memory.budget_background_mib}
    if budget == "min":
        return "min", None
    if isinstance(budget, str) and budget in named:
        return budget, named[budget] * MIB
    if type(budget) is int and 0 < budget <= memory.total_mib:
        return "given", budget * MIB
    most = f"the {memory.total_mib} of {profile.id}"
    raise ConfigError(f"budget = {budget!r}; expected foreground, background, min, or MiB from 1 to {most}.")


def why_untrainable(profile: DeviceProfile) -> str | None:
    """Why no model of usual size trains in front on a device, and what to do instead; None where some do.

    It goes by the engines' floors as they were measured once (`memory.FLOOR_BYTES`), so it asks for no engine here.
    """
    engine = min(ENGINES, key=FLOOR_BYTES.__getitem__)
    budget = profile.memory.budget_mib * MIB
    if budget - FLOOR_BYTES[engine] >= LEAST_ROOM:
        return None
    return (
        f"No engine trains a model of usual size on {profile.id}: of the {format_mib(budget)} that it allows, the "
        f"floor of {engine} alone takes about {format_mib(FLOOR_BYTES[engine])}. Train for another device of `edgetune "
        f"devices`, then ship the bundle to this one: edgetune export run/ --device {profile.id} --out bundle/"
    )


def read_facts(
    data: str | Path | Rows | None, eval_data: str | Path | None, folder: Path, model: DecoderConfig,
    config: TrainConfig, skip_bad: bool, adapter: AdapterConfig, beside: Beside = NONE,
) -> RowFacts:  # fmt: skip
    """The rows to learn from and those held out, divided as training will divide them, and those beside them; virtual
    tokens of the resolved adapter take positions of each.
    """
    if data is None:
        return RowFacts()
    length = (config.max_seq_length or model.max_position_embeddings) - adapter.virtual_tokens

    def read(file: str | Path | Rows, classes: tuple[str, ...] = ()) -> Rows:
        if not isinstance(file, Rows) and config.objective in KIND_OF:
            file = read_labeled_rows(
                file, load_tokenizer(folder), length, config.objective, classes=classes or None, skip_bad=skip_bad
            )
        if isinstance(file, Rows):
            return with_targets(file) if has_head(config.objective) else file
        return with_needed(config.objective, lines(Path(file)), file, model.vocab_size)

    def lines(file: Path) -> Rows:
        rows = read_rows(file, load_tokenizer(folder), length, skip_bad=skip_bad)
        adapter.check_rows(rows.kind, file)
        return rows

    found = read(data)
    classes = found.classes if isinstance(found, LabeledRows) else ()
    rows, held_out = split_eval(found, config.eval_fraction, config.seed)
    if eval_data is not None:
        held_out = read(eval_data, classes)
    parts = beside.read(config.objective, lines, config.seed)
    give_back()
    kept, apart = parts.retention, parts.retention_eval
    return RowFacts(
        rows.rows, held_out.rows, rows.kind == "text", rows.together,
        RowFacts(kept.rows, apart.rows, kept.kind == "text", kept.together) if kept.rows else None,
        RowFacts(parts.anchors.rows, is_text=True) if parts.anchors.rows else None, classes,
    )  # fmt: skip


@dataclass(frozen=True)
class _Costs:
    """What a choice costs, everything else being given."""

    source: Source
    threads: int
    floor_bytes: int
    wishes: Wishes
    free_bytes: int
    """Storage that an app may expect on the device."""

    def job(self, choice: Choice) -> Job:
        """A choice as the cost model wants it."""
        facts, length, tokenizer = self.wishes.facts, choice.max_seq_length, self.source.folder / "tokenizer.json"
        windows = facts.windows(length, choice.resolved.virtual_tokens) if facts.rows else None
        job = Job(
            model=choice.model,
            adapter=choice.resolved,
            optimizer=choice.optimizer,
            grid=self.source.grid if self.source.grid in GRIDS else "int4",  # a dense bundle: its work is no other here
            batch_size=choice.batch_size,
            gradient_accumulation_steps=choice.gradient_accumulation_steps,
            max_seq_length=windows.length if windows else length,
            recompute_layers=choice.recompute_layers,
            tile_weights=choice.tile_weights,
            activation_offloading=choice.activation_offloading,
            dequantized_layers=choice.dequantized_layers,
            step_rule=choice.step_rule,
            threads=self.threads,
            supervised_per_window=windows.supervised if windows else length,
            anchored_per_window=(windows.anchored if windows else length) if self.wishes.config.kl_weight else 0,
            rows_per_window=windows.rows if windows else None,
            num_tokens=facts.num_tokens,
            num_rows=facts.num_rows,
            tokenizer_file_bytes=tokenizer.stat().st_size if tokenizer.is_file() else 0,
            base_copy_bytes=self.source.copied_bytes,
            active_adapter_bytes=self.source.active_adapter_bytes,
            fast_products=choice.fast_products,
            objective=self.wishes.config.objective,
            teacher_tokens=facts.teacher_tokens if facts.rows else DEFAULT_TEACHER_TOKENS,
        )
        if has_head(job.objective) and not isinstance(self.wishes, TextWishes):
            outputs, width = score_shapes(job.objective, facts.classes, choice.model.hidden_size)[SCORE]
            job = replace(job, head_sizes=(outputs * width,), head_floats=3 * job.supervised * outputs)
        if isinstance(self.wishes, TextWishes):
            return self.wishes.fitted(job, choice, self.wishes.config.num_epochs or DEFAULT_EPOCHS)
        return replace(job, cached_windows=self._cached_windows(job, windows)) if windows else job

    def _cached_windows(self, job: Job, windows: Windows) -> int:
        """All windows, where the lowest blocks are frozen, rows are seen again and there is storage; else none."""
        if not job.first_block or self.wishes.engine == "ort":
            return 0
        config = self.wishes.config
        steps = config.max_steps
        per_step = job.batch_size * job.gradient_accumulation_steps
        epochs = (config.num_epochs or DEFAULT_EPOCHS) if steps is None else steps * per_step / windows.learned
        count = windows.learned + windows.held_out + windows.beside
        return count if epochs > 1 and feature_bytes(job, count) <= FREE_SHARE * self.free_bytes else 0

    def parts(self, choice: Choice) -> tuple[str, dict[str, int]]:
        """The moment of the peak, and its parts."""
        return ENGINES[self.wishes.engine](self.job(choice), self.floor_bytes)

    def needed_bytes(self, choice: Choice) -> int:
        """The smallest budget for a choice: the predicted peak, what that may be off by, and what torch's products take
        more beside other programs.
        """
        peak = sum(self.parts(choice)[1].values())
        above = MARGIN_ABOVE_FLOOR * (peak - self.floor_bytes)
        spare = spare_bytes(self.job(choice)) if self.wishes.engine == "torch" else 0
        return math.ceil(peak + MARGIN * peak + above) + spare

    def learning_rate(self, choice: Choice) -> float:
        """The optimizer's own by the method's factor; that of mezo keeps the length of a step, which grows with the
        parameters.
        """
        if choice.step_rule == "mezo":
            return float(sum(self.job(choice).tensor_sizes) ** -0.5)
        return OPTIMIZERS[choice.optimizer].learning_rate * choice.adapter.rate_factor


def _walk(wishes: Wishes, costs: _Costs, budget_bytes: int) -> Iterator[Choice]:
    """Down the ladder: every choice to the first that fits, or to the end where there is none."""
    for choice in descend(wishes.start(), wishes.freedom):
        yield choice
        if costs.needed_bytes(choice) <= budget_bytes:
            return


def _less_recomputation(wishes: Wishes, costs: _Costs, choice: Choice, budget_bytes: int) -> Choice:
    """The same choice with as few blocks computed again as fit, where the user left that open."""
    if "recompute_layers" not in wishes.freedom.settings:
        return choice
    fewer = (replace(choice, recompute_layers=layers) for layers in range(choice.recompute_layers))
    return next((other for other in fewer if costs.needed_bytes(other) <= budget_bytes), choice)


def _more_dequantized(costs: _Costs, choice: Choice, budget_bytes: int) -> Choice:
    """The same choice with the weights of as many blocks dequantized for good as still fit.

    Only where no block is computed again: a block's activations are smaller than its weights, and save more time.
    """
    if choice.recompute_layers or choice.step_rule != "backprop":
        return choice
    more = (replace(choice, dequantized_layers=layers) for layers in range(choice.path_layers, 0, -1))
    return next((other for other in more if costs.needed_bytes(other) <= budget_bytes), choice)


def _concessions(
    walked: list[Choice], given: Choice, costs: _Costs, budget_name: str, budget_bytes: int
) -> tuple[Concession, ...]:
    """What differs from the start, in the ladder's order, each with what was needed before it."""
    start, made = walked[0], []
    for setting in SETTINGS:
        wanted = start.value(setting)
        if given.value(setting) == wanted:
            continue
        before = [choice for choice in walked if choice.value(setting) == wanted][-1]
        needed = f"{-(-costs.needed_bytes(before) // MIB):,} MiB with its reserve"
        reason = f"{wanted} needs {needed}; " + (
            "min takes the smallest" if budget_name == "min" else f"{format_mib(budget_bytes)} are allowed"
        )
        if given.gradient_accumulation_steps != start.gradient_accumulation_steps and setting == "batch_size":
            reason += f"; gradient_accumulation_steps {given.gradient_accumulation_steps} keeps the effective batch"
        if given.step_rule == "backprop" and setting == "optimizer":
            if OPTIMIZERS[given.optimizer].rule != OPTIMIZERS[wanted].rule:
                reason += f"; learning_rate {costs.learning_rate(given):g} is its own"
        elif setting == "step_rule":
            reason += f"; it learns far more slowly; learning_rate {costs.learning_rate(given):.2g} is its own"
        made.append(Concession(setting, wanted, given.value(setting), reason))
    return tuple(made)


def _made(
    source: Source, profile: DeviceProfile, wishes: Wishes, costs: _Costs, choice: Choice,
    budget_name: str, budget_bytes: int, concessions: tuple[Concession, ...],
) -> Plan:  # fmt: skip
    """The plan for a choice, with what it predicts for the device."""
    config, facts = wishes.config, wishes.facts
    moment, parts = costs.parts(choice)
    job, storage = costs.job(choice), profile.storage
    step_seconds = STEP_WORK[wishes.engine](job).seconds(profile)
    cache_bytes = feature_bytes(job, job.cached_windows)
    fill_seconds = lower_work(job, job.cached_windows).seconds(profile) + cache_bytes / storage.write_mb_s / 1e6
    if not isinstance(facts, TextFacts) and OBJECTIVES[config.objective].Objective.needs_reference and facts.rows:
        counts = facts.windows(choice.max_seq_length, choice.resolved.virtual_tokens)
        fill_seconds += reference_work(job, counts.learned + counts.held_out).seconds(profile)
    if cache_bytes:
        per_step = choice.batch_size * choice.gradient_accumulation_steps
        step_seconds += feature_bytes(job, per_step) / storage.read_mb_s / 1e6
    made = Plan(
        format_version=FORMAT_VERSION,
        edgetune_version=__version__,
        device=profile.id,
        model=source.name,
        model_config=wishes.model,
        engine=wishes.engine,
        simulated=wishes.engine == "torch" and profile.kind in ("phone", "watch", "glasses"),
        grid=source.grid,
        budget_name=budget_name,
        budget_bytes=budget_bytes,
        device_budget_bytes=profile.memory.budget_mib * MIB,
        reserve_bytes=costs.needed_bytes(choice) - sum(parts.values()),
        floor_bytes=costs.floor_bytes,
        parts=parts,
        peak_moment=moment,
        predicted_peak_bytes=sum(parts.values()),
        file_backed_bytes=source.file_backed_bytes,
        fits=True,
        concessions=concessions,
        method=choice.adapter.method,
        adapter=choice.resolved,
        objective=config.objective,
        **config.objective_settings,
        classes=facts.classes,
        step_rule=choice.step_rule,
        optimizer=choice.optimizer,
        batch_size=choice.batch_size,
        gradient_accumulation_steps=choice.gradient_accumulation_steps,
        max_seq_length=choice.max_seq_length,
        recompute_layers=choice.recompute_layers,
        tile_weights=choice.tile_weights,
        activation_offloading=choice.activation_offloading,
        dequantized_layers=choice.dequantized_layers,
        fast_products=choice.fast_products,
        arena_bytes=ort_parts.arena_bytes(job) if wishes.engine == "ort" else 0,
        feature_cache_bytes=cache_bytes,
        max_steps=config.max_steps,
        num_epochs=config.num_epochs or DEFAULT_EPOCHS,
        warmup_steps=None,
        warmup_ratio=config.warmup_ratio,
        learning_rate=config.learning_rate or costs.learning_rate(choice),
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        eval_fraction=config.eval_fraction,
        early_stopping_patience=config.early_stopping_patience,
        retention_share=config.retention_share,
        kl_weight=config.kl_weight,
        seed=config.seed,
        threads=costs.threads,
        predicted_step_seconds=step_seconds,
        predicted_run_seconds=None,
        predicted_energy_mwh=None,
        fits_training_window=None,
        slice_seconds=profile.duty.slice_s,
        grace_seconds=profile.duty.grace_s,
        num_slices=None,
    )
    if config.max_steps is None and not facts.rows:
        return made
    made = made.with_steps(
        facts.windows(choice.max_seq_length, choice.resolved.virtual_tokens).learned if facts.rows else 0
    )
    assert made.max_steps is not None
    run_seconds = fill_seconds + made.max_steps * step_seconds
    steps_per_slice = int(profile.duty.slice_s // step_seconds)
    return replace(
        made,
        predicted_run_seconds=run_seconds,
        predicted_energy_mwh=run_seconds * profile.power.max_avg_mw / 3600,
        fits_training_window=run_seconds <= profile.duty.daily_s,
        num_slices=math.ceil(fill_seconds / profile.duty.slice_s + made.max_steps / steps_per_slice)
        if steps_per_slice
        else None,
    )


def _refusal(
    wishes: Wishes, costs: _Costs, budget_bytes: int, profile: DeviceProfile, budget_name: str, model: str
) -> str:
    """Why nothing fits, and the nearest that would: one setting, else several, else a budget."""
    *_, smallest = descend(wishes.start(), wishes.freedom)
    needed = costs.needed_bytes(smallest)
    parts = sorted(costs.parts(smallest)[1].items(), key=lambda part: -part[1])[:3]
    fixed = " ".join(f"{_flag(name)} {smallest.value(name)}" for name in wishes.fixed)
    needed_mib = -(-needed // MIB)
    ways = [_nearest(wishes, costs, budget_bytes)]
    if budget_name == "background" and needed_mib <= profile.memory.budget_mib:
        ways.append("--budget foreground")
    elif needed_mib <= profile.memory.total_mib:
        more = needed_mib > profile.memory.budget_mib
        ways.append(f"--budget {needed_mib}" + (f", more than {profile.id} allows" if more else ""))
    found = " or ".join(filter(None, ways))
    return (
        f"{model}{f' with {fixed}' if fixed else ''} needs {format_mib(needed)} to train; {profile.id} allows "
        f"{format_mib(budget_bytes)} ({budget_name}): {format_mib(needed - budget_bytes)} are missing.\n"
        f"Largest parts: {', '.join(f'{name} {format_mib(size)}' for name, size in parts)}.\n"
        + (f"It fits with {found}." if found else f"No setting makes it fit {profile.id}: choose a smaller model.")
        + (f"\n{why}" if (why := why_untrainable(profile)) else "")
    )


def _nearest(wishes: Wishes, costs: _Costs, budget_bytes: int) -> str:
    """The flags that make it fit: the first single setting of the ladder that does, else all that have to change."""
    for names in [*((name,) for name in wishes.fixed), wishes.fixed]:
        others = wishes.without(names)
        *_, end = _walk(others, costs, budget_bytes)
        if costs.needed_bytes(end) <= budget_bytes:
            start = wishes.start()
            return " ".join(
                f"{_flag(name)} {end.value(name)}" for name in names if end.value(name) != start.value(name)
            )
    return ""


def _flag(setting: str) -> str:
    return "--layers" if setting == "layers_to_transform" else "--" + setting.replace("_", "-")
