"""Groups of the kernel's own where one can be made (version 1 or 2), and of files where version 2 is not mounted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetune.cgroup import Cgroup, CgroupState, cgroup_state, check_cgroup, holding_cgroup, make_cgroup, own_cgroup
from edgetune.errors import ConfigError
from edgetune.memory import MIB

NONE = CgroupState(version=0, folder="", writable=False, limit_bytes=None)


class TestState:
    def test_version_1(self, tmp_path: Path) -> None:
        own = tmp_path / "fs" / "memory" / "job"
        own.mkdir(parents=True)
        (own / "memory.limit_in_bytes").write_text("1048576\n", encoding="utf-8")
        proc = tmp_path / "cgroup"
        proc.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/job\n", encoding="utf-8")
        state = cgroup_state(proc, tmp_path / "fs")
        assert state == {"version": 1, "folder": str(own), "writable": True, "limit_bytes": MIB}

    @pytest.mark.parametrize(("path", "folder"), [("/not/mounted/here", ""), ("/docker/own/child", "child")])
    def test_version_1_unlimited_and_in_a_container(self, tmp_path: Path, path: str, folder: str) -> None:
        own = tmp_path / "fs" / "memory" / folder
        own.mkdir(parents=True)
        (own / "memory.limit_in_bytes").write_text("9223372036854771712\n", encoding="utf-8")
        proc = tmp_path / "cgroup"
        proc.write_text(f"4:memory:{path}\n", encoding="utf-8")
        state = cgroup_state(proc, tmp_path / "fs")
        assert (state["version"], state["folder"], state["limit_bytes"]) == (1, str(own), None)

    @pytest.mark.parametrize(("text", "limit"), [("max\n", None), ("2097152\n", 2 * MIB)])
    def test_version_2(self, tmp_path: Path, text: str, limit: int | None) -> None:
        own = tmp_path / "fs" / "user"
        own.mkdir(parents=True)
        (own / "cgroup.controllers").write_text("cpu memory pids\n", encoding="utf-8")
        (own / "memory.max").write_text(text, encoding="utf-8")
        proc = tmp_path / "cgroup"
        proc.write_text("0::/user\n", encoding="utf-8")
        state = cgroup_state(proc, tmp_path / "fs")
        assert state == {"version": 2, "folder": str(own), "writable": True, "limit_bytes": limit}

    def test_none(self, tmp_path: Path) -> None:
        assert cgroup_state(tmp_path / "missing", tmp_path) == NONE
        (tmp_path / "cgroup").write_text("0::/\n", encoding="utf-8")  # version 2 without the memory controller
        assert cgroup_state(tmp_path / "cgroup", tmp_path) == NONE


@pytest.fixture
def group() -> Iterator[Cgroup]:
    """A real one of 64 MiB."""
    try:
        made = make_cgroup(64 * MIB)
    except ConfigError as error:
        pytest.skip(str(error))
    yield made
    made.remove()
    assert not made.folder.exists()


def run_in(group: Cgroup, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, preexec_fn=group.enter, capture_output=True, text=True, timeout=120)


HOLDS = """
from edgetune.cgroup import holding_cgroup
from edgetune.memory import MIB
held = bytearray(b"x") * (24 * MIB)
group = holding_cgroup(64 * MIB)
print(group.folder, group.holds(64 * MIB + 1), group.holds(64 * MIB + 4096))
"""


class TestReal:
    def test_the_limit_is_read_back_and_counts_swap(self, group: Cgroup) -> None:
        assert group.limit_bytes == 64 * MIB
        assert group.folder.name == f"edgetune-{os.getpid()}"
        if (swap := group.folder / "memory.memsw.limit_in_bytes").exists():
            assert int(swap.read_text()) == 64 * MIB
        assert group.oom_kills == 0

    def test_the_kernel_kills_above_the_limit(self, group: Cgroup) -> None:
        child = run_in(group, "bytearray(b'x') * (32 << 20); print('so far', flush=True); bytearray(b'x') * (96 << 20)")
        assert (child.stdout, child.returncode) == ("so far\n", -signal.SIGKILL)
        assert group.oom_kills == 1
        assert 0 <= 64 * MIB - group.peak_bytes < MIB

    def test_pages_of_files_are_taken_back_instead(self, group: Cgroup, tmp_path: Path) -> None:
        path = tmp_path / "weights"
        path.write_bytes(b"w" * (200 * MIB))
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)  # now the child is the first to read it
        os.close(handle)
        code = """
import mmap, sys
held = bytearray(b"x") * (24 << 20)
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    print(sum(mapped[at] for at in range(0, len(mapped), 4096)) == ord("w") * len(mapped) // 4096)
"""
        child = run_in(group, code, str(path))
        assert (child.stdout, child.returncode) == ("True\n", 0), child.stderr
        assert group.oom_kills == 0
        assert 64 * MIB - group.peak_bytes < MIB, "the file was not charged to the group, so this proves nothing"

    def test_holds_who_was_in_it_from_the_start(self, group: Cgroup) -> None:
        child = run_in(group, HOLDS)
        assert child.stdout.split() == [str(group.folder), "True", "False"], child.stderr

    def test_does_not_hold_who_came_later(self, group: Cgroup) -> None:
        came = f"""
import os
early = bytearray(b"x") * (32 << 20)
open({str(group.folder / "cgroup.procs")!r}, "w").write(str(os.getpid()))
"""
        child = subprocess.run([sys.executable, "-c", came + HOLDS], capture_output=True, text=True, timeout=120)
        assert child.returncode == 1
        assert "no cgroup of 64.0 MiB has held this process since it started" in child.stderr

    def test_a_group_in_use_stays(self, group: Cgroup) -> None:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, preexec_fn=group.enter) as child:
            group.remove()
            assert str(child.pid) in (group.folder / "cgroup.procs").read_text().split()

    def test_checking_leaves_nothing(self, group: Cgroup) -> None:
        group.remove()
        check_cgroup()
        assert not group.folder.exists(), "which is named after this process"
        group.folder.mkdir()  # for the fixture


class Version2:
    """A tree of files in the place of version 2; a new folder gets the files that the kernel would put there."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own = root / "user" / "session"
        self.own.mkdir(parents=True)
        (self.own.parent / "cgroup.subtree_control").write_text("cpu memory pids\n", encoding="utf-8")
        (self.own.parent / "cgroup.procs").touch()
        (self.own / "cgroup.subtree_control").write_text("\n", encoding="utf-8")
        self.state = CgroupState(version=2, folder=str(self.own), writable=True, limit_bytes=None)
        self.limit_is_taken = True
        real = Path.mkdir

        def mkdir(folder: Path, *words: Any, **options: Any) -> None:
            real(folder, *words, **options)
            if folder.name.startswith("edgetune-"):
                (folder / "memory.swap.max").write_text("max\n", encoding="utf-8")
                if not self.limit_is_taken:
                    (folder / "memory.max").symlink_to("/dev/null")

        monkeypatch.setattr(Path, "mkdir", mkdir)

    def divides_nothing(self) -> None:
        """Own has processes, so that the kernel refuses to write to this file; here because it is a folder."""
        (self.own / "cgroup.subtree_control").unlink()
        os.mkdir(self.own / "cgroup.subtree_control")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version2:
    return Version2(tmp_path, monkeypatch)


class TestVersion2:
    def test_below_our_own_where_that_may_be_divided(self, tree: Version2) -> None:
        group = make_cgroup(5 * MIB + 1, tree.state)
        assert group.folder == tree.own / f"edgetune-{os.getpid()}"
        assert (tree.own / "cgroup.subtree_control").read_text() == "+memory"
        assert (group.folder / "memory.max").read_text() == str(5 * MIB)  # whole pages
        assert (group.folder / "memory.swap.max").read_text() == "0"
        assert group.limit_bytes == 5 * MIB

    def test_beside_our_own_where_that_has_processes(self, tree: Version2) -> None:
        tree.divides_nothing()
        assert make_cgroup(5 * MIB, tree.state).folder == tree.own.parent / f"edgetune-{os.getpid()}"
        assert (tree.own.parent / "cgroup.subtree_control").read_text() == "cpu memory pids\n"

    def test_nowhere(self, tree: Version2) -> None:
        tree.divides_nothing()
        (tree.own.parent / "cgroup.subtree_control").unlink()
        with pytest.raises(ConfigError) as caught:
            make_cgroup(5 * MIB, tree.state)
        for part in (
            "enforce = 'cgroup': no group of 5.0 MiB can be made here", f"{tree.own}: Is a directory",
            "--enforce rlimit", "systemd-run --user --scope",
        ):  # fmt: skip
            assert part in str(caught.value)

    def test_a_limit_that_is_not_taken_is_no_limit(self, tree: Version2, monkeypatch: pytest.MonkeyPatch) -> None:
        tree.limit_is_taken = False
        removed: list[Path] = []
        monkeypatch.setattr(Cgroup, "remove", lambda self: removed.append(self.folder))
        with pytest.raises(ConfigError, match="a limit of 5242880 bytes was asked for and None is what was set"):
            make_cgroup(5 * MIB, tree.state)
        assert [folder.parent for folder in removed] == [tree.own, tree.own.parent]

    def test_what_is_read(self, tmp_path: Path) -> None:
        group = Cgroup(2, tmp_path)
        assert (group.limit_bytes, group.peak_bytes, group.oom_kills) == (None, None, None)
        group.enter()
        for name, text in {
            "memory.max": f"{1 << 40}\n",
            "memory.peak": "4242\n",
            "memory.events": "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n",
            "memory.stat": f"anon {1 << 39}\nfile 1\n",
        }.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        assert (group.limit_bytes, group.peak_bytes, group.oom_kills) == (1 << 40, 4242, 2)
        assert group.holds(1 << 40)
        assert not group.holds(1 << 39)
        (tmp_path / "cgroup.procs").write_text("1\n", encoding="utf-8")
        assert not group.holds(1 << 40), "this process is not in it"
        group.enter()
        (tmp_path / "memory.stat").write_text(f"anon 4096\nfile {1 << 39}\n", encoding="utf-8")
        assert not group.holds(1 << 40), "what this process has was charged to another group"


def test_swap_that_version_1_does_not_account_is_not_used(tmp_path: Path) -> None:
    state = CgroupState(version=1, folder=str(tmp_path), writable=True, limit_bytes=None)
    group = make_cgroup(5 * MIB, state)
    assert (group.folder / "memory.swappiness").read_text() == "0"
    assert not (tmp_path / "cgroup.subtree_control").exists(), "which only version 2 has"


def test_swapped_memory_was_charged_too(tmp_path: Path) -> None:
    group = Cgroup(1, tmp_path)
    group.enter()
    (tmp_path / "memory.limit_in_bytes").write_text(f"{1 << 40}\n", encoding="utf-8")
    (tmp_path / "memory.stat").write_text(f"cache 0\nrss 4096\nswap {1 << 39}\n", encoding="utf-8")
    assert group.holds(1 << 40)


def test_an_old_kernel_counts_no_kills(tmp_path: Path) -> None:
    (tmp_path / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\n", encoding="utf-8")
    assert Cgroup(1, tmp_path).oom_kills is None


def test_no_cgroup_at_all() -> None:
    with pytest.raises(ConfigError, match=r"this system has no cgroup that limits memory\. Use --enforce rlimit or"):
        make_cgroup(MIB, NONE)


def test_this_process_is_not_held() -> None:
    own = own_cgroup()
    assert own is None or str(own.folder) == cgroup_state()["folder"]
    with pytest.raises(ConfigError, match="`edgetune train --enforce cgroup` starts one that is held"):
        holding_cgroup(77 * MIB)
