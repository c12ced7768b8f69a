"""Arithmetic on LoRA adapters of one base: several become one, or one is taken from another.

With task tensors t_i, weights w_i and s_i = lora_alpha / r (or its rsLoRA form), names and results are those of PEFT's
`add_weighted_adapter`:

    cat                     A = [w_i s_i A_i], B = [B_i]: the weighted sum of the changes, exactly; the ranks add up
    svd                     the best approximation of that sum at one rank
    linear                  A = sum ±sqrt|w_i s_i| A_i, B = sum sqrt|w_i s_i| B_i; cross terms B_i A_j come with it
    magnitude_prune         linear, of the `density` largest values of each A_i and B_i
    dare_linear             linear, of a random `density` of the values, divided by it (DARE, arXiv 2311.03099)
    ties, dare_ties         of what is left, values whose sign has the majority are averaged (TIES, arXiv 2306.01708)
    ties_svd, …             the same on the changes s_i B_i A_i themselves, then the svd

A weight below zero subtracts: weights 1 and -1 with `cat` are exact. Linears that only some of the adapters have take
part with these alone. One adapter is a sum of one, so `svd` lowers its rank, where PEFT goes over to `linear`. What was
merged has lora_alpha = r, so its scaling is 1. numpy alone, one linear at a time; the svd of a plain sum never makes
the matrix [out, in].
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapter_file import MERGE, Origin, read_origin
from edgetune.adapters import base as peft
from edgetune.adapters import lora
from edgetune.adapters.lora import LoraConfig
from edgetune.errors import AdapterError, ConfigError, ModelError
from edgetune.output import folder_in_progress
from edgetune.weights import Weights, open_tensors, sha256_file, write_atomic

__all__ = ["COMBINATION_TYPES", "MAJORITY_SIGN_METHODS", "merge_adapters", "read_merge"]

FORMAT_VERSION = 1
_RULES = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")
COMBINATION_TYPES = ("cat", "svd", *_RULES, *(f"{rule}_svd" for rule in _RULES[1:]))
MAJORITY_SIGN_METHODS = ("total", "frequency")


@dataclass(frozen=True)
class _Source:
    folder: Path
    config: LoraConfig
    tensors: dict[str, np.ndarray]
    origin: Origin

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Linear -> (out_features, in_features)."""
        names = [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]
        return {name: (len(self.tensors[f"{name}.lora_B"]), self.tensors[f"{name}.lora_A"].shape[1]) for name in names}


@dataclass(frozen=True)
class _Part:
    """What one adapter brings to a linear."""

    weight: float
    scaling: float
    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]

    @property
    def factor(self) -> float:
        return self.weight * self.scaling


@dataclass(frozen=True)
class _Recipe:
    """How tensors are combined; `density` is 1 where nothing is left out."""

    combination_type: str
    density: float
    rank: int
    majority_sign_method: str
    seed: int

    @property
    def rule(self) -> str:
        return self.combination_type.removesuffix("_svd")


def merge_adapters(
    adapters: Sequence[Any],
    weights: Sequence[float],
    *,
    out: str | Path,
    combination_type: str = "svd",
    density: float | None = None,
    svd_rank: int | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write one PEFT folder made of several adapters of the same base; `add_adapter`, `export` and PEFT take it.

    `merge.json` beside the adapter says what it was made of, and which base it belongs to. `relative_distance` there is
    ||merged - sum|| / ||sum|| of the changes, where sum is the weighted one: 0 for cat, what the rank cost for svd.

    Args:
        adapters: runs (`Run` or their folders) and PEFT folders.
        weights: one for each.
        out: the folder to write.
        combination_type: one of `COMBINATION_TYPES`.
        density: share of the values that are kept, above 0 and up to 1; for magnitude_prune, ties and dare.
        svd_rank: rank of the result; for svd. None is the largest of the adapters' ranks.
        majority_sign_method: for ties: by the sum of the values ("total") or the number of each sign ("frequency").
        seed: of what dare leaves out.
        force: replace an earlier result in the folder.

    Raises:
        AdapterError: an adapter cannot be read, belongs to another base or has other shapes; or their ranks differ
            where they have to be equal.
        ConfigError: a setting is out of its range, missing, or of another combination type; or `out` exists.
    """
    if not adapters:
        raise ConfigError("there is no adapter to merge; give the folders of at least one.")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights = {list(weights)}; one number for each of {len(adapters)} adapters was expected.")
    _check_settings(combination_type, density, svd_rank, majority_sign_method)
    sources = [_read(Path(getattr(adapter, "folder", adapter))) for adapter in adapters]
    _check_alike(sources)
    rank = _rank(sources, combination_type, svd_rank)
    recipe = _Recipe(combination_type, density or 1.0, rank, majority_sign_method, seed)
    tensors, distance = _merge(sources, weights, recipe)
    out = Path(out)
    with folder_in_progress(out, MERGE, force=force) as folder:
        peft.save_adapter(folder, _config(sources, recipe.rank), tensors, sources[0].origin.base)
        facts = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in folder.iterdir()}
        made = {
            "format_version": FORMAT_VERSION, "combination_type": combination_type,
            "weights": [float(weight) for weight in weights], "density": density,
            "majority_sign_method": majority_sign_method, "seed": seed, "r": recipe.rank,
            "linears": len(tensors) // 2, "relative_distance": distance,
            "sources": [
                {"folder": str(source.folder), "sha256": sha256_file(source.folder / peft.MODEL)} for source in sources
            ],
            **asdict(sources[0].origin), "files": facts,
        }  # fmt: skip
        write_atomic(folder / MERGE, json.dumps(made, indent=1) + "\n")
    return out


def read_merge(folder: str | Path) -> dict[str, Any]:
    """The `merge.json` of a folder that `merge_adapters` wrote."""
    made: dict[str, Any] = json.loads((Path(folder) / MERGE).read_text(encoding="utf-8"))
    return made


def _check_settings(
    combination_type: str, density: float | None, svd_rank: int | None, majority_sign_method: str
) -> None:
    """Raises ConfigError for what is wrong, and for a setting that this combination type would ignore."""
    if combination_type not in COMBINATION_TYPES:
        raise ConfigError(
            f"combination_type = {combination_type!r}; choose from {', '.join(sorted(COMBINATION_TYPES))}."
        )
    if majority_sign_method not in MAJORITY_SIGN_METHODS:
        raise ConfigError(f"majority_sign_method = {majority_sign_method!r}; choose total or frequency.")
    thins = combination_type not in ("cat", "svd", "linear")
    if thins and (density is None or not 0 < density <= 1):
        raise ConfigError(
            f"density = {density}; {combination_type} keeps a share of the values: a number above 0 and up to 1 was "
            "expected, such as 0.5."
        )
    if density is not None and not thins:
        raise ConfigError(f"density = {density} is not for {combination_type}, which keeps every value. Leave it out.")
    if svd_rank is not None and not combination_type.endswith("svd"):
        raise ConfigError(
            f"svd_rank = {svd_rank} is not for {combination_type}, whose rank follows from the adapters. Leave it out, "
            "or choose svd."
        )
    if svd_rank is not None and svd_rank < 1:
        raise ConfigError(f"svd_rank = {svd_rank}; at least 1 was expected.")


def _read(folder: Path) -> _Source:
    """Raises AdapterError."""
    linears: dict[str, tuple[int, int]] = {}
    if (folder / peft.MODEL).is_file():
        try:
            linears = _linears(open_tensors(folder / peft.MODEL))
        except ModelError as error:
            raise AdapterError(str(error)) from error
    if (method := peft.method_of(folder)) is not lora:
        raise AdapterError(f"{folder} is of the method {method.NAME}; what is merged has LoRA's form. Merge LoRA's.")
    config, tensors = peft.read_adapter(folder, linears)
    assert isinstance(config, LoraConfig)
    return _Source(folder, config, tensors, read_origin(folder))


def _linears(weights: Weights) -> dict[str, tuple[int, int]]:
    """Linear -> (out_features, in_features), by LoRA's tensors alone: the base need not be here."""
    found = {}
    for name in weights:
        linear = name.removesuffix(".lora_A.weight")
        b = f"{linear}.lora_B.weight"
        if linear != name and b in weights and len(weights[name].shape) == len(weights[b].shape) == 2:
            found[linear.removeprefix(peft.PREFIX)] = weights[b].shape[0], weights[name].shape[1]
    return found


def _check_alike(sources: Sequence[_Source]) -> None:
    first, known = sources[0], dict(sources[0].shapes)
    for source in sources[1:]:
        for what in ("base_sha256", "tokenizer_sha256"):
            one, other = getattr(first.origin, what), getattr(source.origin, what)
            if one != other:
                raise AdapterError(
                    f"{source.folder} was trained on another base than {first.folder}: {what} {_short(other)}, not "
                    f"{_short(one)}. Merge adapters of one base; train the other one again on it."
                )
        for linear, shape in source.shapes.items():
            if known.setdefault(linear, shape) != shape:
                raise AdapterError(
                    f"{source.folder} adapts {linear} of shape {list(shape)}; {list(known[linear])} was expected, as "
                    "in the others. Merge adapters of one base."
                )


def _short(hash: str | None) -> str:
    return "none" if hash is None else f"{hash[:12]}…"


def _rank(sources: Sequence[_Source], combination_type: str, svd_rank: int | None) -> int:
    ranks = [max(source.config.ranks) for source in sources]
    if combination_type == "cat":
        return sum(ranks)
    if combination_type.endswith("svd"):
        return svd_rank or max(ranks)
    if len(found := frozenset[int]().union(*(source.config.ranks for source in sources))) > 1:
        raise AdapterError(
            f"{combination_type} needs adapters of one rank, and these have {', '.join(map(str, sorted(found)))}. Use "
            "cat or svd, which take any."
        )
    return ranks[0]


def _config(sources: Sequence[_Source], rank: int) -> LoraConfig:
    """That of the result. Values of zero stand where an adapter of its targets and blocks has nothing."""
    targets = (name for source in sources for name in source.config.target_modules or ())
    blocks = {block for source in sources for block in source.config.layers_to_transform or ()}
    return LoraConfig(
        r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=tuple(dict.fromkeys(targets)), use_rslora=False,
        layers_to_transform=tuple(sorted(blocks)),
    )  # fmt: skip


def _merge(
    sources: Sequence[_Source], weights: Sequence[float], recipe: _Recipe
) -> tuple[dict[str, np.ndarray], float]:
    """The tensors of every linear that some adapter has, and how far their change is from the weighted sum."""
    tensors: dict[str, np.ndarray] = {}
    off = total = 0.0
    linears = dict.fromkeys(linear for source in sources for linear in source.shapes)
    for index, linear in enumerate(linears):
        parts = [
            _Part(w, source.config.scaling, source.tensors[f"{linear}.lora_A"], source.tensors[f"{linear}.lora_B"])
            for source, w in zip(sources, weights, strict=True)
            if f"{linear}.lora_A" in source.tensors
        ]
        a, b = _combine(parts, recipe, index)
        exact_a, exact_b = _cat(parts)
        off += _norm2(np.concatenate([exact_a, -a]), np.concatenate([exact_b, b], 1))
        total += _norm2(exact_a, exact_b)
        tensors |= {f"{linear}.lora_A": _padded(a, recipe.rank, 0), f"{linear}.lora_B": _padded(b, recipe.rank, 1)}
    return tensors, math.sqrt(off / total) if total else 0.0


def _padded(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """The same with zeros up to the rank, where a linear has fewer adapters or is smaller than that."""
    width = [(0, 0), (0, 0)]
    width[axis] = (0, rank - values.shape[axis])
    return np.ascontiguousarray(np.pad(values, width), np.float32)


def _combine(parts: Sequence[_Part], recipe: _Recipe, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r] of one linear, the `index`-th."""
    if recipe.combination_type == "cat":
        return _cat(parts)
    if recipe.combination_type == "svd":
        return _svd_of_product(*_cat(parts), recipe.rank)
    rng = np.random.default_rng([recipe.seed, index])
    if recipe.combination_type.endswith("_svd"):
        deltas = [part.scaling * (part.b @ part.a) for part in parts]
        u, s, vh = np.linalg.svd(_arithmetic(deltas, [p.weight for p in parts], recipe, rng), full_matrices=False)
        return vh[: recipe.rank], u[:, : recipe.rank] * s[: recipe.rank]
    roots = [math.sqrt(abs(part.factor)) for part in parts]
    signed = [math.copysign(root, part.factor) for root, part in zip(roots, parts, strict=True)]
    a = _arithmetic([part.a for part in parts], signed, recipe, rng)
    return a, _arithmetic([part.b for part in parts], roots, recipe, rng)


def _cat(parts: Sequence[_Part]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([part.factor * part.a for part in parts]), np.concatenate([part.b for part in parts], 1)


def _svd_of_product(a: np.ndarray, b: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest `rank` singular directions of B A, from the small factors of B = Q_b R_b and A^T = Q_a R_a.

    B A = Q_b (R_b R_a^T) Q_a^T: the svd in the middle is of one [R, R], with R the ranks' sum.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    u, s, vh = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return vh[:rank] @ q_a.T, (q_b @ u[:, :rank]) * s[:rank]


def _norm2(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frobenius norm of B A, without that matrix: the sum of (A A^T) * (B^T B)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return max(float(np.vdot(a @ a.T, b.T @ b)), 0.0)


def _arithmetic(
    tensors: Sequence[np.ndarray], weights: Sequence[float], recipe: _Recipe, rng: np.random.Generator
) -> np.ndarray:
    """The weighted combination of task tensors of one shape."""
    if recipe.density < 1:
        random = recipe.rule.startswith("dare")
        tensors = [_thinned(t, recipe.density, rng) if random else _largest(t, recipe.density) for t in tensors]
    stacked = np.stack(tensors)
    weighted = stacked * np.asarray(weights, np.float32).reshape(-1, *(1,) * (stacked.ndim - 1))
    if not recipe.rule.endswith("ties"):
        return np.asarray(weighted.sum(0))
    elected = np.where((stacked if recipe.majority_sign_method == "total" else np.sign(stacked)).sum(0) >= 0, 1, -1)
    agrees = np.sign(stacked) == elected
    return np.asarray((weighted * agrees).sum(0) / np.maximum(agrees.sum(0), 1))


def _largest(tensor: np.ndarray, density: float) -> np.ndarray:
    """A share of the values, the largest by size, and zero elsewhere."""
    count = int(density * tensor.size)
    kept = np.zeros(tensor.size, bool)
    first = tensor.size - count
    kept[np.argpartition(np.abs(tensor).ravel(), min(first, tensor.size - 1))[first:]] = True
    return tensor * kept.reshape(tensor.shape)


def _thinned(tensor: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
    """A random share of the values, divided by it, and zero elsewhere: the same in expectation."""
    return tensor * (rng.random(tensor.shape) < density) / np.float32(density)
