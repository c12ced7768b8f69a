"""The uniform 4-bit grid that device kernels read: weight = (code - 8) * scale, blocks of 32 along each row.

Codes lie as `MatMulNBits` of ONNX Runtime wants them: uint8 [N, ceil(K/32), 16], the low nibble is the even k, a row
that is no multiple of 32 is padded with code 8 (zero). Scales are float16 [N, ceil(K/32)], each found by search: of 38
candidates (both signs of the block's extreme value / 8, times 0.70 to 1.15 in steps of 0.025) the one whose rounded
weights have the least squared error against the original, with the scale already rounded to float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgetune.grids.pairs import decode_pairs, pair_table
from edgetune.weights import Matrix, TensorInfo

NAME = "int4"
BLOCK = 32
MARK = ".codes"
ROUNDS_ACTIVATIONS = True

Fill = Callable[[dict[str, np.ndarray]], None]

_LEVELS = np.arange(16, dtype=np.float32) - 8
PAIRS = pair_table(_LEVELS, _LEVELS)
_FACTORS = tuple(sign * factor for factor in np.linspace(0.70, 1.15, 19) for sign in (1.0, -1.0))
WHOLE_BYTES, RANGE_BYTES = 8 << 20, 4 << 20  # codes that one product reads at most; of each range of a larger weight
RANGE_ROWS = 64  # ranges begin at multiples of as many, which keeps their bytes aligned
_TILE = 1 << 15  # weights searched at once: six buffers of this size stay in the L2 cache


def _num_blocks(shape: tuple[int, int]) -> int:
    return -(-shape[1] // BLOCK)


def stored(shape: tuple[int, int]) -> dict[str, TensorInfo]:
    """Suffix -> what a base folder holds for a weight [N, K]."""
    blocks = _num_blocks(shape)
    return {
        ".codes": TensorInfo("U8", (shape[0], blocks, BLOCK // 2)),
        ".scales": TensorInfo("F16", (shape[0], blocks)),
    }


def nbytes(shape: tuple[int, int]) -> int:
    """Stored bytes of a weight [N, K]: 0.5625 per weight where K is a multiple of 32."""
    return sum(info.nbytes for info in stored(shape).values())


def quantize(weight: Matrix) -> dict[str, np.ndarray]:
    """Codes and scales of a float32 weight [N, K]."""
    rows, columns = weight.shape
    blocks = _num_blocks((rows, columns))
    codes = np.empty((rows, blocks, BLOCK // 2), np.uint8)
    scales = np.empty((rows, blocks), np.float16)
    step = max(1, _TILE // (blocks * BLOCK))
    for start in range(0, rows, step):
        tile = np.zeros((min(step, rows - start), blocks * BLOCK), np.float32)
        tile[:, :columns] = weight[start : start + step]
        tile = tile.reshape(-1, BLOCK)
        found = _search(tile)
        levels = _round(tile, found.astype(np.float32), np.empty_like(tile)).astype(np.int8) + 8
        pairs = levels.astype(np.uint8).reshape(-1, blocks, BLOCK // 2, 2)
        codes[start : start + step] = pairs[..., 0] | (pairs[..., 1] << 4)
        scales[start : start + step] = found.reshape(-1, blocks)
    return {".codes": codes, ".scales": scales}


def _round(blocks: np.ndarray, scale: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Levels -8..7 of `blocks` [n, 32] at `scale` [n]; a zero scale gives level 0."""
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
    np.multiply(blocks, inverse[:, None], out=out)
    np.rint(out, out=out)
    return np.clip(out, -8, 7, out=out)


def _search(blocks: np.ndarray) -> np.ndarray:
    """The float16 scale [n] of least squared error for each block [n, 32]."""
    extreme = np.abs(blocks).max(1)
    best = np.zeros(len(blocks), np.float16)
    least = np.full(len(blocks), np.inf, np.float32)
    level = np.empty_like(blocks)
    for factor in _FACTORS:
        candidate = (extreme * np.float32(factor / 8)).astype(np.float16)
        scale = candidate.astype(np.float32)
        _round(blocks, scale, level)
        np.multiply(level, scale[:, None], out=level)
        np.subtract(level, blocks, out=level)
        error = np.einsum("ij,ij->i", level, level)
        better = error < least
        best[better], least[better] = candidate[better], error[better]
    return best


def load(read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """{"codes": uint8 [N, blocks, 16], "scales": float16 [N, blocks]}; `read(suffix)` gives a stored array."""
    return {"codes": read(".codes"), "scales": read(".scales")}


def dequantize(
    codes: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    rows: slice | np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [rows, K] = (code - 8) * scale, into `out` where given (C-contiguous)."""
    packed, scales = codes["codes"], codes["scales"]
    if rows is not None:
        packed, scales = packed[rows], scales[rows]
    count, blocks, _ = packed.shape
    columns = shape[1]
    if out is None:
        out = np.empty((count, columns), np.float32)
    whole = out if columns == blocks * BLOCK else np.empty((count, blocks * BLOCK), np.float32)
    decode_pairs(PAIRS, packed.reshape(-1), whole.reshape(-1))
    by_block = whole.reshape(count, blocks, BLOCK)
    np.multiply(by_block, scales.astype(np.float32)[..., None], out=by_block)
    if whole is not out:
        out[...] = whole[:, :columns]
    return out


def row_unit(shape: tuple[int, int]) -> int:
    """Every row has bytes of its own."""
    return 1


def rows_of(codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice) -> dict[str, np.ndarray]:
    """The part of the arrays that holds a range of rows; views."""
    return {key: array[rows] for key, array in codes.items()}


def flat(codes: Mapping[str, np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """(packed uint8, scales float16) of the whole weight as one run of blocks; None where rows are padded."""
    return None if shape[1] % BLOCK else (codes["codes"].reshape(-1), codes["scales"].reshape(-1))


# x [..., K] ── MatMulNBits(codes, scales, bias) ── y [..., N]
#            └─ or one for each range of rows ── Concat
def emit_linear(
    builder: Any, path: str, x: Any, name: str, shape: tuple[int, int], fill: Fill, *, bias: Any = None, bits: int = 4
) -> Any:
    """Gives x W^T + bias for the weight `name` [N, K]; `fill` writes its codes into the file.

    Accuracy level 4: activations are rounded to int8 per block, which is what the fast kernels compute.

    A runtime packs each matrix in memory of its own while it loads, so a large one, which a head is, is several: views
    of the same bytes.
    """
    codes, scales = _initializers(builder, name, shape, fill, bits)
    (rows, columns), row_bytes = shape, math.prod(codes.shape[1:])

    def product(at: str, inputs: list[Any], count: int) -> Any:
        return builder.op(
            f"{path}{at}/MatMulNBits", "MatMulNBits", inputs, domain="com.microsoft",
            K=columns, N=count, bits=bits, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip

    if rows * row_bytes <= WHOLE_BYTES or bias is not None:
        return product("", [x, codes, scales, None, None, bias][: 3 if bias is None else 6], rows)
    step = max(1, RANGE_BYTES // row_bytes // RANGE_ROWS) * RANGE_ROWS
    parts = []
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part_codes = builder.view(
            f"{name}.codes.{start}", f"{name}.codes", "uint8", (count, *codes.shape[1:]), start_byte=start * row_bytes
        )
        part_scales = builder.view(
            f"{name}.scales.{start}", f"{name}.scales", "float32", (count, scales.shape[1]),
            start_byte=start * 4 * scales.shape[1],
        )  # fmt: skip
        parts.append(product(f"/{start}", [x, part_codes, part_scales], count))
    return builder.op(f"{path}/Concat", "Concat", parts, axis=-1)


def operands(rows: int | str, columns: int) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """What `emit_rows` takes of a weight [rows, K], as inputs of a graph: key -> (type, shape)."""
    blocks = _num_blocks((1, columns))
    return {"codes": ("uint8", (rows, blocks, BLOCK // 2)), "scales": ("float32", (rows, blocks, 1))}


# codes, scales, ids [...] ── GatherBlockQuantized [..., blocks, 32] ── Reshape ── Slice where rows are padded ── [n, K]
def emit_rows(builder: Any, path: str, values: Mapping[str, Any], ids: Any, columns: int) -> Any:
    """Float32 rows [n, K] of a weight for ids of any shape, from the bytes that `emit_linear` multiplies with.

    For all rows too this is faster than `DequantizeLinear`, which wants a zero point for each block: 0.65 against
    1.1 ms for 885k weights.
    """
    rows = _gather(builder, path, values["codes"], ids, values["scales"], 4)
    blocks = _num_blocks((1, columns))
    rows = builder.op(f"{path}/Reshape", "Reshape", [rows, _lengths(builder, path, -1, blocks * BLOCK)])
    return rows if columns == blocks * BLOCK else _cut(builder, path, rows, columns, axis=1)


# ids [b, s] ── GatherBlockQuantized(codes, scales) [b, s, blocks, 32] ── Reshape ── Slice ── rows [b, s, K]
def emit_embedding(
    builder: Any, path: str, ids: Any, name: str, shape: tuple[int, int], fill: Fill, *, bits: int = 4
) -> Any:
    """Rows of the weight `name` [V, K] for ids [b, s], from the same bytes that `emit_linear` multiplies with."""
    codes, _ = _initializers(builder, name, shape, fill, bits)
    blocks = _num_blocks(shape)
    scales = builder.view(f"{name}.scales.rows", f"{name}.scales", "float32", (shape[0], blocks, 1))
    rows = _gather(builder, path, codes, ids, scales, bits)
    rows = builder.op(f"{path}/Reshape", "Reshape", [rows, _lengths(builder, path, 0, 0, blocks * BLOCK)])
    return rows if shape[1] == blocks * BLOCK else _cut(builder, path, rows, shape[1], axis=2)


def _gather(builder: Any, path: str, codes: Any, ids: Any, scales: Any, bits: int) -> Any:
    """Rows of a weight, [..., blocks, 32], from codes [N, blocks, 16] and scales [N, blocks, 1]."""
    return builder.op(
        f"{path}/GatherBlockQuantized", "GatherBlockQuantized", [codes, ids, scales],
        domain="com.microsoft", bits=bits, block_size=BLOCK, gather_axis=0, quantize_axis=2,
    )  # fmt: skip


def _lengths(builder: Any, path: str, *lengths: int) -> Any:
    return builder.constant(f"{path}/shape", np.array(lengths, np.int64))


def _cut(builder: Any, path: str, value: Any, length: int, *, axis: int) -> Any:
    """The first `length` elements along an axis."""
    cut = [builder.constant(f"{path}/{key}", np.array([number], np.int64)) for key, number in (
        ("starts", 0), ("ends", length), ("axes", axis)
    )]  # fmt: skip
    return builder.op(f"{path}/Slice", "Slice", [value, *cut])


def _initializers(builder: Any, name: str, shape: tuple[int, int], fill: Fill, bits: int) -> tuple[Any, Any]:
    """Codes and scales of a weight.

    The scales are widened to float32, the type of the activations, which is exact. Kept in float16 behind a Cast node
    the SmolLM2-135M shape is 7 % smaller on disk, but the widened copies are heap: 147 against 133 MiB anonymous.
    """
    blocks = _num_blocks(shape)
    arrays = {
        "codes": ("uint8", (shape[0], blocks, BLOCK * bits // 8)), "scales": ("float32", (shape[0], blocks))
    }  # fmt: skip
    values = builder.weights(name, arrays, fill)
    return values["codes"], values["scales"]
