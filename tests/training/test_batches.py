"""The order of the windows: counter-based, every window once per epoch, steps of equal size."""

from __future__ import annotations

from typing import Any

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


def test_retention_windows_have_their_share_of_every_step() -> None:
    task, kept = windows(7), windows(5)
    settings: dict[str, Any] = {"retention": kept, "retention_share": 0.25, "seed": 5}
    batches = Batches(task, batch_size=4, gradient_accumulation_steps=2, **settings)
    again = Batches(task, batch_size=4, gradient_accumulation_steps=2, **settings)
    seen = [batches.windows_of_step(step) for step in range(35)]
    assert all(sum(any(window is old for old in kept) for window in step) == 2 for step in seen)
    assert all(again.windows_of_step(step) == seen[step] for step in (30, 3, 17))
    counts = [sum(window is each for step in seen for window in step) for each in (*task, *kept)]
    assert counts == [30] * 7 + [14] * 5
    few = Batches(task, batch_size=1, gradient_accumulation_steps=2, **settings)
    assert sum(any(each is old for old in kept) for step in range(40) for each in few.windows_of_step(step)) == 20
    only = Batches(task, batch_size=4, gradient_accumulation_steps=2, seed=5)
    ours = [window for step in seen for window in step if not any(window is old for old in kept)]
    assert ours[:56] == [window for step in range(7) for window in only.windows_of_step(step)]


def test_retention_windows_have_an_order_of_their_own() -> None:
    batches = Batches(
        windows(7), batch_size=2, gradient_accumulation_steps=1, seed=5, retention=windows(7), retention_share=0.5
    )  # fmt: skip
    task, kept = (
        [int(each.input_ids[0]) for each in part] for part in zip(*map(batches.windows_of_step, range(7)), strict=True)
    )
    assert sorted(task) == sorted(kept) == list(range(7)) and task != kept
