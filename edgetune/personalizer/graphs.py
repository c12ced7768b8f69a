"""The training graphs of a bundle as onnxruntime sessions, and the calls that a micro-batch consists of.

`training.json` names the files, and says where each weight lies in the inference graph's data file. That is mapped, and
its arrays are fed as they lie there: a page of it is in memory while a graph reads it, and never on the heap.
"""

from __future__ import annotations

import json
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
from edgetune.models.config import DecoderConfig
from edgetune.planner.ort_walk import HEAD_TILE_WEIGHTS
from edgetune.runtime.native import load_part
from edgetune.schema import Reader

FORMAT_VERSION = 1
Arrays = dict[str, np.ndarray]
Batch = Mapping[str, np.ndarray]  # input_ids, labels (shifted), position_ids, segment_ids: int64 [B, T]
Check = Callable[[], None]  # called between graphs; raises to leave a step unfinished

GRAPHS = ("start", "forward", "backward", "head_start", "head_tile", "head_end", "loss_tile", "loss_end")


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


class Graph:
    """One session, called by names."""

    def __init__(self, path: Path, threads: int) -> None:
        self._native = load_part(path, threads)
        self.shapes = {value.name: value.shape for value in self._native.get_inputs()}
        self.outputs = [value.name for value in self._native.get_outputs()]

    def __call__(self, values: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> Arrays:
        """The outputs by name, or those that are asked for; `values` may have more than the graph takes."""
        feeds = {name: values[name] for name in self.shapes}
        names = self.outputs if outputs is None else outputs
        return dict(zip(names, self._native.run(names, feeds), strict=True))

    def give_back(self, values: Mapping[str, np.ndarray]) -> None:
        """Run, and let the arena that all graphs share return to the system what nothing uses."""
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        self._native.run(None, {name: values[name] for name in self.shapes}, options)
        give_back()

    def weights(self, weights: Mapping[str, np.ndarray], prefix: str = "") -> Arrays:
        """Those that this graph takes, in the shapes of its inputs, which are named without the prefix."""
        found = {name: weights[prefix + name] for name in self.shapes if prefix + name in weights}
        return {name: value.reshape(self.shapes[name]) for name, value in found.items()}


class TrainingGraphs:
    """All sessions of a bundle's training graphs, and the loss that they compute."""

    def __init__(self, description: Description, threads: int, optimizer: str) -> None:
        self.model, weights = description.model, description.weights
        self.graphs = {name: Graph(description.files[name], threads) for name in GRAPHS}
        self.optimizer = Graph(description.files[f"optimizer.{optimizer}"], threads)
        blocks = [f"{self.model.block(i)}." for i in range(self.model.num_hidden_layers)]
        self.blocks = [self.graphs["forward"].weights(weights, block) for block in blocks]
        self.outer = {name: self.graphs[name].weights(weights) for name in ("start", "head_start", "head_end")}
        self.tiles = list(self._tiles(description))

    def _tiles(self, description: Description) -> Iterator[Arrays]:
        """The rows of the head in ranges."""
        graph, weights = self.graphs["head_tile"], description.weights
        parts = {
            name: weights[description.head + name.removeprefix("head")] for name in graph.shapes if name[:4] == "head"
        }
        for rows in row_tiles((self.model.vocab_size, self.model.hidden_size), HEAD_TILE_WEIGHTS):
            tile = {name: part[rows].reshape(-1, *graph.shapes[name][1:]) for name, part in parts.items()}
            yield {"first_row": np.array([rows.start], np.int64), **tile}

    def give_back(self) -> None:
        """Return to the system what graphs hold for the next call."""
        self.graphs["loss_end"].give_back(dict.fromkeys(self.graphs["loss_end"].shapes, np.ones((1, 1), np.float32)))

    def logits(self, ids: np.ndarray, adapter: Adapter) -> Iterator[np.ndarray]:
        """Of every token of a text [n], for one range of the vocabulary after the other: float32 [n, rows]."""
        positions = np.arange(len(ids))
        batch = {"input_ids": ids[None], "position_ids": positions[None], "segment_ids": np.zeros_like(positions)[None]}
        x, _ = self._forward(batch, adapter, lambda: None, self.model.num_hidden_layers)
        hidden = self.graphs["head_start"]({**self.outer["head_start"], "x": x, "labels": ids})["hidden"]
        for tile in self.tiles:
            parts = {name.removeprefix("head."): value for name, value in tile.items()}
            if "codes" in parts:
                shape = (len(parts["codes"]), self.model.hidden_size)
                weight = int4.dequantize({"codes": parts["codes"], "scales": parts["scales"][..., 0]}, shape)
            else:
                weight = parts["head"]
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
        return 0.0 if sums is None else float(self.graphs["loss_end"](sums)["loss_sum"])

    def gradients(
        self, batch: Batch, adapter: Adapter, first_block: int, scale: float, check: Check
    ) -> tuple[float, Iterator[Arrays]]:
        """The loss sum of a micro-batch, and `scale` times its gradients: those of one block after the other.

        No gradient is computed below `first_block`, the lowest with an adapter.
        """
        x, kept = self._forward(batch, adapter, check, first_block)
        sums = self._sums(x, batch, "head_tile", check)
        if sums is None:
            return 0.0, iter(())
        values = {**self.outer["head_end"], **sums, "x": x, "scale": np.array([scale], np.float32)}
        end = self.graphs["head_end"](values)
        return float(end["loss_sum"]), self._backward(end["dx"], kept, adapter, check)

    def _forward(
        self, batch: Batch, adapter: Adapter, check: Check, keep_from: int
    ) -> tuple[np.ndarray, list[tuple[int, Arrays]]]:
        """The last block's output, and of every block from `keep_from` on what it took beside its weights."""
        shared = self.graphs["start"]({**self.outer["start"], **batch})
        x, kept = shared.pop("x"), list[tuple[int, Arrays]]()
        for index, weights in enumerate(self.blocks):
            kind = self.model.layer_kinds[index]
            taken = {"x": x, **{name: shared[f"{name}.{kind}"] for name in ("mask", "cos", "sin")}}
            if index >= keep_from:
                kept.append((index, taken))
            x = self.graphs["forward"]({**taken, **weights, **adapter.of_block(index)})["y"]
            check()
        return x, kept

    def _sums(self, x: np.ndarray, batch: Batch, tile: str, check: Check) -> Arrays | None:
        """The running sums over all ranges of the vocabulary; None where nothing is supervised."""
        labels = batch["labels"].reshape(-1)
        count = int(np.count_nonzero(labels != IGNORED))
        if not count:
            return None
        sums = {"labels": labels, **self.graphs["head_start"]({**self.outer["head_start"], "x": x, "labels": labels})}
        sums |= {
            "highest": np.full((count, 1), -np.inf, np.float32), "total": np.zeros((count, 1), np.float32),
            "of_target": np.zeros((count, 1), np.float32),
            "weighted": np.zeros((count, self.model.hidden_size), np.float32),
        }  # fmt: skip
        for rows in self.tiles:
            made = self.graphs[tile]({**sums, **rows})
            sums |= {name.removesuffix(".next"): value for name, value in made.items()}
            check()
        return sums

    def _backward(
        self, d: np.ndarray, kept: list[tuple[int, Arrays]], adapter: Adapter, check: Check
    ) -> Iterator[Arrays]:
        """The gradients of the adapter's tensors, from the last block down to the first that was kept."""
        while kept:
            index, taken = kept.pop()
            values = {**taken, "dy": d, **self.blocks[index], **adapter.of_block(index)}
            wanted = [f"{name}.gradient" for name in adapter.names_of_block(index)]
            made = self.graphs["backward"](values, ["dx", *wanted])
            d = made.pop("dx")
            yield {f"{self.model.block(index)}.{k.removesuffix('.gradient')}": value for k, value in made.items()}
            check()


class Adapter:
    """Tensors as graphs take them: A [in, r] and B [r, out] under their full names, and what x A B is scaled by."""

    def __init__(self, model: DecoderConfig, tensors: Arrays, scaling: float) -> None:
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
