"""Output folders that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from edgetune.errors import ConfigError

__all__ = ["folder_in_progress", "sync_folder"]


@contextmanager
def folder_in_progress(out: Path, manifest: str, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` to write into; it takes that name when the block ends without an error.

    With `force` an earlier folder is replaced: one that holds `manifest` and the files which that names, nothing else.

    Raises:
        ConfigError: `out` exists (without `force`), holds what would be lost, is a link or a file, or its parent cannot
            be written.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is a link or a file, which is never replaced. Choose another --out.")
    if out.exists() and not force and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty. Choose another --out, or replace it with --force.")
    if out.exists():
        _check_replaceable(out, manifest)
    out = out.absolute()
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}. Choose another --out.") from error
    try:
        yield temporary
        _sync(temporary)
        replaced = None
        if out.exists():
            replaced = out.with_name(f".{out.name}.old-{os.getpid()}")
            out.rename(replaced)
        temporary.rename(out)
        sync_folder(out.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(out: Path, manifest: str) -> None:
    present = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    if not present:
        return
    try:
        named = set(json.loads((out / manifest).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{out} is not empty and holds no {manifest}, so it is none of edgetune's and --force does not replace it. "
            "Choose another --out."
        ) from None
    folders = {parent.as_posix() for name in named for parent in PurePosixPath(name).parents}
    foreign = sorted(present - named - folders - {manifest})
    if foreign:
        raise ConfigError(
            f"{out} holds {foreign[0]}, which {manifest} does not name ({len(foreign)} such in all); --force would "
            "delete it. Move it away, or choose another --out."
        )


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: a rename before this call is there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
