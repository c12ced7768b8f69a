"""Adapter folders in PEFT's format, written and read without PEFT.

Tensors are named `<linear>.<tensor>` here, for example `model.layers.0.self_attn.q_proj.lora_A`. PEFT's files add its
prefix and `.weight`; nothing else is ever written into them, so PEFT loads a folder unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgetune.adapters.lora import LoraConfig, config_from_peft, config_to_peft, slot
from edgetune.errors import AdapterError, ModelError
from edgetune.models import ModelConfig
from edgetune.weights import TensorInfo, open_tensors, write_atomic, write_safetensors

PREFIX = "base_model.model."
CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, np.ndarray], base_model: str = "") -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`; each appears whole or not at all.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise AdapterError(
                f"{name} holds NaN or infinity; such an adapter is never saved. Lower the learning rate."
            )
    files = {f"{PREFIX}{name}.weight": value for name, value in tensors.items()}
    write_safetensors(folder / MODEL, {k: TensorInfo("F32", v.shape) for k, v in files.items()}, files.__getitem__)
    write_atomic(folder / CONFIG, json.dumps(config_to_peft(config, base_model), indent=1))


def load_adapter(folder: str | Path, model: ModelConfig) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """A resolved config and float32 tensors, from a folder that edgetune or PEFT wrote. Raises as `read_adapter`."""
    return read_adapter(folder, model.linears())


def read_adapter(
    folder: str | Path, linears: Mapping[str, tuple[int, int]]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The same where only the linears are known: name -> (out_features, in_features), in the model's order.

    Raises:
        AdapterError: files are missing or damaged, the method is not supported, or tensors do not fit the linears; the
            message lists the first of them with both shapes.
    """
    folder = Path(folder)
    try:
        peft = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        weights = open_tensors(folder / MODEL)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder} is no adapter folder: {error}. It needs {CONFIG} and {MODEL}.") from error
    except ModelError as error:
        raise AdapterError(str(error)) from error
    foreign = [name for name in weights if not (name.startswith(PREFIX) and name.endswith(".weight"))]
    if foreign:
        raise AdapterError(f"{folder / MODEL} holds {foreign[0]}; names like {PREFIX}….lora_A.weight were expected.")
    names = {name[len(PREFIX) : -len(".weight")]: name for name in weights}
    ranks = {n.removesuffix(".lora_A"): weights[full].shape[0] for n, full in names.items() if n.endswith(".lora_A")}
    unknown = [name for name in ranks if name not in linears]
    if unknown:
        raise AdapterError(
            f"{folder / MODEL} adapts {unknown[0]}, which is no linear of this model, or of a bundle that was exported "
            f"with --slots adapter, none with a slot."
        )
    config = config_from_peft(peft, ranks)
    # The linears found need not be every target in every layer: the shapes come from the model, the set from the file.
    expected = {
        name: shape
        for linear, size in linears.items()
        if linear in ranks
        for name, shape in slot(linear, size, config).names.items()
    }
    problems = [f"{name} is missing" for name in expected if name not in names]
    problems += [f"{name} has no place" for name in names if name not in expected]
    problems += [
        f"{name} has shape {list(weights[full].shape)}; {list(expected[name])} was expected"
        for name, full in names.items()
        if name in expected and weights[full].shape != expected[name]
    ]
    if problems:
        raise AdapterError(f"{folder / MODEL} does not fit the base: " + "; ".join(problems[:10]))
    tensors = {name: weights.float32(full) for name, full in names.items()}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise AdapterError(f"{folder / MODEL}: {name} holds NaN or infinity. Train the adapter again.")
    return config, {name: tensors[name] for name in expected}
