"""NF4, the 4-bit grid of QLoRA (arXiv 2305.14314), as bitsandbytes stores it.

    weight = NF4[code] * absmax          flat row-major blocks of 64, the high nibble is the even element

Blocks may cross rows. Quantization is bitsandbytes' own, so codes and absmax are its bits; reading back needs only the
table of 16 levels, which gives the same bits as `dequantize_4bit` without importing bitsandbytes (about 115 MiB).
With double quantization the absmax values are stored in 8 bits (blocks of 256, less their mean) and undone on loading.
The stored names are those that bitsandbytes and transformers read.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from edgetune.errors import ExportError, MissingExtraError
from edgetune.grids.pairs import decode_pairs, pair_table, swapped
from edgetune.weights import Matrix, TensorInfo

NAME = "nf4"
BLOCK = 64
MARK = ".quant_state.bitsandbytes__nf4"
ROUNDS_ACTIVATIONS = False

PIECE_BYTES = 16 << 20  # float32 weights that one MatMulBnb4 may dequantize at a time
Fill = Callable[[dict[str, np.ndarray]], None]

_NESTED_BLOCK = 256
_QUANTIZED_AT_ONCE = 1 << 20  # weights, or a block's worth of rows
_STATE_BYTES = 256  # the state is JSON, padded with spaces so that a header can be written before its numbers are known
# QLoRA, appendix E: quantiles of the normal distribution, normalized to [-1, 1], with an exact zero.
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
PAIRS = swapped(pair_table(LEVELS, LEVELS))


def stored(shape: tuple[int, int], *, double_quant: bool = False) -> dict[str, TensorInfo]:
    """Suffix -> what a base folder holds for a weight [N, K]. The codes carry the weight's own name."""
    blocks = -(-math.prod(shape) // BLOCK)
    infos = {
        "": TensorInfo("U8", (-(-math.prod(shape) // 2), 1)),
        ".absmax": TensorInfo("U8" if double_quant else "F32", (blocks,)),
        ".quant_map": TensorInfo("F32", (16,)),
    }
    if double_quant:
        infos[".nested_absmax"] = TensorInfo("F32", (-(-blocks // _NESTED_BLOCK),))
        infos[".nested_quant_map"] = TensorInfo("F32", (256,))
    return infos | {MARK: TensorInfo("U8", (_STATE_BYTES,))}


def nbytes(shape: tuple[int, int], *, double_quant: bool = False) -> int:
    """Stored bytes of a weight [N, K]: about 0.5625 per weight, 0.516 with double quantization."""
    return sum(info.nbytes for info in stored(shape, double_quant=double_quant).values())


def quantize(weight: Matrix, *, double_quant: bool = False) -> dict[str, np.ndarray]:
    """Codes and absmax of a float32 weight [N, K], bit-equal to bitsandbytes' `quantize_4bit` of the whole.

    The weight is read in ranges of rows that begin where a block does.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    tensor, quantize_4bit, quantize_blockwise = _import_bitsandbytes()
    rows, columns = weight.shape
    codes, absmax = np.empty((-(-rows * columns // 2), 1), np.uint8), np.empty(-(-rows * columns // BLOCK), np.float32)
    unit = row_unit((rows, columns))
    step = max(unit, _QUANTIZED_AT_ONCE // columns // unit * unit)
    for start in range(0, rows, step):
        piece = np.ascontiguousarray(weight[start : start + step])
        found, state = quantize_4bit(tensor(piece), blocksize=BLOCK, quant_type="nf4")
        first = start * columns
        codes[first // 2 : first // 2 + len(found)] = found.numpy()
        absmax[first // BLOCK : first // BLOCK + len(state.absmax)] = state.absmax.numpy()
    about: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "float32", "shape": [rows, columns]}
    arrays: dict[str, np.ndarray] = {"": codes, ".absmax": absmax, ".quant_map": LEVELS}
    if double_quant:
        offset = tensor(absmax).mean()
        nested, state = quantize_blockwise(tensor(absmax) - offset, blocksize=_NESTED_BLOCK)
        about |= {"nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
        arrays |= {
            ".absmax": nested.numpy(), ".nested_absmax": state.absmax.numpy(), ".nested_quant_map": state.code.numpy()
        }  # fmt: skip
    text = json.dumps(about).encode().ljust(_STATE_BYTES)
    return arrays | {MARK: np.frombuffer(text, np.uint8)}


def _import_bitsandbytes() -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """`torch.from_numpy`, and bitsandbytes' `quantize_4bit` and `quantize_blockwise`.

    On some processors bitsandbytes fetches a kernel from the Hub while it is imported, and warns where it cannot. Only
    what was asked for may connect, so the package that fetches is hidden meanwhile.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, fetcher = logger.level, "kernels"
    hidden = fetcher not in sys.modules
    if hidden:
        sys.modules[fetcher] = None  # type: ignore[assignment]  # Python's way to let an import fail
    logger.setLevel(logging.ERROR)
    try:
        import torch
        from bitsandbytes.functional import quantize_4bit, quantize_blockwise
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "train") from error
    finally:
        logger.setLevel(level)
        if hidden:
            del sys.modules[fetcher]
    return torch.from_numpy, quantize_4bit, quantize_blockwise


def load(read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    """{"codes": uint8 flat, "absmax": float32 [blocks]}; `read(suffix)` gives a stored array."""
    state = json.loads(read(MARK).tobytes())
    absmax = read(".absmax")
    if "nested_offset" in state:
        scale = np.repeat(read(".nested_absmax"), _NESTED_BLOCK)[: len(absmax)]
        absmax = read(".nested_quant_map")[absmax] * scale + np.float32(state["nested_offset"])
    return {"codes": read("").reshape(-1), "absmax": absmax}


def dequantize(
    codes: Mapping[str, np.ndarray],
    shape: tuple[int, int],
    rows: slice | np.ndarray | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [rows, K] = NF4[code] * absmax, into `out` where given (C-contiguous)."""
    columns = shape[1]
    if isinstance(rows, np.ndarray):
        found = _gather(codes, columns, rows)
        if out is None:
            return found
        out[...] = found
        return out
    start, stop, _ = (rows or slice(None)).indices(shape[0])
    if out is None:
        out = np.empty((stop - start, columns), np.float32)
    first, last = start * columns // BLOCK, -(-stop * columns // BLOCK)  # blocks that hold these rows
    packed = codes["codes"][first * BLOCK // 2 : last * BLOCK // 2]
    offset = start * columns - first * BLOCK
    direct = offset == 0 and 2 * len(packed) == out.size
    flat = out.reshape(-1) if direct else np.empty(2 * len(packed), np.float32)
    decode_pairs(PAIRS, packed, flat)
    absmax = codes["absmax"][first:last]
    full = flat.size // BLOCK
    by_block = flat[: full * BLOCK].reshape(full, BLOCK)
    np.multiply(by_block, absmax[:full, None], out=by_block)
    flat[full * BLOCK :] *= absmax[full:].repeat(BLOCK)[: flat.size - full * BLOCK]
    if not direct:
        out[...] = flat[offset : offset + out.size].reshape(out.shape)
    return out


def row_unit(shape: tuple[int, int]) -> int:
    """A range of rows has bytes of its own where it starts with a block."""
    return BLOCK // math.gcd(BLOCK, shape[1])


def rows_of(codes: Mapping[str, np.ndarray], shape: tuple[int, int], rows: slice) -> dict[str, np.ndarray]:
    """The part of the arrays that holds a range of rows, which starts at a multiple of `row_unit`; views."""
    first, last = rows.start * shape[1], rows.stop * shape[1]
    sizes = {"codes": 2, "absmax": BLOCK}  # weights of an element
    return {key: codes[key][first // size : -(-last // size)] for key, size in sizes.items()}


def flat(codes: Mapping[str, np.ndarray], shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """(packed uint8, absmax float32) of the whole weight as one run of blocks; None where blocks cross rows."""
    return None if shape[1] % BLOCK else (codes["codes"], codes["absmax"])


def _gather(codes: Mapping[str, np.ndarray], columns: int, rows: np.ndarray) -> np.ndarray:
    """Single rows, element by element: few of them are read at a time, and their blocks may start anywhere."""
    element = rows.astype(np.int64)[:, None] * columns + np.arange(columns)
    byte = codes["codes"][element >> 1]
    levels: np.ndarray = LEVELS[np.where(element & 1, byte & 15, byte >> 4)]
    levels *= codes["absmax"][element // BLOCK]
    return levels


# x [..., K] ─┬─ MatMulBnb4(rows 0..n) ────┬─ Concat ── Add(bias) ── y [..., N]
#             └─ MatMulBnb4(rows n..2n) … ─┘
def emit_linear(
    builder: Any, path: str, x: Any, name: str, shape: tuple[int, int], fill: Fill, *, bias: Any = None
) -> Any:
    """Gives x W^T + bias for the weight `name` [N, K]; `fill` writes its codes into the file.

    The kernel dequantizes its whole operand on every call, so a large weight is multiplied in ranges of rows.
    """
    rows, columns = shape
    codes, absmax = _initializers(builder, name, shape, fill)
    unit = row_unit(shape)
    step = max(unit, PIECE_BYTES // (4 * columns) // unit * unit)
    pieces = []
    for start in range(0, rows, step):
        count = min(step, rows - start)
        at, operands = path, (codes, absmax)
        if step < rows:
            at, operands = f"{path}/rows.{start}", _row_range(builder, name, columns, start, count)
        attributes = {"K": columns, "N": count, "block_size": BLOCK, "quant_type": 1}
        pieces.append(
            builder.op(f"{at}/MatMulBnb4", "MatMulBnb4", [x, *operands], domain="com.microsoft", **attributes)
        )
    y = pieces[0] if len(pieces) == 1 else builder.op(f"{path}/Concat", "Concat", pieces, axis=-1)
    return y if bias is None else builder.op(f"{path}/bias/Add", "Add", [y, bias])


# ids [b, s] ─┬─ Gather(bytes) ── Cast ── Gather(level pairs) ── Reshape [b, s, groups, g] ── Mul ── Reshape [b, s, K]
#             └─ Mul ── Add ── Div ── Gather(absmax) ── Unsqueeze [b, s, groups, 1] ───────────┘
def emit_embedding(builder: Any, path: str, ids: Any, name: str, shape: tuple[int, int], fill: Fill) -> Any:
    """Rows of the weight `name` [V, K] for ids [b, s], by table look-up in standard operators: exact.

    A block may cross rows; a group is the largest run of elements that always shares one.

    Raises:
        ExportError: K is odd, so that rows would cross bytes.
    """
    rows, columns = shape
    if columns % 2:
        raise ExportError(f"{name} has {columns} columns; an nf4 embedding needs an even number. Use grid 'int4'.")
    _, absmax = _initializers(builder, name, shape, fill)
    packed = builder.view(f"{name}.codes.rows", f"{name}.codes", "uint8", (rows, columns // 2))
    table = builder.constant("nf4.pairs", PAIRS.view(np.float32).reshape(256, 2))
    group = math.gcd(BLOCK, columns)

    def number(key: str, value: Any) -> Any:
        return builder.constant(f"{path}/{key}", np.array(value, np.int64))

    found = builder.op(f"{path}/codes/Gather", "Gather", [packed, ids], axis=0)
    found = builder.op(f"{path}/codes/Cast", "Cast", [found], to=6)  # INT32: Gather takes no uint8 indices
    levels = builder.op(f"{path}/levels/Gather", "Gather", [table, found], axis=0)
    levels = builder.op(
        f"{path}/levels/Reshape", "Reshape", [levels, number("groups", [0, 0, columns // group, group])]
    )
    first = builder.op(f"{path}/absmax/Mul", "Mul", [ids, number("groups_per_row", columns // group)])
    first = builder.op(f"{path}/absmax/Unsqueeze", "Unsqueeze", [first, number("last", [-1])])
    groups = builder.op(f"{path}/absmax/Add", "Add", [first, number("range", np.arange(columns // group))])
    blocks = builder.op(f"{path}/absmax/Div", "Div", [groups, number("groups_per_block", BLOCK // group)])
    scale = builder.op(f"{path}/absmax/Gather", "Gather", [absmax, blocks], axis=0)
    scale = builder.op(f"{path}/scale/Unsqueeze", "Unsqueeze", [scale, number("last", [-1])])
    scaled = builder.op(f"{path}/Mul", "Mul", [levels, scale])
    return builder.op(f"{path}/Reshape", "Reshape", [scaled, number("shape", [0, 0, columns])])


def _row_range(builder: Any, name: str, columns: int, start: int, count: int) -> tuple[Any, Any]:
    """Codes and absmax of some rows, as views of the whole; `start` is the first row of a block."""
    first, size = start * columns, count * columns
    part = f"rows.{start}"
    codes = builder.view(f"{name}.codes.{part}", f"{name}.codes", "uint8", (-(-size // 2),), start_byte=first // 2)
    absmax = builder.view(
        f"{name}.absmax.{part}", f"{name}.absmax", "float32", (-(-size // BLOCK),), start_byte=first // BLOCK * 4
    )
    return codes, absmax


def _initializers(builder: Any, name: str, shape: tuple[int, int], fill: Fill) -> tuple[Any, Any]:
    """Codes and absmax of a weight, flat; double quantization is undone by `load`."""
    count = math.prod(shape)
    arrays = {"codes": ("uint8", (-(-count // 2),)), "absmax": ("float32", (-(-count // BLOCK),))}
    values = builder.weights(name, arrays, fill)
    return values["codes"], values["absmax"]
