"""Why a step is left: a signal, the budget, memory that the system refuses; or a budget that is near.

Each of them only raises a flag; `Guard.check`, called between blocks, leaves the unfinished step. What was computed of
it is dropped, so the run stands where its last completed step left it.
"""

from __future__ import annotations

import errno
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from edgetune.memory import Meter, set_data_limit


class Stopped(Exception):  # noqa: N818, for it is no error
    """The step was left. `reason` is what the summary says in "stopped"."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class NearBudget(Exception):  # noqa: N818, for it is no error
    """The step was left to give something up and to begin it again."""


class Guard:
    """Catches SIGINT and SIGTERM while its body runs, where that is the main thread, and watches a meter's flag."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, meter: Meter, *, hold_budget: bool) -> None:
        self.meter, self.hold_budget = meter, hold_budget
        self.signal: int | None = None
        self.may_shrink = False  # whether the run has something left to give up
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Guard:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # asked twice: whoever asks does not want to wait for the checkpoint
            raise KeyboardInterrupt
        self.signal = number

    def check(self) -> None:
        """Raise `Stopped` where the run should not go on, and `NearBudget` where it should not go on like this."""
        if self.signal is not None:
            raise Stopped("signal")
        if not self.hold_budget:
            return
        if self.meter.exceeded.is_set():
            raise Stopped("budget")
        if self.may_shrink and self.meter.near.is_set():
            raise NearBudget


class DataLimit:
    """Lets allocations fail above the budget while its body runs; what is written between two bodies is not held.

    The limit is measured when the body is first entered, so that what the process reserved by then is not counted.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._before = self._held = (0, 0)
        self.holds = False

    def __enter__(self) -> None:
        import resource

        if self.holds:
            resource.setrlimit(resource.RLIMIT_DATA, self._held)
            return
        self._before = resource.getrlimit(resource.RLIMIT_DATA)
        self.holds = set_data_limit(self.budget_bytes)
        self._held = resource.getrlimit(resource.RLIMIT_DATA)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, self._before)


# Of torch's allocator, of the C++ library, and of oneDNN, whose code for a shape found no place.
_NO_MEMORY = ("allocate memory", "bad_alloc", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch reports that as a RuntimeError."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)
