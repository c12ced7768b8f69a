"""The adapter of a network in PEFT's format, written and read without PEFT.

`target_modules` is a pattern of whole names: a list would also match every layer whose name ends like one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgetune.adapters.base import CONFIG, MODEL, PREFIX
from edgetune.adapters.lora import LoraConfig
from edgetune.errors import AdapterError, ModelError
from edgetune.weights import TensorInfo, open_tensors, write_atomic, write_safetensors


def save_adapter(
    folder: Path, config: LoraConfig, parameters: Mapping[str, nn.Parameter], adapted: Sequence[str]
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; each appears whole or not at all.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    tensors = {_file_name(name): value.detach().numpy() for name, value in parameters.items()}
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise AdapterError(f"{name} holds NaN or infinity, and is not saved. Lower the learning rate.")
    in_full = dict.fromkeys(name.rpartition(".")[0] for name in parameters if not _is_lora(name))
    peft = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "r": config.r,
        "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout, "use_rslora": config.use_rslora,
        "target_modules": "|".join(map(re.escape, adapted)), "modules_to_save": list(in_full) or None,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo("F32", array.shape) for name, array in tensors.items()}
    write_safetensors(folder / MODEL, infos, lambda name: np.ascontiguousarray(tensors[name]))
    write_atomic(folder / CONFIG, json.dumps(peft, indent=1))


def load_adapter(folder: Path, config: LoraConfig, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy an adapter's tensors into the parameters.

    Raises:
        AdapterError: files are missing or damaged, or another rank, strength or set of tensors was attached; the
            message lists the first tensors with both shapes.
    """
    try:
        peft = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = open_tensors(folder / MODEL)
        found = {key: peft.get(key) for key in ("peft_type", "r", "lora_alpha", "use_rslora")}
    except (OSError, ValueError, AttributeError, ModelError) as error:
        raise AdapterError(f"{folder} is no adapter folder: {error}. It needs {CONFIG} and {MODEL}.") from error
    wanted = {"peft_type": "LORA", "r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora}
    other = [f"{key} = {found[key]!r}, attached is {value!r}" for key, value in wanted.items() if found[key] != value]
    if other:
        raise AdapterError(f"{folder / CONFIG} has {'; '.join(other)}. Attach with the adapter's own settings.")
    places = {_file_name(name): value for name, value in parameters.items()}
    problems = [f"{name} is missing" for name in places if name not in weights]
    problems += [f"{name} has no place" for name in weights if name not in places]
    problems += [
        f"{name} has shape {list(weights[name].shape)}; {list(value.shape)} was expected"
        for name, value in places.items()
        if name in weights and weights[name].shape != tuple(value.shape)
    ]
    if problems:
        raise AdapterError(f"{folder / MODEL} does not fit the network: " + "; ".join(problems[:10]))
    arrays = {name: weights.float32(name) for name in places}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise AdapterError(f"{folder / MODEL}: {name} holds NaN or infinity. Train the adapter again.")
    for name, value in places.items():
        value.data.copy_(torch.from_numpy(arrays[name]))


def _is_lora(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B"))


def _file_name(name: str) -> str:
    return f"{PREFIX}{name}.weight" if _is_lora(name) else f"{PREFIX}{name}"
