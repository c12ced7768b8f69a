"""Ranks within a number of bytes: which linears get a LoRA, and of which rank.

A gradient G by a weight with singular values sigma_i goes in about

    e = exp(-sum_i p_i log p_i)        p_i = sigma_i / sum_j sigma_j

directions, its effective rank (Roy and Vetterli, EUSIPCO 2007), so that is how many a change of that weight can use.
It is the "gradient intrinsic dimensionality" that RaLoRA aligns adapters with (Ye et al., "Gradient Intrinsic
Dimensionality Alignment", ICLR 2026). With R the rank that the budget affords everywhere, a linear gets

    rank = t e        but at least R / 2 and at most 4 R

with the one t that fills the budget, in whole ranks. The bounds are those of GoRA (He et al., arXiv 2502.12171), which
shares a budget by another measure, mean |W * G|. How large G is does not decide: on the model of
`benchmarks/adapter_budget.py` v_proj has the largest by far and nearly all of it in one direction, and ranks that
followed it learned less than one rank everywhere (`benchmarks/LOG.md`). `scaling` stays one for all.

What is measured is measured before the first step (`training.sensitivity`); AdaLoRA (arXiv 2303.10512) prunes while
training, from more than the budget allows. So the peak never exceeds the plan's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace

from edgetune.adapters import lora
from edgetune.adapters.base import file_bytes
from edgetune.adapters.lora import LoraConfig
from edgetune.errors import BudgetError, ConfigError
from edgetune.memory import format_mib
from edgetune.models import ModelConfig

CEILING = 4


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


def allocate(config: LoraConfig, model: ModelConfig, directions: Mapping[str, float]) -> LoraConfig:
    """The config, resolved, with the ranks that its `adapter_budget` in bytes holds.

    Args:
        config: a budget, and whatever leaves the ranks open.
        model: the base.
        directions: place -> effective rank of the gradient by its weight, above 0; only these places are adapted.

    Raises:
        BudgetError: the budget holds no linear of rank 1.
    """
    budget, shapes = config.adapter_budget or 0, model.linears()

    def size(ranks: Mapping[str, int]) -> int:
        made = replace(config, r=1, rank_pattern=dict(ranks))
        return file_bytes(made, [lora.slot(place, shapes[place], made) for place in shapes if ranks.get(place)])

    def everywhere(rank: int) -> dict[str, int]:
        return {place: min(rank, *shapes[place]) for place in directions}

    highest = max(min(shapes[place]) for place in directions)
    even = bisect_right(range(1, highest + 1), budget, key=lambda rank: size(everywhere(rank)))
    ranks = everywhere((even + 1) // 2)
    steps = sorted(
        (rank / directions[place], rank, place)
        for place, most in everywhere(max(1, CEILING * even)).items()
        for rank in range(ranks[place] + 1, most + 1)
    )

    def after(count: int) -> dict[str, int]:
        return ranks | {place: rank for _, rank, place in steps[:count]}

    taken = bisect_right(range(1, len(steps) + 1), budget, key=lambda count: size(after(count)))
    ranks = after(taken)
    for _, rank, place in steps[taken:]:  # the bytes that are left
        if rank == ranks[place] + 1 and size(ranks | {place: rank}) <= budget:
            ranks[place] = rank
    ranks = {place: rank for place, rank in ranks.items() if rank}
    if not ranks:
        least = min(size({place: 1}) for place in directions)
        raise BudgetError(
            f"adapter_budget = {budget} bytes holds no adapter: the smallest, of rank 1 at one linear, takes {least}. "
            "Give at least that."
        )
    return replace(config, rank_pattern=ranks).resolved(model)


def table(config: LoraConfig, model: ModelConfig, directions: Mapping[str, float]) -> str:
    """A row for each block and a column for each linear: the rank that it got, and the gradient's effective rank."""
    ranks, paths = config.rank_pattern or {}, list(model.linear_shapes)
    names = [path.rpartition(".")[2] for path in paths]
    slots = lora.slots(config, model)
    size = file_bytes(config, slots)
    lines = [
        f"{len(ranks)} of {len(directions)} linears are adapted, in {size:,} of {config.adapter_budget:,} bytes "
        f"({format_mib(size)}); rank and effective rank of the gradient:",
        f"  {'block':>5}" + "".join(f"{name:>15}" for name in names),
    ]
    for index in range(model.num_hidden_layers):
        places = [f"{model.block(index)}.{path}" for path in paths]
        cells = [
            f"{ranks.get(p, 0):>5}{directions[p]:>10.3g}" if p in directions else f"{'-':>5}{'':>10}" for p in places
        ]
        lines.append(f"  {index:>5}" + "".join(cells))
    return "\n".join(lines)
