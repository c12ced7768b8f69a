"""Linears that share an input, as one matrix of the graph: one product where there were two or three.

    self_attn.qkv_proj       q_proj, k_proj, v_proj      rows below each other
    mlp.gate_up_proj         gate_proj, up_proj

At one token most of what a small linear costs is the call, and an adapter adds calls of its own. So q, k, v and gate,
up are one weight each, with the bytes of their parts, and one adapter slot (`AdapterSlot` says how the parts' adapters
make its own). The names are those that other runtimes give these matrices.

A group stays apart where its parts are stored in different formats, or where the format has no bytes of its own for a
part (an nf4 block that would cross from one to the next). A family gives a bias to all parts of a group or to none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import NamedTuple

from edgetune.adapter_file import AdapterSlot
from edgetune.graphs import FORMATS
from edgetune.models import ModelConfig
from edgetune.models.config import DecoderConfig

FormatOf = Callable[[str], str]  # matrix -> key in `FORMATS`

QKV, GATE_UP = "self_attn.qkv_proj", "mlp.gate_up_proj"
PARTS = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), GATE_UP: ("mlp.gate_proj", "mlp.up_proj")
}  # fmt: skip


class Place(NamedTuple):
    """Where a matrix lies: the weight that holds it, the shape [N, K] of that, and the first row."""

    weight: str
    shape: tuple[int, int]
    start: int

    def rows(self, rows: slice) -> slice:
        """Rows of the matrix as rows of the weight."""
        return slice(self.start + rows.start, self.start + rows.stop)


def adapter_slots(config: ModelConfig, format_of: FormatOf) -> tuple[AdapterSlot, ...]:
    """The linears of all blocks in their order, those that are one weight as one slot."""
    linears = config.linears()
    whole: dict[str, tuple[str, ...]] = {}
    if isinstance(config, DecoderConfig):
        whole = {name: parts for name, parts in _groups(config) if _is_one(config, format_of, parts)}
    starts = {parts[0]: name for name, parts in whole.items()}
    inner = {part for parts in whole.values() for part in parts[1:]}
    slots = []
    for linear, (rows, columns) in linears.items():
        if linear in starts:
            modules = {part: linears[part][0] for part in whole[starts[linear]]}
            slots.append(AdapterSlot(starts[linear], columns, sum(modules.values()), modules))
        elif linear not in inner:
            slots.append(AdapterSlot(linear, columns, rows, {linear: rows}))
    return tuple(slots)


def places(config: ModelConfig, format_of: FormatOf) -> dict[str, Place]:
    """Every matrix, by its name."""
    found = {module: Place(module, shape, 0) for module, shape in config.matrices().items()}
    for slot in adapter_slots(config, format_of):
        shape = (slot.out_features, slot.in_features)
        starts = accumulate(slot.modules.values(), initial=0)
        found |= {module: Place(slot.name, shape, start) for module, start in zip(slot.modules, starts, strict=False)}
    return found


def _groups(config: DecoderConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    for index in range(config.num_hidden_layers):
        block = config.block(index)
        for name, parts in PARTS.items():
            yield f"{block}.{name}", tuple(f"{block}.{part}" for part in parts)


def _is_one(config: DecoderConfig, format_of: FormatOf, parts: tuple[str, ...]) -> bool:
    """Whether a graph can hold these matrices as one."""
    formats = {format_of(part) for part in parts}
    if len(formats) > 1:
        return False
    shapes = [config.linears()[part] for part in parts]
    *starts, rows = accumulate(shape[0] for shape in shapes)
    unit = FORMATS[formats.pop()].row_unit((rows, shapes[0][1]))
    return not any(start % unit for start in starts)
