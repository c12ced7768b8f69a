"""Checkpoints that survive being killed at any write; which folder a run may go to, and the lock that keeps two apart.

    run/checkpoints/ckpt-000123/   adapter.safetensors  optim.safetensors  state.json  MANIFEST.json

A checkpoint is written beside its place, file by file, each flushed to the disk; `MANIFEST.json` (sizes and SHA-256 of
the others) comes last; one rename publishes it. So a folder under its final name is complete, and reading one
checks every byte of it. What fails is renamed `.bad-*` and the one before is taken. Kept are the last two and the best.

There is no random state to keep: data order, dropout masks and the first adapter are functions of (seed, step), see
`training.loop`. JSON and safetensors only.

The lock is `flock`, which the kernel lets go when its holder dies, however it dies; a lock file that only holds a pid
has to guess, and guesses wrongly where two containers share a folder. Left out: Windows, which has no `flock`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.errors import CheckpointError, ConfigError
from edgetune.weights import TensorInfo, sha256_file, write_atomic, write_safetensors

__all__ = [
    "Checkpoint", "check_run_folder", "latest_checkpoint", "lock_run", "newest_state", "read_checkpoint",
    "save_checkpoint",
]  # fmt: skip

FORMAT_VERSION = 1
PLAN = "plan.json"  # a folder that holds it is a run's
_SAFETENSORS = {"float32": "F32", "uint8": "U8"}
KEEP_LAST = 2
_NAME = re.compile(r"ckpt-(\d{6,})")
_MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `state` is JSON, `tensors("adapter")` reads one of its files."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """All tensors of `name`.safetensors, copied into memory."""
        from safetensors.numpy import load_file

        return load_file(self.folder / f"{name}.safetensors")


def save_checkpoint(
    folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, np.ndarray]]
) -> Checkpoint:
    """Publish a checkpoint of `state["step"]` under `folder` and remove those no longer kept.

    `state` is JSON with an int `step` and `best_step` (int or None: the checkpoint that holds the best adapter so far);
    `tensors` are float32 or uint8, by file name without suffix. A checkpoint of that step that is there already is left
    alone.

    Raises:
        CheckpointError: the disk is full or refuses to write. Older checkpoints are still valid.
    """
    final = folder / f"ckpt-{state['step']:06d}"
    size = sum(array.nbytes for group in tensors.values() for array in group.values())
    if not final.exists():
        temporary = folder / f"{final.name}.tmp-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < 2 * size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _write(temporary, state, tensors)
            os.rename(temporary, final)
            _sync_folder(folder)
            _remove_old(folder, state["best_step"])
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"{final} cannot be written: {error.strerror} ({2 * size} bytes are needed for this one and the next). "
                "Older checkpoints are untouched: make room and go on with --resume."
            ) from error
    return Checkpoint(final, dict(state))


def _write(folder: Path, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    folder.mkdir()
    for name, group in tensors.items():
        infos = {key: TensorInfo(_SAFETENSORS[array.dtype.name], array.shape) for key, array in group.items()}
        write_safetensors(folder / f"{name}.safetensors", infos, group.__getitem__)
    write_atomic(folder / "state.json", _json({"format_version": FORMAT_VERSION, **state}))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in sorted(folder.iterdir())
    }
    write_atomic(folder / _MANIFEST, _json({"format_version": FORMAT_VERSION, "files": files}))
    _sync_folder(folder)


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies and whose best one verifies too; and a line for each that was set aside.

    Unfinished writes are removed. A checkpoint that fails is renamed `.bad-*`, never deleted.

    Raises:
        CheckpointError: a checkpoint was written by a newer edgetune, or a damaged one cannot be renamed.
    """
    for leftover in folder.glob("ckpt-*.tmp-*"):
        shutil.rmtree(leftover)
    set_aside: list[str] = []
    for step in sorted(_steps(folder), reverse=True):
        try:
            checkpoint = read_checkpoint(folder, step)
            if checkpoint.state["best_step"] is not None:
                read_checkpoint(folder, checkpoint.state["best_step"])
        except _DamagedError as error:
            set_aside.append(f"{error} It is set aside as {_set_aside(_steps(folder)[step]).name}.")
        else:
            return checkpoint, set_aside
    return None, set_aside


def newest_state(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that verifies; reads only, so the run may be held by another process."""
    for step in sorted(_steps(folder), reverse=True):
        with contextlib.suppress(_DamagedError):
            return read_checkpoint(folder, step).state
    return None


def read_checkpoint(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of this step, every byte of it checked.

    Raises:
        CheckpointError: it is missing, damaged, or was written by a newer edgetune.
    """
    path = _steps(folder).get(step)
    if path is None:
        raise _DamagedError(f"{folder} holds no checkpoint of step {step}.")
    try:
        text = (path / _MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        version, files = manifest["format_version"], manifest["files"]
        whole = text == _json(manifest) and {entry.name for entry in path.iterdir()} == {_MANIFEST, *files}
        wrong = [name for name, facts in files.items() if not _matches(path / name, facts)] if whole else [_MANIFEST]
        if wrong:
            raise _DamagedError(f"{path} is damaged: {wrong[0]} is not what was written.")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["format_version"] != version:
            raise _DamagedError(f"{path} is damaged: format_version is {version} and {state['format_version']}.")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _DamagedError(f"{path} is damaged: {error}.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version}; this edgetune reads {FORMAT_VERSION}. "
            "Go on with the version that wrote it."
        )
    return Checkpoint(path, state)


class _DamagedError(CheckpointError):
    """Not what was written, as opposed to written by a newer version: `latest_checkpoint` may look further back."""


def _matches(path: Path, facts: Mapping[str, Any]) -> bool:
    return bool(path.stat().st_size == facts["bytes"] and sha256_file(path) == facts["sha256"])


def _steps(folder: Path) -> dict[int, Path]:
    matches = {path: _NAME.fullmatch(path.name) for path in folder.glob("ckpt-*")}
    return {int(match[1]): path for path, match in matches.items() if match}


def _set_aside(path: Path) -> Path:
    target, number = path.with_name(f".bad-{path.name}"), 1
    while target.exists():
        number += 1
        target = path.with_name(f".bad-{path.name}-{number}")
    try:
        os.rename(path, target)
    except OSError as error:
        raise CheckpointError(
            f"{path} is damaged and cannot be renamed: {error.strerror}. Remove it by hand."
        ) from error
    return target


def _remove_old(folder: Path, best_step: int | None) -> None:
    steps = _steps(folder)
    for step in sorted(steps)[:-KEEP_LAST]:
        if step != best_step:
            # Out of the way first: a half-removed folder must not look like a damaged checkpoint.
            doomed = steps[step].with_name(f"{steps[step].name}.tmp-{os.getpid()}")
            os.rename(steps[step], doomed)
            shutil.rmtree(doomed)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def check_run_folder(folder: Path, *, resume: bool, force: bool) -> None:
    """Whether a run may be written into a folder, as far as can be seen without writing.

    Raises:
        ConfigError: it exists and is not empty (without `resume` or `force`), or is a link or a file.
        CheckpointError: `resume` of something that is no run.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is a link or a file, which is never replaced. Choose another --out.")
    present = {path.name for path in folder.iterdir()} - {".lock"} if folder.exists() else set()
    if resume and not folder.exists():
        raise CheckpointError(f"{folder} does not exist, so there is nothing to resume. Start without --resume.")
    if resume and present and PLAN not in present:
        raise CheckpointError(f"{folder} holds no {PLAN}, so it is no run folder. Check the path given to --resume.")
    if present and not resume and not force:
        raise ConfigError(
            f"{folder} exists and is not empty. Go on with --resume, replace it with --force, or choose another --out."
        )
    if present and not resume and PLAN not in present:
        raise ConfigError(
            f"{folder} is not empty and no run, so --force does not write a run into it. Choose another --out."
        )


@contextlib.contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Hold `folder`/.lock while the body runs.

    Raises:
        CheckpointError: another process holds it; the message names its pid.
    """
    path = folder / ".lock"
    handle = _acquire(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 32).decode(errors="replace") or "unknown"
            os.close(handle)
            raise CheckpointError(
                f"{path.parent} is in use by process {holder}. Wait for it or stop it, or choose another --out."
            ) from error
        # The holder before us removes the file when it ends: a lock on a file that has no name is worth nothing.
        if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
            return handle
        os.close(handle)
