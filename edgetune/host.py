"""What this machine has, read from the operating system when asked: the "auto" values of the `host` profile.

Nothing is measured here: compute and bandwidth need a benchmark and stay numbers in the profile.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil

MIB = 1 << 20
# What Linux calls a feature in /proc/cpuinfo, where its name differs from the profiles'.
CPUINFO_NAMES = {"asimd": "neon", "asimdhp": "fp16", "asimddp": "dotprod"}
# Of a process that trains. Threads that wait for each other spin for 300,000 rounds by default, and where another
# program takes a core they spin against it. Seconds of a step on the SmolLM2-135M shape, 2 cores, alone and beside one
# busy process: 1.34 and 6.9 with 10,000 rounds, 1.33 and 3.8 with 3,000, 1.41 and 3.1 with 1,000; by default 1.28 alone
THREAD_SETTINGS = {"GOMP_SPINCOUNT": "3000"}


def total_bytes() -> int:
    """Physical memory, or less where the container that this runs in is limited."""
    total: int = psutil.virtual_memory().total
    for limit in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            total = min(total, int(limit.read_text()))
        except (OSError, ValueError):  # not this cgroup version, or "max"
            continue
    return total


def total_mib() -> int:
    return total_bytes() // MIB


def half_available_mib() -> int:
    return int(min(psutil.virtual_memory().available, total_bytes())) // (2 * MIB)


def os_name() -> str:
    return {"Darwin": "macos", "Windows": "windows"}.get(platform.system(), "linux")


def arch() -> str:
    machine = platform.machine().lower()
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, "armv7" if machine.startswith("armv") else machine)


def isa() -> list[str]:
    """Instruction set features under the names that profiles use, sorted; those no profile names are among them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # macOS: every arm64 machine has these
        return ["dotprod", "fp16", "neon"] if arch() == "aarch64" else []
    line = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return sorted({CPUINFO_NAMES.get(word, word) for word in line[1].split()}) if line else []


def threads() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fastest_cores(count: int, cpus: Path = Path("/sys/devices/system/cpu")) -> set[int]:
    """So many of the cores that this process may run on (Linux): fast ones first, second threads of a core last."""
    usable = os.sched_getaffinity(0)
    mask = sum(1 << core for core in usable)

    def rank(core: int) -> tuple[int, int, int]:
        at = cpus / f"cpu{core}"
        siblings = _number(at / "topology/thread_siblings", 16)  # a mask of the threads of this core
        speed = _number(at / "cpu_capacity") or _number(at / "cpufreq/cpuinfo_max_freq")  # the first on Arm alone
        return (siblings & mask & ((1 << core) - 1)).bit_count(), -speed, core

    return set(sorted(usable, key=rank)[:count])


def _number(file: Path, base: int = 10) -> int:
    try:
        return int(file.read_text().replace(",", ""), base)
    except (OSError, ValueError):
        return 0


def cluster() -> list[dict[str, Any]]:
    """All cores as one cluster; the clock falls back to 1 GHz where the system does not tell."""
    try:
        frequency = psutil.cpu_freq()
        khz = int((frequency.max or frequency.current) * 1000)
    except (AttributeError, OSError, RuntimeError, NotImplementedError):
        khz = 0
    return [{"cores": threads(), "khz": khz or 1_000_000, "big": True}]


def free_mib() -> int:
    """Free storage where the command runs."""
    return int(psutil.disk_usage(os.getcwd()).free) // MIB
