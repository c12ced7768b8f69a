"""Training on the torch engine: the loop, and one file per step rule.

A step rule is a module with `NAME` and `loss_and_gradients(decoder, batches, path, dropout_key=..., check=...)`, which
fills `.grad` of the adapter's parameters and returns the step's mean loss.
"""

from __future__ import annotations

from edgetune.training import backprop

STEP_RULES = {"backprop": backprop}

__all__ = ["STEP_RULES"]
