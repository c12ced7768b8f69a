"""The order of the windows: counter-based, every window once per epoch, steps of equal size."""

from __future__ import annotations

import numpy as np

from edgetune.data import Row, Window
from edgetune.training.batches import Batches, in_batches


def windows(count: int) -> list[Window]:
    rows = [Row(np.full(3, i, np.int32), np.full(3, i, np.int32), i) for i in range(count)]
    return [Window((row,), 4) for row in rows]


def seen(batches: Batches, step: int) -> list[int]:
    found, num_tokens = batches.of_step(step)
    assert [len(batch["input_ids"]) for batch in found] == [2] * 3 and num_tokens == 18
    return [int(ids[0]) for batch in found for ids in batch["input_ids"]]


def test_epochs_follow_each_other_without_a_gap() -> None:
    batches = Batches(windows(7), batch_size=2, gradient_accumulation_steps=3, seed=5)
    order = [index for step in range(7) for index in seen(batches, step)]
    epochs = [order[i : i + 7] for i in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_step_needs_no_steps_before_it() -> None:
    first = Batches(windows(7), batch_size=2, gradient_accumulation_steps=3, seed=5)
    in_turn = [seen(first, step) for step in range(6)]
    again = Batches(windows(7), batch_size=2, gradient_accumulation_steps=3, seed=5)
    assert seen(again, 4) == in_turn[4] and seen(again, 1) == in_turn[1]
    other = Batches(windows(7), batch_size=2, gradient_accumulation_steps=3, seed=6)
    assert [seen(other, step) for step in range(6)] != in_turn


def test_the_last_batch_may_be_smaller() -> None:
    sizes = [len(batch["input_ids"]) for batch in in_batches(windows(7), 3)]
    assert sizes == [3, 3, 1]
