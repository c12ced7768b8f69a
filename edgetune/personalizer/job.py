"""What a personalization trains with: the user's settings, what the rows need, and the device's budget, as a plan.

The planner makes it, as for any training; what is known here is the bundle, its graphs and how long its windows may be.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from edgetune.adapter_file import split_bytes
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.bundle import Bundle
from edgetune.checkpoint import PLAN
from edgetune.device import load_device
from edgetune.errors import CheckpointError, ConfigError
from edgetune.personalizer.graphs import read_description
from edgetune.planner import Source, check_engine, make, read_budget, read_facts
from edgetune.planner.plans import Plan, TrainConfig
from edgetune.planner.wishes import RowFacts, Wishes

ENGINE = "ort"


def make_plan(
    bundle: Bundle, *, data: str | Path, eval_data: str | Path | None, adapter: AdapterConfig | None,
    config: TrainConfig | None, device: str | Path, budget: str | int, skip_bad: bool,
) -> Plan:  # fmt: skip
    """The plan of a personalization.

    Raises ConfigError for what graphs cannot train, BundleError where there are none, and as `planner.plan`.
    """
    description = read_description(bundle)
    profile = load_device(device)
    named_budget = read_budget(budget, profile)
    model = replace(description.model, max_position_embeddings=description.context_length)
    config = (config or TrainConfig()).checked()
    if eval_data is not None:
        config = replace(config, eval_fraction=0.0)
    _check_default(bundle)
    source = Source(
        str(bundle.folder), bundle.folder, bundle.manifest["grid"] or "none",
        sum(tensor.nbytes for tensor in description.tensors.values()),
        active_adapter_bytes=split_bytes(bundle.adapter_tensors(), bundle.slots),
    )  # fmt: skip
    wishes = Wishes(model, adapter or LoraConfig(), config, RowFacts(), ENGINE)
    check_engine(wishes, source.grid)
    if not (bundle.folder / "tokenizer.json").is_file():
        raise ConfigError(
            f"{bundle.folder} has no tokenizer.json to read rows with. Export it from a base that has one."
        )
    facts = read_facts(data, eval_data, bundle.folder, model, config, skip_bad, wishes.adapter.resolved(model))
    return make(source, profile, replace(wishes, facts=facts), *named_budget)


def _check_default(bundle: Bundle) -> None:
    """Raises ConfigError where the adapter in use is none that training graphs can compute the loss of."""
    name = bundle.default_adapter
    if name is None:
        return
    binding = bundle.adapters[name].binding
    others = {
        "a prefix": binding.virtual_tokens, "a bottleneck": binding.activation, "a LoReFT": binding.positions,
        "an LST": binding.reduction,
    }  # fmt: skip
    if kind := next((kind for kind, said in others.items() if said), None):
        raise ConfigError(
            f"adapter {name}, the default of {bundle.folder}, is {kind}, and the training graphs know LoRA alone: what "
            f"is trained could not be compared with it. Choose another with `edgetune adapter default`."
        )


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
