"""The adapters of a bundle: list, add, remove, choose and check them. Each change happens whole or not at all.

An adapter belongs to its bundle from the moment that `edgetune.json` is replaced, which is one rename. Adding writes
the adapter's own files before that, removing deletes them after it. So a crash leaves the bundle as it was, or as it
was meant to be; what may lie there besides is a file that the manifest does not name, which nobody reads.

The base that an adapter was trained on is known from the run's summary, from the base folder that a PEFT folder names,
or from the adapter file itself, and is compared with the bundle's before anything is written. No torch is needed, so a
device can add what it was sent. Left out: Windows, which has no `flock`.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapter_file import (
    SUFFIXES,
    AdapterEntry,
    BoundAdapter,
    bind,
    check_probe_change,
    is_name,
    read_adapter,
    read_origin,
    write_adapter,
)
from edgetune.adapters import base as peft
from edgetune.adapters import prompt
from edgetune.bundle import MANIFEST, AnyBundle, Bundle, EncoderBundle, check_adapter, load_any_bundle, read_manifest
from edgetune.errors import AdapterError, BundleError, EdgetuneWarning
from edgetune.output import sync_folder
from edgetune.runtime.embedding import Embedder, open_embedder
from edgetune.runtime.session import Session, open_any_session
from edgetune.weights import sha256_file, write_atomic

_UNFINISHED = (".*.safetensors.tmp-*", ".*.onnx_adapter.tmp", f".{MANIFEST}.tmp-*")  # of an edit that was killed


def list_adapters(bundle: AnyBundle[Any] | str | Path) -> dict[str, Any]:
    """What a bundle carries, ready for JSON: `bundle`, `default`, and `adapters`: name -> r, lora_alpha, slots (how
    many), bytes of its two files, probe_change.

    Raises BundleError.
    """
    bundle = bundle if isinstance(bundle, AnyBundle) else load_any_bundle(bundle)
    files = bundle.manifest["files"]
    adapters = {
        name: {
            "r": entry.binding.r,
            "lora_alpha": entry.binding.lora_alpha,
            "slots": len(entry.binding.slots),
            "bytes": sum(files[f"{name}{suffix}"]["bytes"] for suffix in SUFFIXES),
            "probe_change": entry.probe_change,
        }
        for name, entry in bundle.adapters.items()
    }
    return {"bundle": str(bundle.folder), "default": bundle.default_adapter, "adapters": adapters}


def add_adapter(
    bundle: AnyBundle[Any] | str | Path, source: Any, *, name: str | None = None, default: bool = False,
    probe_change: Callable[[dict[str, np.ndarray]], float] | None = None,
) -> Bundle | EncoderBundle:  # fmt: skip
    """Add an adapter to a bundle; the bundle as it is then.

    An EdgetuneWarning says where the bundle's weights were rounded after the adapter was trained around them.

    Args:
        bundle: the bundle, or its folder.
        source: a run (`Run` or its folder), a PEFT folder, or a `.safetensors` file that a bundle carries.
        name: what it is called in the bundle; None takes it from the source.
        default: use it where none is named. The first adapter of a bundle always becomes the default.
        probe_change: measures what `Session.probe_change` does; None loads the inference graph for that.

    Raises:
        AdapterError: it does not fit the bundle, changes nothing, or its name is taken or no name.
        BundleError: the bundle is damaged, or cannot be written; it is then as it was.
    """
    folder, source = _folder(bundle), Path(getattr(source, "folder", source))
    with _locked(folder):
        bundle = load_any_bundle(folder)
        name = _new_name(bundle, source, name)
        adapter = _read_source(bundle, source)
        check_adapter(bundle, adapter, origin=str(source))
        measure = probe_change or _open(bundle).probe_change
        entry = AdapterEntry(adapter.binding, measure(adapter.tensors))
        check_probe_change(entry.probe_change, origin=str(source))
        manifest = bundle.manifest | {"adapters": bundle.manifest["adapters"] | {name: asdict(entry)}}
        if default or not bundle.adapters:
            manifest["default_adapter"] = name
        with _written(folder, name, adapter) as paths:
            facts = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in paths}
            _commit(folder, manifest | {"files": manifest["files"] | facts})
    if (rounded := _rounded(bundle, source)) is not None:
        warnings.warn(rounded, EdgetuneWarning, stacklevel=2)
    return load_any_bundle(folder)


def _rounded(bundle: AnyBundle[Any], source: Path) -> str | None:
    """What is to be known of an adapter on weights that it was not trained around; None where they are the same."""
    manifest = bundle.manifest
    if manifest["rounding"] is None:
        return None
    error = manifest["rounding"].get("mean_relative_error")
    by = f" by {error:.2%} on average" if isinstance(error, (int, float)) else ""
    grid, weights = manifest["grid"], manifest["weights"]
    return (
        f"{source} was trained around {grid or 'dense'} weights, and those of {bundle.folder} were rounded to "
        f"{weights}{by}. What that costs this adapter was not measured: `edgetune export` of its run with --weights "
        f"{weights} does, and --weights {grid or 'fp32'} is exact"
    )


def remove_adapter(bundle: AnyBundle[Any] | str | Path, name: str) -> Bundle | EncoderBundle:
    """Take an adapter out of a bundle, also one whose files are damaged; the bundle as it is then.

    Where it was the default, the bundle has none afterwards and is used as the base alone, until `set_default_adapter`.
    A session that uses it keeps what it loaded.
    Raises AdapterError where there is none of that name, BundleError where the bundle cannot be read or written.
    """
    folder = _folder(bundle)
    with _locked(folder):
        manifest = read_manifest(folder)
        _check_known(folder, manifest, name)
        files = [f"{name}{suffix}" for suffix in SUFFIXES]
        manifest["adapters"] = {key: value for key, value in manifest["adapters"].items() if key != name}
        manifest["files"] = {key: value for key, value in manifest["files"].items() if key not in files}
        if manifest["default_adapter"] == name:
            manifest["default_adapter"] = None
        _commit(folder, manifest)
        for file in files:
            (folder / file).unlink(missing_ok=True)
    return load_any_bundle(folder)


def set_default_adapter(bundle: AnyBundle[Any] | str | Path, name: str | None) -> Bundle | EncoderBundle:
    """Choose the adapter that is used where none is named; None is the base alone. Raises as `remove_adapter`."""
    folder = _folder(bundle)
    with _locked(folder):
        manifest = load_any_bundle(folder).manifest
        if name is not None:
            _check_known(folder, manifest, name)
        _commit(folder, manifest | {"default_adapter": name})
    return load_any_bundle(folder)


def check_adapters(bundle: AnyBundle[Any] | str | Path) -> dict[str, Any]:
    """Read every byte of a bundle, and measure again what each adapter does to the probe rows.

    The result of `list_adapters`, with `probe_change` as it is on this machine.
    Raises BundleError where a file is not what the manifest says, AdapterError naming every adapter that is wrong.
    """
    bundle = load_any_bundle(_folder(bundle))
    session = _open(bundle)
    result, problems = list_adapters(bundle), []
    for name, figures in result["adapters"].items():
        try:
            figures["probe_change"] = session.probe_change(bundle.adapter_tensors(name))
            check_probe_change(figures["probe_change"], origin=f"adapter {name}")
        except AdapterError as error:
            problems.append(str(error))
    if problems:
        raise AdapterError("\n".join(problems))
    return result


def _open(bundle: Bundle | EncoderBundle) -> Session | Embedder:
    """What adapters are probed on: the base, in fp32."""
    if isinstance(bundle, EncoderBundle):
        return open_embedder(bundle, adapter=False, fp32_compute=True)
    return open_any_session(bundle, adapter=False, fp32_compute=True)


def _folder(bundle: AnyBundle[Any] | str | Path) -> Path:
    return bundle.folder if isinstance(bundle, AnyBundle) else Path(bundle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process edits a bundle at a time; another waits. The lock is on the folder itself and leaves nothing."""
    import fcntl

    read_manifest(folder)  # refuses what is no bundle
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for pattern in _UNFINISHED:
            for path in folder.glob(pattern):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def _commit(folder: Path, manifest: dict[str, Any]) -> None:
    """Replace the manifest: what was before it is on disk by then."""
    try:
        sync_folder(folder)
        write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))
    except OSError as error:
        raise _unwritable(folder, error) from error
    with contextlib.suppress(OSError):  # it holds already; this only makes it survive a power cut
        sync_folder(folder)


@contextlib.contextmanager
def _written(folder: Path, name: str, adapter: BoundAdapter) -> Iterator[list[Path]]:
    """The adapter's files, removed again where the body fails; a file that was there before stays."""
    paths = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    fresh = [path for path in paths if not path.exists()]
    try:
        write_adapter(folder, name, adapter)
        yield paths
    except BaseException as error:
        if name not in read_manifest(folder)["adapters"]:
            for path in fresh:
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(folder, error) from error
        raise


def _unwritable(folder: Path, error: OSError) -> BundleError:
    return BundleError(
        f"{folder} cannot be written: {error.strerror or error}. It is as it was; make room, or check its permissions"
    )


def _check_known(folder: Path, manifest: dict[str, Any], name: str) -> None:
    if name not in manifest["adapters"] or not is_name(name):  # no path, whatever the manifest holds
        known = f"it has {', '.join(manifest['adapters'])}" if manifest["adapters"] else "it has none"
        raise AdapterError(f"{folder} has no adapter {name!r}; {known}")


def _new_name(bundle: AnyBundle[Any], source: Path, name: str | None) -> str:
    chosen = (source.stem if source.is_file() else source.resolve().name).lower() if name is None else name
    if not is_name(chosen):
        raise AdapterError(
            f"{chosen!r} is no name for an adapter; give it one with --name: up to 63 lower-case letters, digits, _ "
            f"and -, and not model"
        )
    if chosen in bundle.adapters:
        raise AdapterError(
            f"{bundle.folder} has an adapter {chosen} already; choose another --name, or take that one out with "
            f"`edgetune adapter remove {bundle.folder} {chosen}`"
        )
    return chosen


def _read_source(bundle: AnyBundle[Any], source: Path) -> BoundAdapter:
    """The adapter of a run folder, a PEFT folder or a file, with what it was trained on."""
    if source.is_file():
        return read_adapter(source)
    shapes = {module: (rows, slot.in_features) for slot in bundle.slots for module, rows in slot.modules.items()}
    if (prefix := bundle.prefix) is not None:  # the model as a whole: keys and values of a position in all layers
        shapes[""] = 2 * prefix.layers * prefix.kv_heads * prefix.head_dim, 0
    method = peft.method_of(source)
    if method.Config.own:
        method.CAPABILITIES.require("own_inputs", AdapterError)
    if method is prompt:
        raise AdapterError(
            f"{source} is a prompt, and what keys and values the model makes of it is computed by an export. "
            f"`edgetune export {source} --out` another bundle, and add the adapter.safetensors of that one"
        )
    config, tensors = peft.read_adapter(source, shapes)
    origin = read_origin(source)
    known = origin.base_sha256, origin.grid, origin.tokenizer_sha256
    return bind(config, tensors, known, bundle.slots, bundle.prefix)
