"""A cache on disk for what the frozen blocks below the lowest adapter make of each window.

    run/features/   features-00000.safetensors …   manifest.json

Adapters in the upper blocks alone leave the lower ones frozen. They run once for each window, before the first step;
every step and evaluation then starts from what they left, float32 [T, hidden] per window, mapped from the files, and
their codes are not mapped again. Gradients are those of a run without the cache, to the bit (see `forward`).

A window is found by a hash of its ids, positions and segments: all that its features depend on besides the model, so
another tokenizer, file or window length finds nothing that is not its own. What else decides their bits is the key in
the manifest (base, its config, lowest adapted block, tiles, threads, torch); under another key the cache starts anew.

Files are published one by one, each complete and with its SHA-256 in the manifest, so a run that is stopped while it
fills the cache goes on from there. A resumed run reads every byte of what it finds and removes what fails. The folder
is readable by its owner alone, since features tell what the user's texts are. A run that was stopped or killed leaves
it for its resume; where one ends or fails, `loop.train` removes it.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.data import Window, stack
from edgetune.errors import CheckpointError
from edgetune.memory import format_mib
from edgetune.models.decoder import Decoder
from edgetune.planner.costs import FREE_SHARE
from edgetune.training.forward import Batch, Check, lower_blocks
from edgetune.weights import TensorInfo, Weights, open_tensors, sha256_file, write_atomic, write_safetensors

FORMAT_VERSION = 1
FILE_BYTES = 16 << 20  # the most that a stop while the cache is filled can cost
MANIFEST = "manifest.json"


class FeatureCache:
    """The features of block `first_block` for as many windows as `most_bytes` hold. `folder` is made by `fill`."""

    def __init__(self, folder: Path, decoder: Decoder, first_block: int, most_bytes: int, base_sha256: str) -> None:
        self.folder, self.decoder, self.first_block, self.most_bytes = folder, decoder, first_block, most_bytes
        key = {
            "base_sha256": base_sha256, "config": decoder.config.to_dict(), "first_block": first_block,
            "tile_weights": decoder.workspace.tile_weights, "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }  # fmt: skip
        self._key: dict[str, Any] = json.loads(json.dumps(key))  # as it comes back from the manifest
        self.num_written = 0  # files
        self._files: dict[str, str] = {}  # name -> SHA-256
        self._known: dict[str, Weights] = {}  # window -> the file that holds it

    def __call__(self, window: Batch, out: torch.Tensor) -> bool:
        """Fill out [T, hidden] with the features of a micro-batch of one window; whether they are known."""
        name = _name(window)
        file = self._known.get(name)
        if file is not None:
            np.copyto(out.numpy(), file.array(name))
        return file is not None

    def fill(self, windows: Sequence[Window], check: Check, tell: Callable[[str], None]) -> None:
        """Run the lower blocks over every window that is not known yet.

        Raises:
            Stopped: `check` asks for it; files that are complete stay.
            OSError: less storage is free than the rest needs and leaves, or it refuses to write.
        """
        self._read_folder(check)
        missing = self._missing(windows)
        total, size = len(self._known) + len(missing), sum(map(self._nbytes, missing.values()))
        if not missing:
            return
        if size > FREE_SHARE * shutil.disk_usage(self.folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        tell(f"{self.first_block} frozen blocks run once over {len(missing)} windows, into {format_mib(size)} of files")
        for names in self._files_of(missing):
            self._write(names, missing, check)
            tell(f"{len(self._known)} of {total} windows are in the feature cache")
        self.decoder.weights.unmap()  # the lower blocks' codes were read for the last time

    def forget(self) -> None:
        """Remove the folder: from here on nothing is known."""
        self._files.clear()
        self._known.clear()
        remove(self.folder)

    def _read_folder(self, check: Check) -> None:
        """Take what an earlier part of this run left, every byte of it checked, and remove all else."""
        hashes = known_files(self.folder, self._key)
        if hashes is None:
            remove(self.folder)
            self.folder.mkdir(mode=0o700)
            return
        for path in sorted(self.folder.iterdir()):
            check()
            if path.name in hashes and sha256_file(path) == hashes[path.name]:
                self._take(path, hashes[path.name])
            elif path.name != MANIFEST:
                path.unlink()

    def _take(self, path: Path, sha256: str) -> None:
        file = open_tensors(path)
        self._files[path.name] = sha256
        self._known |= dict.fromkeys(file, file)

    def _missing(self, windows: Sequence[Window]) -> dict[str, Window]:
        """Windows that are not known, by name, in their order, as long as there is room."""
        room = self.most_bytes - sum(file[name].nbytes for name, file in self._known.items())
        missing: dict[str, Window] = {}
        for window in windows:
            name, size = _name(stack([window])), self._nbytes(window)
            if name not in self._known and name not in missing and size <= room:
                missing[name] = window
                room -= size
        return missing

    def _files_of(self, missing: Mapping[str, Window]) -> Iterator[list[str]]:
        """The names of the windows, file by file."""
        names: list[str] = []
        size = 0
        for name, window in missing.items():
            if names and size + self._nbytes(window) > FILE_BYTES:
                yield names
                names, size = [], 0
            names.append(name)
            size += self._nbytes(window)
        yield names

    @torch.no_grad()
    def _write(self, names: Sequence[str], windows: Mapping[str, Window], check: Check) -> None:
        """Publish a file with the features of these windows, and name it in the manifest."""
        hidden = self.decoder.config.hidden_size
        infos = {name: TensorInfo("F32", (windows[name].length, hidden)) for name in names}

        def features(name: str) -> np.ndarray:
            made: np.ndarray = lower_blocks(self.decoder, stack([windows[name]]), self.first_block, check).numpy()
            return made

        free = (f"features-{number:05d}.safetensors" for number in itertools.count())
        path = self.folder / next(name for name in free if name not in self._files)
        write_safetensors(path, infos, features)
        path.chmod(0o600)
        self._take(path, sha256_file(path))
        write_manifest(self.folder, self._key, self._files)
        self.num_written += 1

    def _nbytes(self, window: Window) -> int:
        return TensorInfo("F32", (window.length, self.decoder.config.hidden_size)).nbytes


def remove(folder: Path) -> None:
    """Remove a cache's folder, whatever is left of it.

    Raises:
        CheckpointError: the system refuses.
    """
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds what a model made of your rows and cannot be removed: {error.strerror}. Remove it by hand."
        ) from error


def write_manifest(folder: Path, key: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Name the files of a cache of this key, with their SHA-256."""
    manifest = {"format_version": FORMAT_VERSION, "key": key, "files": files}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    (folder / MANIFEST).chmod(0o600)


def known_files(folder: Path, key: Mapping[str, Any]) -> dict[str, str] | None:
    """File -> SHA-256, as a cache of this key lists them; None where the folder is no such cache of this user alone."""
    try:
        status = folder.lstat()
        private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077 and status.st_uid == os.geteuid()
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = private and manifest["format_version"] == FORMAT_VERSION and manifest["key"] == key
        return dict(manifest["files"]) if known else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _name(window: Batch) -> str:
    """What a micro-batch of one window is found by."""
    parts = (window[key].tobytes() for key in ("input_ids", "position_ids", "segment_ids"))
    return hashlib.sha256(b"".join(parts)).hexdigest()
