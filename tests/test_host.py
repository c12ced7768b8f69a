"""Which cores are the fast ones, read from a tree of the kernel's files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgetune import host


def write_cores(folder: Path, cores: dict[int, dict[str, object]]) -> Path:
    for core, files in cores.items():
        for name, value in files.items():
            path = folder / f"cpu{core}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")
    return folder


def test_second_threads_of_a_core_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads 0 and 1 are of one core, so are 2 and 3; but 2 may not be used, so 3 is a core of its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 3, 40}, raising=False)
    masks = {0: "00000000,00000003", 1: "00000000,00000003", 3: "00000000,0000000c", 40: "00000100,00000000"}
    cpus = write_cores(tmp_path, {core: {"topology/thread_siblings": mask} for core, mask in masks.items()})
    assert host.fastest_cores(1, cpus) == {0}
    assert host.fastest_cores(3, cpus) == {0, 3, 40}
    assert host.fastest_cores(9, cpus) == {0, 1, 3, 40}


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_fast_ones_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    cpus = write_cores(tmp_path, {core: {name: 400 if core < 4 else 1024} for core in range(6)})
    assert host.fastest_cores(2, cpus) == {4, 5}
    assert host.fastest_cores(3, cpus) == {0, 4, 5}


def test_a_system_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 2, 7}, raising=False)
    cpus = write_cores(tmp_path, {2: {"cpu_capacity": "unknown"}})
    assert host.fastest_cores(2, cpus) == {2, 5}
