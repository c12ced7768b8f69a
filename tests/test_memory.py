"""The meter against known allocations, the limits in children, and what the allocator gives back."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgetune import memory
from edgetune.memory import MIB, Meter, anonymous_bytes, format_mib, measure_floor, read_memory, rss_bytes

CLOSE = 2 * MIB  # what Python itself may allocate meanwhile


def touched(num_bytes: int) -> mmap.mmap:
    """Private anonymous memory, every page written."""
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, num_bytes, mmap.PAGESIZE):
        block[at] = 1
    return block


def run(code: str) -> str:
    """What a child prints; it fails the test where the child fails."""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


@contextmanager
def child_holding(num_bytes: int, code: str = "") -> Iterator[int]:
    """The pid of a child that holds so much until the body ends."""
    code = code or f"import sys; block = bytearray(b'x') * {num_bytes}; print('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child.pid
        assert child.stdin is not None
        child.stdin.close()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0.0 MiB"), (MIB // 2, "0.5 MiB"), (99 * MIB, "99.0 MiB"), (100 * MIB, "100 MiB"), (1338 * MIB, "1,338 MiB")],
)
def test_format_mib(num_bytes: int, text: str) -> None:
    assert format_mib(num_bytes) == text


def test_counts_what_was_written_and_no_more() -> None:
    before = anonymous_bytes()
    untouched = mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert abs(anonymous_bytes() - before) < CLOSE
    block = touched(48 * MIB)
    assert abs(anonymous_bytes() - before - 48 * MIB) < CLOSE
    block.close()
    untouched.close()
    assert abs(anonymous_bytes() - before) < CLOSE


def test_mapped_files_count_as_rss_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"w" * (32 * MIB))
    before, rss_before, files_before = anonymous_bytes(), rss_bytes(), read_memory().file_backed_bytes
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[at] for at in range(0, len(mapped), mmap.PAGESIZE)) == ord("w") * 32 * MIB // mmap.PAGESIZE
        assert abs(anonymous_bytes() - before) < CLOSE
        assert rss_bytes() - rss_before > 31 * MIB
        assert 31 * MIB < read_memory().file_backed_bytes - files_before < 32 * MIB + CLOSE


@pytest.mark.skipif(not memory.has_data_limit(), reason="only Linux keeps the figure")
def test_file_backed_is_what_the_kernel_calls_so() -> None:
    with child_holding(8 * MIB) as pid:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
        found = read_memory(pid)
        assert found.file_backed_bytes == (kib["RssFile"] + kib["RssShmem"]) * 1024
        assert found.rss_bytes - found.file_backed_bytes == kib["RssAnon"] * 1024


def test_children_and_their_children_count() -> None:
    before = anonymous_bytes()
    with child_holding(40 * MIB) as pid:
        own = anonymous_bytes(pid)
        assert own > 40 * MIB
        assert abs(anonymous_bytes() - before - own) < CLOSE
    grand = f"""
import subprocess, sys
code = "import sys; b = bytearray(b'x') * {40 * MIB}; print('ready', flush=True); sys.stdin.read()"
child = subprocess.Popen([sys.executable, "-c", code])
child.wait()
"""
    with child_holding(0, grand) as pid:
        assert anonymous_bytes(pid) > 40 * MIB


def test_swapped_memory_counts() -> None:
    text = b"Name:\tx\nVmHWM:\t   9 kB\nVmRSS:\t   7 kB\nRssAnon:\t   5 kB\nVmData:\t  99 kB\nVmSwap:\t   3 kB\n"
    assert memory._anonymous(memory._status_fields(text)) == 8 << 10


@pytest.mark.skipif(not memory.has_data_limit(), reason="counts what Linux says is open")
def test_reading_leaves_no_file_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        anonymous_bytes()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_child_started_by_a_thread_counts() -> None:
    import threading

    held = []

    def hold() -> None:
        with child_holding(40 * MIB) as pid:
            held.append(anonymous_bytes() - before)
            held.append(anonymous_bytes(pid))

    before = anonymous_bytes()
    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert abs(held[0] - held[1]) < CLOSE


def test_no_such_process() -> None:
    with pytest.raises(ProcessLookupError):
        anonymous_bytes(2**22 + 1)


class TestMeter:
    def test_catches_a_peak_that_is_over(self) -> None:
        with Meter() as meter:
            before = meter.now_bytes
            block = touched(64 * MIB)
            time.sleep(0.05)
            block.close()
            assert abs(meter.now_bytes - before) < CLOSE
        assert abs(meter.peak_bytes - before - 64 * MIB) < CLOSE
        assert meter.num_samples > 5

    def test_catches_a_child(self) -> None:
        with Meter() as meter:
            before = meter.now_bytes
            with child_holding(64 * MIB):
                time.sleep(0.05)
        assert meter.peak_bytes - before > 64 * MIB

    def test_reset(self) -> None:
        with Meter() as meter:
            block = touched(64 * MIB)
            assert meter.now_bytes == pytest.approx(meter.peak_bytes, abs=CLOSE)
            block.close()
            meter.reset_peak()
            assert meter.peak_bytes == pytest.approx(meter.now_bytes, abs=CLOSE)

    def test_raises_its_flag_above_the_budget_alone(self) -> None:
        budget = anonymous_bytes() + 32 * MIB
        with Meter(budget) as meter:
            block = touched(16 * MIB)
            assert meter.now_bytes < budget
            assert not meter.exceeded.is_set()
            more = touched(32 * MIB)
            assert meter.exceeded.wait(5)  # by the thread alone
            more.close()
            block.close()
            assert meter.now_bytes < budget
            assert meter.exceeded.is_set()

    def test_says_that_the_budget_is_near_until_it_is_told_otherwise(self) -> None:
        now = anonymous_bytes()
        with Meter(now + 200 * MIB, near_bytes=now + 24 * MIB) as meter:
            assert meter.now_bytes < meter.near_bytes
            assert not meter.near.is_set()
            block = touched(48 * MIB)
            assert meter.near.wait(5)  # by the thread alone
            block.close()
            meter.near.clear()
            assert meter.now_bytes < meter.near_bytes
            assert not meter.near.is_set()
            assert not meter.exceeded.is_set()

    def test_peak_rss_has_the_mapped_file(self, tmp_path: Path) -> None:
        path = tmp_path / "weights"
        path.write_bytes(b"w" * (64 * MIB))
        with Meter() as meter:
            before, rss_before, files_before = meter.peak_bytes, meter.peak_rss_bytes, meter.peak_file_backed_bytes
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                sum(mapped[at] for at in range(0, len(mapped), mmap.PAGESIZE))
                meter.now_bytes  # noqa: B018 - takes a sample
        assert meter.peak_rss_bytes - rss_before > 60 * MIB
        assert 60 * MIB < meter.peak_file_backed_bytes - files_before < 64 * MIB + CLOSE
        assert read_memory().file_backed_bytes < meter.peak_file_backed_bytes - 60 * MIB, "the peak outlives the file"
        assert abs(meter.peak_bytes - before) < CLOSE

    @pytest.mark.skipif(not memory.has_data_limit(), reason="only Linux keeps the figure")
    def test_a_peak_of_rss_between_two_samples_is_seen_and_one_before_is_not(self) -> None:
        for touch in (True, False):
            fields = memory._fields_of(os.getpid())
            below = fields[b"VmHWM"] - fields[b"VmRSS"]  # what earlier tests reached
            with Meter(seconds=1000) as meter:
                before = meter.peak_rss_bytes
                if touch:
                    touched(below + 64 * MIB).close()
                meter.now_bytes  # noqa: B018 - takes a sample
                assert (meter.peak_rss_bytes - before > 60 * MIB) is touch
                meter.reset_peak()
                meter.now_bytes  # noqa: B018
                assert meter.peak_rss_bytes < before + 8 * MIB

    def test_without_proc(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "_PROC", False)
        with Meter(seconds=0.02) as meter:
            before = meter.now_bytes
            block = touched(64 * MIB)
            time.sleep(0.1)
            block.close()
        assert abs(meter.peak_bytes - before - 64 * MIB) < 2 * CLOSE

    def test_without_the_kernels_list_of_children(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "_PROC_CHILDREN", False)
        before = anonymous_bytes()
        with child_holding(40 * MIB):
            assert anonymous_bytes() - before > 40 * MIB


LIMITED = """
import mmap, sys
from edgetune.memory import MIB, anonymous_bytes, set_data_limit
held = bytearray(b'x') * (20 * MIB)
assert set_data_limit(anonymous_bytes() + 64 * MIB)
"""


def test_data_limit_lets_allocations_fail_above_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"w" * (200 * MIB))
    out = run(
        LIMITED
        + f"""
inside = bytearray(b'x') * (48 * MIB)
with open({str(path)!r}, 'rb') as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
print(sum(mapped[at] for at in range(0, len(mapped), 4096)) == 200 * 256 * ord('w'))
try:
    outside = bytearray(32 * MIB)
except MemoryError:
    print('refused')
"""
    )
    assert out.split() == ["True", "refused"]


def test_data_limit_measures_what_is_reserved_but_unused() -> None:
    out = run(
        """
import mmap
from edgetune.memory import MIB, anonymous_bytes, set_data_limit
reserved = mmap.mmap(-1, 500 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
assert set_data_limit(anonymous_bytes() + 64 * MIB)
print(len(bytearray(b'x') * (40 * MIB)))
"""
    )
    assert int(out) == 40 * MIB


def test_data_limit_can_be_lifted_and_stays_below_a_hard_one() -> None:
    out = run(
        """
import resource
from edgetune.memory import MIB, anonymous_bytes, set_data_limit
unlimited = resource.getrlimit(resource.RLIMIT_DATA)[1]
assert set_data_limit(anonymous_bytes() + 900 * MIB)
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
resource.setrlimit(resource.RLIMIT_DATA, (soft, soft))
assert set_data_limit(anonymous_bytes() + 9000 * MIB)
print(hard == unlimited, resource.getrlimit(resource.RLIMIT_DATA) == (soft, soft))
"""
    )
    assert out.split() == ["True", "True"]


def test_no_limits_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_PROC", False)
    assert not memory.set_data_limit(1)


HOLES = """
import numpy as np
from edgetune.memory import MIB, anonymous_bytes, give_back, trim_allocator
def freed_between_blocks(num_bytes, count):
    blocks = [np.ones(num_bytes, np.uint8) for _ in range(count)]
    before = anonymous_bytes()
    del blocks[:-1]
    return before, blocks
"""


def test_trimmed_allocator_gives_large_blocks_back() -> None:
    """Freeing a block of 30 MiB makes glibc keep blocks below that size, unless the threshold is fixed."""
    code = (
        HOLES
        + """
%s
np.ones(30 * MIB, np.uint8)
before, last = freed_between_blocks(MIB, 40)
print((before - anonymous_bytes()) // MIB)
"""
    )
    assert int(run(code % "assert trim_allocator()")) >= 38
    assert int(run(code % "")) <= 2


def test_give_back_returns_small_blocks() -> None:
    out = run(
        HOLES
        + """
before, last = freed_between_blocks(10_000, 4000)
kept = anonymous_bytes()
assert give_back()
print((before - kept) // MIB, (before - anonymous_bytes()) // MIB)
"""
    )
    kept, returned = map(int, out.split())
    assert kept <= 2
    assert returned >= 36


def test_floor_without_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    assert measure_floor.__wrapped__("torch", 1) == memory.FLOOR_BYTES["torch"]


def test_floor_is_measured_once_in_a_child() -> None:
    floor = measure_floor("torch", 1)
    assert 80 * MIB < floor < 400 * MIB
    assert measure_floor("torch", 1) == floor
    assert floor != memory.FLOOR_BYTES["torch"]  # bytes of this machine, not the table's round number
