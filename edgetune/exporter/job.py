"""What an export starts from: a run, a base or a model opened, with adapter, tokenizer and held-out rows.

Everything that does not go together is refused here, before a byte is written.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from edgetune.adapter_file import AdapterSlot, BoundAdapter, PrefixShape, bind
from edgetune.adapters import METHODS
from edgetune.adapters.attach import attach
from edgetune.adapters.bottleneck import BottleneckConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.head import SCORE, Head, load_with_head
from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.loreft import LoreftConfig
from edgetune.adapters.lst import LstConfig
from edgetune.adapters.prefix import PrefixConfig
from edgetune.adapters.prompt import PromptConfig
from edgetune.base import AnyBase, Base, EncoderBase, open_any_base, weights_sha256
from edgetune.bundle import MANIFEST
from edgetune.data import Row, read_rows, split_eval
from edgetune.device import DeviceProfile, load_device
from edgetune.errors import DeviceError, EdgetuneWarning, ExportError
from edgetune.graphs import FORMATS, standard
from edgetune.graphs.fused import adapter_slots
from edgetune.graphs.ops import has_fused_attention
from edgetune.grids import GRIDS
from edgetune.hub import model_folder
from edgetune.models.config import DecoderConfig
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.models.encoder import Encoder
from edgetune.models.places import Score
from edgetune.quantizer import quantize, read_manifest
from edgetune.tokenizer import Tokenizer, load_tokenizer
from edgetune.training.forward import keys_values
from edgetune.weights import sha256_file

# Rotary tables and KV cache grow with it: 128k positions would add 32 MiB of tables that no device could fill.
CONTEXT_LIMIT = 8192
_ROW_LENGTH = 512  # tokens of a held-out row, where the run does not say


@dataclass(frozen=True)
class Adapter:
    """An adapter under training's names."""

    config: AdapterConfig
    tensors: dict[str, np.ndarray]
    linears: dict[str, tuple[int, int]]
    "(out_features, in_features) of those of the model, by name"
    head: Head | None = None
    "what was trained behind the model"
    alpha: float = 1.0
    "the share of its change that is merged, where its tensors are the model's own"

    @property
    def method(self) -> ModuleType:
        return METHODS[self.config.method]

    @property
    def needs_merge(self) -> bool:
        """Whether it can be in no graph but merged."""
        can = self.method.CAPABILITIES
        return can.as_lora is not None and can.own_inputs is not None

    def weakened(self, alpha: float) -> Adapter:
        """The adapter whose change of the weights is `alpha` times this one's."""
        if alpha == 1:
            return self
        self.method.CAPABILITIES.require("merge_share", ExportError)
        if self.config.own:
            return replace(self, alpha=alpha)
        config, tensors = self.method.weakened(self.config, self.tensors, alpha)
        return replace(self, config=config, tensors=tensors)

    @cached_property
    def places(self) -> dict[str, dict[str, np.ndarray]]:
        """Its tensors by place and short name."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, value in self.tensors.items():
            place, _, short = name.rpartition(".")
            found.setdefault(place, {})[short] = value
        return found

    def merged(self, place: str, weight: np.ndarray, rows: slice) -> np.ndarray:
        """These rows of the weight there with the adapter folded in."""
        if self.config.own:
            return self.tuned(f"{place}.weight", weight, rows)
        tensors = self.places[place] | self.method.frozen_tensors(self.config, self.linears[place])
        made: np.ndarray = self.method.merge(weight, tensors, rows, self.config)
        return made

    def tuned(self, name: str, frozen: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """One of the model's own tensors as it is merged, in these rows, of what the base has there."""
        trained = self.tensors[name][rows] if name in self.tensors else frozen
        return trained if self.alpha == 1 else frozen + np.float32(self.alpha) * (trained - frozen)

    def merged_vector(self, name: str, vector: np.ndarray) -> np.ndarray:
        """The vector that the base has under that name, with the adapter folded in."""
        if self.config.own:
            return self.tuned(name, vector)
        place, _, kind = name.rpartition(".")
        if kind != "bias" or place not in self.places or not self.method.SCALES_BIAS:
            return vector
        merged: np.ndarray = self.method.merge_bias(vector, self.places[place])
        return merged

    def changes(self, place: str) -> bool:
        """Whether it has something in it there, of the model's own tensors at a matrix."""
        if self.config.own:
            return f"{place}.weight" in self.tensors and place in self.linears
        return place in self.places and bool(self.method.changes(self.places[place]))


@dataclass(frozen=True)
class Job:
    """One export: what goes in, and how."""

    base: Base | EncoderBase
    base_sha256: str
    adapter: Adapter | None
    weights: str
    merge: bool
    rows: Sequence[Row]
    "held-out rows of the new task"
    retention: Sequence[Row]
    "rows of what the base could do already"
    tokenizer: Tokenizer | None
    any_adapter: bool = True
    "whether every linear has a slot, not only those of this adapter"

    @property
    def decoder(self) -> Base:
        """The base, where the job is a decoder's."""
        assert isinstance(self.base, Base)
        return self.base

    def format_of(self, module: str) -> str:
        """The key in `FORMATS` of a matrix in the bundle: what the base has it in, where nothing is rounded."""
        stored = self.base.grid or "fp32"
        return self.weights if self.merge or self.weights != stored else self.base.grid_of(module) or "fp32"

    @property
    def head(self) -> Head | None:
        """What was trained behind the model."""
        return None if self.adapter is None else self.adapter.head

    def open_decoder(self) -> Decoder:
        """The base in torch, with a trained head."""
        decoder = load_decoder(self.base.folder)
        if self.head is not None:
            decoder.score = Score(nn.Parameter(torch.from_numpy(self.head.tensors[SCORE])))
        return decoder

    @property
    def slots(self) -> tuple[AdapterSlot, ...]:
        """Those of the graph; a merged one has none."""
        if self.merge:
            return ()
        slots = adapter_slots(self.base.config, self.format_of)
        config = None if self.adapter is None else self.adapter.config
        if isinstance(config, BottleneckConfig | LoreftConfig | LstConfig):
            everywhere = config.changed(layers_to_transform=None).resolved(self.base.config)
            activation = config.activation if isinstance(config, BottleneckConfig) else None
            positions = config.positions if isinstance(config, LoreftConfig) else None
            reduction = config.reduction if isinstance(config, LstConfig) else None
            hidden = self.base.config.hidden_size
            slots = tuple(
                AdapterSlot(
                    slot.place, slot.in_features, slot.out_features, {slot.place: hidden}, activation,
                    positions, reduction,
                )
                for slot in METHODS[config.method].slots(everywhere, self.base.config)
            )  # fmt: skip
        if self.any_adapter or self.adapter is None or self.virtual_tokens:
            return slots
        return tuple(slot for slot in slots if self.adapter.places.keys() & slot.modules.keys())

    @property
    def virtual_tokens(self) -> int:
        """Positions of the context that the adapter takes."""
        return 0 if self.adapter is None else self.adapter.config.virtual_tokens

    @property
    def row_length(self) -> int:
        """The tokens that a row may have beside them."""
        return self.context_length - self.virtual_tokens

    def bound(self, adapter: Adapter) -> BoundAdapter:
        """An adapter as inputs of the graph. Raises AdapterError where its method has none."""
        config, prefix = self.base.config, None
        if isinstance(config, DecoderConfig):
            prefix = PrefixShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        origin = self.base_sha256, self.base.grid, self.tokenizer_sha256
        return bind(adapter.config, adapter.tensors, origin, self.slots, prefix)

    def feeds(self, adapter: Adapter) -> dict[str, np.ndarray]:
        """These inputs; none of a merged graph, which has none."""
        return {} if self.merge else self.bound(adapter).tensors

    @property
    def contrib(self) -> bool:
        """Whether the graph may use com.microsoft operators."""
        return self.weights != standard.NAME

    @property
    def writes_cache_in_place(self) -> bool:
        """Whether past and present of the KV cache may be one buffer: only the contrib attention can."""
        config = self.base.config
        return self.contrib and isinstance(config, DecoderConfig) and has_fused_attention(config)

    @property
    def context_length(self) -> int:
        return min(self.base.config.max_position_embeddings, CONTEXT_LIMIT)

    @property
    def tokenizer_sha256(self) -> str | None:
        return sha256_file(self.base.folder / "tokenizer.json") if self.tokenizer else None

    @property
    def bos_token_id(self) -> int | None:
        found = self.tokenizer.bos_token_id if self.tokenizer else None
        return self.decoder.config.bos_token_id if found is None else found

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        found = self.tokenizer.eos_token_ids if self.tokenizer else ()
        return found or self.decoder.config.eos_token_ids


def attach_adapter(job: Job, model: Decoder | Encoder) -> Adapter:
    """Put the run's adapter into a model and return it, or a seeded random one that fills every slot."""
    config = job.adapter.config if job.adapter is not None else LoraConfig().resolved(job.base.config)
    parameters = attach(model, config)
    if job.adapter is not None:
        values = job.adapter.tensors
    else:
        rng = np.random.default_rng(0)
        values = {
            name: rng.normal(0, 0.1, tuple(value.shape)).astype(np.float32)
            for name, value in parameters.items()
            if name.endswith("lora_B")
        }
    for name, value in values.items():
        now = parameters[name].data
        if config.own and job.adapter is not None:
            value = job.adapter.tuned(name, now.numpy())
        now.copy_(torch.from_numpy(value))
    return Adapter(
        config, {name: value.detach().numpy() for name, value in parameters.items()}, job.base.config.linears()
    )


def read_job(
    folder: Path,
    work: Path,
    weights: str | None,
    merge: bool,
    eval_data: str | Path | None,
    device: DeviceProfile | str | Path | None,
    retention_data: str | Path | None,
) -> Job:
    """Open everything that the export needs; refuse what does not go together."""
    if weights is not None and weights not in FORMATS:
        raise ExportError(f"weights = {weights!r}; choose from {', '.join(FORMATS)}.")
    run = _read_run(folder)
    if run and (run["base"] / MANIFEST).is_file():
        raise ExportError(
            f"{folder} was trained in the bundle {run['base']}, which is one already. Put the adapter into another one "
            f"with `edgetune adapter add BUNDLE {folder}`."
        )
    base = open_any_base(run["base"] if run else folder)
    adapter = _read_adapter(folder, base, run, merge=merge) if run else None
    if merge and adapter is None:
        raise ExportError(f"{folder} has no adapter to merge. Export a run folder, or leave --merge off.")
    profile = _profile(device, folder)
    chosen = weights or _default_weights(base, adapter, profile)
    if profile is not None and chosen != profile.runtime.weights and (why := profile.runtime.slow_reason(chosen)):
        warnings.warn(
            f"{chosen} weights are slow on {profile.id}: {why}. Its profile names {profile.runtime.weights}.",
            EdgetuneWarning,
            stacklevel=3,
        )
    if adapter is None:
        base = _on_grid(base, chosen, work)
    sha256 = weights_sha256(base.folder)
    if base.grid is not None and (wanted := read_manifest(base.folder)["base_sha256"]) != sha256:
        raise ExportError(
            f"{base.folder} has weights with SHA-256 {sha256[:12]}, but its manifest names {wanted[:12]}. Run "
            f"`edgetune quantize` again."
        )
    if run and run.get("base_sha256") not in (None, sha256):
        raise ExportError(
            f"{base.folder} has SHA-256 {sha256[:12]}, but {folder} was trained on {run['base_sha256'][:12]}. Put that "
            f"base back, or train again."
        )
    tokenizer = load_tokenizer(base.folder) if (base.folder / "tokenizer.json").is_file() else None
    if tokenizer is not None:
        tokenizer.check_vocab(base.config.vocab_size)
    if isinstance(base, EncoderBase) and (eval_data is not None or retention_data is not None):
        raise ExportError(f"{base.folder} is an encoder: it predicts no token of held-out rows. Leave their files out.")
    has_head = adapter is not None and adapter.head is not None
    if has_head and (eval_data is not None or retention_data is not None):
        raise ExportError(
            f"{folder} has a trained head, which predicts no token of held-out rows. Leave their files out; `edgetune "
            "eval` measures a classifier."
        )
    virtual = 0 if adapter is None else adapter.config.virtual_tokens
    rows = () if isinstance(base, EncoderBase) or has_head else _held_out(run, tokenizer, base, eval_data, virtual)
    retention = () if retention_data is None else _held_out({}, tokenizer, base, retention_data)
    if retention and not rows:
        raise ExportError(
            f"There are no held-out rows of the new task to weigh those of {retention_data} against. Give them with "
            f"--eval-data."
        )
    return Job(base, sha256, adapter, chosen, merge, rows, retention, tokenizer)


def _read_run(folder: Path) -> dict[str, Any]:
    """What a run says of itself; of another PEFT adapter folder, only its base. Empty for a folder that is neither."""
    if not (folder / "adapter_config.json").is_file():
        if (folder / "plan.json").is_file():
            raise ExportError(
                f"{folder} is a run that has not ended. Finish it with `edgetune train --resume {folder}`."
            )
        return {}
    path = folder / "summary.json"
    try:
        if path.is_file():
            run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        else:
            path = folder / "adapter_config.json"
            run = {"base": json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]}
        run["base"] = model_folder(run["base"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ExportError(f"{path} does not say which base was trained on ({error!r}). Train again.") from error
    return run


def _read_adapter(folder: Path, base: AnyBase[Any], run: Mapping[str, Any], *, merge: bool) -> Adapter:
    config, tensors, head = load_with_head(folder, base.config, run)
    adapter = Adapter(config, tensors, base.config.linears(), head)
    can = adapter.method.CAPABILITIES
    can.require("merge" if merge else "as_lora" if can.own_inputs else "own_inputs", ExportError)
    if not _does_something(adapter, base):
        raise ExportError(f"The adapter of {folder} changes nothing. Train it, or export the base.")
    return as_prefix(base, adapter) if isinstance(config, PromptConfig) and isinstance(base, Base) else adapter


def _does_something(adapter: Adapter, base: AnyBase[Any]) -> bool:
    """Whether the adapted model differs from the base."""
    if not adapter.config.own:
        return any(map(adapter.changes, adapter.places))
    for name, value in adapter.tensors.items():
        place, _, kind = name.rpartition(".")
        is_matrix = kind == "weight" and place in adapter.linears
        frozen = base.dequantize(place) if is_matrix else base.weights.float32(name)
        if not np.array_equal(value, frozen):
            return True
    return False


def as_prefix(base: Base, adapter: Adapter) -> Adapter:
    """A prompt as the keys and values that the model makes of it, once; a prefix as it is."""
    config = adapter.config
    if not isinstance(config, PromptConfig) or isinstance(config, PrefixConfig):
        return adapter
    prompt = torch.from_numpy(adapter.tensors["prompt_embeddings"])
    parts = [part.clone() for layer in keys_values(load_decoder(base.folder), prompt) for part in layer]
    folded = PrefixConfig(num_virtual_tokens=config.num_virtual_tokens)
    return replace(adapter, config=folded, tensors={"prompt_embeddings": torch.cat(parts, 1).numpy()})


def _profile(device: DeviceProfile | str | Path | None, folder: Path) -> DeviceProfile | None:
    """The profile that was given, else that of the run's plan; None where there is none, or it is no longer known."""
    if isinstance(device, DeviceProfile):
        return device
    if device is not None:
        return load_device(device)
    try:
        return load_device(str(json.loads((folder / "plan.json").read_text(encoding="utf-8"))["device"]))
    except (OSError, ValueError, KeyError, TypeError, DeviceError):
        return None


def _default_weights(base: AnyBase[Any], adapter: Adapter | None, profile: DeviceProfile | None) -> str:
    """What the profile names, unless the base is on another grid than the profile's: that was chosen against it."""
    stored = base.grid or "fp32"
    if profile is None or stored not in (profile.runtime.grid, "fp32" if adapter is None else None):
        return stored
    return profile.runtime.weights


def _on_grid(base: Base | EncoderBase, weights: str, work: Path) -> Base | EncoderBase:
    """The base to export as `weights` without an adapter: a dense one is quantized for a grid, from the original."""
    grid = "int4" if weights == standard.NAME else weights
    if grid not in GRIDS or base.grid == grid:
        return base
    if base.grid is not None:
        raise ExportError(
            f"{base.folder} is stored as {base.grid}; {weights} would round it to 4 bits a second time. Quantize the "
            f"original model for another grid."
        )
    return open_any_base(quantize(base.folder, grid, work / "base"))


def _held_out(
    run: Mapping[str, Any], tokenizer: Tokenizer | None, base: AnyBase[Any], eval_data: str | Path | None,
    virtual_tokens: int = 0,
) -> Sequence[Row]:  # fmt: skip
    """The rows that training did not see: those given, else the run's own, where its file is still what it was.

    They are as long as positions that virtual tokens leave.
    """
    length = min(run.get("max_seq_length", _ROW_LENGTH), base.config.max_position_embeddings, CONTEXT_LIMIT)
    length -= virtual_tokens
    if tokenizer is None:
        if eval_data is not None:
            raise ExportError(f"{base.folder} has no tokenizer.json to read {eval_data} with. Put one there.")
        return ()
    if eval_data is not None:
        return read_rows(eval_data, tokenizer, length).rows
    split = run.get("eval_data") is None
    path = run.get("data" if split else "eval_data")
    if path is None or not Path(path).is_file():
        return ()
    rows = read_rows(path, tokenizer, length, skip_bad=True)
    if rows.sha256 != run.get("data_sha256" if split else "eval_data_sha256"):
        return ()
    return (split_eval(rows, run["eval_fraction"], run["seed"])[1] if split else rows).rows
