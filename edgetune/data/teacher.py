"""What a teacher said of the rows of a file, recorded beside it: `rows.jsonl` has `rows.teacher.safetensors`.

    indices  I32 [P, k]             the k tokens that the teacher finds most likely, of each position that is learned
    values   F32 or F16 [P, k]      their log-probabilities, of its softmax over the whole vocabulary
    metadata "data_sha256"          of the rows' file, as it was when the teacher read it

P counts the learned tokens of all rows in the order of the file: of a row with n token ids, those positions t > 0 that
are learned, predicted from the ids before them. `read_rows` gives the ids and which of them are learned, so whoever
records asks for the same. A teacher has the student's tokens, not necessarily its tokenizer's file.

The arrays stay mapped: rows hold views of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from edgetune.data import Rows
from edgetune.errors import DataError, ModelError
from edgetune.weights import Weights, open_tensors

MOST_ABOVE_ONE = 0.01  # by so much may probabilities of half precision sum to more than 1
PIECE = 512  # positions that are checked at once


def teacher_path(data: Path) -> Path:
    """Where the record of a file of rows lies."""
    return data.with_name(f"{data.stem}.teacher.safetensors")


def with_teacher(rows: Rows, data: str | Path, vocab_size: int) -> Rows:
    """The rows of a file with what the teacher said of each.

    Raises:
        DataError: there is no record, it is of other rows, or it is not as this module says.
    """
    path = teacher_path(Path(data))
    if not path.is_file():
        raise DataError(f"{data} has no record of a teacher. Write {path}: `edgetune.data.teacher` says how.")
    try:
        file = open_tensors(path)
        ids, logps = file.array("indices"), file.array("values")
    except (ModelError, KeyError) as error:
        raise DataError(f"{path} is no record of a teacher: {error}") from error
    _check(path, file, ids, logps, rows, vocab_size)
    found, at = [], 0
    for row in rows:
        end = at + row.num_supervised
        found.append(replace(row, teacher=(ids[at:end], logps[at:end])))
        at = end
    return replace(rows, rows=tuple(found))


def _check(path: Path, file: Weights, ids: np.ndarray, logps: np.ndarray, rows: Rows, vocab_size: int) -> None:
    if file.metadata.get("data_sha256") != rows.sha256:
        raise DataError(
            f"{path} was recorded for other rows: its data_sha256 is {file.metadata.get('data_sha256')}, that of the "
            f"rows is {rows.sha256}. Record it again."
        )
    wanted = (rows.num_supervised, ids.shape[-1])
    if ids.dtype != np.int32 or logps.dtype not in (np.float16, np.float32) or not ids.shape == logps.shape == wanted:
        raise DataError(
            f"{path} has indices {ids.dtype} {list(ids.shape)} and values {logps.dtype} {list(logps.shape)}; int32 and "
            f"float16 or float32 [{rows.num_supervised}, k] were expected, one line for each learned token of the "
            "rows. Record it with the tokenizer of this base, and without skipped rows."
        )
    for start in range(0, len(ids), PIECE):
        part, values = ids[start : start + PIECE], logps[start : start + PIECE].astype(np.float64)
        if part.min() < 0 or part.max() >= vocab_size:
            raise DataError(f"{path} has indices from {part.min()} to {part.max()}; the base has {vocab_size} tokens.")
        in_order = np.sort(part, axis=1)
        if (in_order[:, 1:] == in_order[:, :-1]).any():
            raise DataError(f"{path} names a token twice for one position; the k most likely are k different ones.")
        sums = np.exp(np.minimum(values, 10)).sum(1)
        if not np.isfinite(values).all() or sums.max() > 1 + MOST_ABOVE_ONE:
            raise DataError(
                f"{path} has values whose probabilities sum to {sums.max():.3g}: log-probabilities were expected. Take "
                "log_softmax of the logits first."
            )
