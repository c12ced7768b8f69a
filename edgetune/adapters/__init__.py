"""Adapter methods: small trained tensors around a frozen model.

A method is one file without torch, so that the planner and the device can read it:

    NAME, Config              its key here; the frozen dataclass of its settings (see `adapters.config`)
    CAPABILITIES              what it can do, and where it cannot, why and what to do instead (`adapters.capabilities`)
    slots(config, model)      the tensors that it needs, by place: a list of `Slot`
    slot(place, shape, config)                the slot at one place of that (out_features, in_features)
    initialize(slot, config, rng)             its values before the first step: the adapted model equals the base
    PEFT_NAMES, reads_peft, config_to_peft, config_from_peft          its files, where PEFT has the method

A method at linears has, for torch tensors and numpy arrays alike,

    forward(x, y, tensors, config)            the layer's output from its input x and the frozen output y
    merge(weight, tensors, rows, config)      rows of the frozen weight with the adapter folded in
    changes(tensors)                          whether these tensors of a slot do anything
    weakened(config, tensors, alpha)          the adapter that changes the weight by `alpha` times as much
    as_lora(config, tensors)                  the same adapter as LoRA, where it has that form

and for torch tensors alone

    add(x, y, tensors, config)                `forward` into y itself
    add_gradients(x, d_y, d_x, tensors, gradients, config)            its backward, added to d_x and to the gradients
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from edgetune.adapters import lora
from edgetune.errors import AdapterError

METHODS = {"lora": lora}


def method_of_peft(peft: Mapping[str, Any]) -> ModuleType:
    """The method of an `adapter_config.json`.

    Raises:
        AdapterError: it is none of `METHODS`.
    """
    for module in METHODS.values():
        if module.CAPABILITIES.peft_file is None and module.reads_peft(peft):
            return module
    raise AdapterError(
        f"adapter_config.json has peft_type {peft.get('peft_type')!r}; supported are "
        f"{', '.join(repr(name) for name, module in METHODS.items() if module.CAPABILITIES.peft_file is None)}."
    )
