"""A cgroup of exactly the budget: the one limit that the kernel itself holds a process to.

              version 1                        version 2
    limit     memory.limit_in_bytes            memory.max
    swap      memory.memsw.limit_in_bytes      memory.swap.max
    peak      memory.max_usage_in_bytes        memory.peak (since Linux 5.19)
    kills     memory.oom_control: oom_kill     memory.events: oom_kill (both since Linux 4.13)

A group is charged for anonymous memory, for the kernel's own memory on its behalf, and for pages of files that it was
the first to read. The last the kernel takes back before it kills, so a mapped base does not use a budget up; the peak
includes them. Memory and swap together are held to the limit: version 2 limits them apart, so there nothing is swapped.
Only memory that a process takes while it is in the group is charged to it: it has to enter before its program starts.

Files as in Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of Linux. Left out: memory.high, which
slows a process down above it instead of ending it; the governor knows sooner and can give something up. And
memory.failcnt: Linux 6.18 does not count there while the limits with and without swap are equal (tried).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path
from typing import TypedDict

from edgetune.errors import ConfigError
from edgetune.memory import MIB, anonymous_bytes, format_mib

# What a group of a process that trains is charged for and the meter does not see, measured: page tables, stacks and
# such, 1.1 to 1.7 MiB; 2 MiB of the mapped base that were being read, which the kernel cannot take back meanwhile (it
# killed with those in its report; more where a disk reads further ahead, see read_ahead_kb); and 0.7 MiB by which a
# refused allocation may come too late.
KERNEL_BYTES = 5 * MIB
_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
_SWAP = {1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"}
_PEAK = {1: "memory.max_usage_in_bytes", 2: "memory.peak"}
_ANONYMOUS = {1: ("rss", "swap"), 2: ("anon",)}  # of memory.stat
_INSTEAD = "Use --enforce rlimit or --enforce governor"


class CgroupState(TypedDict):
    """How a cgroup could hold this process: `version` 0 is not at all, `folder` is that of the memory controller."""

    version: int
    folder: str
    writable: bool
    limit_bytes: int | None


_NO_CGROUP = CgroupState(version=0, folder="", writable=False, limit_bytes=None)


def cgroup_state(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> CgroupState:
    """The memory controller of this process, version 1 or 2; the other arguments are for tests."""
    try:
        lines = [line.split(":", 2) for line in proc.read_text().splitlines()]
    except OSError:
        return _NO_CGROUP
    for controller, version, mount in (("memory", 1, root / "memory"), ("", 2, root)):
        paths = [path.strip("/").split("/") for _, names, path in lines if controller in names.split(",")]
        # Inside a container the path may be the host's, of which only the end is mounted, or nothing but our group.
        ends = (mount.joinpath(*path[at:]) for path in paths for at in range(len(path) + 1))
        folder = next(filter(Path.is_dir, ends), mount)
        file = folder / _LIMIT[version]
        if paths and ("memory" in _words(folder / "cgroup.controllers") if version == 2 else file.exists()):
            writable, limit_bytes = os.access(folder, os.W_OK), _number(file)
            return CgroupState(version=version, folder=str(folder), writable=writable, limit_bytes=limit_bytes)
    return _NO_CGROUP


@dataclass(frozen=True)
class Cgroup:
    """A group of the memory controller, by its folder."""

    version: int
    folder: Path

    @property
    def limit_bytes(self) -> int | None:
        """None is unlimited."""
        return _number(self.folder / _LIMIT[self.version])

    @property
    def peak_bytes(self) -> int | None:
        """The most that was ever charged, pages of files included; None where the kernel does not keep it."""
        return _number(self.folder / _PEAK[self.version])

    @property
    def oom_kills(self) -> int | None:
        """How many processes the kernel killed at the limit; None where it does not count them."""
        file = "memory.oom_control" if self.version == 1 else "memory.events"
        return _fields(self.folder / file).get("oom_kill")

    def enter(self) -> None:
        """Move this process, with one thread, into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def holds(self, limit_bytes: int) -> bool:
        """Whether this process is in the group, has been since its program began, and the limit is this one.

        One that came later left what it had by then with the group that it came from.
        """
        inside = str(os.getpid()) in _words(self.folder / "cgroup.procs")
        if not inside or self.limit_bytes != _whole_pages(limit_bytes):
            return False
        fields = _fields(self.folder / "memory.stat")
        charged = sum(fields.get(name, 0) for name in _ANONYMOUS[self.version])
        late = MIB + 64 * PAGESIZE * (
            os.cpu_count() or 1
        )  # the kernel adds up once so many pages per core have changed
        return charged + late >= anonymous_bytes()

    def remove(self) -> None:
        """Remove the group; one that still has processes stays."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def make_cgroup(limit_bytes: int, state: CgroupState | None = None) -> Cgroup:
    """A new and empty group of that size, below this process's own or, in version 2, beside it.

    Raises:
        ConfigError: none can be made here; the message says why and what can be done instead.
    """
    state = cgroup_state() if state is None else state
    if not state["version"]:
        raise ConfigError(f"enforce = 'cgroup': this system has no cgroup that limits memory. {_INSTEAD}.")
    problems = []
    for parent in _parents(state):
        group = Cgroup(state["version"], parent / f"edgetune-{os.getpid()}")
        try:
            _make(group, limit_bytes)
        except OSError as error:
            group.remove()
            problems.append(f"{parent}: {error.strerror or error}")
        else:
            return group
    hint = "" if state["version"] == 1 else ", or start `systemd-run --user --scope -p Delegate=yes edgetune train ...`"
    raise ConfigError(
        f"enforce = 'cgroup': no group of {format_mib(limit_bytes)} can be made here ({'; '.join(problems)}). "
        f"{_INSTEAD}{hint}."
    )


def _parents(state: CgroupState) -> Iterator[Path]:
    """Where the group may lie. In version 2 a group with processes, such as our own, does not divide its memory."""
    own = Path(state["folder"])
    yield own
    if state["version"] == 2 and (own.parent / "cgroup.subtree_control").exists():
        yield own.parent


def _make(group: Cgroup, limit_bytes: int) -> None:
    """Raises OSError, also where the kernel took another limit than this one."""
    parent = group.folder.parent
    if group.version == 2 and "memory" not in _words(parent / "cgroup.subtree_control"):
        (parent / "cgroup.subtree_control").write_text("+memory")
    group.folder.mkdir()
    size = _whole_pages(limit_bytes)
    (group.folder / _LIMIT[group.version]).write_text(str(size))
    swap = group.folder / _SWAP[group.version]
    if swap.exists():
        swap.write_text(str(size if group.version == 1 else 0))
    elif group.version == 1:  # swap is not accounted: then none is used, which 0 means for a group's own limit
        (group.folder / "memory.swappiness").write_text("0")
    if group.limit_bytes != size:
        raise OSError(f"a limit of {size} bytes was asked for and {group.limit_bytes} is what was set")


def own_cgroup() -> Cgroup | None:
    """The group that this process is in."""
    state = cgroup_state()
    return Cgroup(state["version"], Path(state["folder"])) if state["version"] else None


def holding_cgroup(limit_bytes: int) -> Cgroup:
    """The group that has held this process to that limit since its program began.

    Raises:
        ConfigError: there is none.
    """
    group = own_cgroup()
    if group is None or not group.holds(limit_bytes):
        raise ConfigError(
            f"enforce = 'cgroup': no cgroup of {format_mib(limit_bytes)} has held this process since it started. "
            f"`edgetune train --enforce cgroup` starts one that is held. {_INSTEAD} here."
        )
    return group


def check_cgroup() -> None:
    """Raise ConfigError where `make_cgroup` would, found by making one."""
    make_cgroup(64 * MIB).remove()


def _whole_pages(num_bytes: int) -> int:
    return num_bytes // PAGESIZE * PAGESIZE


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _fields(file: Path) -> dict[str, int]:
    """A file of lines such as `oom_kill 0`."""
    words = _words(file)
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=False)}


def _number(file: Path) -> int | None:
    try:
        value = int(file.read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return None
    return value if value < 1 << 60 else None  # version 1 writes "no limit" as a huge number
