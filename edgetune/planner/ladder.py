"""The ladder of concessions: which settings may shrink, in which order, and by which steps.

    batch_size            the next smaller divisor of the effective batch; accumulation grows, so that batch stays
    recompute_layers      one block more is computed again in backward
    tile_weights          half as many weights are dequantized at once
    optimizer             adamw_8bit: the same rule, its moments in 8 bits
    activation_offloading the inputs of the blocks go to a file, which every step writes
    fast_products         products as torch multiplies them otherwise: half as fast, but no code for each shape
    max_seq_length        half the window, never below what the rows need
    target_modules        q_proj and v_proj alone
    r                     rank 4, then 2
    layers_to_transform   the upper half of the blocks, then of those, down to the last
    optimizer             lion_8bit, then sgd: other rules, with learning rates of their own
    step_rule             mezo: no gradients, the memory of inference

The first six cost time or nothing that was seen to matter, the others cost what the adapter can learn, so they come
later, and the last one costs most of both. A step is taken only when every step above it was not enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from edgetune.adapters.config import AdapterConfig
from edgetune.models import ModelConfig
from edgetune.optimizers import OPTIMIZERS

FEWER_TARGETS = ("q_proj", "v_proj"), ("query", "value")  # the pair that the LoRA paper settles on, as families call it
SMALLER_RANKS = (4, 2)
SMALLEST_TILE = 1 << 20  # weights, 4 MiB: smaller matrix products lose speed


@dataclass(frozen=True)
class Choice:
    """The settings that a plan may change. `adapter` is as the user wrote it, with what was conceded filled in."""

    model: ModelConfig
    adapter: AdapterConfig
    batch_size: int
    gradient_accumulation_steps: int
    max_seq_length: int
    recompute_layers: int
    tile_weights: int
    activation_offloading: bool
    dequantized_layers: int
    optimizer: str
    step_rule: str
    fast_products: bool

    @property
    def resolved(self) -> AdapterConfig:
        """The adapter with every field filled."""
        return self.adapter.resolved(self.model)

    @property
    def path_layers(self) -> int:
        """Blocks from the lowest adapted one to the top."""
        return self.model.num_hidden_layers - self.resolved.first_block

    def value(self, setting: str) -> str:
        """A setting as it is typed on the command line."""
        value = getattr(self if hasattr(self, setting) else self.resolved, setting, None)
        if setting == "layers_to_transform" and value:
            return _ranges(value)
        return ",".join(value) if isinstance(value, tuple) else str(value)


def _ranges(layers: Iterable[int]) -> str:
    """0,2,5-8 for 0, 2, 5, 6, 7, 8."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


@dataclass(frozen=True)
class Freedom:
    """What may be conceded, and how far."""

    settings: frozenset[str]
    accumulation: bool
    """Whether accumulation may grow where the micro-batch shrinks."""
    shortest_window: int
    rules: bool
    """Whether another rule may take the optimizer's or the step's place: not where a learning rate was set for one."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Those that the engine has."""


def _smaller_batches(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    effective = choice.batch_size * choice.gradient_accumulation_steps
    for size in range(choice.batch_size - 1, 0, -1):
        if choice.batch_size % size == 0:
            steps = effective // size if freedom.accumulation else choice.gradient_accumulation_steps
            yield replace(choice, batch_size=size, gradient_accumulation_steps=steps)


def _more_recomputation(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    for layers in range(choice.recompute_layers + 1, choice.path_layers + 1):
        yield replace(choice, recompute_layers=layers)


def _smaller_tiles(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    while choice.tile_weights > SMALLEST_TILE:
        choice = replace(choice, tile_weights=max(SMALLEST_TILE, choice.tile_weights // 2))
        yield choice


def _quantized_moments(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    if "adamw_8bit" in freedom.optimizers:
        yield replace(choice, optimizer="adamw_8bit")


def _offloading(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    if not choice.activation_offloading:
        yield replace(choice, activation_offloading=True)


def _slower_products(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    if choice.fast_products:
        yield replace(choice, fast_products=False)


def _shorter_windows(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    while choice.max_seq_length > freedom.shortest_window:
        choice = replace(choice, max_seq_length=max(freedom.shortest_window, choice.max_seq_length // 2))
        yield choice


def _fewer_targets(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    known = {path.rpartition(".")[2] for path in choice.model.linear_shapes}
    fewer = next(pair for pair in FEWER_TARGETS if known.issuperset(pair))
    yield replace(choice, adapter=choice.adapter.changed(target_modules=fewer))


def _smaller_ranks(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    for r in SMALLER_RANKS:
        yield replace(choice, adapter=choice.adapter.changed(r=r))


def _upper_layers(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    total = choice.model.num_hidden_layers
    kept = total // 2
    while kept:
        layers = tuple(range(total - kept, total))
        again = min(choice.recompute_layers, kept)
        yield replace(choice, adapter=choice.adapter.changed(layers_to_transform=layers), recompute_layers=again)
        kept //= 2


def _fewer_moments(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    if freedom.rules:
        for name in ("lion_8bit", "sgd"):
            if name in freedom.optimizers:
                yield replace(choice, optimizer=name)


def _no_gradients(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    if freedom.rules and choice.optimizer == "sgd":  # which mezo is
        yield replace(choice, step_rule="mezo")


RUNGS: tuple[tuple[str, Callable[[Choice, Freedom], Iterator[Choice]]], ...] = (
    ("batch_size", _smaller_batches),
    ("recompute_layers", _more_recomputation),
    ("tile_weights", _smaller_tiles),
    ("optimizer", _quantized_moments),
    ("activation_offloading", _offloading),
    ("fast_products", _slower_products),
    ("max_seq_length", _shorter_windows),
    ("target_modules", _fewer_targets),
    ("r", _smaller_ranks),
    ("layers_to_transform", _upper_layers),
    ("optimizer", _fewer_moments),
    ("step_rule", _no_gradients),
)
SETTINGS = tuple(dict.fromkeys(setting for setting, _ in RUNGS))
ADAPTER_SETTINGS = frozenset({"target_modules", "r", "layers_to_transform"})  # where the method has them


def descend(choice: Choice, freedom: Freedom) -> Iterator[Choice]:
    """The choice itself, then each further concession, smaller and smaller; nothing is ever taken back."""
    yield choice
    for setting, rung in RUNGS:
        if setting in freedom.settings:
            for smaller in rung(choice, freedom):
                choice = smaller
                yield choice
