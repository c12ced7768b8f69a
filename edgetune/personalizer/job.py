"""What a personalization trains with: the user's settings, what the rows need, and the device's budget, as a plan.

Nothing is conceded and no peak is predicted: the planner does not know this engine's parts. The plan's figures for them
are zero, and null in the summary.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from edgetune import __version__, host
from edgetune.adapters.lora import LoraConfig
from edgetune.bundle import Bundle
from edgetune.checkpoint import PLAN
from edgetune.data import read_rows, split_eval
from edgetune.device import load_device
from edgetune.errors import CheckpointError, ConfigError
from edgetune.memory import MIB, give_back
from edgetune.optimizers import OPTIMIZERS
from edgetune.personalizer.graphs import Description, read_description
from edgetune.planner import DEFAULT_EPOCHS, METHOD, read_budget
from edgetune.planner.plans import FORMAT_VERSION, Plan, TrainConfig
from edgetune.planner.wishes import DEFAULT_BATCH_SIZE, RowFacts, Wishes
from edgetune.tokenizer import load_tokenizer

ENGINE = "ort"
UNPREDICTED = (
    "fits", "floor_bytes", "parts", "peak_moment", "predicted_peak_bytes", "file_backed_bytes", "reserve_bytes",
    "predicted_step_seconds",
)  # fmt: skip


def make_plan(
    bundle: Bundle, *, data: str | Path, eval_data: str | Path | None, adapter: LoraConfig | None,
    config: TrainConfig | None, device: str | Path, budget: str | int, skip_bad: bool,
) -> Plan:  # fmt: skip
    """The plan of a personalization.

    Raises ConfigError for what graphs cannot train, BundleError where there are none, and as `planner.plan`.
    """
    description = read_description(bundle)
    profile = load_device(device)
    budget_name, budget_bytes = read_budget(budget, profile)
    if budget_bytes is None:
        raise ConfigError("budget = 'min': the smallest budget of this engine is not known. Give a number of MiB.")
    model = replace(description.model, max_position_embeddings=description.context_length)
    adapter, config = adapter or LoraConfig(), (config or TrainConfig()).checked()
    _check_supported(adapter, config, description)
    if not (bundle.folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{bundle.folder} has no tokenizer.json to read rows with. Export it from a base that has one."
        )
    facts = _facts(bundle, data, eval_data, config, model.max_position_embeddings, skip_bad)
    length = Wishes(model, adapter, replace(config, batch_size=1), facts).start().max_seq_length
    batch = config.batch_size or 1
    at_once = max(1, min(DEFAULT_BATCH_SIZE // batch, facts.windows(length).learned // batch))
    optimizer = config.optimizer or "adamw"
    return Plan(
        format_version=FORMAT_VERSION, edgetune_version=__version__, device=profile.id, model=str(bundle.folder),
        model_config=model, engine=ENGINE, simulated=False, grid=bundle.manifest["grid"] or "none",
        budget_name=budget_name, budget_bytes=budget_bytes, device_budget_bytes=profile.memory.budget_mib * MIB,
        reserve_bytes=0, floor_bytes=0, parts={}, peak_moment="backward", predicted_peak_bytes=0, file_backed_bytes=0,
        fits=True, concessions=(), method=METHOD, adapter=adapter.resolved(model), step_rule="backprop",
        optimizer=optimizer, batch_size=batch,
        gradient_accumulation_steps=config.gradient_accumulation_steps or at_once, max_seq_length=length,
        recompute_layers=model.num_hidden_layers, tile_weights=model.largest_linear, activation_offloading=False,
        dequantized_layers=0, feature_cache_bytes=0, max_steps=config.max_steps,
        num_epochs=config.num_epochs or DEFAULT_EPOCHS, warmup_steps=None, warmup_ratio=config.warmup_ratio,
        learning_rate=config.learning_rate or OPTIMIZERS[optimizer].learning_rate,
        lr_scheduler_type=config.lr_scheduler_type, weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm, eval_fraction=0.0 if eval_data is not None else config.eval_fraction,
        seed=config.seed, threads=min(profile.compute.threads, host.threads()), predicted_step_seconds=0.0,
        predicted_run_seconds=None, predicted_energy_mwh=None, fits_training_window=None,
        slice_seconds=profile.duty.slice_s, grace_seconds=profile.duty.grace_s, num_slices=None,
    )  # fmt: skip


def old_plan(run: str | Path) -> Plan:
    """The plan of a run that goes on. Raises CheckpointError where there is none, ConfigError of another engine's."""
    try:
        plan = Plan.from_dict(json.loads((Path(run) / PLAN).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{run} cannot be resumed: {error}. Give the folder that --out named.") from error
    if plan.engine != ENGINE:
        raise ConfigError(f"{run} was trained by the {plan.engine} engine. Go on with `edgetune train --resume`.")
    return plan


def sliced(plan: Plan, slice_seconds: int | None, grace_seconds: float | None) -> Plan:
    """The plan with another slice of time and grace, where given. Raises ConfigError where they are none."""
    for name, value in (("slice_seconds", slice_seconds), ("grace_seconds", grace_seconds)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} = {value}; a number of seconds above 0 was expected.")
    return replace(
        plan,
        slice_seconds=plan.slice_seconds if slice_seconds is None else slice_seconds,
        grace_seconds=plan.grace_seconds if grace_seconds is None else grace_seconds,
    )


def _check_supported(adapter: LoraConfig, config: TrainConfig, description: Description) -> None:
    """Raises ConfigError for settings that the graphs do not have."""
    wanted = {
        "lora_dropout": bool(adapter.lora_dropout),
        "step_rule": config.step_rule not in (None, "backprop"),
        "recompute_layers": config.recompute_layers is not None,
        "activation_offloading": bool(config.activation_offloading),
    }
    refused = [name for name, asked in wanted.items() if asked]
    if refused:
        raise ConfigError(
            f"{', '.join(refused)} cannot be set here: training graphs have no dropout, and compute every block again. "
            "Leave that out, or use `edgetune train`."
        )
    if config.optimizer not in (None, *description.optimizers):
        raise ConfigError(
            f"optimizer = {config.optimizer!r}; the bundle has graphs for {', '.join(description.optimizers)}."
        )


def _facts(
    bundle: Bundle, data: str | Path, eval_data: str | Path | None, config: TrainConfig, most: int, skip_bad: bool
) -> RowFacts:
    """The rows, divided as training will divide them."""
    tokenizer, length = load_tokenizer(bundle.folder), config.max_seq_length or most
    rows = read_rows(data, tokenizer, length, skip_bad=skip_bad)
    if eval_data is None:
        learned, held_out = split_eval(rows, config.eval_fraction, config.seed)
    else:
        learned, held_out = rows, read_rows(eval_data, tokenizer, length, skip_bad=skip_bad)
    give_back()
    return RowFacts(learned.rows, held_out.rows, rows.kind == "text")
