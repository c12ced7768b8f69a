"""Adapter folders in PEFT's format, written and read without PEFT.

Tensors are named `<place>.<tensor>` here, for example `model.layers.0.self_attn.q_proj.lora_A`. PEFT's files add its
prefix and what the method's `PEFT_NAMES` say; nothing else is ever written into them, so PEFT loads a folder unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from edgetune.adapters import METHODS, method_of_peft
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.lora import LoraConfig, at_one_scaling
from edgetune.adapters.slot import Slot
from edgetune.errors import AdapterError, ModelError
from edgetune.models import ModelConfig
from edgetune.weights import (
    TensorInfo,
    Weights,
    open_tensors,
    safetensors_header,
    write_atomic,
    write_safetensors,
)

PREFIX = "base_model.model."
OUTSIDE = "base_model."  # in the place of the prefix, where PEFT wraps no layer of the model: beside virtual tokens
AROUND = (PREFIX, OUTSIDE, "")  # what a file may have before the name of a head; nothing beside the model's own tensors
CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(
    folder: Path, config: AdapterConfig, tensors: Mapping[str, np.ndarray], base_model: str = "", *,
    inside: str = "", beside: Mapping[str, np.ndarray] | None = None, said: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write `adapter_config.json` and `adapter_model.safetensors`; each appears whole or not at all. Of a method that
    folds what it trains, they hold that.

    `inside` is where the model lies in the one that PEFT knows, such as `bert.`; `beside` are tensors of that one which
    are kept whole, by their names there, and `said` are keys of its config that differ for it.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    method = METHODS[config.method]
    tensors = method.fold(tensors) if hasattr(method, "fold") else tensors
    for name, value in (*tensors.items(), *(beside or {}).items()):
        if not np.isfinite(value).all():
            raise AdapterError(
                f"{name} holds NaN or infinity; such an adapter is never saved. Lower the learning rate."
            )
    files = {_peft_name(name, method, inside): value for name, value in tensors.items()}
    around = OUTSIDE if config.virtual_tokens else _prefix(method)
    files |= {f"{around}{name}": value for name, value in (beside or {}).items()}
    write_safetensors(folder / MODEL, {k: TensorInfo("F32", v.shape) for k, v in files.items()}, files.__getitem__)
    write_atomic(folder / CONFIG, json.dumps(method.config_to_peft(config, base_model) | dict(said or {}), indent=1))


def file_bytes(config: AdapterConfig, slots: Iterable[Slot]) -> int:
    """Bytes of the `adapter_model.safetensors` that `save_adapter` writes of a config with these slots."""
    method = METHODS[config.method]
    shapes = {name: shape for slot in slots for name, shape in slot.names.items()}
    infos = {_peft_name(name, method, ""): TensorInfo("F32", shape) for name, shape in shapes.items()}
    return len(safetensors_header(infos)) + sum(info.nbytes for info in infos.values())


def load_adapter(folder: str | Path, model: ModelConfig) -> tuple[AdapterConfig, dict[str, np.ndarray]]:
    """A resolved config and float32 tensors, from a folder that edgetune or PEFT wrote. Raises as `read_adapter`."""
    return read_adapter(folder, model.linears(), model)


def read_adapter(
    folder: str | Path, places: Mapping[str, tuple[int, int]], model: ModelConfig | None = None, *,
    inside: str = "", beside: Collection[str] = (),
) -> tuple[AdapterConfig, dict[str, np.ndarray]]:  # fmt: skip
    """The same where only the places are known: name -> (out_features, in_features), in the model's order.

    `model` gives the places of a method that has others than linears. `inside` and `beside` are as in `save_adapter`;
    the tensors of the latter are left out here.

    Raises:
        AdapterError: files are missing or damaged, the method is not supported, or tensors do not fit the linears; the
            message lists the first of them with both shapes.
    """
    folder = Path(folder)
    peft, weights = _open(folder)
    if beside:
        peft |= {"modules_to_save": None}
    method = method_of_peft(peft)
    endings, prefix = {f".{ending}": f".{short}" for short, ending in method.PEFT_NAMES.items()}, _prefix(method)
    if model is not None and hasattr(method, "places"):
        places = method.places(model)
    names: dict[str, str] = {}
    for name in weights:
        if name in method.PEFT_SHARED or any(name == f"{around}{kept}" for kept in beside for around in AROUND):
            continue
        if name in method.PEFT_NAMES.values():  # of the model as a whole
            names[name] = name
            continue
        if name in (f"{around}score.weight" for around in AROUND):
            raise AdapterError(
                f"{folder / MODEL} has a trained head ({name}): its outputs are classes or values, and it continues "
                "no text. PEFT loads it around the model's *ForSequenceClassification; take an adapter without a head."
            )
        ending = next((ending for ending in endings if name.endswith(ending)), None)
        if ending is None or not name.startswith(prefix):
            like = f"{prefix}…{next(iter(endings))}"
            raise AdapterError(f"{folder / MODEL} holds {name}; names like {like} were expected.")
        names[name[len(prefix) :].removeprefix(inside).removesuffix(ending) + endings[ending]] = name
    found = dict.fromkeys(name.rpartition(".")[0] for name in names)
    unknown = [place for place in found if place not in places]
    if unknown:
        raise AdapterError(
            f"{folder / MODEL} adapts {unknown[0]}, which is no linear of this model, or of a bundle that was exported "
            f"with --slots adapter, none with a slot."
        )
    shapes = {name: weights[full].shape for name, full in names.items()}
    adapted = {place: shape for place, shape in places.items() if place in found}
    config = method.config_from_peft(peft, shapes, adapted)
    if shared := {name: weights.float32(name) for name in method.PEFT_SHARED if name in weights}:
        method.check_shared(config, shared)
    # The places found need not be every target in every layer: the shapes come from the model, the set from the file.
    expected = {
        name: shape for place, size in adapted.items() for name, shape in method.slot(place, size, config).names.items()
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
    if isinstance(config, LoraConfig):
        tensors = at_one_scaling(config, peft, tensors)
    return config, {name: tensors[name] for name in expected}


def method_of(folder: str | Path) -> ModuleType:
    """The method of an adapter folder. Raises AdapterError as `read_adapter`."""
    return method_of_peft(_open(Path(folder))[0])


def _open(folder: Path) -> tuple[dict[str, Any], Weights]:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")), open_tensors(folder / MODEL)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder} is no adapter folder: {error}. It needs {CONFIG} and {MODEL}.") from error
    except ModelError as error:
        raise AdapterError(str(error)) from error


def _prefix(method: ModuleType) -> str:
    """What the files of a method have before a name."""
    return str(getattr(method, "PREFIX", PREFIX))


def _peft_name(name: str, method: ModuleType, inside: str) -> str:
    place, _, short = name.rpartition(".")
    ending: str = method.PEFT_NAMES[short]
    return f"{_prefix(method)}{inside}{place}.{ending}" if place else ending
