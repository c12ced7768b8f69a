"""A bundle folder, read strictly: what a device gets, and the checks before anything native opens a file.

`edgetune.json` is the manifest. Loading compares every listed file with its size and SHA-256, so a swapped tokenizer or
a damaged weight file is found here, by name, and not by a runtime that crashes on it. A bundle carries any number of
adapters, each bound to base, grid and tokenizer; one that does not fit is refused before an inference session exists,
because onnxruntime reports it late or not at all.

Torch, onnx and onnxruntime stay out: this module runs on the device. Writing a bundle is `exporter`'s part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

import numpy as np

from edgetune.adapter_file import (
    SUFFIXES,
    AdapterEntry,
    AdapterSlot,
    Binding,
    BoundAdapter,
    PrefixShape,
    check_probe_change,
    is_name,
    read_adapter,
    tensor_problems,
)
from edgetune.errors import AdapterError, BundleError
from edgetune.memory import format_mib
from edgetune.schema import Reader
from edgetune.weights import sha256_file

FORMAT_VERSION = 1
MANIFEST = "edgetune.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"
ADAPTER = "adapter"  # the name of the adapter that an export brings along
TRAINING, TRAINING_MANIFEST = "training", "training.json"  # of a bundle that can be personalized
GENAI_CONFIG = "genai_config.json"
LOGITS_TO_KEEP = "logits_to_keep"  # an optional input: logits of so many last positions alone
SHARE_BUFFER = "edgetune.past_present_share_buffer"  # in the metadata of graphs that write the cache in place

_AGAIN = "Export the bundle again"
_TEXT, _OPTIONAL_TEXT = (str,), (str, type(None))
_KEYS: dict[str, tuple[type, ...]] = {
    "format_version": (int,), "edgetune_version": _TEXT, "model": (dict,), "grid": _OPTIONAL_TEXT, "weights": _TEXT,
    "merged": (bool,), "base_sha256": _TEXT, "tokenizer_sha256": _OPTIONAL_TEXT, "slots": (list,),
    "adapters": (dict,), "default_adapter": _OPTIONAL_TEXT, "probe_rows": (list,), "merge": (dict, type(None)),
    "parity": (dict,), "rounding": (dict, type(None)), "peak_rss_bytes": (int,),
    "files": (dict,), "versions": (dict,),
}  # fmt: skip


@dataclass(frozen=True)
class BundleModel:
    """The numbers of the model that a client of its graph needs: sizes of KV cache and logits, special ids.

    Where a head was trained, its `objective` says for what, and `classes` are the names of its outputs.
    """

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
    objective: str | None = None
    classes: tuple[str, ...] = ()

    @property
    def num_logits(self) -> int:
        """Of a position: one for each token, or as many as the outputs of a trained head."""
        return self.vocab_size if self.objective is None else max(1, len(self.classes))


@dataclass(frozen=True)
class EncoderModel:
    """The same of an encoder. `pooling` is "mean" or "cls"; `normalize`: whether an embedding has length 1.

    Where a head was trained, its `objective` says for what, and `classes` are the names of its outputs.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    pooling: str
    normalize: bool
    objective: str | None = None
    classes: tuple[str, ...] = ()


_Model = TypeVar("_Model", BundleModel, EncoderModel)


@dataclass(frozen=True)
class AnyBundle(Generic[_Model]):
    """A checked bundle folder. `manifest` is `edgetune.json` as it is on disk."""

    folder: Path
    manifest: dict[str, Any]
    model: _Model
    slots: tuple[AdapterSlot, ...]
    adapters: dict[str, AdapterEntry]

    @property
    def model_path(self) -> Path:
        return self.folder / MODEL

    @property
    def prefix(self) -> PrefixShape | None:
        """What its graph takes as the past of a cache; None of an encoder."""
        model = self.model
        if not isinstance(model, BundleModel):
            return None
        return PrefixShape(model.num_hidden_layers, model.num_key_value_heads, model.head_dim)

    @property
    def has_adapter(self) -> bool:
        """Whether the bundle carries adapters of its own beside the graph (a merged bundle does not)."""
        return bool(self.adapters)

    @property
    def default_adapter(self) -> str | None:
        """The adapter that is used where none is named; None is the base alone."""
        name: str | None = self.manifest["default_adapter"]
        return name

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that the default adapter begins with."""
        name = self.default_adapter
        return 0 if name is None else self.adapters[name].binding.virtual_tokens

    @property
    def probe_rows(self) -> list[np.ndarray]:
        """Token ids that adapters are probed on, int64 [n] each."""
        return [np.array(row, np.int64) for row in self.manifest["probe_rows"]]

    @property
    def nbytes(self) -> int:
        """Size of the folder in bytes: every listed file and the manifest itself."""
        files: dict[str, dict[str, int]] = self.manifest["files"]
        return sum(file["bytes"] for file in files.values()) + (self.folder / MANIFEST).stat().st_size

    def adapter_tensors(self, name: str | None = None) -> dict[str, np.ndarray]:
        """An adapter of the bundle as graph inputs, checked; None is the default one, empty where there is none.

        Raises AdapterError where there is none of that name, it does not fit the bundle, or it changes nothing.
        """
        name = self.default_adapter if name is None else name
        if name is None:
            return {}
        if name not in self.adapters:
            known = f"it has {', '.join(self.adapters)}" if self.adapters else "it has none"
            raise AdapterError(
                f"{self.folder} has no adapter {name!r}; {known}. `edgetune adapter add` adds one; a file is given by "
                f"its path, with its suffix"
            )
        entry, path = self.adapters[name], self.folder / f"{name}{SUFFIXES[0]}"
        adapter = read_adapter(path)
        if sha256_file(path) != self.manifest["files"][path.name]["sha256"]:
            raise AdapterError(f"{path} was changed after the bundle was loaded. Load the bundle again")
        if adapter.binding != entry.binding:
            raise AdapterError(f"{path} says something else of itself than {MANIFEST} does. Add the adapter again")
        check_adapter(self, adapter, origin=f"adapter {name}")
        check_probe_change(entry.probe_change, origin=f"adapter {name}")
        return adapter.tensors

    def summary(self) -> dict[str, Any]:
        """The result of `export` as the CLI prints it: sizes in bytes, parity figures, cost of rounding."""
        keys = ("weights", "grid", "merged", "merge", "parity", "rounding", "peak_rss_bytes")
        result: dict[str, Any] = {"bundle": str(self.folder), "bundle_bytes": self.nbytes}
        result |= {key: self.manifest[key] for key in keys}
        if result["rounding"] is not None:  # its list of all layers stays in the manifest
            result["rounding"] = {k: v for k, v in result["rounding"].items() if k != "error_over_delta"}
        return result


class Bundle(AnyBundle[BundleModel]):
    """The bundle of a decoder: it continues texts."""


class EncoderBundle(AnyBundle[EncoderModel]):
    """The bundle of an encoder: it turns texts into embeddings."""


def explain(summary: Mapping[str, Any]) -> str:
    """`Bundle.summary` for people: what was written, whether it computes what was trained, what rounding cost."""
    parity, rounding = summary["parity"], summary["rounding"]
    kind = (
        "adapter merged" if summary["merged"] else "adapter beside it" if parity["adapter"] == "run" else "no adapter"
    )
    lines = [
        f"{summary['bundle']}: {format_mib(summary['bundle_bytes'])}, {summary['weights']} weights, {kind}",
    ]
    if "max_abs_hidden" in parity:
        return "\n".join([*lines, *_encoder_lines(parity, rounding)])
    lines.append(
        f"  parity    logits differ from torch's by at most {parity['max_abs_logit']:.1e}, the likeliest token agrees "
        f"at {parity['top1_agreement']:.2%} of {parity['rows']:,} positions"
    )
    if "fast" in parity:
        fast = parity["fast"]
        lines.append(
            f"  fast path the likeliest token agrees at {fast['top1_agreement']:.2%} on int8 activations, "
            f"KL {fast['kl']:.1e}"
        )
    if parity.get("task"):
        losses = ", ".join(f"{task['loss']:.4f} {name}" for name, task in parity["task"].items())
        lines.append(f"  held out  loss {losses}")
    if summary["merge"] is not None:
        merge = summary["merge"]
        by = f"{merge['chosen_by']}; 0 is the base, 1 as trained"
        lines += [f"  merged    {merge['alpha']:g} of the adapter's change ({by})", *sweep_lines(merge)]
    if rounding is not None:
        ratio = rounding["max_error_over_delta"]
        if ratio is not None:
            merged = summary["merge"]["alpha"] if summary["merge"] is not None else 1
            change = "training" if merged == 1 else f"{merged:g} of training"
            verdict = f"{'MORE' if ratio > 1 else 'less'} than {change} changed it"
            lines.append(
                f"  rounding  moved {rounding['worst_layer']} {ratio:.2f} times as far as {change} did, {verdict}; "
                f"{rounding['mean_error_over_delta']:.2f} times on average"
            )
        else:
            lines.append(f"  rounding  moved weights by {rounding['mean_relative_error']:.2%} on average")
        lines.append(
            f"            logits changed by up to {rounding['max_abs_logit']:.2g}, the likeliest token agrees at "
            f"{rounding['top1_agreement']:.2%}, KL {rounding['kl']:.1e}"
        )
        if rounding["loss_before"] is not None:
            lines.append(
                f"            loss on the held-out rows among these {rounding['rows']:,} positions "
                f"{rounding['loss_before']:.4f} -> {rounding['loss_after']:.4f}"
            )
    return "\n".join(lines)


def _encoder_lines(parity: Mapping[str, Any], rounding: Mapping[str, Any] | None) -> Iterator[str]:
    """Parity and cost of rounding of an encoder."""
    yield (
        f"  parity    hidden states differ from torch's by at most {parity['max_abs_hidden']:.1e} over "
        f"{parity['rows']:,} tokens, the least cosine of {parity['texts']} embeddings is {parity['min_cosine']:.6f}"
    )
    if "fast" in parity:
        yield (
            f"  fast path cosine {parity['fast']['mean_cosine']:.4f} on average on int8 activations, "
            f"{parity['fast']['min_cosine']:.4f} at least"
        )
    if rounding is not None:
        yield (
            f"  rounding  moved weights by {rounding['mean_relative_error']:.2%} on average; cosine of embeddings "
            f"before and after {rounding['mean_cosine']:.4f} on average, {rounding['min_cosine']:.4f} at least"
        )


def sweep_lines(merge: Mapping[str, Any]) -> Iterator[str]:
    """The table of a merge: the metrics at each alpha, the chosen one marked. Empty where there were no rows."""
    if not merge["sweep"]:
        return
    sets = [name for name in ("task", "retention") if merge["sweep"][0][name] is not None]
    columns = "".join(f"{name + ' loss':>16} {'accuracy':>9}" for name in sets)
    yield f"            {'alpha':<7}{columns}"
    for row in merge["sweep"]:
        figures = "".join(f"{row[name]['loss']:>16.4f} {row[name]['token_accuracy']:>9.1%}" for name in sets)
        yield f"            {row['alpha']:<7g}{figures}{'  <- chosen' if row['alpha'] == merge['alpha'] else ''}"


def load_bundle(folder: str | Path | AnyBundle[Any]) -> Bundle:
    """As `load_any_bundle`, for what only decoders can do that continue texts. Raises BundleError also for others."""
    folder = Path(folder.folder if isinstance(folder, AnyBundle) else folder)
    if is_encoder(folder):
        raise BundleError(
            f"{folder} is the bundle of an encoder, which gives embeddings and no text. `edgetune run {folder} "
            f"--prompt TEXT` prints the embedding of a text, edgetune.embed() gives those of many"
        )
    bundle = load_any_bundle(folder)
    assert isinstance(bundle, Bundle)
    check_continues(bundle)
    return bundle


def check_continues(bundle: AnyBundle[Any]) -> None:
    """Raises BundleError where a trained head stands in the place of that over the vocabulary."""
    if isinstance(bundle.model, BundleModel) and bundle.model.objective is not None:
        raise BundleError(
            f"{bundle.folder} has a trained head ({bundle.model.objective}), so it continues no text. `edgetune run "
            f"{bundle.folder} --prompt TEXT` prints what it says of a text"
        )


def is_encoder(folder: Path) -> bool:
    """Whether this is the bundle of an encoder, by its manifest. Raises BundleError as `read_manifest`."""
    return "pooling" in read_manifest(folder)["model"]


def has_head(folder: Path) -> bool:
    """Whether a trained head makes its logits, by its manifest. Raises BundleError as `read_manifest`."""
    return read_manifest(folder)["model"].get("objective") is not None


def load_any_bundle(folder: str | Path) -> Bundle | EncoderBundle:
    """Read and check a bundle folder: manifest keys and types, then the size and SHA-256 of every listed file.

    Raises BundleError naming the file and the field.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    manifest = read_manifest(folder)
    _check_files(folder, manifest["files"])
    where = f"{path}: model"
    slots = tuple(_parse(AdapterSlot, slot, f"{path}: slots[{i}]") for i, slot in enumerate(manifest["slots"]))
    if "pooling" in manifest["model"]:
        model = _parse(EncoderModel, manifest["model"], where)
        return EncoderBundle(folder, manifest, model, slots, _read_entries(manifest, path))
    decoder = _parse(BundleModel, manifest["model"], where)
    return Bundle(folder, manifest, decoder, slots, _read_entries(manifest, path))


def load_adapter_tensors(bundle: AnyBundle[Any], path: str | Path) -> dict[str, np.ndarray]:
    """Adapter tensors for this bundle's graph inputs from a file that `write_adapter` wrote, checked.

    Raises AdapterError where the file is unreadable, belongs to another base, or does not fit the slots.
    """
    adapter = read_adapter(path)
    check_adapter(bundle, adapter, origin=str(path))
    return adapter.tensors


def check_adapter(bundle: AnyBundle[Any], adapter: BoundAdapter, *, origin: str = "the adapter") -> None:
    """Refuse an adapter that does not fit this bundle, before an inference session exists.

    Raises AdapterError: it was made for another base, grid or tokenizer, or its tensors are not those of its slots; the
    message lists every one that is wrong.
    """
    if not bundle.slots:
        raise AdapterError(f"{bundle.folder} is merged and takes no adapter; export without --merge to keep slots")
    _check_binding(bundle, adapter.binding, origin)
    problems = list(tensor_problems(adapter, {slot.name: slot for slot in bundle.slots}, bundle.prefix))
    if problems:
        shown = "\n  ".join(problems[:20])
        raise AdapterError(
            f"{origin} does not fit {bundle.folder}, {len(problems)} of its tensors are wrong:\n  {shown}\n"
            f"Train an adapter on the base of this bundle, or export a bundle of the adapter's base"
        )
    if adapter.binding.virtual_tokens >= bundle.model.max_position_embeddings:
        raise AdapterError(
            f"{origin} begins the cache with {adapter.binding.virtual_tokens} virtual tokens, and the context of "
            f"{bundle.folder} is {bundle.model.max_position_embeddings}. Train it with fewer"
        )
    slots = [slot for slot in bundle.slots if slot.name in adapter.binding.slots]
    if slots and not any(slot.changes(adapter.tensors) for slot in slots):
        names = " or ".join(name.rpartition(".")[2] for name in slots[-1].inputs)
        raise AdapterError(f"{origin} changes nothing: {names} of every slot is zero. Train it")


def _check_binding(bundle: AnyBundle[Any], binding: Binding, origin: str) -> None:
    """Raises AdapterError naming what of the adapter's origin is not the bundle's."""
    manifest = bundle.manifest
    if binding.base_sha256 != manifest["base_sha256"]:
        raise AdapterError(
            f"{origin} was trained on base {binding.base_sha256[:12]}, {bundle.folder} holds "
            f"{manifest['base_sha256'][:12]}; use the bundle of that base, or train the adapter on this one"
        )
    if binding.grid != manifest["grid"]:
        raise AdapterError(
            f"{origin} was trained around {binding.grid or 'dense'} weights, those of {bundle.folder} are "
            f"{manifest['grid'] or 'dense'}; use the bundle of that grid, or train the adapter on this one"
        )
    if binding.tokenizer_sha256 != manifest["tokenizer_sha256"]:
        theirs, ours = (sha and sha[:12] for sha in (binding.tokenizer_sha256, manifest["tokenizer_sha256"]))
        raise AdapterError(
            f"{origin} was trained with tokenizer {theirs}, {bundle.folder} has {ours}: the same text would be other "
            f"tokens. Train it with this tokenizer, or export a bundle with the adapter's"
        )


def _read_entries(manifest: Mapping[str, Any], path: Path) -> dict[str, AdapterEntry]:
    """The manifest's adapters and what refers to them, checked."""
    entries: dict[str, AdapterEntry] = {}
    for name, value in manifest["adapters"].items():
        where = f"{path}: adapters[{name!r}]"
        if not is_name(name):
            raise BundleError(f"{where} is no name, expected lower-case letters, digits, _ and -. {_AGAIN}")
        reader = Reader()
        entry = reader.read(AdapterEntry, value) if isinstance(value, dict) else None
        if entry is None:
            reason = "; ".join(reader.problems) or f"is {value!r:.80}, expected an object"
            raise BundleError(f"{where}: {reason}. {_AGAIN}")
        unlisted = [f"{name}{suffix}" for suffix in SUFFIXES if f"{name}{suffix}" not in manifest["files"]]
        if unlisted:
            raise BundleError(f"{where}: files does not list {unlisted[0]}. {_AGAIN}")
        entries[name] = entry
    default = manifest["default_adapter"]
    if default is not None and default not in entries:
        raise BundleError(f"{path}: default_adapter is {default!r}, which is none of its adapters. {_AGAIN}")
    if manifest["slots"] and not manifest["probe_rows"]:
        raise BundleError(f"{path}: probe_rows is empty, so no adapter could be probed. {_AGAIN}")
    vocab_size = manifest["model"]["vocab_size"]
    for row in manifest["probe_rows"]:
        if not isinstance(row, list) or not row or any(type(i) is not int or not 0 <= i < vocab_size for i in row):
            raise BundleError(f"{path}: probe_rows has {row!r:.80}, expected a list of token ids. {_AGAIN}")
    return entries


def read_manifest(folder: Path) -> dict[str, Any]:
    """`edgetune.json` of a bundle, its keys and types checked and nothing else.

    Raises BundleError naming the file and the field.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"{folder} does not exist. Check the path; `edgetune export run/ --out bundle/` writes one")
    if not path.is_file():
        raise BundleError(
            f"{folder} has no {MANIFEST}, so it is no bundle. `edgetune export run/ --out bundle/` writes one"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}. Export the bundle again") from error
    if not isinstance(manifest, dict):
        raise BundleError(f"{path} holds a {type(manifest).__name__}, expected an object. Export the bundle again")
    if manifest.get("kind") == "module":
        raise BundleError(
            f"{folder} is the bundle of a network of its user's own: there is no text in it. Run it with onnxruntime, "
            f"measure it with edgetune.bench_module()"
        )
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


_Part = TypeVar("_Part", BundleModel, EncoderModel, AdapterSlot)
_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "int | None": (int, type(None)), "tuple[int, ...]": (list,),
    "dict[str, int]": (dict,), "str | None": _OPTIONAL_TEXT, "tuple[str, ...]": (list, tuple),
}  # fmt: skip


def _parse(kind: type[_Part], value: Any, where: str) -> _Part:
    """A dataclass of this module from its JSON object."""
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {value!r:.80}, expected an object. Export the bundle again")
    types = {field.name: _FIELD_TYPES[str(field.type)] for field in fields(kind)}
    value = {field.name: field.default for field in fields(kind) if field.default is not MISSING} | value
    _check_keys(value, types, where)
    for key, item in value.items():
        numbers = item.values() if isinstance(item, dict) else item if isinstance(item, list) else [item]
        if key == "classes":
            if not all(isinstance(name, str) for name in item):
                raise BundleError(f"{where}: {key} is {item!r:.80}, expected names. Export the bundle again")
            continue
        wanted = () if isinstance(item, (str, bool, type(None))) else numbers
        if any(type(number) is not int or number < 0 for number in wanted):
            raise BundleError(f"{where}: {key} is {item!r:.80}, expected no negative number. Export the bundle again")
    parts: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    return kind(**parts)
