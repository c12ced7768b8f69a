"""Moments of an optimizer in 8 bits, by blocks and with a dynamic exponent (Dettmers et al., arXiv 2110.02861).

    value = map[code] * absmax          blocks of 256, each tensor begins a new one; the last is filled up with zeros

The map has seven decades: the more digits a value lies below its block's largest, the fewer bits are left for its
fraction. A moment without a sign uses the sign's bit for the fraction too. A value gets the code that is nearest.

This is the scheme of bitsandbytes, which itself would cost 115 MiB, but for two things. It leaves tensors below 4,096
values in float32; all of a small LoRA's may be, so here every tensor is quantized. And a moment without a sign is
never rounded to zero: it is what Adam divides by, and where a block's gradients differ by a factor of 1,000 a zero
there made single steps of 350 times the learning rate (measured); its smallest code allows 2.

This file is numpy: `training.moments` does the arithmetic, in torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BLOCK = 256
DECADES = 7


def dynamic_map(*, signed: bool) -> np.ndarray:
    """The 256 values of the codes, ascending float32 in -1..1 or 0..1.

    Decade d is 10^(d-6) times the centres of 2^d (signed) or 2^(d+1) equal parts of 0.1..1; zero and one are exact.
    bitsandbytes computes the same in float32, so its values are up to two units in the last place away.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        parts = 2 ** (decade if signed else decade + 1)
        centres = 10.0 ** (decade - DECADES + 1) * (0.1 + 0.9 * (np.arange(parts) + 0.5) / parts)
        values += [*centres, *(-centres if signed else ())]
    return np.sort(np.array(values, np.float32))


def tables(*, signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map, the upper bound of every code, and first codes: what a value is encoded with.

    Eight bits of search for every value would take most of an update's time. But the upper 16 bits of a float32 leave
    at most two codes to choose from: the first is looked up by them, and the value's bound says whether it is the next.
    """
    values = dynamic_map(signed=signed)
    bounds = np.append((values[:-1] + values[1:]) / 2, np.float32(np.inf))
    if not signed:
        bounds[0] = -1  # nothing gets the code of zero
    upper = np.arange(_upper_bits(signed), dtype=np.uint32) << 16
    least = np.where(upper >> 31, upper | 0xFFFF, upper).view(np.float32)  # the lowest value with these bits
    return values, bounds, np.searchsorted(bounds, least).astype(np.uint8)


def _upper_bits(signed: bool) -> int:
    """How many there are, from those of 0 to those of 1 or -1; none of them means a value between 1 and -0."""
    return (0xBF80 if signed else 0x3F80) + 1


def num_blocks(num_parameters: int) -> int:
    """Blocks of a tensor."""
    return -(-num_parameters // BLOCK)


def nbytes(num_parameters: int) -> int:
    """Bytes of one moment of a tensor: codes, and an absmax per block."""
    return num_blocks(num_parameters) * (BLOCK + 4)


def scratch_bytes(tile: int, moments: Mapping[str, bool]) -> int:
    """Bytes in use while tiles of that many parameters are decoded, updated and encoded again."""
    of_tile = 4 * BLOCK * num_blocks(tile)  # codes and bounds, and the values of every moment
    of_tables = sum(2 * 4 * BLOCK + _upper_bits(signed) for signed in moments.values())
    return (2 + len(moments)) * of_tile + of_tables
