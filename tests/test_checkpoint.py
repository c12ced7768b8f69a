"""Checkpoints under kills, full disks and flipped bits, and the lock."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune import checkpoint
from edgetune.checkpoint import latest_checkpoint, lock_run, read_checkpoint, save_checkpoint
from edgetune.errors import CheckpointError


def content(step: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(step)
    return {
        "adapter": {"a": rng.standard_normal((5, 3)).astype(np.float32), "b": np.zeros((0,), np.float32)},
        "optim": {"exp_avg": rng.integers(0, 256, (2, 7), np.uint8), "exp_avg.absmax": rng.random(2, np.float32)},
    }


def save(folder: Path, step: int, best_step: int | None = None) -> checkpoint.Checkpoint:
    return save_checkpoint(folder, {"step": step, "best_step": best_step, "loss": 0.5 * step}, content(step))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_is(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None and found.step == step and found.state["loss"] == 0.5 * step
    for name, group in content(step).items():
        tensors = found.tensors(name)
        assert tensors.keys() == group.keys()
        assert all(np.array_equal(tensors[key], group[key]) for key in group)
        assert all(tensors[key].dtype == group[key].dtype for key in group)


def test_the_newest_comes_back_and_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") == (None, [])
    for step, best in ((0, None), (10, 10), (20, 10), (1000000, 10), (1000010, 10)):
        save(tmp_path, step, best)
    assert names(tmp_path) == ["ckpt-000010", "ckpt-1000000", "ckpt-1000010"]
    found, set_aside = latest_checkpoint(tmp_path)
    assert_is(found, 1000010)
    assert set_aside == []
    assert_is(read_checkpoint(tmp_path, 10), 10)


def test_saving_a_step_again_leaves_it_alone(tmp_path: Path) -> None:
    path = save(tmp_path, 3).folder / "state.json"
    before = path.stat().st_mtime_ns
    save(tmp_path, 3)
    assert path.stat().st_mtime_ns == before


def test_every_flipped_bit_is_found_and_the_one_before_is_taken(tmp_path: Path) -> None:
    save(tmp_path / "good", 1)
    save(tmp_path / "good", 2)
    rng = np.random.default_rng(0)
    for file in sorted((tmp_path / "good" / "ckpt-000002").iterdir()):
        size = file.stat().st_size
        everywhere = file.name == "MANIFEST.json"  # nothing else vouches for its bytes
        for position in range(size) if everywhere else sorted({0, size - 1, *rng.integers(0, size, 40).tolist()}):
            shutil.copytree(tmp_path / "good", tmp_path / "bad")
            damaged = bytearray(file.read_bytes())
            damaged[position] ^= 1 << int(rng.integers(8))
            (tmp_path / "bad" / "ckpt-000002" / file.name).write_bytes(damaged)
            found, set_aside = latest_checkpoint(tmp_path / "bad")
            assert_is(found, 1)
            assert len(set_aside) == 1 and ".bad-ckpt-000002" in set_aside[0], (file.name, position)
            assert names(tmp_path / "bad") == [".bad-ckpt-000002", "ckpt-000001"]
            shutil.rmtree(tmp_path / "bad")


@pytest.mark.parametrize("harm", ["missing", "extra", "short", "empty"])
def test_a_folder_that_is_not_as_written_is_set_aside(tmp_path: Path, harm: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2).folder
    match harm:
        case "missing":
            (folder / "optim.safetensors").unlink()
        case "extra":
            (folder / "more.json").write_text("{}")
        case "short":
            os.truncate(folder / "adapter.safetensors", 100)
        case "empty":
            shutil.rmtree(folder)
            folder.mkdir()
    (tmp_path / ".bad-ckpt-000002").mkdir()  # one from an earlier crash is not overwritten
    found, set_aside = latest_checkpoint(tmp_path)
    assert_is(found, 1)
    assert "is damaged" in set_aside[0] and set_aside[0].endswith(".bad-ckpt-000002-2.")


def test_a_checkpoint_whose_best_is_damaged_is_no_use(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, 1 if step < 3 else 2)
    (tmp_path / "ckpt-000002" / "state.json").write_text("{}")
    found, set_aside = latest_checkpoint(tmp_path)
    assert found is None and len(set_aside) == 3


def test_a_newer_format_is_refused_by_name_and_left_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format_version 2; this edgetune reads 1"):
        latest_checkpoint(tmp_path)
    assert names(tmp_path) == ["ckpt-000001"]


def test_a_missing_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        read_checkpoint(tmp_path, 7)


# Forks a child per write point, which kills itself there; the parent then looks at what is left. It is a process of its
# own because a fork must not inherit the threads of this one.
KILLS = """
import json, os, shutil, signal, sys
from pathlib import Path
from tests.test_checkpoint import save
from edgetune.checkpoint import latest_checkpoint

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}

def run_and_die(folder, at):
    seen = 0
    def point():
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
    real = os.fsync
    def fsync(handle):
        point(); real(handle); point()
    os.fsync = fsync
    sys.addaudithook(lambda event, args: point() if event in EVENTS else None)
    save(folder, 3, 1)
    os._exit(0)

root, found, at = Path(sys.argv[1]), [], 0
while True:
    at += 1
    folder = root / str(at)
    for step in (0, 1, 2):
        save(folder, step, 1)
    child = os.fork()
    if child == 0:
        run_and_die(folder, at)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    latest, set_aside = latest_checkpoint(folder)
    found.append([latest.step, len(set_aside), sorted(p.name for p in folder.iterdir())])
print(json.dumps(found))
"""


def run_script(script: str, *arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=root, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_every_write_point(tmp_path: Path) -> None:
    found: list[Any] = json.loads(run_script(KILLS, str(tmp_path)))
    assert len(found) >= 30, "the hooks no longer see the writes"
    steps = [step for step, *_ in found]
    assert steps == sorted(steps) and set(steps) == {2, 3}
    for step, set_aside, left in found:
        assert set_aside == 0 and "ckpt-000001" in left and f"ckpt-{step:06d}" in left
        assert all(".tmp-" not in name for name in left)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_disk_names_the_path_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    save(tmp_path, 1)
    real = os.fsync
    for failing in range(1, 100):
        calls = 0

        def fsync(handle: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(code, os.strerror(code))
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            save(tmp_path, 2)
            break
        except CheckpointError as error:
            assert "ckpt-000002" in str(error) and os.strerror(code) in str(error) and "bytes" in str(error)
        found, set_aside = latest_checkpoint(tmp_path)
        assert found is not None and set_aside == []
        if found.step == 2:  # only the last fsync, of the parent folder, comes after the rename
            shutil.rmtree(found.folder)
        assert names(tmp_path) == ["ckpt-000001"]
    assert failing > 5


def test_too_little_free_space_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * sum(value.nbytes for group in content(1).values() for value in group.values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(CheckpointError, match=f"No space left on device .{needed} bytes"):
        save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    save(tmp_path, 1)


def test_a_second_holder_is_refused_and_told_who_is_first(tmp_path: Path) -> None:
    refusal = pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}")
    with lock_run(tmp_path), refusal, lock_run(tmp_path):
        pass
    with lock_run(tmp_path):
        pass
    assert names(tmp_path) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from edgetune.checkpoint import lock_run\n"
        "with lock_run(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=root, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match=f"in use by process {holder.pid}"), lock_run(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert names(tmp_path) == [".lock"]
    with lock_run(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
