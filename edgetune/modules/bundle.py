"""The bundle of a network: what `export_module` writes, and what reads it without torch.

model.onnx  model.onnx.data                    the network; stock onnxruntime runs it
adapter.safetensors  adapter.onnx_adapter      the adapter as graph inputs, unless it is merged
edgetune.json                                  inputs, outputs, layers, parity, hashes, versions
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapter_file import SUFFIXES, read_adapter
from edgetune.bundle import ADAPTER, MANIFEST, MODEL
from edgetune.errors import AdapterError, BundleError
from edgetune.weights import sha256_file

FORMAT_VERSION = 1
KIND = "module"
_AGAIN = "Export it again with edgetune.export_module()"


@dataclass(frozen=True)
class ModuleBundle:
    """A checked bundle folder of a network; `manifest` is `edgetune.json` as it is on disk."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL

    @property
    def nbytes(self) -> int:
        """Bytes of every listed file and of the manifest itself."""
        listed = sum(int(entry["bytes"]) for entry in self.manifest["files"].values())
        return listed + (self.folder / MANIFEST).stat().st_size

    def adapter_feeds(self) -> dict[str, np.ndarray]:
        """The adapter as graph inputs, to be fed beside the network's own; empty where it is merged.

        Raises AdapterError where it was trained around other weights.
        """
        if self.manifest["merged"]:
            return {}
        adapter = read_adapter(self.folder / f"{ADAPTER}{SUFFIXES[0]}")
        if adapter.binding.base_sha256 != self.manifest["base_sha256"]:
            raise AdapterError(f"the adapter in {self.folder} was trained around other weights. {_AGAIN}.")
        return adapter.tensors


def load_module_bundle(folder: str | Path | ModuleBundle) -> ModuleBundle:
    """Read and check a bundle folder: its manifest, then size and SHA-256 of every file.

    Raises:
        BundleError: it is none, is damaged, or was written by a newer edgetune.
    """
    folder = Path(folder.folder if isinstance(folder, ModuleBundle) else folder)
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, version, files = manifest["kind"], manifest["format_version"], manifest["files"]
        sizes = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{folder} is no bundle of a network: {error!r:.200}. {_AGAIN}.") from error
    if kind != KIND or version != FORMAT_VERSION:
        raise BundleError(
            f"{path}: kind is {kind!r} and format_version {version!r}; {KIND!r} and {FORMAT_VERSION} were expected. "
            f"{_AGAIN}, or use the edgetune that wrote it."
        )
    for name, (size, digest) in sizes.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise BundleError(f"{path}: files names {name!r}, which is no file of this folder. Copy the bundle again.")
        if file.stat().st_size != size or sha256_file(file) != digest:
            raise BundleError(f"{file} is not what {MANIFEST} says. Copy the bundle again.")
    return ModuleBundle(folder, manifest)
