"""The plan of a sensitivity pass: some steps of a training run that never updates (`training.sensitivity`).

It is the plan of that run, with an adapter of COLUMNS ranks at every linear, and one moment, which is where the sums
of the gradients lie: as many bytes as rank 12 has with AdamW's two. So it obeys the same budget, by the same
concessions; where COLUMNS ranks do not fit it is the default rank, which is conceded too. Linears that it concedes are
not measured, and get no rank. Rows beside those of the task have no part in it: where the adapter does nothing yet, the
divergence from the base has no gradient.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.adapters.allocation import check_wishes
from edgetune.adapters.lora import LoraConfig
from edgetune.base import EncoderBase, open_any_base
from edgetune.device import DeviceProfile
from edgetune.errors import BudgetError, ConfigError
from edgetune.hub import model_folder
from edgetune.planner import plan
from edgetune.planner.beside import Beside
from edgetune.planner.plans import Plan, TrainConfig

STEPS = 8
COLUMNS = 16


def plan_pass(
    model: str | Path, device: str | Path | DeviceProfile, *, data: str | Path | None, adapter: LoraConfig,
    config: TrainConfig | None = None, engine: str | None = None, retention_data: str | Path | None = None,
    kl_data: str | Path | None = None, **wishes: Any,
) -> Plan:  # fmt: skip
    """The plan of the pass before a run with these wishes, which are those of `planner.plan`.

    Raises:
        ConfigError: there are no rows, the engine is another, or the adapter's settings contradict its budget.
        BudgetError, DataError, DeviceError, ModelError: as `planner.plan`.
    """
    check_wishes(adapter)
    if data is None or engine not in (None, "torch"):
        what = "rows to measure on: give --data" if data is None else f"the torch engine, not {engine}: leave that out"
        raise ConfigError(f"adapter_budget = {adapter.adapter_budget} needs {what}.")
    base = open_any_base(model_folder(model))
    if isinstance(base, EncoderBase):
        raise ConfigError(f"adapter_budget = {adapter.adapter_budget}; {model} is an encoder: set --r there.")
    beside = Beside.of(retention_data, kl_data)
    wanted = beside.completed(config or TrainConfig()).checked()
    beside.check(wanted)
    steps = replace(
        wanted, max_steps=STEPS, num_epochs=None, step_rule="backprop", optimizer="lion",
        learning_rate=1.0, max_grad_norm=1e12, early_stopping_patience=None,
        retention_share=None, kl_weight=None,
    )  # fmt: skip
    narrowest = min(columns for _, columns in base.config.linears().values())
    measured = LoraConfig(r=min(COLUMNS, narrowest), layers_to_transform=adapter.layers_to_transform)
    given: dict[str, Any] = {"data": data, "config": steps, "engine": "torch", **wishes}
    try:
        made = plan(model, device, adapter=measured, **given)
    except BudgetError:
        made = plan(model, device, adapter=replace(measured, r=None), **given)
    return replace(made, feature_cache_bytes=0)  # too few steps for it
