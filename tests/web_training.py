"""What `examples/web/training.js` trains, a second time: the loop of `personalizer` on the same rows and adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from edgetune.adapters.lora import LoraConfig, slots
from edgetune.bundle import load_bundle
from edgetune.data import Row, Window, read_rows, stack
from edgetune.personalizer.graphs import Arrays, TrainingGraphs, read_description
from edgetune.personalizer.trainer import Backprop
from edgetune.planner.plans import Plan
from edgetune.tokenizer import load_tokenizer
from edgetune.training.schedule import learning_rate


def mulberry32(seed: int) -> Callable[[], float]:
    """Numbers in 0..1 that follow from a seed."""
    state, whole = seed, 0xFFFFFFFF

    def draw() -> float:
        nonlocal state
        state = (state + 0x6D2B79F5) & whole
        t = (state ^ (state >> 15)) * (1 | state) & whole
        t = ((t + ((t ^ (t >> 7)) * (61 | t) & whole)) & whole) ^ t
        return (t ^ (t >> 14)) / 2**32

    return draw


def losses(bundle: Path, data: Path, plan: Plan) -> list[float]:
    """The loss of every step, each row a window of its own; begins and draws as the page does."""
    description = read_description(load_bundle(bundle))
    rows, draw = read_rows(data, load_tokenizer(bundle), plan.max_seq_length), mulberry32(plan.seed)
    config = plan.adapter.resolved(description.model)
    graphs = TrainingGraphs(description, 1, plan.optimizer)
    rule, order = Backprop(graphs, _initial(config, plan, draw), config, plan), _endless(list(rows), draw)
    assert plan.max_steps is not None
    found = []
    for step in range(plan.max_steps):
        batches = [_batch([next(order) for _ in range(plan.batch_size)]) for _ in range(plan.gradient_accumulation_steps)]
        found.append(rule.gradient(batches, (0, step), lambda: None)[0])
        rate = learning_rate(
            step, peak=plan.learning_rate, warmup_steps=round(plan.warmup_ratio * plan.max_steps),
            max_steps=plan.max_steps, schedule=plan.lr_scheduler_type,
        )  # fmt: skip
        rule.update(rate)
    return found


def _initial(config: LoraConfig, plan: Plan, draw: Callable[[], float]) -> Arrays:
    tensors: Arrays = {}
    for slot in slots(config, plan.model_config):
        bound = 1 / math.sqrt(slot.in_features)
        a = [bound * (2 * draw() - 1) for _ in range(slot.in_features * config.rank)]
        tensors[f"{slot.linear}.lora_A"] = np.array(a, np.float32).reshape(slot.in_features, config.rank)
        tensors[f"{slot.linear}.lora_B"] = np.zeros((config.rank, slot.out_features), np.float32)
    return tensors


def _endless(rows: list[Row], draw: Callable[[], float]) -> Iterator[Row]:
    while True:
        order = list(range(len(rows)))
        for i in range(len(order) - 1, 0, -1):
            j = math.floor(draw() * (i + 1))
            order[i], order[j] = order[j], order[i]
        for index in order:
            yield rows[index]


def _batch(rows: list[Row]) -> dict[str, np.ndarray]:
    length = max(map(len, rows))
    return stack([Window((row,), length) for row in rows])
