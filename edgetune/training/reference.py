"""What the base makes of every sequence, measured once before the first step: the reference of preference objectives.

The reference is the base without the adapter. It runs forward over all windows, from the mapped weights that training
reads too, and is gone before the first buffer of training is taken: one float64 for each sequence stays, so no second
model is ever beside the one that learns.

    run/reference/  logps.safetensors  manifest.json         0700, readable by nobody else, while the run goes on

A run that goes on takes the file where its hash is the manifest's and its key says that the same base, rows, windows
and library made it; anything else is measured anew. `loop.train` removes it where the run ends or fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.data import Window
from edgetune.linear import Workspace
from edgetune.memory import give_back
from edgetune.models.decoder import load_decoder
from edgetune.objectives import sft
from edgetune.objectives.base import read_sequences
from edgetune.training.batches import in_batches
from edgetune.training.features import known_files, remove, write_manifest
from edgetune.training.forward import Check, last_hidden
from edgetune.training.inputs import Inputs
from edgetune.weights import TensorInfo, open_tensors, sha256_file, write_safetensors

FILE, TENSOR = "logps.safetensors", "logps"


class Reference:
    """The log-probabilities of one run's rows. `folder` is made by `add`."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        self.folder, self.inputs = folder, inputs
        key = {"identity": inputs.identity, "threads": torch.get_num_threads(), "torch": torch.__version__}
        self._key: dict[str, Any] = json.loads(json.dumps(key))  # as it comes back from the manifest
        self.num_measured = 0  # sequences, by this process

    def add(
        self, like: Workspace, limit: AbstractContextManager[None], check: Check, tell: Callable[[str], None]
    ) -> Inputs:
        """The inputs whose rows have their `reference`, measured under a limit, with tiles and products as `like` has.

        Raises:
            Stopped: `check` asks for it; the next part of the run begins anew with this.
            OSError: the storage refuses to write.
        """
        logps = self._read()
        if logps is None:
            tell("the base runs once over all rows: it is what this objective compares with")
            logps = self._measure(like, limit, check)
            self._write(logps)
        values = iter(logps.tolist())
        windows, eval_windows = (_with(each, values) for each in (self.inputs.windows, self.inputs.eval_windows))
        return replace(self.inputs, windows=windows, eval_windows=eval_windows)

    @property
    def num_rows(self) -> int:
        return sum(len(window.rows) for window in (*self.inputs.windows, *self.inputs.eval_windows))

    def _read(self) -> np.ndarray | None:
        """What an earlier part of this run left; None where that is not whole, or of something else."""
        hashes = known_files(self.folder, self._key)
        path = self.folder / FILE
        if hashes is None or not path.is_file() or sha256_file(path) != hashes.get(FILE):
            return None
        logps: np.ndarray = open_tensors(path).array(TENSOR).copy()
        return logps if logps.shape == (self.num_rows,) else None

    @torch.no_grad()
    def _measure(self, like: Workspace, limit: AbstractContextManager[None], check: Check) -> np.ndarray:
        """Of every row in the order of the windows, float64."""
        every = tuple(  # the base has no virtual tokens
            [replace(window, virtual_tokens=0) for window in windows]
            for windows in (self.inputs.windows, self.inputs.eval_windows)
        )
        decoder = load_decoder(self.inputs.base)
        decoder.context(max(window.length for windows in every for window in windows))  # as in `torch_trainer`
        space = decoder.workspace
        space.tile_weights = like.tile_weights
        space.fast_positions, space.fast_loss_rows = like.fast_positions, like.fast_loss_rows
        if like.reads_ahead:
            decoder.read_on_demand()
        found = []
        with limit:
            for batch in (batch for windows in every for batch in in_batches(windows, self.inputs.plan.batch_size)):
                hidden = last_hidden(decoder, batch, check)
                losses = sft.token_losses(hidden, sft.targets(batch), decoder.lm_head, space)
                found.append(read_sequences(batch, losses.numpy()).logps)
                check()
        del decoder, space, hidden
        give_back()
        self.num_measured = self.num_rows
        return np.concatenate(found)

    def _write(self, logps: np.ndarray) -> None:
        remove(self.folder)
        self.folder.mkdir(mode=0o700)
        path = self.folder / FILE
        write_safetensors(path, {TENSOR: TensorInfo("F64", logps.shape)}, lambda name: logps)
        path.chmod(0o600)
        write_manifest(self.folder, self._key, {FILE: sha256_file(path)})


def _with(windows: Sequence[Window], logps: Iterator[float]) -> list[Window]:
    return [
        replace(window, rows=tuple(replace(row, reference=next(logps)) for row in window.rows)) for window in windows
    ]
