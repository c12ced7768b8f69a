"""The training graphs of a bundle as onnxruntime sessions, and the calls that a micro-batch consists of.

`training.json` names the files, and says where each weight lies in the inference graph's data file. That is mapped, and
its arrays are fed as they lie there: a page of it is in memory while a graph reads it, and never on the heap.

What outlives a call (block inputs, gradients, running sums) is written straight into `Buffers`. So onnxruntime's arena
holds nothing between two calls, and its size is what the largest single graph needs, in whatever order they run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime

from edgetune.bundle import DATA, TRAINING, TRAINING_MANIFEST, Bundle
from edgetune.data import IGNORED
from edgetune.errors import BundleError
from edgetune.grids import int4, row_tiles
from edgetune.memory import give_back
from edgetune.models import ModelConfig
from edgetune.models.config import DecoderConfig
from edgetune.planner.ort_walk import HEAD_TILE_WEIGHTS
from edgetune.runtime.native import load_part
from edgetune.schema import Reader
from edgetune.training.stop import is_out_of_memory

FORMAT_VERSION = 1
Arrays = dict[str, np.ndarray]
Batch = Mapping[str, np.ndarray]  # input_ids, labels (shifted), position_ids, segment_ids: int64 [B, T]
Check = Callable[[], None]  # called between graphs; raises to leave a step unfinished

PROBE_TILE_WEIGHTS = 1 << 18  # of the head, dequantized at once for the logits of probe rows
KEPT = ("forward_kept", "backward_kept")
GRAPHS = ("start", "forward", "backward", *KEPT, "head_start", "head_tile", "head_end", "loss_tile", "loss_end")


@dataclass(frozen=True)
class Tensor:
    """A weight in the data file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Description:
    """What `training.json` says: the model, its weights, and the files of the graphs."""

    folder: Path
    model: DecoderConfig
    context_length: int
    head: str
    tensors: dict[str, Tensor]
    files: dict[str, Path]

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Names of the update rules that have a graph."""
        return tuple(name.removeprefix("optimizer.") for name in self.files if name.startswith("optimizer."))

    @cached_property
    def weights(self) -> Arrays:
        """Every weight, mapped."""
        data = np.memmap(self.folder / DATA, np.uint8, "r")
        return {
            name: data[t.offset : t.offset + t.nbytes].view(t.dtype).reshape(t.shape)
            for name, t in self.tensors.items()
        }


def read_description(bundle: Bundle) -> Description:
    """The training graphs of a bundle whose files were checked.

    Raises:
        BundleError: it has none, or its `training.json` is newer or damaged.
    """
    path, listed = bundle.folder / TRAINING / TRAINING_MANIFEST, bundle.manifest["files"]
    if f"{TRAINING}/{TRAINING_MANIFEST}" not in listed:
        raise BundleError(
            f"{bundle.folder} has no training graphs. Export it again with --with-training, from an int4 base"
        )
    reader = Reader()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        version = said["format_version"]
        model = reader.read(DecoderConfig, said["model_config"]) if version == FORMAT_VERSION else None
        tensors = {name: Tensor(**value | {"shape": tuple(value["shape"])}) for name, value in said["tensors"].items()}
        files = {name: bundle.folder / TRAINING / graph["file"] for name, graph in said["graphs"].items()}
        length, head = int(said["context_length"]), str(said["head"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error!r}). Export the bundle again") from error
    if version != FORMAT_VERSION:
        raise BundleError(f"{path} has format_version {version!r}, this edgetune reads {FORMAT_VERSION}. Upgrade it")
    missing = [f"no graph {name}" for name in GRAPHS if name not in files]
    missing += [f"{file.name} is not listed" for file in files.values() if f"{TRAINING}/{file.name}" not in listed]
    if model is None or missing:
        raise BundleError(f"{path} cannot be used: {[*reader.problems, *missing][0]}. Export the bundle again")
    return Description(bundle.folder, model, length, head, tensors, files)


class Buffers:
    """Arrays by name that graphs write their outputs into; the memory of a name is used again."""

    def __init__(self) -> None:
        self._held: Arrays = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> np.ndarray:
        """The memory of that name in this shape; what is in it is of no use."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].size < size:
            self._held.pop(name, None)
            self._held[name] = np.empty(size, dtype)
        return self._held[name][:size].reshape(shape)

    def clear(self) -> None:
        """Give all of it back."""
        self._held.clear()


class Graph:
    """One session, called by names."""

    def __init__(self, path: Path, threads: int, arena_bytes: int) -> None:
        self.path = path
        self._native = load_part(path, threads, arena_bytes)
        self.shapes = {value.name: value.shape for value in self._native.get_inputs()}

    def __call__(self, values: Mapping[str, np.ndarray], into: Arrays) -> Arrays:
        """Write the outputs that `into` names into its arrays, and give it; `values` may have more than is taken.

        Raises:
            BundleError: the graph takes or gives something else than this edgetune knows, or fails.
        """
        missing = [name for name in self.shapes if name not in values]
        if missing:
            raise self._refusal(f"it takes {missing[0]}, which this edgetune does not feed")
        feeds = {name: np.ascontiguousarray(values[name]) for name in self.shapes}
        binding = self._native.io_binding()
        try:
            for name, value in feeds.items():
                binding.bind_cpu_input(name, value)
            for name, value in into.items():
                binding.bind_output(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)
            self._native.run_with_iobinding(binding)
        except Exception as error:  # the exceptions of onnxruntime share no other base
            if is_out_of_memory(error):
                raise
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in into.items())
            reason = str(error).strip().partition("\n")[0][:300]
            raise self._refusal(f"{shapes} expected of it: {reason}") from error
        return into

    def _refusal(self, reason: str) -> BundleError:
        return BundleError(
            f"the training graph {self.path} cannot be used: {reason}. Export the bundle again with --with-training, "
            f"by the edgetune that trains here, for onnxruntime {onnxruntime.__version__}"
        )

    def weights(self, weights: Mapping[str, np.ndarray], prefix: str = "") -> Arrays:
        """Those that this graph takes, in the shapes of its inputs, which are named without the prefix."""
        found = {name: weights[prefix + name] for name in self.shapes if prefix + name in weights}
        return {name: value.reshape(self.shapes[name]) for name, value in found.items()}


class TrainingGraphs:
    """All sessions of a bundle's training graphs, and the loss that they compute."""

    def __init__(
        self, description: Description, threads: int, optimizer: str, arena_bytes: int, kept_layers: int = 0
    ) -> None:
        self.model, weights = description.model, description.weights
        self.kept_layers = kept_layers  # the last ones keep what their backward needs
        names = [name for name in GRAPHS if kept_layers or name not in KEPT]
        self.graphs = {name: Graph(description.files[name], threads, arena_bytes) for name in names}
        self.optimizer = Graph(description.files[f"optimizer.{optimizer}"], threads, arena_bytes)
        self.buffers = Buffers()
        blocks = [f"{self.model.block(i)}." for i in range(self.model.num_hidden_layers)]
        self.blocks = [self.graphs["forward"].weights(weights, block) for block in blocks]
        self.outer = {name: self.graphs[name].weights(weights) for name in ("start", "head_start", "head_end")}
        self.tiles = list(self._tiles(description))
        # The arena's range is there from the first call on: before allocations are limited, where it would count whole.
        ones = dict.fromkeys(self.graphs["loss_end"].shapes, np.ones((1, 1), np.float32))
        self.graphs["loss_end"](ones, {"loss_sum": self.buffers("loss_sum", ())})
        taken = self.graphs["backward_kept"].shapes if kept_layers else {}
        self.kept = {name: int(shape[1]) for name, shape in taken.items() if name.startswith("kept.")}

    def _tiles(self, description: Description) -> Iterator[Arrays]:
        """The rows of the head in ranges."""
        graph, weights = self.graphs["head_tile"], description.weights
        parts = {
            name: weights[description.head + name.removeprefix("head")] for name in graph.shapes if name[:4] == "head"
        }
        for rows in row_tiles((self.model.vocab_size, self.model.hidden_size), HEAD_TILE_WEIGHTS):
            tile = {name: part[rows].reshape(-1, *graph.shapes[name][1:]) for name, part in parts.items()}
            yield {"first_row": np.array([rows.start], np.int64), **tile}

    def release(self) -> None:
        """Return to the system what lies here from call to call."""
        self.buffers.clear()
        give_back()

    def logits(self, ids: np.ndarray, adapter: Adapter) -> Iterator[np.ndarray]:
        """Of every token of a text [n], for one range of the vocabulary after the other: float32 [n, rows]."""
        positions = np.arange(len(ids))
        batch = {"input_ids": ids[None], "position_ids": positions[None], "segment_ids": np.zeros_like(positions)[None]}
        x, _ = self._forward(batch, adapter, lambda: None, self.model.num_hidden_layers)
        hidden = self._labelled(x, ids, len(ids))["hidden"].copy()  # another adapter's may be computed in between
        for tile in self.tiles:
            parts = {name.removeprefix("head."): value for name, value in tile.items() if name != "first_row"}
            count = len(next(iter(parts.values())))
            for rows in row_tiles((count, self.model.hidden_size), PROBE_TILE_WEIGHTS):
                if "codes" in parts:
                    codes = {"codes": parts["codes"][rows], "scales": parts["scales"][rows, :, 0]}
                    weight = int4.dequantize(codes, (rows.stop - rows.start, self.model.hidden_size))
                else:
                    weight = parts["head"][rows]
                yield hidden @ weight.T

    def probe_change(self, rows: list[np.ndarray], adapter: Adapter) -> float:
        """As `Session.probe_change`: the largest change of a logit on probe rows by the largest logit."""
        change, largest, base = 0.0, 0.0, Adapter(self.model, {}, 1.0)
        for ids in rows:
            for before, after in zip(self.logits(ids, base), self.logits(ids, adapter), strict=True):
                with np.errstate(invalid="ignore"):  # of infinite logits: no number, which the caller refuses
                    found = np.abs(after - before).max(), np.abs(before).max()
                change, largest = np.maximum((change, largest), found)
        return float(change / largest)

    def loss_sum(self, batch: Batch, adapter: Adapter, check: Check) -> float:
        """Sum of the loss over the supervised tokens of a micro-batch, in nats."""
        x, _ = self._forward(batch, adapter, check, self.model.num_hidden_layers)
        sums = self._sums(x, batch, "loss_tile", check)
        if sums is None:
            return 0.0
        return float(self.graphs["loss_end"](sums, {"loss_sum": self.buffers("loss_sum", ())})["loss_sum"])

    def gradients(
        self, batch: Batch, adapter: Adapter, first_block: int, scale: float, check: Check, gradients: Arrays
    ) -> float:
        """The loss sum of a micro-batch; `scale` times its gradients go into `gradients`, or are added to those there.

        No gradient is computed below `first_block`, the lowest with an adapter.
        """
        x, kept = self._forward(batch, adapter, check, first_block)
        sums = self._sums(x, batch, "head_tile", check)
        if sums is None:
            return 0.0
        values = {**self.outer["head_end"], **sums, "x": x, "scale": np.array([scale], np.float32)}
        outputs = {"loss_sum": self.buffers("loss_sum", ()), "dx": self.buffers("dx", x.shape)}
        end = self.graphs["head_end"](values, outputs)
        loss_sum = float(end["loss_sum"])
        self._backward(x, end["dx"], kept, adapter, gradients, check)
        return loss_sum

    def _forward(
        self, batch: Batch, adapter: Adapter, check: Check, keep_from: int
    ) -> tuple[np.ndarray, list[tuple[int, Arrays]]]:
        """The last block's output, and of every block from `keep_from` on what it took beside its weights."""
        windows, length = batch["input_ids"].shape
        shape = windows * length, self.model.hidden_size

        def block_input(index: int) -> np.ndarray:
            return self.buffers(f"input.{index if index >= keep_from else index % 2}", shape)

        rotary = windows, length, self.model.head_dim // 2
        shared = {"x": block_input(0)}
        for kind in range(len(self.model.attention_kinds)):
            sizes = {"mask": (windows, 1, length, length), "cos": rotary, "sin": rotary}
            shared |= {f"{name}.{kind}": self.buffers(f"{name}.{kind}", size) for name, size in sizes.items()}
        self.graphs["start"]({**self.outer["start"], **batch}, shared)
        x, kept = shared.pop("x"), list[tuple[int, Arrays]]()
        for index, weights in enumerate(self.blocks):
            layer = self.model.layer_kinds[index]
            taken = {"x": x, **{name: shared[f"{name}.{layer}"] for name in ("mask", "cos", "sin")}}
            if index >= keep_from:
                kept.append((index, taken))
            values, outputs = {**taken, **weights, **adapter.of_block(index)}, {"y": block_input(index + 1)}
            if index >= max(keep_from, self.model.num_hidden_layers - self.kept_layers):
                made = {name: self.buffers(f"{name}.{index}", (shape[0], width)) for name, width in self.kept.items()}
                self.graphs["forward_kept"](values, outputs | made)
                taken |= made
            else:
                self.graphs["forward"](values, outputs)
            x = outputs["y"]
            check()
        return x, kept

    def _labelled(self, x: np.ndarray, labels: np.ndarray, count: int) -> Arrays:
        """The last norm of the `count` rows that have a label, and their labels."""
        hidden = self.buffers("hidden", (count, self.model.hidden_size))
        outputs = {"hidden": hidden, "targets": self.buffers("targets", (count,), np.int64)}
        return self.graphs["head_start"]({**self.outer["head_start"], "x": x, "labels": labels}, outputs)

    def _sums(self, x: np.ndarray, batch: Batch, tile: str, check: Check) -> Arrays | None:
        """The running sums over all ranges of the vocabulary; None where nothing is supervised."""
        labels = batch["labels"].reshape(-1)
        count = int(np.count_nonzero(labels != IGNORED))
        if not count:
            return None
        shapes = {"highest": (count, 1), "total": (count, 1), "of_target": (count, 1)}
        if tile == "head_tile":
            shapes["weighted"] = count, self.model.hidden_size
        sums = {name: self.buffers(f"{name}.0", shape) for name, shape in shapes.items()}
        for name, value in sums.items():
            value.fill(-np.inf if name == "highest" else 0)
        of_rows = {"labels": labels, **self._labelled(x, labels, count)}
        for turn, rows in enumerate(self.tiles, 1):
            after = {name: self.buffers(f"{name}.{turn % 2}", shape) for name, shape in shapes.items()}
            outputs = {f"{name}.next": value for name, value in after.items()}
            self.graphs[tile]({**of_rows, **sums, **rows}, outputs)
            sums = after
            check()
        return of_rows | sums

    def _backward(
        self, x: np.ndarray, d: np.ndarray, kept: list[tuple[int, Arrays]], adapter: Adapter, gradients: Arrays,
        check: Check,
    ) -> None:  # fmt: skip
        """From the last block down to the first that was kept; x is the last one's output, and d its gradient.

        The gradient of a block's input is written over its output, which nothing reads any more.
        """
        while kept:
            index, taken = kept.pop()
            values = {**taken, "dy": d, **self.blocks[index], **adapter.of_block(index)}
            outputs, added = {"dx": x}, list[tuple[np.ndarray, np.ndarray]]()
            for name in adapter.names_of_block(index):
                shape, full = values[name].shape, f"{self.model.block(index)}.{name}"
                if full in gradients:
                    outputs[f"{name}.gradient"] = self.buffers(f"again.{name}", shape)
                    added.append((gradients[full], outputs[f"{name}.gradient"]))
                else:
                    outputs[f"{name}.gradient"] = gradients[full] = self.buffers(f"gradient.{full}", shape)
            self.graphs["backward_kept" if taken.keys() & self.kept.keys() else "backward"](values, outputs)
            for total, value in added:
                total += value
            x, d = taken["x"], x
            check()


class Adapter:
    """Tensors as graphs take them: A [in, r] and B [r, out] under their full names, and what x A B is scaled by."""

    def __init__(self, model: ModelConfig, tensors: Arrays, scaling: float) -> None:
        self.tensors = tensors
        self._own: list[Arrays] = [{} for _ in range(model.num_hidden_layers)]
        for name, value in tensors.items():
            _, _, index, short = name.split(".", 3)
            self._own[int(index)][short] = value
        self._others = {"scaling": np.array([scaling], np.float32)}
        for linear, (rows, columns) in model.linear_shapes.items():
            self._others |= {
                f"{linear}.lora_A": np.zeros((columns, 0), np.float32),
                f"{linear}.lora_B": np.zeros((0, rows), np.float32),
            }

    def of_block(self, index: int) -> Arrays:
        """What a block's graphs take, under the names in it: of rank 0 where there is none."""
        return self._others | self._own[index]

    def names_of_block(self, index: int) -> list[str]:
        """Those that there are."""
        return list(self._own[index])
