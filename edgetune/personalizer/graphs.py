"""The training graphs of a bundle as onnxruntime sessions, and the calls that a micro-batch consists of.

`training.json` names the files; the weights are those of the inference graph's data file, mapped by every session. An
input is fed by the value of its name, so a graph of a block takes what it needs of what the batch and the adapter are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.bundle import TRAINING, TRAINING_MANIFEST, Bundle
from edgetune.data import IGNORED
from edgetune.errors import BundleError
from edgetune.models.config import DecoderConfig
from edgetune.runtime.native import load_part
from edgetune.schema import Reader

FORMAT_VERSION = 1
Arrays = dict[str, np.ndarray]
Batch = Mapping[str, np.ndarray]  # input_ids, labels (shifted), position_ids, segment_ids: int64 [B, T]
Check = Callable[[], None]  # called between graphs; raises to leave a step unfinished

_KINDS = ("start", "forward", "backward", "head_start", "head_tiles", "head_end", "loss_tiles", "loss_end")
_LOWEST = np.float32(-np.inf)


@dataclass(frozen=True)
class Description:
    """What `training.json` says: the model, and the files of each kind of graph."""

    model: DecoderConfig
    context_length: int
    files: dict[str, tuple[Path, ...]]

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Names of the update rules that have a graph."""
        return tuple(kind.removeprefix("optimizer.") for kind in self.files if kind.startswith("optimizer."))


def read_description(bundle: Bundle) -> Description:
    """The training graphs of a bundle whose files were checked.

    Raises:
        BundleError: it has none, or its `training.json` is newer or damaged.
    """
    path = bundle.folder / TRAINING / TRAINING_MANIFEST
    listed = bundle.manifest["files"]
    if f"{TRAINING}/{TRAINING_MANIFEST}" not in listed:
        raise BundleError(
            f"{bundle.folder} has no training graphs. Export it again with --with-training, on the int4 grid"
        )
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        version = said["format_version"]
        if version != FORMAT_VERSION:
            raise BundleError(f"{path} has format_version {version!r}, expected {FORMAT_VERSION}. Upgrade edgetune")
        reader = Reader()
        model = reader.read(DecoderConfig, said["model_config"])
        files = {
            kind: tuple(bundle.folder / TRAINING / file for file in graph["files"])
            for kind, graph in said["graphs"].items()
        }
        length = int(said["context_length"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is damaged ({error!r}). Export the bundle again") from error
    unlisted = [file for group in files.values() for file in group if f"{TRAINING}/{file.name}" not in listed]
    missing = [kind for kind in _KINDS if not files.get(kind)]
    if model is None or unlisted or missing:
        reason = reader.problems or unlisted or [f"no graph {kind}" for kind in missing]
        raise BundleError(f"{path} cannot be used: {reason[0]}. Export the bundle again")
    return Description(model, length, files)


class Graph:
    """One session, called by names."""

    def __init__(self, path: Path, folder: Path, threads: int) -> None:
        self._native = load_part(path, folder, threads)
        self.inputs = [value.name for value in self._native.get_inputs()]
        self.optional = [value.name for value in self._native.get_overridable_initializers()]
        self.outputs = [value.name for value in self._native.get_outputs()]

    def __call__(self, values: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> Arrays:
        """The outputs by name, or those that are asked for; `values` may have more than the graph takes."""
        feeds = {name: values[name] for name in self.inputs}
        feeds |= {name: values[name] for name in self.optional if name in values}
        names = self.outputs if outputs is None else list(outputs)
        return dict(zip(names, self._native.run(names, feeds), strict=True))


class TrainingGraphs:
    """All sessions of a bundle's training graphs, and the loss that they compute."""

    def __init__(self, description: Description, folder: Path, threads: int, optimizer: str) -> None:
        def load(kind: str) -> list[Graph]:
            return [Graph(path, folder, threads) for path in description.files[kind]]

        self.hidden_size = description.model.hidden_size
        (self.start,), (self.head_start,), (self.head_end,), (self.loss_end,) = map(
            load, ("start", "head_start", "head_end", "loss_end")
        )
        self.forward, self.backward = load("forward"), load("backward")
        self.head_tiles, self.loss_tiles = load("head_tiles"), load("loss_tiles")
        (self.optimizer,) = load(f"optimizer.{optimizer}")

    def loss_sum(self, batch: Batch, adapter: Batch, check: Check) -> float:
        """Sum of the loss over the supervised tokens of a micro-batch, in nats."""
        shared = self.start(batch)
        x = shared.pop("x")
        for graph in self.forward:
            x = graph({"x": x, **shared, **adapter})["y"]
            check()
        sums = self._sums(x, batch, self.loss_tiles, check)
        return 0.0 if sums is None else float(self.loss_end(sums)["loss_sum"])

    def gradients(
        self, batch: Batch, adapter: Batch, first_block: int, scale: float, check: Check
    ) -> tuple[float, Iterator[Arrays]]:
        """The loss sum of a micro-batch, and `scale` times its gradients: those of one block after the other.

        No gradient is computed below `first_block`, the lowest with an adapter.
        """
        shared = self.start(batch)
        x, inputs = shared.pop("x"), list[np.ndarray]()
        for index, graph in enumerate(self.forward):
            if index >= first_block:
                inputs.append(x)
            x = graph({"x": x, **shared, **adapter})["y"]
            check()
        sums = self._sums(x, batch, self.head_tiles, check)
        if sums is None:
            return 0.0, iter(())
        end = self.head_end({"x": x, "scale": np.array([scale], np.float32), **sums})
        return float(end["loss_sum"]), self._down(end["dx"], inputs, shared, adapter, check)

    def _sums(self, x: np.ndarray, batch: Batch, tiles: Sequence[Graph], check: Check) -> Arrays | None:
        """The running sums over all ranges of the vocabulary; None where nothing is supervised."""
        labels = batch["labels"].reshape(-1)
        count = int(np.count_nonzero(labels != IGNORED))
        if not count:
            return None
        sums = {"labels": labels, **self.head_start({"x": x, "labels": labels})}
        sums |= {
            "highest": np.full((count, 1), _LOWEST), "total": np.zeros((count, 1), np.float32),
            "of_target": np.zeros((count, 1), np.float32), "weighted": np.zeros((count, self.hidden_size), np.float32),
        }  # fmt: skip
        for graph in tiles:
            sums |= {name.removesuffix(".next"): value for name, value in graph(sums).items()}
            check()
        return sums

    def _down(
        self, d: np.ndarray, inputs: list[np.ndarray], shared: Arrays, adapter: Batch, check: Check
    ) -> Iterator[Arrays]:
        """The gradients of the adapter's tensors, from the last block down to where the inputs begin."""
        for graph in reversed(self.backward[-len(inputs) :]):
            trained = [name for name in graph.optional if name in adapter]
            values = {"x": inputs.pop(), "dy": d, **shared, **adapter}
            made = graph(values, ["dx", *(f"{name}.gradient" for name in trained)])
            d = made.pop("dx")
            yield {name.removesuffix(".gradient"): value for name, value in made.items()}
            check()
