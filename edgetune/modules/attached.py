"""A network with an adapter: `attach` puts frozen layers in the place of its own, and says what it did with each.

Names are the network's own (`net.named_modules()`), so an adapter's file means the same to PEFT. A layer that is used
under two names is one layer, adapted once, under the first.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgetune.adapters.lora import LoraConfig
from edgetune.errors import ConfigError, ModelError
from edgetune.grids import GRIDS
from edgetune.modules import files
from edgetune.modules.layers import FrozenLayer, dense_reason, no_adapter_reason, untouched_reason

_KIB = 1024
_WITH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)  # instance norms too
_SETTINGS = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"}  # others speak of a decoder's blocks


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer that has weights."""

    name: str
    kind: str
    shape: tuple[int, ...]
    "of its weight; empty where it has several"
    grid: str | None
    adapted: bool
    nbytes: int
    "frozen, as stored"
    dense_nbytes: int
    reason: str
    "why it is not on the grid or has no adapter; empty where it is and has"


class AttachedModule(nn.Module):
    """A network whose Linear, Conv1d and Conv2d layers are frozen and adapted; call it as the network itself.

    `module` is the network, changed in place. `layers` says what became of each layer, `config` is the adapter's.
    The only parameters with gradients are `trainable()`. Statistics of normalization layers are frozen too: `train()`
    leaves these layers in evaluation, or the base would change with every batch.
    """

    def __init__(self, module: nn.Module, config: LoraConfig, grid: str, layers: Sequence[LayerReport]) -> None:
        super().__init__()
        self.module, self.config, self.grid, self.layers = module, config, grid, tuple(layers)
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives."""
        return self.module(*args, **kwargs)

    def train(self, mode: bool = True) -> AttachedModule:
        """As of any module, except for layers that keep statistics."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _WITH_STATISTICS) and layer.track_running_stats:
                layer.eval()
        return self

    def frozen_layers(self) -> dict[str, FrozenLayer]:
        """The layers that were replaced, by name."""
        return {name: layer for name, layer in self.module.named_modules() if isinstance(layer, FrozenLayer)}

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The frozen network alone while the body runs (layers that are trained in full stay trained)."""
        layers = self.frozen_layers().values()
        before = [layer.scaling for layer in layers]
        try:
            for layer in layers:
                layer.scaling = 0.0
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling = scaling

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's tensors `<layer>.lora_A` and `<layer>.lora_B`, and those of layers that are trained in full."""
        return {name: value for name, value in self.module.named_parameters() if value.requires_grad}

    @property
    def frozen_nbytes(self) -> int:
        """Bytes of everything that is not trained: codes and scales, dense weights, biases, statistics."""
        frozen = [value for value in self.module.parameters() if not value.requires_grad]
        return sum(value.numel() * value.element_size() for value in (*frozen, *self.module.buffers()))

    @property
    def adapter_nbytes(self) -> int:
        """Bytes of `trainable()`."""
        return sum(value.numel() * value.element_size() for value in self.trainable().values())

    @property
    def base_sha256(self) -> str:
        """Of everything that is not trained, with its names: what an adapter is bound to."""
        digest, trained = hashlib.sha256(), self.trainable()
        for name, value in self.module.state_dict().items():
            if name not in trained:
                digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
                digest.update(value.contiguous().view(-1).numpy().view(np.uint8).data)
        return digest.hexdigest()

    def summary(self) -> str:
        """A line for each layer with weights, and the sum."""
        width = max(len(layer.name) for layer in self.layers)
        lines = [_line(layer, width) for layer in self.layers]
        dense = sum(layer.dense_nbytes for layer in self.layers)
        stored = sum(layer.nbytes for layer in self.layers)
        count = sum(value.numel() for value in self.trainable().values())
        total = (
            f"frozen: {stored / _KIB:,.1f} KiB, {dense / _KIB:,.1f} dense. "
            f"Trained: {count:,} parameters, {self.adapter_nbytes / _KIB:,.1f} KiB"
        )
        return "\n".join([*lines, total])

    def save(self, folder: str | Path) -> None:
        """Write the adapter as PEFT does. Raises AdapterError where a tensor holds NaN or infinity."""
        files.save_adapter(Path(folder), self.config, self.trainable(), self._names())

    def load(self, folder: str | Path) -> AttachedModule:
        """Read an adapter that `save` or PEFT wrote, and return self. Raises AdapterError where it does not fit."""
        files.load_adapter(Path(folder), self.config, self.trainable())
        return self

    def _names(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.adapted]


def attach(
    module: nn.Module,
    adapter: LoraConfig | None = None,
    *,
    grid: str = "int4",
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
) -> AttachedModule:
    """Freeze a network on a 4-bit grid and put LoRA on its Linear, Conv1d and Conv2d layers, in place.

    Args:
        module: any network in float32 on the CPU. Layers of other kinds, recurrent ones among them, stay as they are.
        adapter: LoRA's settings; `target_modules` are names of layers, whole or their last parts (None: all).
        grid: "int4" or "nf4". Layers too small for it stay dense, and `summary()` says which.
        modules_to_save: names of modules that are trained in full instead, such as a new head (PEFT's word).
        seed: fixes the adapter's first values.

    Right afterwards the network computes what its rounded weights compute: B is zero.

    Raises:
        ModelError: no layer can be adapted, or a weight is not float32 on the CPU.
        ConfigError: a name is not in the network, its layer cannot be adapted, or a setting is out of range.
    """
    if grid not in GRIDS:
        raise ConfigError(f"grid = {grid!r}; choose from {', '.join(GRIDS)}.")
    config = _resolved(adapter or LoraConfig())
    _check_weights(module)
    saved = _named(module, modules_to_save)
    kept = {id(part) for name in saved for part in module.get_submodule(name).modules()}
    layers = {name: layer for name, layer in module.named_modules() if id(layer) not in kept and _has_weights(layer)}
    targets = _targets(layers, config)
    module.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    reports = []
    for name, layer in layers.items():
        frozen = _freeze(layer, grid)
        if frozen is not None and name in targets:
            frozen.adapt(config.rank, config.scaling, config.lora_dropout or 0.0, generator)
        if frozen is not None:
            _replace(module, layer, frozen)
        reports.append(_report(name, layer, frozen, grid, targeted=name in targets))
    for name in saved:
        module.get_submodule(name).requires_grad_(True)
        reports.append(_saved_report(name, module.get_submodule(name)))
    return AttachedModule(module, replace(config, target_modules=tuple(targets)), grid, reports)


def _resolved(config: LoraConfig) -> LoraConfig:
    """The config with every field that means something here filled. Raises ConfigError."""
    if type(config) is not LoraConfig:  # a subclass is another method
        raise ConfigError(f"adapter is {config!r:.80}; a LoraConfig was expected. Other methods have no form here.")
    wrong = [
        field.name
        for field in fields(config)
        if field.name not in _SETTINGS and getattr(config, field.name) != field.default
    ]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)} speaks of a decoder's blocks. Name layers of the network in target_modules."
        )
    r = 8 if config.r is None else config.r
    alpha = 2 * r if config.lora_alpha is None else config.lora_alpha
    dropout = config.lora_dropout or 0.0
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ConfigError(f"r = {r!r}; an integer of at least 1 was expected.")
    if not 0 < alpha < math.inf:
        raise ConfigError(f"lora_alpha = {alpha!r}; a positive number was expected.")
    if not 0 <= dropout < 1:
        raise ConfigError(f"lora_dropout = {dropout!r}; a number from 0 to below 1 was expected.")
    return replace(config, r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=bool(config.use_rslora))


def _check_weights(module: nn.Module) -> None:
    for name, value in module.named_parameters():
        if value.dtype != torch.float32 or value.device.type != "cpu":
            raise ModelError(
                f"{name} is {str(value.dtype).removeprefix('torch.')} on {value.device}; float32 on the CPU was "
                f"expected. Call .float().cpu() on the network first."
            )
    if any(isinstance(layer, FrozenLayer) for layer in module.modules()):
        raise ModelError("the network has an adapter already. Attach to a new copy of it.")


def _has_weights(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters(recurse=False))


def _named(module: nn.Module, names: Sequence[str]) -> list[str]:
    """The names, each of them checked to be a module's."""
    known = dict(module.named_modules())
    for name in names:
        if not name or name not in known:
            raise ConfigError(_unknown("modules_to_save", name, [key for key in known if key]))
    return list(dict.fromkeys(names))


def _targets(layers: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    """The names of the layers that get an adapter. Raises ModelError and ConfigError as `attach`."""
    reasons = {name: untouched_reason(layer) or no_adapter_reason(layer) for name, layer in layers.items()}
    able = [name for name, reason in reasons.items() if reason is None]
    if not able:
        found = "; ".join(f"{name or 'the network itself'}: {reason}" for name, reason in reasons.items())
        raise ModelError(
            f"no layer of this {'network' if layers else 'module'} can be adapted: {found or 'it has no weights'}. "
            f"Linear, Conv1d and Conv2d layers inside a module can."
        )
    if config.target_modules is None:
        return able
    wanted = set()
    for target in config.target_modules:
        found_names = [name for name in layers if name == target or name.endswith(f".{target}")]
        if not found_names:
            raise ConfigError(_unknown("target_modules", target, able))
        unable = [name for name in found_names if reasons[name] is not None]
        if unable:
            raise ConfigError(f"target_modules has {target!r}, and {unable[0]} {reasons[unable[0]]}. Leave it out.")
        wanted |= set(found_names)
    if not wanted:
        raise ConfigError(f"target_modules has nothing; choose from {', '.join(able)}.")
    return [name for name in able if name in wanted]


def _unknown(setting: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"{setting} has {name!r}, which the network has no layer of.{meant} It has {', '.join(known)}."


def _freeze(layer: nn.Module, grid: str) -> FrozenLayer | None:
    """The layer that takes its place; None where it stays."""
    if untouched_reason(layer) is not None:
        return None
    assert isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    frozen = FrozenLayer(layer, None if dense_reason(tuple(layer.weight.shape), grid) else grid)
    frozen.train(layer.training)
    return frozen


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is. Raises ModelError where that is the network itself."""
    if module is old:
        raise ModelError(f"the network is a single {type(old).__name__}. Put it into a module: nn.Sequential(layer).")
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def _report(name: str, layer: nn.Module, frozen: FrozenLayer | None, grid: str, *, targeted: bool) -> LayerReport:
    dense = _nbytes(itertools.chain(layer.parameters(recurse=False), layer.buffers(recurse=False)))
    kind = type(layer).__name__
    if frozen is None:
        return LayerReport(name, kind, (), None, False, dense, dense, untouched_reason(layer) or "")
    reasons = [dense_reason(frozen.frozen.shape, grid), None if targeted else no_adapter_reason(layer) or "no adapter"]
    stored = _nbytes(frozen.buffers())
    reason = "; ".join(reason for reason in reasons if reason)
    return LayerReport(name, kind, frozen.frozen.shape, frozen.frozen.grid, targeted, stored, dense, reason)


def _saved_report(name: str, part: nn.Module) -> LayerReport:
    return LayerReport(name, type(part).__name__, (), None, False, 0, 0, "trained in full, and stored with the adapter")


def _nbytes(tensors: Iterator[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _line(layer: LayerReport, width: int) -> str:
    shape = "x".join(map(str, layer.shape))
    stored = f"{layer.grid or 'dense':5} {'adapted' if layer.adapted else '':7}"
    line = f"{layer.name:{width}}  {layer.kind:18} {shape:12} {layer.nbytes / _KIB:8,.1f} KiB  {stored}  {layer.reason}"
    return line.rstrip()
