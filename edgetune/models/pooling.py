"""How an encoder's hidden states become one embedding, from the files that sentence-transformers keeps beside a model.

    modules.json                  the steps: Transformer, Pooling and, where it is there, Normalize
    1_Pooling/config.json         which pooling: mean over the tokens of the text, or the first token (CLS)
    sentence_bert_config.json     after how many tokens a text is cut

Without modules.json it is what sentence-transformers itself makes of a plain model: the mean, not normalized.

Left out: other poolings (max, last token, weighted means, several at once) and steps that compute (Dense, LayerNorm);
they are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgetune.errors import ModelError

MODULES, LENGTH = "modules.json", "sentence_bert_config.json"
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_STEPS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


@dataclass(frozen=True)
class Pooling:
    """`mode` is "mean", over the tokens of a text, special ones included, or "cls", its first token.

    `normalize` divides by the L2 norm. Texts are cut after `max_seq_length` tokens; None: where positions end.
    """

    mode: str = "mean"
    normalize: bool = False
    max_seq_length: int | None = None


def read_pooling(folder: Path, hidden_size: int) -> Pooling:
    """The pooling of a model or base folder.

    Raises:
        ModelError: a file is damaged, or says what is not supported.
    """
    length = _max_seq_length(folder)
    steps = _read_steps(folder)
    if steps is None:
        return Pooling(max_seq_length=length)
    path = folder / steps[1][1] / "config.json"
    values = _read_json(path)
    if not isinstance(values, dict):
        raise ModelError(f"{path} is missing or holds no object. Fetch the model again.")
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value]
    if len(chosen) != 1 or chosen[0] not in _MODES:
        raise ModelError(
            f"{path} sets {', '.join(chosen) or 'no pooling_mode'}; exactly one of {', '.join(_MODES)} is supported."
        )
    size = values.get("word_embedding_dimension", hidden_size)
    if size != hidden_size:
        raise ModelError(f"{path} has word_embedding_dimension {size!r}, config.json has hidden_size {hidden_size}.")
    return Pooling(_MODES[chosen[0]], len(steps) == 3, length)


def pooling_files(folder: Path) -> Iterator[str]:
    """Names inside a folder of the files that `read_pooling` reads there."""
    steps = _read_steps(folder) or []
    for name in (MODULES, LENGTH, *(f"{path}/config.json" for kind, path in steps if kind == "Pooling")):
        if (folder / name).is_file():
            yield name


def _read_steps(folder: Path) -> list[tuple[str, str]] | None:
    """(kind, folder) of each step, checked; None where there is no modules.json."""
    path = folder / MODULES
    modules = _read_json(path)
    if modules is None:
        return None
    try:
        steps = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (TypeError, KeyError) as error:
        raise ModelError(f"{path} is no list of modules with type and path ({error!r}). Fetch it again.") from error
    kinds = [kind for kind, _ in steps]
    if kinds not in _STEPS:
        raise ModelError(
            f"{path} has the modules {', '.join(kinds)}; {' and '.join(', '.join(known) for known in _STEPS)} are "
            "supported."
        )
    for _, inside in steps:
        if PurePosixPath(inside).is_absolute() or ".." in PurePosixPath(inside).parts or "\\" in inside:
            raise ModelError(f"{path} has the path {inside!r}, which leaves the model's folder. Fetch it again.")
    return steps


def _max_seq_length(folder: Path) -> int | None:
    path = folder / LENGTH
    values: Mapping[str, Any] = _read_json(path) or {}
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds no object. Fetch it again.")
    if values.get("do_lower_case"):
        raise ModelError(f"{path} sets do_lower_case, which is not supported. A tokenizer.json that lowers case is.")
    length = values.get("max_seq_length")
    if length is not None and (type(length) is not int or length < 1):
        raise ModelError(f"{path} has max_seq_length = {length!r}; a positive integer was expected.")
    return length


def _read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}. Fetch it again.") from error
