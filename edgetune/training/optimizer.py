"""One step of an optimizer over an adapter's tensors, the clipping of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from edgetune.optimizers import OPTIMIZERS, TILE
from edgetune.optimizers.blockwise import BLOCK, num_blocks
from edgetune.training.moments import BlockwiseMoment, Float32Moment


class Optimizer:
    """Updates parameters by the rule of that name; `state_bytes` and `scratch_bytes` of its table say what it holds.

    `lr_ratio` is by how much the rate of a tensor, named without its place, is higher.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, torch.nn.Parameter], *, weight_decay: float,
        lr_ratio: Callable[[str], float] = lambda tensor: 1.0,
    ) -> None:  # fmt: skip
        info = OPTIMIZERS[name]
        self.rule, self.parameters, self.weight_decay, self.updates = info.rule, parameters, weight_decay, 0
        self.ratios = [lr_ratio(name.rpartition(".")[2]) for name in parameters]
        sizes = [parameter.numel() for parameter in parameters.values()]
        self.moments: dict[str, Float32Moment | BlockwiseMoment]
        if info.quantized:
            edges = torch.empty(num_blocks(min(TILE, max(sizes))), BLOCK)
            codes = torch.empty(edges.shape, dtype=torch.int32)
            self.moments = {
                kind: BlockwiseMoment(sizes, signed, codes, edges) for kind, signed in self.rule.MOMENTS.items()
            }
        else:
            self.moments = {kind: Float32Moment(sizes) for kind in self.rule.MOMENTS}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its `.grad`, which is used as scratch and dropped."""
        self.updates += 1
        for index, (name, parameter) in enumerate(self.parameters.items()):
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None, name
            values, slopes = parameter.data.view(-1), gradient.view(-1)
            for at in range(0, len(values), TILE):
                tile = slice(at, min(at + TILE, len(values)))
                self.rule.update(
                    values[tile], slopes[tile], *(moment.read(index, tile) for moment in self.moments.values()),
                    learning_rate=learning_rate * self.ratios[index], weight_decay=self.weight_decay,
                    updates=self.updates,
                )  # fmt: skip
                for moment in self.moments.values():
                    moment.write(index, tile)

    def drop_gradients(self) -> None:
        """Leave this step out."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, np.ndarray]:
        """The moments, by name; views, not copies."""
        return {
            f"{kind}{suffix}": tensor.numpy()
            for kind, moment in self.moments.items()
            for suffix, tensor in moment.tensors.items()
        }

    def load(self, tensors: Mapping[str, np.ndarray], updates: int) -> None:
        """Take back what `tensors` gave after that many updates."""
        self.updates = updates
        for name, kept in self.tensors().items():
            kept[...] = tensors[name]


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale all gradients together so that their global norm is at most `max_norm`; returns the norm before.

    The same arithmetic as `torch.nn.utils.clip_grad_norm_`. A norm that is not finite leaves the gradients as they are.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    if norm.isfinite():
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
    return float(norm)


class OptimizerRule:
    """What a step rule whose gradients an optimizer takes does with that."""

    optimizer: Optimizer

    def update(self, learning_rate: float) -> None:
        """The optimizer's step."""
        self.optimizer.step(learning_rate)

    def drop(self) -> None:
        """Drop the gradients."""
        self.optimizer.drop_gradients()

    def tensors(self) -> dict[str, np.ndarray]:
        """The optimizer's state."""
        return self.optimizer.tensors()

    def load(self, tensors: Mapping[str, np.ndarray], updates: int) -> None:
        """Give it back to the optimizer."""
        self.optimizer.load(tensors, updates)
