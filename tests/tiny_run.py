"""A run folder written without training: an adapter with non-zero, reproducible values on a base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapters import METHODS
from edgetune.adapters.base import save_adapter
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_any_base


def adapter_tensors(base: Path, config: AdapterConfig, seed: int = 5) -> tuple[Any, dict[str, np.ndarray]]:
    """A resolved config and random tensors under training's names; B is as large as A."""
    model = open_any_base(base).config
    config = config.resolved(model)
    rng = np.random.default_rng(seed)
    return config, {
        name: rng.normal(0, 0.1, shape).astype(np.float32)
        for slot in METHODS[config.method].slots(config, model)
        for name, shape in slot.names.items()
    }


def write_run(folder: Path, base: Path, config: AdapterConfig | None = None, **summary: Any) -> Path:
    """r = 3 and lora_alpha = 5 on q_proj and down_proj unless told otherwise."""
    config = config or LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj", "down_proj"))
    folder.mkdir(parents=True)
    save_adapter(folder, *adapter_tensors(base, config), str(base))
    (folder / "plan.json").write_text("{}", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"base": str(base), **summary}), encoding="utf-8")
    return folder
