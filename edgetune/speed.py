"""How fast this machine multiplies, copies and decodes: `python -m edgetune.speed THREADS SECONDS` prints it as JSON.

    products   y = x W^T and dx = dy W in float32, 256 tokens with the gate projection of three models: GFLOP/s
    copy       between two arrays that no cache holds, bytes read and written: MB/s, MB = 1e6 bytes
    decoding   weights from each 4-bit grid into one float32 buffer, from codes that fill a cache: weights/s

Each is a list of samples, taken over SECONDS. torch measures where it is installed, because it trains; numpy stands in
on a device without it. A process of its own, so that threads and allocator are as training has them.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from edgetune.grids import GRIDS
from edgetune.products import fast_products

# tokens, in_features, out_features
PRODUCTS = {"smollm2-135m": (256, 576, 1536), "qwen2.5-0.5b": (256, 896, 4864), "llama-3.2-1b": (256, 2048, 8192)}
COPY_BYTES = 1 << 27  # of each array, or an eighth of the memory available
DECODED_SHAPE, DECODED_MATRICES = (1536, 576), 64  # 32 MiB of codes, as many as a small model has
SAMPLE_SECONDS = 0.02  # a sample takes at least so long, however short the work


def rates(work: Callable[[], object], amount: float, seconds: float) -> list[float]:
    """Samples of `amount` per second, where each call of `work` does so much; the first call is not counted."""
    work()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        started, calls = time.perf_counter(), 0
        while (took := time.perf_counter() - started) < SAMPLE_SECONDS:
            work()
            calls += 1
        samples.append(amount * calls / took)
    return samples


def measure(threads: int, seconds: float) -> dict[str, Any]:
    """All samples, by name, and the library that made them."""
    try:
        import torch
    except ModuleNotFoundError:
        return {"library": f"numpy {np.__version__}", **_measure(np.matmul, np.copyto, lambda array: array, seconds)}
    torch.set_num_threads(threads)

    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    with fast_products():
        return {"library": f"torch {torch.__version__}", **_measure(torch.mm, copy, torch.from_numpy, seconds)}


def _measure(
    multiply: Callable[..., Any], copy: Callable[[Any, Any], None], wrap: Callable[[np.ndarray], Any], seconds: float
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    products = {}
    for name, (tokens, inner, outer) in PRODUCTS.items():
        arrays = (rng.random(shape, np.float32) for shape in ((tokens, inner), (tokens, outer), (outer, inner)))
        x, y, weight = map(wrap, arrays)
        gigaflop = 2e-9 * tokens * inner * outer
        products[name] = {
            "forward": rates(functools.partial(multiply, x, weight.T, out=y), gigaflop, seconds),
            "backward": rates(functools.partial(multiply, y, weight, out=x), gigaflop, seconds),
        }
    count = min(COPY_BYTES, psutil.virtual_memory().available // 8) // 4
    source, target = (wrap(np.full(count, value, np.float32)) for value in (1, 2))
    copied = rates(functools.partial(copy, target, source), 2 * 4e-6 * count, seconds)
    return {
        "products_gflops": products,
        "copy_mb_s": copied,
        "decoded_weights_per_second": {grid: _decoding(grid, rng, seconds) for grid in GRIDS},
    }


def _decoding(grid: str, rng: np.random.Generator, seconds: float) -> list[float]:
    infos = GRIDS[grid].stored(DECODED_SHAPE)
    out, number = np.empty(DECODED_SHAPE, np.float32), 0

    def read(suffix: str) -> np.ndarray:
        """Bytes that are each two codes, scales of one, and a state that says nothing."""
        info = infos[suffix]
        if info.dtype == "U8":
            return rng.integers(0, 256, info.shape, np.uint8) if len(info.shape) > 1 else np.frombuffer(b"{}", np.uint8)
        return np.ones(info.shape, {"F16": np.float16, "F32": np.float32}[info.dtype])

    matrices = [GRIDS[grid].load(read) for _ in range(DECODED_MATRICES)]

    def decode() -> None:
        nonlocal number
        number = (number + 1) % DECODED_MATRICES
        GRIDS[grid].dequantize(matrices[number], DECODED_SHAPE, None, out)

    return rates(decode, out.size, seconds)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), float(sys.argv[2]))))
