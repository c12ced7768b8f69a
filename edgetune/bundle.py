"""A bundle folder, read strictly: what a device gets, and the checks before anything native opens a file.

`edgetune.json` is the manifest. Loading compares every listed file with its size and SHA-256, so a swapped tokenizer or
a damaged weight file is found here, by name, and not by a runtime that crashes on it. Adapters are checked against the
manifest's slots before an inference session exists, because onnxruntime reports a wrong one late or not at all.

Torch, onnx and onnxruntime stay out: this module runs on the device. Writing a bundle is `exporter`'s part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from edgetune.errors import AdapterError, BundleError, ModelError
from edgetune.memory import format_mib
from edgetune.weights import open_tensors, sha256_file

FORMAT_VERSION = 1
MANIFEST = "edgetune.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
ADAPTER = "adapter.safetensors"
ADAPTER_ONNX = "adapter.onnx_adapter"
GENAI_CONFIG = "genai_config.json"

_TEXT, _OPTIONAL_TEXT = (str,), (str, type(None))
_KEYS: dict[str, tuple[type, ...]] = {
    "format_version": (int,), "edgetune_version": _TEXT, "model": (dict,), "grid": _OPTIONAL_TEXT, "weights": _TEXT,
    "merged": (bool,), "base_sha256": _TEXT, "tokenizer_sha256": _OPTIONAL_TEXT, "slots": (list,),
    "adapter": (dict, type(None)), "parity": (dict,), "rounding": (dict, type(None)), "peak_rss_bytes": (int,),
    "files": (dict,), "versions": (dict,),
}  # fmt: skip


@dataclass(frozen=True)
class BundleModel:
    """The numbers of the model that a client of its graph needs: sizes of KV cache and logits, special ids."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class AdapterSlot:
    """Where an adapter plugs in: inputs `<name>.lora_A` [in_features, r] and `<name>.lora_B` [r, out_features]."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Bundle:
    """A checked bundle folder. `manifest` is `edgetune.json` as it is on disk."""

    folder: Path
    manifest: dict[str, Any]
    model: BundleModel
    slots: tuple[AdapterSlot, ...]

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL

    @property
    def has_adapter(self) -> bool:
        """Whether the bundle carries an adapter of its own beside the graph (a merged bundle does not)."""
        return ADAPTER in self.manifest["files"]

    @property
    def nbytes(self) -> int:
        """Size of the folder in bytes: every listed file and the manifest itself."""
        files: dict[str, dict[str, int]] = self.manifest["files"]
        return sum(file["bytes"] for file in files.values()) + (self.folder / MANIFEST).stat().st_size

    def adapter_tensors(self) -> dict[str, np.ndarray]:
        """The bundle's own adapter as graph inputs, checked; empty where there is none.

        Raises AdapterError where the file does not fit the slots.
        """
        return load_adapter_tensors(self, self.folder / ADAPTER) if self.has_adapter else {}

    def summary(self) -> dict[str, Any]:
        """The result of `export` as the CLI prints it: sizes in bytes, parity figures, cost of rounding."""
        keys = ("weights", "grid", "merged", "parity", "rounding", "peak_rss_bytes")
        result: dict[str, Any] = {"bundle": str(self.folder), "bundle_bytes": self.nbytes}
        result |= {key: self.manifest[key] for key in keys}
        if result["rounding"] is not None:  # its list of all layers stays in the manifest
            result["rounding"] = {k: v for k, v in result["rounding"].items() if k != "error_over_delta"}
        return result


def explain(summary: Mapping[str, Any]) -> str:
    """`Bundle.summary` for people: what was written, whether it computes what was trained, what rounding cost."""
    parity, rounding = summary["parity"], summary["rounding"]
    kind = (
        "adapter merged" if summary["merged"] else "adapter beside it" if parity["adapter"] == "run" else "no adapter"
    )
    lines = [
        f"{summary['bundle']}: {format_mib(summary['bundle_bytes'])}, {summary['weights']} weights, {kind}",
        f"  parity    logits differ from torch's by at most {parity['max_abs_logit']:.1e}, the likeliest token agrees "
        f"at {parity['top1_agreement']:.2%} of {parity['rows']:,} positions",
    ]
    if "fast" in parity:
        fast = parity["fast"]
        lines.append(
            f"  fast path the likeliest token agrees at {fast['top1_agreement']:.2%} on int8 activations, "
            f"KL {fast['kl']:.1e}"
        )
    if parity.get("task"):
        losses = ", ".join(f"{task['loss']:.4f} {name}" for name, task in parity["task"].items())
        lines.append(f"  held out  loss {losses}")
    if rounding is not None:
        ratio = rounding["max_error_over_delta"]
        if ratio is not None:
            verdict = "MORE than training changed it" if ratio > 1 else "less than training changed it"
            lines.append(
                f"  rounding  moved {rounding['worst_layer']} {ratio:.2f} times as far as training did, {verdict}; "
                f"{rounding['mean_error_over_delta']:.2f} times on average"
            )
        else:
            lines.append(f"  rounding  moved weights by {rounding['mean_relative_error']:.2%} on average")
        lines.append(
            f"            logits changed by up to {rounding['max_abs_logit']:.2g}, the likeliest token agrees at "
            f"{rounding['top1_agreement']:.2%}, KL {rounding['kl']:.1e}"
        )
        if rounding["loss_before"] is not None:
            lines.append(f"            held-out loss {rounding['loss_before']:.4f} -> {rounding['loss_after']:.4f}")
    return "\n".join(lines)


def load_bundle(folder: str | Path) -> Bundle:
    """Read and check a bundle folder: manifest keys and types, then the size and SHA-256 of every listed file.

    Raises BundleError naming the file and the field.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise BundleError(
            f"{folder} has no {MANIFEST}, so it is no bundle. `edgetune export run/ --out bundle/` writes one"
        )
    manifest = _read_manifest(path)
    _check_files(folder, manifest["files"])
    model = _parse(BundleModel, manifest["model"], f"{path}: model")
    slots = tuple(_parse(AdapterSlot, slot, f"{path}: slots[{i}]") for i, slot in enumerate(manifest["slots"]))
    return Bundle(folder, manifest, model, slots)


def load_adapter_tensors(bundle: Bundle, path: str | Path) -> dict[str, np.ndarray]:
    """Adapter tensors for this bundle's graph inputs from a file laid out as `adapter.safetensors`, checked.

    Raises AdapterError where the file is unreadable, belongs to another base, or does not fit the slots.
    """
    path = Path(path)
    try:
        weights = open_tensors(path)
    except ModelError as error:
        raise AdapterError(str(error)) from error
    tensors = {name: weights.array(name) for name in weights}
    check_adapter(bundle, tensors, origin=str(path))
    return tensors


def check_adapter(
    bundle: Bundle, tensors: Mapping[str, np.ndarray], *, base_sha256: str | None = None, origin: str = "adapter"
) -> None:
    """Refuse an adapter that does not fit this bundle, before an inference session exists.

    `tensors` are graph inputs: `<slot>.lora_A` [in_features, r] and `<slot>.lora_B` [r, out_features], fp32, scaling
    folded into lora_B. `base_sha256`, where known, is the base that the adapter was trained on.
    Raises AdapterError with every problem found.
    """
    if base_sha256 is not None and base_sha256 != bundle.manifest["base_sha256"]:
        raise AdapterError(
            f"{origin} was trained on base {base_sha256[:12]}, {bundle.folder} holds "
            f"{bundle.manifest['base_sha256'][:12]}; use the bundle of that base, or train the adapter on this one"
        )
    if not bundle.slots:
        raise AdapterError(f"{bundle.folder} is merged and takes no adapter; export without --merge to keep slots")
    if not tensors:
        raise AdapterError(f"{origin} holds no tensor; expected <slot>.lora_A and <slot>.lora_B for at least one slot")
    slots = {slot.name: slot for slot in bundle.slots}
    problems = [problem for name in sorted(tensors) if (problem := _problem(name, tensors, slots))]
    if problems:
        shown = "\n  ".join(problems[:20])
        raise AdapterError(
            f"{origin} does not fit {bundle.folder}, {len(problems)} of {len(tensors)} tensors are wrong:\n  {shown}\n"
            f"Train an adapter on the base of this bundle, or export a bundle of the adapter's base"
        )


def _problem(name: str, tensors: Mapping[str, np.ndarray], slots: Mapping[str, AdapterSlot]) -> str | None:
    """What is wrong with one adapter tensor, or None."""
    module, _, kind = name.rpartition(".")
    slot = slots.get(module)
    if slot is None or kind not in ("lora_A", "lora_B"):
        return f"{name}: the graph has no such input"
    twin = tensors.get(f"{module}.{'lora_B' if kind == 'lora_A' else 'lora_A'}")
    if twin is None:
        return f"{name}: comes without its twin {'lora_B' if kind == 'lora_A' else 'lora_A'}"
    array = tensors[name]
    if array.dtype != np.float32:
        return f"{name}: is {array.dtype}, expected float32"
    if array.ndim != 2 or twin.ndim != 2:
        return f"{name}: has shape {list(array.shape)} beside {list(twin.shape)}, expected two matrices"
    rank = twin.shape[0] if kind == "lora_A" else twin.shape[1]
    expected = (slot.in_features, rank) if kind == "lora_A" else (rank, slot.out_features)
    if array.shape != expected or rank == 0:
        return f"{name}: has shape {list(array.shape)}, expected {list(expected)} with a rank of at least 1"
    if not np.isfinite(array).all():
        return f"{name}: holds NaN or infinity"
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}. Export the bundle again") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path} holds a {type(manifest).__name__}, expected an object. Export the bundle again")
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version {version} is newer than {FORMAT_VERSION}; upgrade edgetune to read it"
        )
    if version != FORMAT_VERSION:
        raise BundleError(f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}. Export the bundle again")
    _check_keys(manifest, _KEYS, str(path))
    return manifest


def _check_keys(value: Mapping[str, Any], keys: Mapping[str, tuple[type, ...]], where: str) -> None:
    missing, unknown = sorted(keys.keys() - value.keys()), sorted(value.keys() - keys.keys())
    if missing or unknown:
        raise BundleError(f"{where}: missing keys {missing}, unknown keys {unknown}. Export the bundle again")
    for key, types in keys.items():
        if not isinstance(value[key], types) or (isinstance(value[key], bool) and bool not in types):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise BundleError(f"{where}: {key} is {value[key]!r:.80}, expected {names}. Export the bundle again")


def _check_files(folder: Path, files: Mapping[str, Any]) -> None:
    for required in (MODEL, DATA):
        if required not in files:
            raise BundleError(f"{folder / MANIFEST}: files does not list {required}. Export the bundle again")
    root = folder.resolve()
    for name, entry in files.items():
        where = f"{folder / MANIFEST}: files[{name!r}]"
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or not pure.parts:
            raise BundleError(
                f"{where} points outside of the bundle, expected a path inside it. Export the bundle again"
            )
        if not isinstance(entry, dict):
            raise BundleError(f"{where} is {entry!r:.80}, expected an object. Export the bundle again")
        _check_keys(entry, {"bytes": (int,), "sha256": _TEXT}, where)
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{path} is listed in {MANIFEST} but missing. Copy the whole bundle folder again")
        if not path.resolve().is_relative_to(root):
            raise BundleError(f"{path} is a link that leaves the bundle. Copy the file itself into the folder")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(f"{path} has {size} bytes, {MANIFEST} says {entry['bytes']}. Copy the bundle again")
        digest = sha256_file(path)
        if digest != entry["sha256"]:
            raise BundleError(
                f"{path} has SHA-256 {digest[:12]}…, {MANIFEST} says {entry['sha256'][:12]}…. Copy the bundle again"
            )


_Part = TypeVar("_Part", BundleModel, AdapterSlot)
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "int | None": (int, type(None)), "tuple[int, ...]": (list,)
}  # fmt: skip


def _parse(kind: type[_Part], value: Any, where: str) -> _Part:
    """A dataclass of this module from its JSON object."""
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {value!r:.80}, expected an object. Export the bundle again")
    types = {field.name: _FIELD_TYPES[str(field.type)] for field in fields(kind)}
    _check_keys(value, types, where)
    for key, item in value.items():
        numbers = item if isinstance(item, list) else [item] if isinstance(item, int) else []
        if any(type(number) is not int or number < 0 for number in numbers):
            raise BundleError(f"{where}: {key} is {item!r:.80}, expected no negative number. Export the bundle again")
    parts: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    return kind(**parts)
