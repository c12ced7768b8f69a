"""From what a user calls a model to a folder on this machine.

A local folder always wins, and nothing connects unless the name can only be a Hub id: exactly "org/name", given as a
string, where no folder "org" lies in the working directory. So a mistyped path is an error, never a download. The
download itself is huggingface_hub's: its cache, its token, its HF_HUB_OFFLINE. Only safetensors weights and the files
that describe them are fetched; pickled weights and code never are.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from edgetune.errors import MissingExtraError, ModelError

__all__ = ["model_folder"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "modules.json",
    "sentence_bert_config.json",
    "*_Pooling/config.json",
)


def model_folder(model: str | Path) -> Path:
    """The folder of a model: a local one, or the snapshot of a Hub id such as "HuggingFaceTB/SmolLM2-135M".

    Raises:
        ModelError: There is no such folder, or the Hub could not give the model.
        MissingExtraError: A Hub id was given and huggingface_hub is not installed.
    """
    if not str(model).strip() or model == Path():
        raise ModelError("The model is an empty path. Give a model folder or a Hub id (org/name).")
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path
        is_file = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL inside, no such home
        raise ModelError(f"{str(model)[:200]!r} is not a path ({error}). Give a model folder or a Hub id.") from error
    if is_file:
        raise ModelError(f"{model} is a file; a model is a folder with config.json and safetensors. Try {path.parent}.")
    # "models/SmolLM" beside a folder "models" is a path with a mistake in it, not a name on the Hub.
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and not path.parent.exists():
        return _download(model)
    raise ModelError(_no_such_folder(model, path))


def _no_such_folder(model: str | Path, path: Path) -> str:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    wanted = path.relative_to(parent).parts[0]
    try:
        folders = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    except OSError:  # a folder that may be passed through but not listed
        folders = []
    near = difflib.get_close_matches(wanted, folders, n=3)
    hint = f"Did you mean {' or '.join(str(parent / name) for name in near)}?" if near else "Check the path."
    return f"The model folder {model} does not exist: {parent.resolve()} has no {wanted}. {hint} A Hub id is org/name."


def _download(repo_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", "hub") from error
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_FILES)))
    except Exception as error:  # its errors come from several libraries and differ by version
        what, step = _reason(error)
        raise ModelError(
            f"There is no local folder {repo_id}, and the Hub did not give a model of that name: {what}. {step}, or "
            "download the model elsewhere and give its folder."
        ) from error


def _reason(error: Exception) -> tuple[str, str]:
    """What is wrong in a few words, and the next step: the client's own message is a paragraph."""
    from huggingface_hub import constants

    kinds = [kind.__name__ for kind in type(error).__mro__]  # by name: their place differs by version
    if "GatedRepoError" in kinds:
        return "it is gated", "Accept its terms on its page and log in with `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return "there is none, or it is private", "Check the name, or log in with `hf auth login`"
    if "LocalEntryNotFoundError" in kinds and constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache does not hold it", "Unset it"
    if "LocalEntryNotFoundError" in kinds:
        return "it cannot be reached, and the cache does not hold it", "Check the connection"
    line = str(error).strip().partition("\n")[0][:120]
    return f"{type(error).__name__}: {line}", "Check the name and the connection"
