"""First values of LoRA that the original model or the rows decide, on a base whose codes stay what they are.

    loftq    scaling * B A is the rank-r part of what quantization lost, W - dequantize(codes), so the adapted model
             starts nearer to the original one than the base is. LoftQ (Li et al., arXiv 2310.08659) with one
             alternation: a second one would quantize again, and other codes would have to ship. The factors share the
             singular values' roots, as in PEFT's PiSSA.
    eva      A are the right singular vectors of the layer's inputs over some windows of the rows, B is zero, so the
             adapted model starts as the base. EVA (Paischer et al., arXiv 2410.07170) without its redistribution of
             ranks: the plan counted each of them.

Singular vectors come from passes over tiles of one matrix, so nothing is ever as large as that: by subspace iteration
(Halko, Martinsson, Tropp, arXiv 0909.4061) for loftq. For eva they are those of what was kept of the windows before
and the next one (incremental SVD), held where A will be. All of it is done before the first buffer of a step is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from edgetune.adapters.attach import AdaptedLinear
from edgetune.adapters.lora import EVA, LOFTQ, LoraConfig
from edgetune.base import Base, open_base
from edgetune.errors import ConfigError, ModelError
from edgetune.hub import model_folder
from edgetune.models.decoder import Decoder
from edgetune.training.batches import in_batches
from edgetune.training.blocks import BlockPass, Linear
from edgetune.training.forward import below, start
from edgetune.training.inputs import Inputs

EVA_WINDOWS = 32
OVERSAMPLING = 24  # columns of the iteration beside the rank
ITERATIONS = 10  # what 4 bits lose is nearly noise: after these, 98 % of what the best approximation catches
MOST_LOST = 0.5  # of a weight's norm: 4 bits lose about a tenth
GRAM_COLUMNS = 1024  # float64 at once
NO_SIGNAL = 1e-6  # of the largest singular value


def initialize(
    decoder: Decoder, inputs: Inputs, limit: AbstractContextManager[None], tell: Callable[[str], None]
) -> None:
    """Give the adapter that was just attached the first values that its config asks for.

    Raises:
        ConfigError: loftq without the original model, or eva with too few rows for its rank.
        ModelError: the original model cannot be read, or is not what the base was quantized from.
    """
    config = inputs.plan.adapter
    if not isinstance(config, LoraConfig):
        return
    if config.init_lora_weights == LOFTQ:
        original = open_original(config, inputs)
        tell(f"loftq: the adapter starts at what quantization lost of {original.folder}, so not as the base")
        with limit:
            start_at_loss(decoder, config, original, inputs.plan.seed)
    elif config.init_lora_weights == EVA:
        tell("eva: the adapter starts at the main directions of the rows' activations; it does nothing yet")
        with limit:
            start_at_activations(decoder, config, inputs)


def open_original(config: LoraConfig, inputs: Inputs) -> Base:
    """The model that the base was quantized from: of the same shapes, and equal in all that no grid changes.

    Raises: as `initialize`.
    """
    if config.init_from is None:
        raise ConfigError(
            f"init_lora_weights = 'loftq' compares {inputs.base} with the original model. Say where that is with "
            "--init-from, or leave loftq out."
        )
    base, original = open_base(inputs.base), open_base(model_folder(config.init_from))
    if original.grid is not None:
        raise ModelError(
            f"{original.folder} is on the {original.grid} grid; the original model of {base.folder} was expected."
        )
    shapes, found = base.config.matrices(), original.config.matrices()
    for module in {**shapes, **found}:
        if shapes.get(module) != found.get(module):
            raise ModelError(
                f"{original.folder} has {module} of shape {found.get(module)}, {base.folder} of {shapes.get(module)}: "
                "it is not what this base was quantized from."
            )
    for name in base.config.vectors():
        if not np.array_equal(base.weights.array(name), original.weights.array(name)):
            raise _other_model(original, base.folder, name)
    return original


def _other_model(original: Base, base: Any, name: str) -> ModelError:
    return ModelError(
        f"{original.folder} is not what {base} was quantized from: {name} differs. Give --init-from the original model."
    )


@torch.no_grad()
def start_at_loss(decoder: Decoder, config: LoraConfig, original: Base, seed: int) -> None:
    """LoftQ's values, from the original model.

    Raises:
        ModelError: a weight is not what the codes stand for.
    """
    for layer in _adapted(decoder):
        loss = _Loss(layer, original)
        left, values, right = loss.largest(config.rank, np.random.default_rng([seed, layer.index]))
        original.weights.unmap()
        rank = int((values > NO_SIGNAL * values[0]).sum())  # beyond it A stays random, and B zero
        roots = (values[:rank] / config.scaling).sqrt_()
        layer.tensors["lora_A"][:rank] = right[:, :rank].T * roots[:, None]
        layer.tensors["lora_B"][:, :rank] = left[:, :rank] * roots


def _adapted(decoder: Decoder) -> list[AdaptedLinear]:
    return [module for module in decoder.modules() if isinstance(module, AdaptedLinear)]


class _Loss:
    """R = W - dequantize(codes) [out, in] of a layer, tile by tile."""

    def __init__(self, layer: AdaptedLinear, original: Base) -> None:
        self.frozen, self.original = layer.base_layer, original
        lost = kept = 0.0
        for rows, loss in self._tiles():
            lost += float(loss.square().sum())
            kept += float(torch.from_numpy(original.dequantize(self.frozen.name, rows)).square().sum())
        if lost > MOST_LOST**2 * kept:
            raise _other_model(original, "the base", f"{self.frozen.name}.weight")

    def _tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows, weight in self.frozen.tiles():
            yield rows, torch.from_numpy(self.original.dequantize(self.frozen.name, rows)).sub_(weight)

    def largest(self, rank: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Left vectors [out, r], values [r] and right vectors [in, r] of the largest singular values, r <= rank."""
        n, k = self.frozen.shape
        columns = min(rank + OVERSAMPLING, n, k)
        basis = torch.from_numpy(rng.standard_normal((k, columns)).astype(np.float32))
        for _ in range(ITERATIONS):
            image = torch.zeros_like(basis)
            for _, loss in self._tiles():
                image.addmm_(loss.T, loss @ basis)
            basis = torch.linalg.qr(image)[0]
        product = torch.empty(n, columns)
        for rows, loss in self._tiles():
            torch.mm(loss, basis, out=product[rows])
        left, values, turned = torch.linalg.svd(product, full_matrices=False)
        return left[:, :rank], values[:rank], basis @ turned.T[:, :rank]


@torch.no_grad()
def start_at_activations(decoder: Decoder, config: LoraConfig, inputs: Inputs) -> None:
    """EVA's values, from the first windows of the rows.

    Raises:
        ConfigError: they have fewer directions than the adapter's rank.
    """
    for layer in _adapted(decoder):
        layer.tensors["lora_A"].zero_()
    for batch in in_batches(inputs.windows[:EVA_WINDOWS], 1):
        x = below(decoder, batch, config.first_block, lambda: None)
        walk = start(decoder, batch)
        watched = _WatchedPass(walk, torch.from_numpy(batch["segment_ids"][0] >= 0))
        for index, block in enumerate(decoder.blocks[config.first_block :]):
            y = decoder.workspace.like(x, f"input.{(index + 1) % 2}")
            watched.forward(block, x, y, "slot.0")
            x = y
    decoder.workspace.clear()
    for layer in _adapted(decoder):
        norms = torch.linalg.vector_norm(layer.tensors["lora_A"], dim=1, keepdim=True)
        if norms.min() <= NO_SIGNAL * norms.max():
            raise ConfigError(
                f"init_lora_weights = 'eva' finds fewer than r = {config.rank} directions in what "
                f"{layer.slot.place} gets from the rows. Lower r, give more rows, or take kaiming."
            )
        layer.tensors["lora_A"].div_(norms)


class _WatchedPass(BlockPass):
    """Keeps in `lora_A` the main directions of what its layer got so far, each as long as its singular value."""

    def __init__(self, walk: BlockPass, occupied: torch.Tensor) -> None:
        super().__init__(walk.workspace, walk.contexts, walk.batch, walk.length)
        self.occupied = occupied  # bool [N]: the others are padding

    def _linear(self, layer: Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        if isinstance(layer, AdaptedLinear):
            kept = layer.tensors["lora_A"]
            rows = torch.cat([kept, x[self.occupied]])
            gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
            for at in range(0, rows.shape[1], GRAM_COLUMNS):
                wide = rows[:, at : at + GRAM_COLUMNS].double()
                gram.addmm_(wide, wide.T)
            _, vectors = torch.linalg.eigh(gram)  # from the smallest
            kept.copy_(vectors[:, -len(kept) :].flip(1).T.float() @ rows)
        super()._linear(layer, x, y)
