"""Adapter methods: small trained tensors around a frozen linear.

A method is one file without torch, so that the planner and the device can read it:

    NAME                      PEFT's `peft_type` in lower case
    Config                    frozen dataclass; `resolved(model_config)` fills what the user left open
    slots(config, model)      the tensors that it needs, by linear: a list of `Slot`
    initialize(slot, rng)     their values before the first step: the adapted layer equals the base
    forward(x, y, tensors, config)   the layer's output from its input x and the frozen output y; torch or numpy arrays
    add(x, y, tensors, config)       the same into y itself, for torch tensors
    add_gradients(x, d_y, d_x, tensors, gradients, config)    its backward pass, added to d_x and to the gradients
    onnx_tensors(config, tensors)    the same adapter as inputs of the exported graph
"""

from __future__ import annotations

from edgetune.adapters import lora

METHODS = {"lora": lora}
