"""How many threads compute while other programs want the same cores.

Threads that share each matrix product wait for the slowest of them. Where another program takes turns with one of them
on its core, all wait for that core's turns: beside one busy process on two cores, two threads are slower than one. So
between blocks the crew looks at how long its threads stood in the system's queue, ready to run. Where that is much it
goes on with half of them, and tries all of them again after a while, each time that fails after a longer one.

The number changes no bit of the result where every thread's part of an array ends where a whole vector ends
(`planner.job.keeps_bits`; the loss fills its rows up to that). The crew keeps its number elsewhere, and where the
system does not tell, which is anywhere but on Linux.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import torch

LOOK_SECONDS = 0.2
TRIAL_SECONDS = 0.05  # a trial of more threads is looked at sooner: where it fails, it costs time
# Of the time, in the queue, all threads together: measured 0.02 with two threads alone on two cores, and 0.74 beside a
# busy process. Passing work of the system is 0.1 over so long a look.
CROWDED_SHARE = 0.3
SHORTEST_PATIENCE_SECONDS, LONGEST_PATIENCE_SECONDS = 0.5, 8.0


@contextlib.contextmanager
def using(threads: int) -> Iterator[None]:
    """So many threads while the body runs. All have started then: stacks count where a DataLimit is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.zeros(threads << 15).add_(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Crew:
    """The threads of one run; `look` wants to be called often.

    `threads` is the plan's number, which stays where it is not `free`. The others are for tests: `waited` returns the
    seconds that this process's threads stood in the queue so far, or None where that is not known.
    """

    def __init__(
        self, threads: int, *, free: bool,
        waited: Callable[[], float | None] | None = None, clock: Callable[[], float] = time.monotonic,
        use: Callable[[int], None] = torch.set_num_threads,
    ) -> None:  # fmt: skip
        self.threads = self.most = threads
        self._waited, self._clock, self._use = waited or queued_seconds, clock, use
        self._patience, self._tried = SHORTEST_PATIENCE_SECONDS, False
        self._changed = self._looked = clock()
        known = self._waited() if free else None
        self._known, self._before = known is not None, known or 0.0

    def look(self) -> None:
        """Halve the threads where they stand in the queue; double them, up to the plan's, when it is time to try."""
        now = self._clock()
        since = now - self._changed
        on_trial = self._tried and since < LOOK_SECONDS
        if not self._known or now - self._looked < (TRIAL_SECONDS if on_trial else LOOK_SECONDS):
            return
        waited = self._waited() or self._before  # unknown once: nothing has happened since the look before
        crowded = waited - self._before > CROWDED_SHARE * (now - self._looked)
        self._looked, self._before = now, waited
        if crowded and self.threads > 1:
            failed = self._tried and since < LONGEST_PATIENCE_SECONDS
            self._patience = min(2 * self._patience, LONGEST_PATIENCE_SECONDS) if failed else SHORTEST_PATIENCE_SECONDS
            self._set(self.threads // 2, now)
        elif self.threads < self.most and since > self._patience:
            self._set(2 * self.threads, now)

    def _set(self, threads: int, now: float) -> None:
        self._tried, self.threads, self._changed = threads > self.threads, threads, now
        self._use(threads)


def queued_seconds() -> float | None:
    """Seconds that the threads which compute were ready to run and did not, each for itself: the caller's, and those
    that torch started. None where the system does not tell (`/proc/self/task/*/schedstat`, the second figure).
    """
    total, others = 0, {str(thread.native_id) for thread in threading.enumerate()} - {str(threading.get_native_id())}
    try:
        for thread in {*os.listdir("/proc/self/task")} - others:
            file = os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY)
            try:
                total += int(os.read(file, 100).split()[1])
            finally:
                os.close(file)
    except (OSError, IndexError, ValueError):  # no such files, or a thread that has just ended
        return None
    return total / 1e9
