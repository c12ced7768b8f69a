"""Ranks within a number of bytes: which linears get a LoRA, and of which rank.

A change of the weights of spectral norm 1 and rank r lowers the loss, to first order, by at most the sum of the r
largest singular values of the gradient G by the weight, and so by at most

    gain(r) = sqrt(r) ||G||        with ||G|| the Frobenius norm

It grows ever more slowly with the rank. So ranks are given one step after the other, each where the gain per byte of
the file is the largest of those that still fit. As in AdaLoRA (Zhang et al., arXiv 2303.10512) a sensitivity decides
what a linear gets; there it is that of each singular triple, and ranks are pruned while training, from more than the
budget allows. Here it is measured before the first step (`training.sensitivity`), so the peak never exceeds the plan's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from edgetune.adapters import lora
from edgetune.adapters.base import file_bytes
from edgetune.adapters.lora import LoraConfig
from edgetune.errors import BudgetError, ConfigError
from edgetune.memory import format_mib
from edgetune.models import ModelConfig

RANKS = (0, 2, 4, 8, 16, 32)


def check_wishes(config: LoraConfig) -> None:
    """Raises ConfigError where a budget of bytes and another setting contradict each other."""
    if config.method != lora.NAME:
        raise ConfigError(
            f"adapter_budget = {config.adapter_budget}; ranks within it are chosen for lora, not {config.method}. Take "
            "--adapter lora, or set --r."
        )
    chosen = ("r", "target_modules", "lora_alpha", "rank_pattern")
    given = [name for name in chosen if getattr(config, name) is not None]
    if given:
        raise ConfigError(
            f"adapter_budget = {config.adapter_budget} chooses linears and their ranks, and alpha = 2 r follows; "
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set too. Leave one of the two out."
        )


def allocate(config: LoraConfig, model: ModelConfig, norms: Mapping[str, float]) -> LoraConfig:
    """The config, resolved, with the ranks that its `adapter_budget` in bytes holds.

    Args:
        config: a budget, and whatever leaves the ranks open.
        model: the base.
        norms: place -> norm of the gradient by its weight [out, in]; only these places are adapted.

    Raises:
        BudgetError: the budget holds no linear of the lowest rank.
    """
    budget, shapes = config.adapter_budget or 0, model.linears()
    ranks: dict[str, int] = {}

    def with_ranks(ranks: dict[str, int]) -> LoraConfig:
        return replace(config, rank_pattern=ranks).resolved(model)

    def size(ranks: dict[str, int]) -> int:
        made = replace(config, r=RANKS[1], rank_pattern=ranks)
        return file_bytes(made, [lora.slot(place, shapes[place], made) for place in shapes if place in ranks])

    open_steps = {place: _steps(norm, shapes[place]) for place, norm in norms.items() if norm > 0}
    while steps := [(found[0], place) for place, found in open_steps.items() if found]:
        (_, rank), place = max(steps)
        if size(ranks | {place: rank}) <= budget:
            ranks[place] = rank
            open_steps[place].pop(0)
        else:
            del open_steps[place]  # higher ranks take more
    if not ranks:
        least = min(size({place: RANKS[1]}) for place in norms)
        raise BudgetError(
            f"adapter_budget = {budget} bytes holds no adapter: the smallest, of rank {RANKS[1]} at one linear, takes "
            f"{least}. Give at least that."
        )
    return with_ranks(ranks)


def _steps(norm: float, shape: tuple[int, int]) -> list[tuple[float, int]]:
    """(gain per byte, rank) of each step up of a linear; the gains fall."""
    ranks = [rank for rank in RANKS if rank <= min(shape)]
    return [
        (norm * (math.sqrt(rank) - math.sqrt(below)) / ((rank - below) * sum(shape)), rank)
        for below, rank in pairwise(ranks)
    ]


def table(config: LoraConfig, model: ModelConfig, norms: Mapping[str, float]) -> str:
    """A row for each block and a column for each linear: the rank that it got, and the gradient's norm there."""
    ranks, paths = config.rank_pattern or {}, list(model.linear_shapes)
    names = [path.rpartition(".")[2] for path in paths]
    slots = lora.slots(config, model)
    size = file_bytes(config, slots)
    lines = [
        f"{len(ranks)} of {len(norms)} linears are adapted, in {size:,} of {config.adapter_budget:,} bytes "
        f"({format_mib(size)}); rank and norm of the gradient:",
        f"  {'block':>5}" + "".join(f"{name:>15}" for name in names),
    ]
    for index in range(model.num_hidden_layers):
        places = [f"{model.block(index)}.{path}" for path in paths]
        cells = [f"{ranks.get(p, 0):>5}{norms[p]:>10.3g}" if p in norms else f"{'-':>5}{'':>10}" for p in places]
        lines.append(f"  {index:>5}" + "".join(cells))
    return "\n".join(lines)
