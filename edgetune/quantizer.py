"""A Hugging Face folder in, a base/ folder on a 4-bit grid out, one tensor at a time.

Memory stays at the codes of the largest tensor plus what the grid's search needs: weights are read, checked and
converted in ranges of rows. The folder appears under its name only when every file in it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgetune import __version__
from edgetune.base import AnyBase, open_any_base
from edgetune.errors import ConfigError, ModelError
from edgetune.grids import GRIDS
from edgetune.hub import model_folder
from edgetune.models.config import read_hf_config
from edgetune.models.pooling import pooling_files
from edgetune.output import folder_in_progress
from edgetune.tokenizer import load_tokenizer
from edgetune.weights import StoredMatrix, TensorInfo, sha256_file, write_safetensors

MANIFEST = "manifest.json"
CHECKED_ROWS = 4096  # of a tensor that is kept as it is, at once
FORMAT_VERSION = 1
# What a tokenizer or a generation loop may read; copied as they are.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def quantize(
    model: str | Path,
    grid: str = "int4",
    out: str | Path = "base",
    *,
    double_quant: bool = False,
    dense_embeddings: bool = False,
    force: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a base/ folder; return its path.

    Args:
        model: a model folder (one safetensors file or shards; float32, float16 or bfloat16) or a Hub id.
        grid: "nf4" or "int4".
        out: the folder to write.
        double_quant: nf4 only: store absmax in 8 bits (QLoRA's double quantization).
        dense_embeddings: keep the embedding and the head as they are; transformers then reads an nf4 base.
        force: replace an earlier base/ folder.
        on_progress: called with (tensor name, number done, number in all).

    Raises:
        ModelError: the folder cannot be read or is quantized already, a tensor holds NaN or infinity, or the tokenizer
            has ids beyond the embedding.
        ConfigError: the grid is unknown, a setting contradicts it, or `out` exists.
        MissingExtraError: nf4 without bitsandbytes.
    """
    if grid not in GRIDS:
        raise ConfigError(f"grid = {grid!r}; choose from {', '.join(GRIDS)}.")
    if double_quant and grid != "nf4":
        raise ConfigError(f"double_quant needs grid 'nf4'; {grid!r} has no second quantization. Leave it off.")
    source = open_any_base(model_folder(model))
    if source.grid is not None:
        raise ModelError(f"{source.folder} is on the {source.grid} grid already. Quantize the original model instead.")
    if (source.folder / "tokenizer.json").is_file():
        load_tokenizer(source.folder).check_vocab(source.config.vocab_size)
    options = {"double_quant": True} if double_quant else {}
    on_grid = set(source.config.linears() if dense_embeddings else source.config.matrices())
    with folder_in_progress(Path(out), MANIFEST, force=force) as folder:
        _write_weights(folder, source, grid, options, on_grid, on_progress)
        hf = read_hf_config(source.folder) | {"quantization_config": _quantization_config(grid, double_quant)}
        (folder / "config.json").write_text(json.dumps(hf, indent=1), encoding="utf-8")
        for name in (*COPIED, *pooling_files(source.folder)):
            if (source.folder / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.folder / name, folder / name)
        _write_manifest(folder, source, grid, double_quant=double_quant, dense_embeddings=dense_embeddings)
    return Path(out)


def _write_weights(
    folder: Path,
    source: AnyBase[Any],
    grid: str,
    options: dict[str, Any],
    on_grid: set[str],
    on_progress: Callable[[str, int, int], None] | None,
) -> None:
    stored: dict[str, TensorInfo] = {}
    origin: dict[str, tuple[str, str]] = {}  # stored name -> (module, suffix)
    for module, shape in source.config.matrices().items():
        if module in on_grid:
            for suffix, info in GRIDS[grid].stored(shape, **options).items():
                stored[f"{module}.weight{suffix}"] = info
                origin[f"{module}.weight{suffix}"] = (module, suffix)
        else:
            stored[f"{module}.weight"] = source.weights[f"{module}.weight"]
    stored |= {name: source.weights[name] for name in source.config.vectors()}
    current: dict[str, dict[str, np.ndarray]] = {}  # the codes of the one module being written

    def produce(name: str) -> np.ndarray:
        if name not in origin:
            for start in range(0, source.weights[name].shape[0], CHECKED_ROWS):
                StoredMatrix(source.weights, name)[start : start + CHECKED_ROWS]
            return source.weights.array(name)
        module, suffix = origin[name]
        if module not in current:
            if on_progress is not None:
                on_progress(module, len(done), len(on_grid))
            done.add(module)
            current.clear()
            current[module] = GRIDS[grid].quantize(StoredMatrix(source.weights, f"{module}.weight"), **options)
        return current[module][suffix]

    done: set[str] = set()
    write_safetensors(folder / "model.safetensors", stored, produce)


def _quantization_config(grid: str, double_quant: bool) -> dict[str, Any]:
    """For nf4 the keys of transformers' BitsAndBytesConfig; for int4 our own method name, which it refuses by name."""
    if grid == "nf4":
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double_quant, "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
    return {"quant_method": "edgetune", "grid": grid, "bits": 4, "block_size": GRIDS[grid].BLOCK, "symmetric": True}


def _write_manifest(folder: Path, source: AnyBase[Any], grid: str, **options: bool) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format_version": FORMAT_VERSION, "edgetune_version": __version__, "grid": grid, **options,
        "source": source.folder.name, "num_parameters": source.config.num_parameters,
        "base_sha256": files["model.safetensors"]["sha256"], "files": files,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a base/ folder, each file's size checked.

    Raises:
        ModelError: there is none, it is of a newer format, or a file is missing or of another size.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is no base folder ({error}). Make one with `edgetune quantize`.") from error
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path} has format_version {version}; this edgetune reads {FORMAT_VERSION}. Install a newer edgetune."
        )
    for name, entry in files.items():
        file = Path(folder) / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            raise ModelError(
                f"{file} has {size} bytes; its manifest says {entry['bytes']}. Run `edgetune quantize` again."
            )
    return manifest
