"""The number of threads beside other programs: when it changes, and that it changes no bit."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from edgetune import host
from edgetune.adapters.lora import LoraConfig
from edgetune.planner.job import keeps_bits, row_step
from edgetune.training.backprop import Path as Walk
from edgetune.training.crew import (
    LONGEST_PATIENCE_SECONDS,
    SHORTEST_PATIENCE_SECONDS,
    Crew,
    queued_seconds,
    using,
)
from tests.training.conftest import make_base, random_batch
from tests.training.test_backprop import adapted, gradients

LOOK = 0.25
ALIGNED = {
    "hidden_size": 192, "intermediate_size": 448, "vocab_size": 301, "head_dim": 32,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip


class Machine:
    """A clock, and a queue in which the crew's threads stand for a share of the time."""

    def __init__(self, threads: int = 4, *, free: bool = True) -> None:
        self.now, self.queued, self.used = 100.0, 0.0, [threads]
        self.crew = Crew(threads, free=free, waited=lambda: self.queued, clock=lambda: self.now, use=self.used.append)

    def pass_time(self, seconds: float, share: float, *, from_threads: int = 0) -> None:
        """Let it pass by looks; the share is of the time in which at least so many threads computed."""
        for _ in range(round(seconds / LOOK)):
            self.now += LOOK
            self.queued += LOOK * share if self.crew.threads >= from_threads else 0.0
            self.crew.look()


def test_halves_beside_others_and_comes_back() -> None:
    machine = Machine()
    machine.pass_time(1.0, 0.1)
    assert machine.used == [4]
    machine.pass_time(LOOK, 0.5)
    assert machine.used == [4, 2]
    machine.pass_time(SHORTEST_PATIENCE_SECONDS + 2 * LOOK, 0.0)
    assert machine.used == [4, 2, 4]
    assert machine.crew.threads == 4


def test_a_trial_that_fails_is_made_less_and_less_often() -> None:
    machine = Machine(threads=2)
    machine.pass_time(100.0, 0.5, from_threads=2)
    trials = machine.used.count(2) - 1
    assert 100 / LONGEST_PATIENCE_SECONDS - 2 < trials < 100 / LONGEST_PATIENCE_SECONDS + 6
    machine.pass_time(LONGEST_PATIENCE_SECONDS + 2 * LOOK, 0.0)
    assert machine.crew.threads == 2


def test_a_trial_is_looked_at_sooner() -> None:
    machine = Machine(threads=2)
    machine.pass_time(LOOK, 0.5)
    machine.pass_time(SHORTEST_PATIENCE_SECONDS + LOOK, 0.0)
    assert machine.used == [2, 1, 2]
    machine.now, machine.queued = machine.now + 0.06, machine.queued + 0.05
    machine.crew.look()
    assert machine.used == [2, 1, 2, 1]


def test_one_thread_stays_one() -> None:
    machine = Machine(threads=2)
    machine.pass_time(SHORTEST_PATIENCE_SECONDS, 0.9)
    assert machine.used == [2, 1]


def test_keeps_its_number_where_another_would_change_bits() -> None:
    machine = Machine(free=False)
    machine.pass_time(3.0, 0.9)
    assert machine.used == [4]


def test_says_where_that_is() -> None:
    assert keeps_bits(2, 96, 64) and keeps_bits(8, 256, 32)
    for threads, positions, head_dim in (
        (2, 80, 64),
        (4, 96, 64),
        (2, 96, 16),
        (3, 96, 64),
        (16, 256, 64),
        (1, 96, 64),
    ):
        assert not keeps_bits(threads, positions, head_dim)


def test_keeps_its_number_where_the_system_does_not_tell() -> None:
    used: list[int] = []
    crew = Crew(2, free=True, waited=lambda: None, clock=iter(range(100)).__next__, use=used.append)
    crew.look()
    assert not used


def test_looks_no_more_often_than_it_must() -> None:
    machine = Machine()
    machine.now, machine.queued = machine.now + 0.1, 1.0
    machine.crew.look()
    assert machine.used == [4]


def spin(stop: threading.Event) -> None:
    block = bytes(1 << 20)
    while not stop.is_set():
        hashlib.sha256(block)  # without the interpreter's lock


def test_the_queue_is_the_kernels() -> None:
    before = queued_seconds()
    if before is None:
        pytest.skip("this system does not tell")
    code = "import os\nparent = os.getppid()\nprint(flush=True)\nwhile os.getppid() == parent: pass"
    command = [sys.executable, "-c", code]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2 * host.threads())]
    try:
        for other in others:
            assert other.stdout is not None and other.stdout.readline()
        started = time.process_time()
        while time.process_time() < started + 0.1:  # of the processor: it waits at least as long for it
            pass
        during = queued_seconds()
    finally:
        for other in others:
            other.kill()
            other.communicate()
    assert during is not None and during > before + 0.05


def test_other_threads_of_python_are_none_of_the_crew() -> None:
    """Such as the one that samples memory."""
    before = queued_seconds()
    stop = threading.Event()
    threads = [threading.Thread(target=spin, args=(stop,)) for _ in range(4 * host.threads())]
    for thread in threads:
        thread.start()
    stop.wait(0.5)  # they stand in the queue for more than a second, and this one sleeps
    after = queued_seconds()
    stop.set()
    for thread in threads:
        thread.join()
    assert before is None or (after is not None and after < before + 0.25)


@pytest.mark.parametrize(("threads", "batch", "length"), [(2, 1, 32), (2, 3, 96), (2, 5, 32), (4, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize(("grid", "fast"), [("nf4", False), ("int4", False), ("int4", True)])
def test_the_number_of_threads_changes_no_bit(
    tmp_path: Path, grid: str, fast: bool, threads: int, batch: int, length: int
) -> None:
    decoder, parameters, _ = adapted(make_base(tmp_path, "qwen2", grid, **ALIGNED), LoraConfig(r=8))
    assert keeps_bits(threads, batch * length, decoder.config.head_dim)
    if fast:
        decoder.workspace.fast_positions = decoder.workspace.fast_loss_rows = batch * length
    batches = [random_batch(decoder.config.vocab_size, batch, length)]
    walk = Walk(0, 1, row_step=row_step(threads))
    found = []
    while threads:
        with using(threads):
            found.append(gradients(decoder, parameters, batches, walk))
        threads //= 2
    for loss, made in found[1:]:
        assert loss == found[0][0]
        assert [name for name in made if not torch.equal(made[name], found[0][1][name])] == []
