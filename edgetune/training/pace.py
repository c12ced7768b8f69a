"""How fast a run goes and for how long: a device's compute and its slices of time, kept on another machine.

    emulate      every step lasts as long as the plan predicts for the device. What this machine has left of that time
                 is slept away by the step and not by the block, because the prediction is one of whole steps; and
                 before the update, so that a run stopped meanwhile stands where the device would. An evaluation is
                 slowed down as much as the steps before it were; a checkpoint takes what it takes here.
    one slice    the run stops at the end of the longest uninterrupted run that the device's system grants. No step is
                 begun that would not end in it, and what is written at the end is done before the grace is over.

Emulation cannot speed a machine up: steps that take it longer than the device are counted, and a slice is one of the
device's time, not of this machine's. Left out: how many slices a day has (`duty.daily_s`), which is for whatever
starts them; and heat, which the sustained GFLOP/s of a profile already include.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

from edgetune import host
from edgetune.planner.plans import Plan
from edgetune.training.stop import Stopped

NAP_SECONDS = 0.05  # between two looks at whether the run should stop
RECENT_STEPS = 20  # how long a step takes is the median of so many
FINAL_CHECKPOINTS = 2  # a run ends with a checkpoint, and with adapter and summary, which together take no longer


class Pace:
    """The clock of one run, and of one slice, which begins when this is made.

    `emulate` and `one_slice` are those of `train`; without both it only looks on.
    """

    def __init__(
        self, plan: Plan, *, emulate: bool = False, one_slice: bool = False,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self.emulates, self.clock, self._sleep = emulate, clock, sleep
        self.device, self.device_step_seconds = plan.device, plan.predicted_step_seconds
        self.slice_seconds, self.grace_seconds = plan.slice_seconds if one_slice else math.inf, plan.grace_seconds
        self._started = clock()
        self._step_started: float | None = None
        self._behind = 0.0  # how much longer than the device this machine took, in all
        self._worked: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds of this machine's work on the last steps
        self._warned = False

    def check(self, checkpoint_seconds: float) -> None:
        """Raise `Stopped` where the slice ends, less what two checkpoints of that length take beyond the grace."""
        if self._left(checkpoint_seconds) < 0:
            raise Stopped("slice")

    def begin_step(self, checkpoint_seconds: float) -> None:
        """Raise `Stopped` where a step would not end in the slice."""
        expected = statistics.median(self._worked) if self._worked else 0.0
        if self._left(checkpoint_seconds) < (self.device_step_seconds if self.emulates else expected):
            raise Stopped("slice")
        self._step_started = self.clock()

    def end_step(self, check: Callable[[], None]) -> float | None:
        """Sleep until the device would have made the step, calling `check` meanwhile.

        Returns:
            The seconds slept, 0 where this machine was slower than the device; None where nothing is emulated.
        """
        started, self._step_started = self._step_started, None
        assert started is not None
        worked = self.clock() - started
        self._worked.append(worked)
        if not self.emulates:
            return None
        self._behind += max(0.0, worked - self.device_step_seconds)
        self._sleep_until(started + self.device_step_seconds, check)
        return max(0.0, self.device_step_seconds - worked)

    def end_evaluation(self, started: float, check: Callable[[], None]) -> None:
        """Sleep until the device would have done what began at `started`, as the steps of this process tell."""
        if not self.emulates or not self._worked:
            return
        worked = self.clock() - started
        on_device = worked * self.device_step_seconds / statistics.median(self._worked)
        self._behind += max(0.0, worked - on_device)
        self._sleep_until(started + on_device, check)

    def warning(self) -> str | None:
        """What to tell, once, after a step that took longer here than on the device; a first step always may."""
        if self._warned or not self.emulates or len(self._worked) < 2 or self._worked[-1] <= self.device_step_seconds:
            return None
        self._warned = True
        return (
            f"this machine is slower than {self.device}: {self._worked[-1]:.3g} s for a step that is predicted to take "
            f"{self.device_step_seconds:.3g} s there. Emulation cannot speed it up; `late_steps` counts such steps"
        )

    def _left(self, checkpoint_seconds: float) -> float:
        """Seconds until the run has to stop. A step in progress has taken no longer than it would on the device."""
        now, behind = self.clock(), self._behind
        if self.emulates and self._step_started is not None:
            behind += max(0.0, now - self._step_started - self.device_step_seconds)
        writing = max(0.0, FINAL_CHECKPOINTS * checkpoint_seconds - self.grace_seconds)
        return self.slice_seconds - writing - (now - self._started - behind)

    def _sleep_until(self, end: float, check: Callable[[], None]) -> None:
        while (left := end - self.clock()) > 0:
            check()
            self._sleep(min(left, NAP_SECONDS))


@contextlib.contextmanager
def pinned(count: int) -> Iterator[None]:
    """Keep all threads of this process on its `count` fastest cores, where there are more and the system can (Linux).

    For emulation: a device's `threads` are all that it has, so the thread that samples memory gets no core of its own.
    Runs that are not emulated stay free, because the system can then move them away from a core that others use.
    """
    if not hasattr(os, "sched_setaffinity") or count >= host.threads():
        yield
        return
    before = os.sched_getaffinity(0)
    _move_threads(host.fastest_cores(count))
    try:
        yield
    finally:
        _move_threads(before)


def _move_threads(cores: set[int]) -> None:
    """The system's call moves one thread; those that start later follow the thread that starts them."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended, or the system forbids it
            os.sched_setaffinity(int(thread), cores)
