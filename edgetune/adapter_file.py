"""An adapter as a bundle carries it: the tensors as graph inputs, and what binds them to one base.

    NAME.safetensors     what edgetune reads, and any client that feeds graph inputs; the binding is in its metadata
    NAME.onnx_adapter    the same tensors for onnxruntime's own adapter API

An adapter of another base with the same shapes runs without an error and gives nonsense; onnxruntime stores versions in
its adapter files and never checks them. So each file says itself what it was trained on, and whoever loads it compares
that with the bundle (`bundle.check_adapter`). An adapter of no effect is found by what it does to a few probe rows.
Torch, onnx and onnxruntime stay out, but for writing.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

from edgetune.adapters import METHODS, bottleneck, lora, loreft, lst
from edgetune.adapters import prefix as prefix_tuning
from edgetune.adapters.base import CONFIG
from edgetune.adapters.bottleneck import BottleneckConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.loreft import LoreftConfig
from edgetune.adapters.lst import LstConfig
from edgetune.adapters.prefix import PrefixConfig
from edgetune.base import open_any_base, weights_sha256
from edgetune.errors import AdapterError, ModelError
from edgetune.schema import Key, Reader
from edgetune.weights import TensorInfo, open_tensors, sha256_file, write_safetensors

FORMAT_VERSION = 1
SUFFIXES = (".safetensors", ".onnx_adapter")
SUMMARY, MERGE = "summary.json", "merge.json"  # beside an adapter that was trained, or merged from others
PAST = "past_key_values."  # inputs of a decoder's graph: its cache
PROMPT_LENGTH = "prompt_length"  # an optional input of one with slots for positions of a prompt
_METADATA = "edgetune"  # key in the safetensors header, whose values are strings
# As a share of the largest logit. What changes less cannot be told from the rounding of float32.
MIN_PROBE_CHANGE = 1e-6
_PROBE_ROWS, _PROBE_LENGTH = 2, 32
# Lower case: the file systems of phones and SD cards do not tell "Notes" from "notes".
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Binding:
    """What an adapter belongs to, and what it is. A base of another hash, grid or tokenizer is another base."""

    base_sha256: str
    grid: str | None
    tokenizer_sha256: str | None
    r: Annotated[int, Key("rank; where linears have their own, what divides them all; 0 without slots", 0, 1 << 20)]
    lora_alpha: Annotated[float, Key("strength that training used; it is folded into lora_B", low=0)]
    slots: tuple[str, ...]
    "those of the graph that it fills"
    activation: str | None = None
    "of a bottleneck, which is that of the slots"
    virtual_tokens: Annotated[int, Key("positions that its keys and values begin the cache with", low=0)] = 0
    positions: str | None = None
    "of a LoReFT, which are those of the slots"
    reduction: Annotated[int | None, Key("of an LST, which is that of the slots", low=1)] = None


@dataclass(frozen=True)
class Origin:
    """The base that an adapter folder was trained on."""

    base: str  # its folder, as far as it is known
    base_sha256: str
    grid: str | None
    tokenizer_sha256: str | None


def read_origin(folder: Path) -> Origin:
    """The base of an adapter folder.

    A run says so itself, and so does what was merged. Of another folder, and of a run that does not, it is what the
    base that it names has now.

    Raises:
        AdapterError: it names none, or none that is here.
    """
    path = next((folder / name for name in (SUMMARY, MERGE) if (folder / name).is_file()), folder / CONFIG)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        keys = ("base_sha256", "grid", "tokenizer_sha256")
        if all(key in said for key in keys):
            base_sha256, grid, tokenizer_sha256 = (said[key] for key in keys)
            return Origin(str(said.get("base", "")), str(base_sha256), grid, tokenizer_sha256)
        base = Path(said["base_model_name_or_path" if path.name == CONFIG else "base"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise AdapterError(
            f"{path} does not say which base was trained on ({error!r}). Train the adapter again"
        ) from error
    if not base.is_dir():
        raise AdapterError(
            f"{path} names the base {str(base)!r}, and there is no such folder to compare with. Put it there, or "
            f"correct the path"
        )
    tokenizer = base / "tokenizer.json"
    known = sha256_file(tokenizer) if tokenizer.is_file() else None
    return Origin(str(base), weights_sha256(base), open_any_base(base).grid, known)


@dataclass(frozen=True)
class AdapterSlot:
    """Where an adapter plugs in: inputs `<name>.lora_A` [in_features, n] and `<name>.lora_B` [n, out_features].

    Those of a bottleneck are `adapter_down` and `adapter_up`, of the same shapes, with the activation between them; of
    a LoReFT they are `reft_down`, `reft_bias` [n] and `reft_up`, for the `positions` of a prompt. A rung of an LST, of
    hidden states narrowed by `reduction`, has `side_scale` [1], `side_down` and `side_up`; its way back to their width
    has `side_upsample` [in_features, out_features] alone.
    `modules` are the linears whose outputs lie side by side in it, each with its number. Where there are several, their
    lora_A stand side by side and their lora_B along the diagonal (`by_slot`); n is the sum of their ranks.
    """

    name: str
    in_features: int
    out_features: int
    modules: dict[str, int]
    activation: str | None = None
    positions: str | None = None
    reduction: int | None = None

    @property
    def is_lora(self) -> bool:
        """Whether it takes LoRA, which any linear's can be put into."""
        return self.activation is None and self.positions is None and self.reduction is None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its matrices, which change nothing where one is zero."""
        first, second = ("lora_A", "lora_B") if self.activation is None else ("adapter_down", "adapter_up")
        if self.positions is not None:
            first, second = "reft_down", "reft_up"
        if self.reduction is not None:
            if self._leads_back:
                return (f"{self.name}.side_upsample",)
            first, second = "side_down", "side_up"
        return f"{self.name}.{first}", f"{self.name}.{second}"

    @property
    def _leads_back(self) -> bool:
        """Whether it is an LST's way back to the stream, without which no rung changes anything."""
        return self.name.endswith(f".{lst.OUTPUT}")

    def changes(self, tensors: Mapping[str, np.ndarray]) -> bool:
        """Whether its inputs among these change what the model computes."""
        bias = tensors.get(f"{self.name}.reft_bias")
        if self.reduction is not None and not self._leads_back:
            return False
        return (bias is not None and bool(bias.any())) or all(tensors[name].any() for name in self.inputs)

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """Every input with its shape."""
        if self._leads_back:
            return {self.inputs[0]: (self.in_features if rank else 0, self.out_features)}
        first, second = self.inputs
        between: dict[str, tuple[int, ...]] = {}
        if self.positions is not None:
            between = {f"{self.name}.reft_bias": (rank,)}
        if self.reduction is not None:
            between = {f"{self.name}.side_scale": (1,)}
        return {first: (self.in_features, rank), **between, second: (rank, self.out_features)}


@dataclass(frozen=True)
class PrefixShape:
    """What a graph takes as the past of its cache: `layers` keys and values [1, kv_heads, tokens, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int

    def tensors(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """The inputs with their shapes."""
        shape = (1, self.kv_heads, tokens, self.head_dim)
        return {f"{PAST}{i}.{kind}": shape for i in range(self.layers) for kind in ("key", "value")}


@dataclass(frozen=True)
class AdapterEntry:
    """What the manifest says of an adapter; its files are `<name>.safetensors` and `<name>.onnx_adapter`."""

    binding: Binding
    probe_change: Annotated[float, Key("largest change of an output on the probe rows by the largest output", low=0)]


@dataclass(frozen=True)
class BoundAdapter:
    """Inputs of the graph, float32: those of slots (`AdapterSlot`), a LoRA's scaling folded into lora_B, and those of a
    prefix (`PrefixShape`).
    """

    binding: Binding
    tensors: dict[str, np.ndarray]


def by_slot(tensors: Mapping[str, np.ndarray], slots: Iterable[AdapterSlot]) -> dict[str, np.ndarray]:
    """Graph inputs from `<linear>.lora_A` [in, r] and `<linear>.lora_B` [r, out] of the adapted linears.

        y = [x Wq, x Wk, x Wv] + x [Aq, Ak, Av] diag(Bq, Bk, Bv)

    A linear of a slot without an adapter is left out; of a slot with one linear the tensors are what they were.
    """
    feeds: dict[str, np.ndarray] = {}
    for slot in slots:
        if not slot.is_lora:
            feeds |= {name: tensors[name] for name in slot.shapes(0) if name in tensors}
            continue
        adapted = [module for module in slot.modules if f"{module}.lora_A" in tensors]
        if not adapted:
            continue
        feeds[f"{slot.name}.lora_A"] = np.concatenate([tensors[f"{module}.lora_A"] for module in adapted], 1)
        b = np.zeros((feeds[f"{slot.name}.lora_A"].shape[1], slot.out_features), np.float32)
        start = row = 0
        for module, outputs in slot.modules.items():
            if module in adapted:
                part = tensors[f"{module}.lora_B"]
                b[row : row + len(part), start : start + outputs] = part
                row += len(part)
            start += outputs
        feeds[f"{slot.name}.lora_B"] = b
    return feeds


def by_linear(tensors: Mapping[str, np.ndarray], slots: Iterable[AdapterSlot]) -> dict[str, np.ndarray]:
    """An adapter of a bundle for each linear on its own, which gives the same sum at the rank of the whole slot."""
    found: dict[str, np.ndarray] = {}
    for slot in slots:
        if f"{slot.name}.lora_A" not in tensors:
            continue
        start = 0
        for module, outputs in slot.modules.items():
            found[f"{module}.lora_A"] = tensors[f"{slot.name}.lora_A"]
            found[f"{module}.lora_B"] = np.ascontiguousarray(tensors[f"{slot.name}.lora_B"][:, start : start + outputs])
            start += outputs
    return found


def split_bytes(tensors: Mapping[str, np.ndarray], slots: Iterable[AdapterSlot]) -> int:
    """What `by_linear` copies: B of slots that are several linears."""
    names = (f"{slot.name}.lora_B" for slot in slots if len(slot.modules) > 1)
    return sum(tensors[name].nbytes for name in names if name in tensors)


def bind(
    config: AdapterConfig, tensors: dict[str, np.ndarray], origin: tuple[str, str | None, str | None],
    slots: Iterable[AdapterSlot], prefix: PrefixShape | None,
) -> BoundAdapter:  # fmt: skip
    """An adapter under training's names as inputs of a graph with these slots and, of a decoder, this prefix.

    `origin` is what it was trained on: hash of the base, grid, hash of the tokenizer.

    Raises:
        AdapterError: its method has no inputs of a graph; the message says what to do instead.
    """
    if isinstance(config, PrefixConfig) and prefix is not None:
        feeds = prefix_tuning.onnx_tensors(tensors, prefix.layers, prefix.kv_heads)
        return BoundAdapter(Binding(*origin, 0, 0.0, (), None, config.virtual_tokens), feeds)
    if isinstance(config, BottleneckConfig):
        feeds = by_slot(bottleneck.onnx_tensors(config, tensors), slots)
        filled = tuple(dict.fromkeys(name.rpartition(".")[0] for name in feeds))
        return BoundAdapter(Binding(*origin, config.rank, float(config.rank), filled, config.activation), feeds)
    if isinstance(config, LoreftConfig):
        feeds = by_slot(loreft.onnx_tensors(config, tensors), slots)
        filled = tuple(dict.fromkeys(name.rpartition(".")[0] for name in feeds))
        binding = Binding(*origin, config.rank, float(config.rank), filled, positions=config.positions)
        return BoundAdapter(binding, feeds)
    if isinstance(config, LstConfig):
        feeds = by_slot(lst.onnx_tensors(config, tensors), slots)
        filled = tuple(dict.fromkeys(name.rpartition(".")[0] for name in feeds))
        units = lst.UNITS
        return BoundAdapter(Binding(*origin, units, float(units), filled, reduction=config.reduction), feeds)
    method, slots = METHODS[config.method], tuple(slots)
    method.CAPABILITIES.require("as_lora", AdapterError)
    linears = {module: (rows, slot.in_features) for slot in slots for module, rows in slot.modules.items()}
    config, tensors = method.as_lora(config, tensors, linears)
    assert isinstance(config, LoraConfig)
    feeds = by_slot(lora.onnx_tensors(config, tensors), slots)
    filled = tuple(dict.fromkeys(name.rpartition(".")[0] for name in feeds))
    return BoundAdapter(Binding(*origin, config.rank, float(config.lora_alpha or 0), filled), feeds)


def is_name(text: str) -> bool:
    """Whether an adapter may be called so: lower-case letters, digits, _ and -; no path is ever a name."""
    return _NAME.fullmatch(text) is not None and text != "model"  # model.safetensors is what others take for weights


def write_adapter(folder: Path, name: str, adapter: BoundAdapter) -> None:
    """Write both files of an adapter; each appears under its name whole or not at all."""
    import onnxruntime

    infos = {key: TensorInfo("F32", value.shape) for key, value in adapter.tensors.items()}
    bound = json.dumps({"format_version": FORMAT_VERSION, **asdict(adapter.binding)})
    safetensors, native = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    write_safetensors(safetensors, infos, adapter.tensors.__getitem__, {_METADATA: bound})
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(value) for key, value in adapter.tensors.items()}
    file.set_parameters(values)
    temporary = native.with_name(f".{native.name}.tmp")
    try:
        file.export_adapter(str(temporary))
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(native)
    finally:
        temporary.unlink(missing_ok=True)


def read_adapter(path: str | Path) -> BoundAdapter:
    """An adapter from its `.safetensors` file; the tensors are views into the mapped file.

    Raises:
        AdapterError: the file is missing or damaged, or does not say what it was trained on.
    """
    path = Path(path)
    try:
        weights = open_tensors(path)
    except ModelError as error:
        raise AdapterError(str(error)) from error
    return BoundAdapter(_read_binding(path, weights.metadata), {name: weights.array(name) for name in weights})


def _read_binding(path: Path, metadata: Mapping[str, str]) -> Binding:
    if _METADATA not in metadata:
        raise AdapterError(
            f"{path} does not say which base it was trained on, so it cannot be checked. "
            f"`edgetune adapter add` makes such a file from a run or a PEFT folder"
        )
    try:
        values = json.loads(metadata[_METADATA])
        version = values.pop("format_version")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterError(f"{path}: what it says of its base is damaged ({error!r}). Make the file again") from error
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{path} has format_version {version!r}, this edgetune reads {FORMAT_VERSION}. Upgrade edgetune, or make "
            f"the file again"
        )
    reader = Reader()
    binding = reader.read(Binding, values)
    if binding is None:
        raise AdapterError(f"{path}: what it says of its base is wrong: {'; '.join(reader.problems)}")
    return binding


def probe_rows(vocab_size: int, context_length: int) -> list[list[int]]:
    """Token ids to probe adapters on: seeded ones, because a bundle is given away and held-out rows may be private."""
    length = min(_PROBE_LENGTH, context_length)
    rows: list[list[int]] = np.random.default_rng(0).integers(0, vocab_size, (_PROBE_ROWS, length)).tolist()
    return rows


def check_probe_change(change: float, *, origin: str = "the adapter") -> None:
    """Refuse an adapter by what it does to the outputs of the probe rows, as a share of the largest one.

    Raises AdapterError where that is nothing, or no number.
    """
    if not np.isfinite(change):
        raise AdapterError(f"{origin} makes outputs that are no numbers on the probe rows. Train it with a lower rate")
    if change <= MIN_PROBE_CHANGE:
        raise AdapterError(
            f"{origin} changes nothing: on the probe rows no output moves by more than {change:.1e} of the largest, "
            f"and {MIN_PROBE_CHANGE:.0e} is the rounding of float32. Train it longer, or use the base alone"
        )


def tensor_problems(
    adapter: BoundAdapter, slots: Mapping[str, AdapterSlot], prefix: PrefixShape | None = None
) -> Iterator[str]:
    """What is wrong with each tensor: missing, extra, or not as its slot needs it. `prefix` is that of the graph."""
    tensors, r, virtual = adapter.tensors, adapter.binding.r, adapter.binding.virtual_tokens
    expected: dict[str, tuple[int, ...]] = {} if prefix is None or not virtual else prefix.tensors(virtual)
    for name in adapter.binding.slots:
        slot = slots.get(name)
        if slot is None:
            yield f"{name}: the graph has no such slot"
            continue
        if slot.activation != adapter.binding.activation:
            yield f"{name}: its non-linearity is {adapter.binding.activation}, that of the graph {slot.activation}"
            continue
        if slot.positions != adapter.binding.positions:
            yield f"{name}: it changes positions {adapter.binding.positions}, the graph {slot.positions}"
            continue
        if slot.reduction != adapter.binding.reduction:
            yield f"{name}: its reduction is {adapter.binding.reduction}, that of the graph {slot.reduction}"
            continue
        expected |= slot.shapes(_rank_in(tensors.get(slot.inputs[0]), r) if slot.is_lora else r)
    if virtual and prefix is None:
        yield "it begins a cache, and the graph has none"
    if not adapter.binding.slots and not virtual:
        yield "it names no slot, expected at least one"
    for name, shape in expected.items():
        array = tensors.get(name)
        if array is None:
            yield f"{name}: is missing, expected {list(shape)}"
        elif array.dtype != np.float32:
            yield f"{name}: is {array.dtype}, expected float32"
        elif array.shape != shape:
            yield f"{name}: has shape {list(array.shape)}, expected {list(shape)}"
        elif not np.isfinite(array).all():
            yield f"{name}: holds NaN or infinity"
    named = {name for slot in adapter.binding.slots if slot in slots for name in slots[slot].shapes(0)}
    for name in sorted(tensors.keys() - expected.keys() - named):
        yield f"{name}: is not of a slot that the adapter names"


def _rank_in(a: np.ndarray | None, r: int) -> int:
    """How many columns lora_A of a slot has: some times r, as many as the tensor shows; else r of one linear."""
    columns = 0 if a is None or a.ndim != 2 else a.shape[1]
    return columns if columns and r and columns % r == 0 else r
