"""Two 4-bit codes share a byte, so one table look-up per byte decodes both.

The table has 256 rows of two float32 values. Seen as 256 float64 numbers it turns decoding into a plain `take`, which
moves eight bytes per code pair without looking at them. This is no grid, only what both grids read with.
"""

from __future__ import annotations

import numpy as np

# numpy widens the indices of `take` to eight bytes each: pieces bound that copy to 512 KiB and keep it in the L2 cache.
_PIECE = 65536


def pair_table(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """float64 [256] whose bytes are the float32 pair (low[byte & 15], high[byte >> 4])."""
    byte = np.arange(256)
    return np.stack([low[byte & 15], high[byte >> 4]], axis=1).astype(np.float32).view(np.float64).reshape(256)


def swapped(table: np.ndarray) -> np.ndarray:
    """The same table with each pair in the opposite order."""
    return np.ascontiguousarray(table.view(np.float32).reshape(256, 2)[:, ::-1]).view(np.float64).reshape(256)


def decode_pairs(table: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Write the two values of every byte of `codes` (uint8, flat) into `out` (float32, flat, twice as long)."""
    pairs = out.view(np.float64)
    for start in range(0, codes.size, _PIECE):
        stop = start + _PIECE
        np.take(table, codes[start:stop], out=pairs[start:stop], mode="clip")
