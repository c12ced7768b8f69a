"""Memory: the meter, the limits and the floor, all in bytes.

A budget counts anonymous + swap memory of the whole process tree: the figure that Android's memory limiter and a Linux
cgroup act on. Pages of mapped files are clean and can be dropped, so they are reported beside it (`rss`), never in it.

On Linux the figures come from /proc (RssAnon + VmSwap); elsewhere from psutil's unique set size, which is slower and
counts mapped pages that nobody shares. Shared anonymous memory is not counted; nothing in edgetune creates any.

Left out: what to do at the limit. The trainer decides that; the meter only raises its flag.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import mmap
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

MIB = 1 << 20
SAMPLE_SECONDS = 0.004
WHOLE_EVERY = 5  # samples: swap and child processes are read every 20 ms
_PROC = Path("/proc/self/status").exists()
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if _PROC else 0
_PROC_CHILDREN = Path("/proc/thread-self/children").exists()  # some kernels, Android's among them, leave it out
_FIELDS = re.compile(rb"^(VmHWM|VmRSS|RssAnon|VmData|VmSwap):\s+(\d+) kB$", re.MULTILINE)


def format_mib(num_bytes: float) -> str:
    """For people: "1,338 MiB", with one decimal below 100."""
    mib = num_bytes / MIB
    return f"{mib:,.0f} MiB" if abs(mib) >= 99.95 else f"{mib:.1f} MiB"


@dataclass(frozen=True)
class Sample:
    """One reading, summed over a process and its descendants."""

    anonymous_bytes: int
    """Anonymous + swap."""
    rss_bytes: int
    file_backed_bytes: int
    """Resident pages of mapped files, clean ones mostly, which the system may drop."""


def read_memory(pid: int | None = None) -> Sample:
    """What a process and its descendants use now, by the kernel's own count; None is this process.

    Raises:
        ProcessLookupError: there is no such process (any more).
    """
    return _Tree(pid).read()


def anonymous_bytes(pid: int | None = None) -> int:
    """Anonymous + swap bytes of a process and its descendants; None is this process.

    Raises:
        ProcessLookupError: there is no such process (any more).
    """
    return read_memory(pid).anonymous_bytes


def rss_bytes(pid: int | None = None) -> int:
    """Resident bytes of the same, mapped files included."""
    return read_memory(pid).rss_bytes


class _Tree:
    """A process and its descendants. The files of the root stay open, so that reading again costs little."""

    def __init__(self, pid: int | None) -> None:
        self.pid = os.getpid() if pid is None else pid
        self.highest_rss_bytes = 0  # of the root, as the kernel remembers it
        self._rest = Sample(0, 0, 0)  # beside the root's resident pages: its swap and its descendants
        self._files: list[int] = []
        if _PROC:
            try:
                for name in ("status", "statm"):
                    self._files.append(os.open(f"/proc/{self.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError as error:
                raise ProcessLookupError(f"there is no process {self.pid}") from error

    def read(self) -> Sample:
        """All of it."""
        if not _PROC:
            return self._read_psutil()
        status, _ = self._files
        root = _status_fields(os.pread(status, 4096, 0))
        self.highest_rss_bytes = root.get(b"VmHWM", 0)
        anonymous, rss, files = root.get(b"VmSwap", 0), 0, 0
        for child in _descendants(self.pid):
            fields = _fields_of(child)
            anonymous, rss = anonymous + _anonymous(fields), rss + fields.get(b"VmRSS", 0)
            files += _file_backed(fields)
        self._rest = Sample(anonymous, rss, files)
        return Sample(root.get(b"RssAnon", 0) + anonymous, root.get(b"VmRSS", 0) + rss, _file_backed(root) + files)

    def glance(self) -> Sample:
        """The root's resident pages now, and the rest as `read` found it: two microseconds instead of fifty."""
        if not _PROC:
            return self._read_psutil()
        _, statm = self._files
        _, resident, shared, *_ = os.pread(statm, 256, 0).split()
        pages, shared_bytes = int(resident), int(shared) * _PAGE_BYTES
        rss = pages * _PAGE_BYTES
        return Sample(
            rss - shared_bytes + self._rest.anonymous_bytes,
            rss + self._rest.rss_bytes,
            shared_bytes + self._rest.file_backed_bytes,
        )

    def _read_psutil(self) -> Sample:
        anonymous = rss = 0
        root = psutil.Process(self.pid)
        for process in (root, *root.children(recursive=True)):
            try:
                info = process.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            anonymous, rss = anonymous + info.uss, rss + info.rss
        return Sample(anonymous, rss, max(0, rss - anonymous))

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)


def _status_fields(text: bytes) -> dict[bytes, int]:
    return {name: int(kib) * 1024 for name, kib in _FIELDS.findall(text)}


def _fields_of(pid: int) -> dict[bytes, int]:
    try:
        return _status_fields(Path(f"/proc/{pid}/status").read_bytes())
    except OSError:  # it has ended
        return {}


def _anonymous(fields: dict[bytes, int]) -> int:
    return fields.get(b"RssAnon", 0) + fields.get(b"VmSwap", 0)


def _file_backed(fields: dict[bytes, int]) -> int:
    """Shared memory included, of which edgetune creates none."""
    return fields.get(b"VmRSS", 0) - fields.get(b"RssAnon", 0)


def _descendants(pid: int) -> list[int]:
    """All living descendants. Every thread lists the children that it started."""
    if not _PROC_CHILDREN:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            handle = os.open(f"/proc/{pid}/task/{thread}/children", os.O_RDONLY)
            try:
                children = os.read(handle, 1 << 16).split()
            finally:
                os.close(handle)
            for child in map(int, children):
                found += [child, *_descendants(child)]
    except OSError:  # the thread or the process has ended
        pass
    return found


class Meter:
    """Samples memory in a daemon thread while the `with` body runs.

    `exceeded` is set at the first sample above `budget_bytes` and stays set; nothing is stopped. `near` is set at each
    one above `near_bytes`: whoever then gave something up clears it.
    """

    def __init__(
        self, budget_bytes: int | None = None, *, near_bytes: int | None = None, seconds: float = SAMPLE_SECONDS
    ) -> None:
        self.budget_bytes, self.near_bytes = budget_bytes, near_bytes
        self.exceeded, self.near = threading.Event(), threading.Event()
        self.num_samples = 0
        self._seconds = seconds
        self._tree = _Tree(None)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edgetune-meter", daemon=True)
        self.reset_peak()

    def __enter__(self) -> Meter:
        self.reset_peak()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take(self._tree.read)
        self._stop.set()
        self._thread.join()

    @property
    def now_bytes(self) -> int:
        """Anonymous + swap bytes at this moment."""
        return self._take(self._tree.read).anonymous_bytes

    @property
    def peak_bytes(self) -> int:
        """The most anonymous + swap bytes of any sample since the last reset."""
        return self._peak.anonymous_bytes

    @property
    def peak_rss_bytes(self) -> int:
        """The most resident bytes since the last reset; exact for this process where the kernel keeps the figure."""
        return self._peak.rss_bytes

    @property
    def peak_file_backed_bytes(self) -> int:
        """The most resident bytes of mapped files of any sample since the last reset."""
        return self._peak.file_backed_bytes

    def reset_peak(self) -> None:
        """Forget the peaks: from here on they start at what is in use now."""
        with self._lock:
            self._peak = self._tree.read()
            self._highest_rss_before = self._tree.highest_rss_bytes

    def _take(self, read: Callable[[], Sample]) -> Sample:
        with self._lock:
            sample = read()
            self.num_samples += 1
            highest = self._tree.highest_rss_bytes
            seen = highest if highest > self._highest_rss_before else 0
            self._peak = Sample(
                max(self._peak.anonymous_bytes, sample.anonymous_bytes),
                max(self._peak.rss_bytes, sample.rss_bytes, seen),
                max(self._peak.file_backed_bytes, sample.file_backed_bytes),
            )
        if self.budget_bytes is not None and sample.anonymous_bytes > self.budget_bytes:
            self.exceeded.set()
        if self.near_bytes is not None and sample.anonymous_bytes > self.near_bytes:
            self.near.set()
        return sample

    def _run(self) -> None:
        for index in itertools.count(1):
            if self._stop.wait(self._seconds):
                return
            self._take(self._tree.glance if index % WHOLE_EVERY else self._tree.read)


def has_data_limit() -> bool:
    """Whether RLIMIT_DATA counts all private memory here: on Linux alone."""
    return _PROC


def set_data_limit(budget_bytes: int) -> bool:
    """Let allocations fail above the budget: RLIMIT_DATA = budget + what it counts beyond anonymous memory.

    RLIMIT_DATA counts private writable address space, touched or not. What is reserved now and not in use (VmData less
    RssAnon) is measured and added; call this once imports are done and threads run, whose stacks count 8 MiB each. In
    training that difference then grows by less than 0.5 MiB (measured). Only the soft limit is set, so it can be lifted
    again.

    Returns:
        Whether the limit holds now: False where the system has none.
    """
    if not has_data_limit():
        return False
    import resource

    fields = _fields_of(os.getpid())
    unused_bytes = max(0, fields[b"VmData"] - fields[b"RssAnon"])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = budget_bytes + unused_bytes
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return True


def trim_allocator(threshold_bytes: int = 1 << 17) -> bool:
    """Make glibc give every block of at least `threshold_bytes` back when it is freed; elsewhere do nothing.

    glibc raises that threshold on its own up to 32 MiB as large blocks are freed, and then keeps freed blocks in its
    heap. Fixing it gave back 65 to 120 MiB in measurements. It holds for the process and cannot be undone.

    Returns:
        Whether it was set.
    """
    m_mmap_threshold, m_trim_threshold = -3, -1  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    return bool(mallopt(m_mmap_threshold, threshold_bytes) and mallopt(m_trim_threshold, threshold_bytes))


def give_back() -> bool:
    """Return to the system what was freed inside the allocator's heap: call it after freeing much in small pieces.

    A tokenizer of 150,000 tokens is 100 MiB of them; 82 stay behind when it is freed, and 6 after this (measured).

    Returns:
        Whether the allocator can (glibc alone does).
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return False
    trim(0)
    return True


def read_ahead(address: int, num_bytes: int) -> None:
    """Begin to read a range of a mapped file, without waiting for it; a hint, which a system may not know."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = _madvise()
    if madvise is not None:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + num_bytes - start), mmap.MADV_WILLNEED)


@functools.cache
def _madvise() -> Any:
    try:
        return ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):  # Windows
        return None


# Anonymous bytes after the imports of an engine and a first small step, before any model: what `measure_floor` gave on
# x86-64 Linux, Python 3.11, torch 2.13 for CPUs, onnxruntime 1.31. Stands in where the engine is not installed and
# cannot be measured.
FLOOR_BYTES = {"torch": 150 * MIB, "ort": 32 * MIB}
# What an engine needs to be importable, and what measures it there, after the imports of the command that trains.
_FLOORS = {
    "torch": ("torch", "edgetune.cli.launch, edgetune.cli.training, edgetune.training.floor"),
    "ort": ("onnxruntime", "edgetune.cli.personalizing, edgetune.personalizer.floor"),
}


@functools.cache
def measure_floor(engine: str, threads: int = 1) -> int:
    """Anonymous bytes of a process with this engine before any model, measured once in a child (about two seconds).

    Where the engine is not installed or does not start, what another machine measured (`FLOOR_BYTES`).
    """
    package, modules = _FLOORS[engine]
    if importlib.util.find_spec(package) is not None:
        code = f"import {modules} as f; f.main({threads})"
        paths = (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
        child = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            check=False,
        )
        if child.returncode == 0:
            return int(child.stdout)
    return FLOOR_BYTES[engine]
