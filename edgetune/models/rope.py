"""Rotary position embedding: the cosine and sine tables that torch and the ONNX graph both read.

    angle[p, i] = p * f_i,   f_i = theta^(-2i / head_dim),   i = 0 .. head_dim/2 - 1        (RoFormer, arXiv 2104.09864)

The tables serve the rotate-half convention of Hugging Face checkpoints: element i is rotated with element
i + head_dim/2. Llama 3's scaling stretches long wavelengths by `factor`, keeps short ones, and blends in between.
"""

from __future__ import annotations

import math

import numpy as np

from edgetune.models.config import AttentionKind


def inverse_frequencies(kind: AttentionKind, head_dim: int) -> np.ndarray:
    """float64 [head_dim/2]: radians per position of a kind of attention that rotates."""
    assert kind.rope_theta is not None, "these layers embed no positions"
    inverse = kind.rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = kind.rope_scaling
    if scaling is None:
        return inverse
    if scaling.rope_type == "linear":
        return inverse / scaling.factor
    wavelength = 2 * math.pi / inverse
    ratio = scaling.original_max_position_embeddings / wavelength
    smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)  # 0: long wavelength, fully stretched; 1: short, untouched
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def rope_tables(kind: AttentionKind, head_dim: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each float32 [length, head_dim/2]."""
    # Angles are multiplied in float32, as Hugging Face does, so that tables agree to the last bit of the angle.
    frequencies = inverse_frequencies(kind, head_dim).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.cos(angles), np.sin(angles)
