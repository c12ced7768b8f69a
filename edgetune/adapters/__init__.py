"""Adapter methods: small trained tensors around a frozen model.

A method is one file without torch, so that the planner and the device can read it:

    NAME, Config              its key here; the frozen dataclass of its settings (see `adapters.config`)
    CAPABILITIES              what it can do, and where it cannot, why and what to do instead (`adapters.capabilities`)
    slots(config, model)      the tensors that it needs, by place: a list of `Slot`
    slot(place, shape, config)                the slot at one place of that (out_features, in_features)
    initialize(slot, config, rng, frozen)     its values before the first step: the adapted model equals the base.
                                              `frozen` is the `FrozenLinear`, or None where there is no torch
    frozen_tensors(config, shape)             what it computes with beside them, and never trains or writes
    PREFIX                    what its files put before names, where that is not PEFT's
    PEFT_NAMES, PEFT_SHARED, reads_peft, config_to_peft, config_from_peft          its files, where PEFT has the method

A method at linears computes

    y = outer * (W (inner * x) + added(x)) + bias

for torch tensors, without the factors where its slots scale nothing, and with the bias in brackets where it
SCALES_BIAS:

    forward(x, y, tensors, config)            y with the sum's second term, for autograd and for numpy arrays
    add(x, y, tensors, config)                the same into y itself
    add_gradients(x, d_y, d_x, tensors, gradients, config)            its backward, added to d_x and to the gradients
    factors(tensors, config, norms)           inner [in] and outer [out], None where they are all one
    add_factor_gradient(d_factor, tensors, gradients, config, norms)  from that of either, to the gradients
    squared_norms(weight, squares, tensors, rows, config)             what `norms` are made of, where factors need them

One of the model's own tensors has `Config.own` and computes nothing beside the model: each of its tensors has name and
shape of one of the model, starts as that, and takes its place: of a vector that the base keeps dense, or with
`Config.thaws` of a matrix on the grid, dequantized. Of the functions above it has those of slots and of files alone.

A method of hidden states (`models.places`) has the first three of these, for the place's input x and what is there, y;
one whose config has `prompt_positions` gets those rows alone, and one with a `side_group` gives states of its own.
One of virtual tokens has none: its tensor is the model's, at the place "". Both have `places(model)`, every place that
they could have, with shapes as `slot` takes them. What is trained of a prompt may be a network that makes it: then
`encode(tensors)` is the prompt, `add_gradients(d, tensors, gradients)` its backward, and `fold(tensors)` what the files
hold, which are another method's.

A method at linears has for numpy arrays

    merge(weight, tensors, rows, config)      rows of the frozen weight with the adapter folded in
    changes(tensors)                          whether these tensors of a slot do anything
    weakened(config, tensors, alpha)          the adapter that changes the weight by `alpha` times as much, where
                                              there is one (`merge_share`)
    as_lora(config, tensors, linears)         the same adapter as LoRA, where it has that form
    merge_bias(bias, tensors)                 the same of the bias, where it SCALES_BIAS
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from edgetune.adapters import (
    bitfit,
    bottleneck,
    dora,
    full,
    ia3,
    ln_tuning,
    lora,
    loreft,
    lst,
    p_tuning,
    prefix,
    prompt,
    vera,
)
from edgetune.errors import AdapterError

METHODS = {
    "lora": lora, "dora": dora, "ia3": ia3, "vera": vera,
    "ln_tuning": ln_tuning, "bitfit": bitfit, "full": full,
    "bottleneck": bottleneck, "loreft": loreft, "lst": lst, "prefix_tuning": prefix, "prompt_tuning": prompt,
    "p_tuning": p_tuning,
}  # fmt: skip


def method_of_peft(peft: Mapping[str, Any]) -> ModuleType:
    """The method of an `adapter_config.json`.

    Raises:
        AdapterError: it is none of `METHODS`.
    """
    for module in METHODS.values():
        if module.reads_peft(peft):
            return module
    raise AdapterError(
        f"adapter_config.json has peft_type {peft.get('peft_type')!r}; supported are "
        f"{', '.join(repr(name) for name, module in METHODS.items() if module.CAPABILITIES.peft_file is None)}."
    )
