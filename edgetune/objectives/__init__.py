"""What a run minimizes: one file per objective.

An objective is a module with `NAME`, `loss(hidden, targets, head, buffers)` and `loss_and_gradient(...)` of the same
arguments. It starts at the normalized hidden states and ends at the gradient of them, so that how logits are made, in
tiles or at all, is its own affair. torch is imported inside functions only: the planner reads the sizes of the tiles
where there is no torch.
"""

from __future__ import annotations

from edgetune.objectives import sft

OBJECTIVES = {"sft": sft}

__all__ = ["OBJECTIVES"]
