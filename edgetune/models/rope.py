"""Rotary position embedding: the cosine and sine tables that torch and the ONNX graph both read.

    angle[p, i] = p * f_i,   f_i = theta^(-2i / head_dim),   i = 0 .. head_dim/2 - 1        (RoFormer, arXiv 2104.09864)

The tables serve the rotate-half convention of Hugging Face checkpoints: element i is rotated with element
i + head_dim/2. Llama 3's scaling stretches long wavelengths by `factor`, keeps short ones, and blends in between.
"""

from __future__ import annotations

import math

import numpy as np

from edgetune.models.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """float64 [head_dim/2]: radians per position."""
    inverse = config.rope_theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling.rope_type == "linear":
        return inverse / scaling.factor
    wavelength = 2 * math.pi / inverse
    ratio = scaling.original_max_position_embeddings / wavelength
    smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)  # 0: long wavelength, fully stretched; 1: short, untouched
    return (1 - smooth) * inverse / scaling.factor + smooth * inverse


def rope_tables(config: DecoderConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each float32 [length, head_dim/2]."""
    # Angles are multiplied in float32, as Hugging Face does, so that tables agree to the last bit of the angle.
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(config).astype(np.float32)[None, :]
    return np.cos(angles), np.sin(angles)
