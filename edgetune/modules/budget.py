"""A device's memory limit around any code: `with budget("galaxy-watch-7") as held: …`.

What counts is anonymous + swap memory of the whole process, Python and torch themselves included, for the device's
killer counts them too. A governor samples it (`memory.Meter`) and `held.check()` raises where it was above the limit;
so does the end of the block. With `enforce="rlimit"` (Linux) allocations beyond it fail as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgetune.device import DeviceProfile, load_device
from edgetune.errors import BudgetError, ConfigError
from edgetune.memory import Meter, anonymous_bytes, format_mib, has_data_limit, trim_allocator
from edgetune.training.stop import DataLimit, is_out_of_memory

ENFORCEMENTS = ("governor", "rlimit")


@dataclass(frozen=True)
class HeldBudget:
    """A limit that is being watched."""

    budget_bytes: int
    meter: Meter

    @property
    def peak_bytes(self) -> int:
        """The most anonymous + swap bytes since the block began."""
        return self.meter.peak_bytes

    def check(self) -> None:
        """Raises BudgetError where any sample was above the limit; call it once a step."""
        if self.meter.exceeded.is_set():
            raise BudgetError(
                f"the process came to {format_mib(self.peak_bytes)}; {format_mib(self.budget_bytes)} are allowed. "
                f"Smaller batches need less, and so does a process that holds nothing else."
            )


def budget_bytes(limit: DeviceProfile | str | Path | int) -> int:
    """The limit of a profile, of its id or file, or a number of bytes. Raises DeviceError and ConfigError."""
    if isinstance(limit, bool) or (isinstance(limit, int) and limit < 1):
        raise ConfigError(f"the budget is {limit!r}; a device or a number of bytes was expected.")
    if isinstance(limit, int):
        return limit
    profile = limit if isinstance(limit, DeviceProfile) else load_device(limit)
    return profile.memory.budget_mib << 20


@contextlib.contextmanager
def budget(limit: DeviceProfile | str | Path | int, *, enforce: str = "governor") -> Iterator[HeldBudget]:
    """Hold this process to a device's budget, or to a number of bytes, while the body runs.

    Raises:
        BudgetError: the process holds more already, came above the limit, or was refused an allocation at it.
        DeviceError: there is no such device.
        ConfigError: nothing enforces that, here.
    """
    most = budget_bytes(limit)
    if enforce not in ENFORCEMENTS:
        raise ConfigError(f"enforce = {enforce!r}; choose from {', '.join(ENFORCEMENTS)}.")
    if enforce == "rlimit" and not has_data_limit():
        raise ConfigError("this system has no RLIMIT_DATA that counts private memory. Use enforce='governor'.")
    trim_allocator()
    now = anonymous_bytes()
    if now > most:
        raise BudgetError(
            f"this process holds {format_mib(now)} already; {format_mib(most)} are allowed. Start a new one that "
            f"imports and loads only what training needs."
        )
    with Meter(most) as meter, DataLimit(most) if enforce == "rlimit" else contextlib.nullcontext():
        held = HeldBudget(most, meter)
        try:
            yield held
        except (MemoryError, RuntimeError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            raise BudgetError(f"an allocation was refused at {format_mib(most)}. Smaller batches need less.") from error
        held.check()
