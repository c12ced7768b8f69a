"""An adapter method around the frozen linears of a torch model.

`AdaptedLinear` holds the frozen layer and the method's tensors and knows neither: no class per combination of method
and grid. Dropout masks come from counters (seed, step, micro-batch, slot), so a recomputed block sees the mask of its
first pass and a resumed run sees those of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from edgetune.adapters import METHODS
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.slot import FACTOR_COLUMNS, Slot
from edgetune.adapters.states import AdaptedState, gradients_of, put_virtual_tokens
from edgetune.errors import AdapterError
from edgetune.linear import FrozenLinear
from edgetune.models.decoder import Decoder, RMSNorm
from edgetune.models.encoder import Encoder


class AdaptedLinear(nn.Module):
    """`base_layer` with what a method multiplies and adds: y = outer * (W (inner * x) + added(x)) + bias."""

    def __init__(self, base_layer: FrozenLinear, slot: Slot, index: int, config: AdapterConfig) -> None:
        super().__init__()
        self.base_layer, self.slot, self.index, self.config = base_layer, slot, index, config
        self.method = METHODS[config.method]
        self.tensors = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(shape)) for name, shape in slot.tensors.items()}
        )
        shared = self.method.frozen_tensors(config, (slot.out_features, slot.in_features))
        self.shared = {name: torch.from_numpy(value) for name, value in shared.items()}
        self.dropout_key: tuple[int, ...] | None = None  # None: no dropout, as in evaluation
        self.frozen_squares: torch.Tensor | None = None  # of the norms of the frozen rows, where factors need them
        self.norms: torch.Tensor | None = None  # of the rows as they are now

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X [..., in_features] -> [..., out_features]."""
        if not self.multiplies:
            result: torch.Tensor = self.method.forward(self._dropped(x), self.base_layer(x), self._all, self.config)
            return result
        self.norms = None
        inner, outer = self._factors()
        y = self.base_layer(x if inner is None else x * inner)
        bias = None if self.method.SCALES_BIAS else self.base_layer.bias
        y = self.method.forward(self._dropped(x), y if bias is None else y - bias, self.tensors, self.config)
        made: torch.Tensor = y if outer is None else y * outer
        return made if bias is None else made + bias

    @property
    def _all(self) -> dict[str, torch.Tensor]:
        """The tensors that it computes with: those trained, and those shared."""
        return {**self.tensors, **self.shared}

    @property
    def multiplies(self) -> bool:
        """Whether the method has factors here."""
        return self.slot.scales_input or self.slot.scales_output

    def start_pass(self, key: tuple[int, ...] | None) -> None:
        """Choose the dropout masks of a pass, and forget what was computed from the tensors as they were."""
        self.dropout_key, self.norms = key, None

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        """What the frozen weight multiplies: x [N, in_features] itself, or with its factors, in "adapter.x"."""
        inner = self._factors()[0] if self.slot.scales_input else None
        return x if inner is None else torch.mul(x, inner, out=self.base_layer.workspace.like(x, "adapter.x"))

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Turns y [N, out_features], the frozen layer's from `taken(x)`, into the layer's output."""
        if not self.slot.scales_output:
            self.method.add(self._dropped(x), y, self._all, self.config)
            return
        bias = None if self.method.SCALES_BIAS else self.base_layer.bias
        if bias is not None:
            y.sub_(bias)
        self.method.add(self._dropped(x), y, self._all, self.config)
        y.mul_(self._factors()[1])
        if bias is not None:
            y.add_(bias)

    def before_frozen(self, x: torch.Tensor, d_y: torch.Tensor) -> torch.Tensor:
        """The gradient [N, out_features] of what the frozen weight gives, for d_y: that itself, or with the factors.

        Adds the gradient of those, from the frozen product computed again, some of its columns at a time.
        """
        if not self.slot.scales_output:
            return d_y
        take, layer, outer = self.base_layer.workspace.take, self.base_layer, self._factors()[1]
        d_sum = take(len(x), layer.out_features, "adapter.d_y").zero_()
        self.method.add(self._dropped(x), d_sum, self.tensors, self.config)
        if self.method.SCALES_BIAS and layer.bias is not None:
            d_sum.add_(layer.bias)
        d_outer = d_sum.mul_(d_y).sum(0)
        for rows, weight in layer.tiles():
            for start in range(rows.start, rows.stop, FACTOR_COLUMNS):
                columns = slice(start, min(start + FACTOR_COLUMNS, rows.stop))
                part = weight[columns.start - rows.start : columns.stop - rows.start]
                y = torch.mm(x, part.T, out=take(len(x), len(part), "adapter.y"))
                d_outer[columns].add_(y.mul_(d_y[:, columns]).sum(0))
        self._add_factor_gradient(d_outer)
        return torch.mul(d_y, outer, out=d_sum)

    def add_gradients(self, x: torch.Tensor, d_y: torch.Tensor, d_x: torch.Tensor | None) -> None:
        """Backward of `add` for d_y [N, out_features] as `before_frozen` gave it: adds to d_x [N, in_features] and to
        `.grad` of the tensors.
        """
        keep = self._keep(x.shape)
        if keep is None:
            self.method.add_gradients(x, d_y, d_x, self._all, gradients_of(self.tensors), self.config)
            return
        d_dropped = None if d_x is None else torch.zeros_like(x)
        self.method.add_gradients(x * keep, d_y, d_dropped, self._all, gradients_of(self.tensors), self.config)
        if d_x is not None and d_dropped is not None:
            d_x.addcmul_(d_dropped, keep)

    def add_taken_gradient(self, x: torch.Tensor, d_taken: torch.Tensor, d_x: torch.Tensor | None) -> None:
        """Backward of `taken` for d_taken [N, in_features], which is overwritten: adds to d_x and to `.grad`."""
        inner = self._factors()[0]
        if d_x is not None:
            d_x.addcmul_(d_taken, inner)
        self._add_factor_gradient(d_taken.mul_(x).sum(0))

    def _factors(self) -> tuple[Any, Any]:
        """Inner [in_features] and outer [out_features]; None where they are all one."""
        if not self.slot.kept_floats:
            found: tuple[Any, Any] = self.method.factors(self.tensors, self.config, None)
            return found
        if self.norms is None:
            self.norms = self._row_norms()
        found = self.method.factors(self.tensors, self.config, self.norms)
        return found

    @torch.no_grad()
    def _row_norms(self) -> torch.Tensor:
        if self.frozen_squares is None:
            self.frozen_squares = self.base_layer.row_norms().square_()
        norms = torch.empty_like(self.frozen_squares)
        for rows, weight in self.base_layer.tiles():
            squares = self.frozen_squares[rows]
            norms[rows] = self.method.squared_norms(weight, squares, self.tensors, rows, self.config)
        return norms.sqrt_()

    def _add_factor_gradient(self, d_factor: torch.Tensor) -> None:
        self.method.add_factor_gradient(d_factor, self.tensors, gradients_of(self.tensors), self.config, self.norms)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        keep = self._keep(x.shape)
        return x if keep is None else x * keep

    def _keep(self, shape: torch.Size) -> torch.Tensor | None:
        """0 where dropout takes a value and 1 / (1 - p) elsewhere; None where nothing is dropped."""
        p = self.config.dropout
        if p == 0 or self.dropout_key is None:
            return None
        seed = int(np.random.SeedSequence([*self.dropout_key, self.index]).generate_state(1, np.uint64)[0] >> 1)
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= p
        return keep.float().div_(1 - p)

    def merged_weight(self) -> torch.Tensor:
        """float32 [out_features, in_features]: the frozen weight with the adapter folded in, as a new tensor."""
        tensors = {name: value.detach().numpy() for name, value in self._all.items()}
        weight = self.base_layer.dequantize().numpy()
        return torch.from_numpy(self.method.merge(weight, tensors, slice(None), self.config))


def attach(model: Decoder | Encoder, config: AdapterConfig, seed: int = 0) -> dict[str, nn.Parameter]:
    """Wrap the linears that a resolved config names; return the trainable tensors by full name.

    The values are initialized from `seed` alone; the adapted model computes what the base computes. The model's own
    vectors become parameters where they are, in the memory that they have, and its matrices after they are dequantized.
    """
    method = METHODS[config.method]
    parameters: dict[str, nn.Parameter] = {}
    if config.own:
        vectors, matrices = own_vectors(model), linears(model)
        for name in (name for slot in method.slots(config, model.config) for name in slot.names):
            if name not in vectors:
                parameters[name] = matrices[name.removesuffix(".weight")].thaw()
                continue
            module, attribute = vectors[name]
            parameters[name] = nn.Parameter(getattr(module, attribute))
            setattr(module, attribute, parameters[name])
        return parameters
    if isinstance(model, Decoder):
        model.prompt_positions, model.side_group = config.prompt_positions, config.side_group
    for index, slot in enumerate(method.slots(config, model.config)):
        rng = np.random.default_rng([seed, index])
        if not slot.place:
            parameters |= put_virtual_tokens(model, slot, config, rng)
            continue
        path, _, name = slot.place.removeprefix("model.").rpartition(".")
        parent = model.get_submodule(path)
        frozen = getattr(parent, name)
        layer = AdaptedState(slot, config) if frozen is None else AdaptedLinear(frozen, slot, index, config)
        for key, value in method.initialize(slot, config, rng, frozen).items():
            layer.tensors[key].data.copy_(torch.from_numpy(value))
            parameters[f"{slot.place}.{key}"] = layer.tensors[key]
        setattr(parent, name, layer)
    return parameters


def own_vectors(model: Decoder | Encoder) -> dict[str, tuple[nn.Module, str]]:
    """The vectors that can be trained in their place, by full name: a module of the model, and its attribute."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for module in model.modules():
        if isinstance(module, RMSNorm):
            found[f"{module.name}.weight"] = module, "weight"
        elif isinstance(module, FrozenLinear) and module.bias is not None:
            found[f"{module.name}.bias"] = module, "bias"
    return found


def linears(model: Decoder | Encoder) -> dict[str, FrozenLinear]:
    """The frozen linears of a model by full name."""
    return {module.name: module for module in model.modules() if isinstance(module, FrozenLinear)}


def load_tensors(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, np.ndarray]) -> None:
    """Copy adapter tensors into attached parameters.

    Raises:
        AdapterError: a tensor is missing, extra or of another shape.
    """
    problems = [f"{name} is missing" for name in parameters if name not in tensors]
    problems += [f"{name} has no place" for name in tensors if name not in parameters]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}; {list(value.shape)} was expected"
        for name, value in parameters.items()
        if name in tensors and tensors[name].shape != tuple(value.shape)
    ]
    if problems:
        raise AdapterError("The adapter does not fit: " + "; ".join(problems[:10]))
    for name, value in parameters.items():
        value.data.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))


@contextmanager
def detached(model: Decoder) -> Iterator[None]:
    """The base alone while the body runs: of adapted linears the frozen ones, nothing at other places, and the model's
    own tensors as they are stored.

    An adapter with virtual tokens has no place here: they take positions, so a micro-batch is another one without them.
    """
    assert not model.virtual_tokens, "the base has other positions"
    adapted = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, AdaptedLinear | AdaptedState)
    ]
    for parent, name, child in adapted:
        setattr(parent, name, child.base_layer if isinstance(child, AdaptedLinear) else None)
    named = {name: getattr(*place) for name, place in own_vectors(model).items()}
    own = [(name, value, value.data) for name, value in named.items() if isinstance(value, nn.Parameter)]
    thawed = [(layer, layer.held) for layer in linears(model).values() if isinstance(layer.held, nn.Parameter)]
    for name, value, _ in own:
        value.data = torch.from_numpy(model.weights.float32(name))
    for layer, _ in thawed:
        layer.release()
    try:
        yield
    finally:
        for _, value, trained in own:
            value.data = trained
        for layer, weight in thawed:
            layer.held = weight
        for parent, name, child in adapted:
            setattr(parent, name, child)


def set_dropout(model: Decoder | Encoder, key: tuple[int, ...] | None) -> None:
    """Choose the dropout masks of every adapted linear by counters such as (seed, step, micro-batch); None: none."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.start_pass(key)
