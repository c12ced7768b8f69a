"""Which of torch's two libraries multiplies float32 matrices on a CPU: MKL, or oneDNN where that is faster.

On AMD processors MKL stays with 256-bit instructions; oneDNN's float32 kernels use 512 bits, and were 2.2 times as fast
on a Zen 5 (`benchmarks/LOG.md`). torch sends float32 products to oneDNN only where its setting *allows* rounding to
bfloat16 on the way. oneDNN does round in kernels for matrix units (AMX); without those the same setting reaches its
plain float32 kernels. So the setting is used only where there is no AMX, and only after a product that rounding would
change came out exact. Processors with AMX are Intel's, where MKL is as fast.

oneDNN writes code for each shape that it meets, about `CODE_BYTES`, and keeps it: so only products whose shapes come
again and again are worth it, and the planner counts them (`planner.costs`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from edgetune import host

CODE_BYTES = 600 << 10  # for each shape; 0.51 to 0.71 MiB measured with 64 to 256 rows of 64 to 1,536 columns
UNTOUCHED = 2.2  # times as much: address space that is reserved for it, 0.75 to 1.88 MiB a shape, and not used
SIZE = 128  # of the product that is looked at: oneDNN leaves matrices of up to 16 x 16 to others


def are_offered() -> bool:
    """Whether this processor is one for which a plan may count on fast products; torch is not asked."""
    isa = host.isa()
    return "avx512f" in isa and "amx_tile" not in isa


@contextlib.contextmanager
def fast_products(wanted: bool = True) -> Iterator[None]:
    """Float32 products of torch as fast as they are exact while the body runs, where that is `wanted`."""
    if not (wanted and _reaches_exact_kernels()):
        yield
        return
    with _rounding_allowed():
        yield


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Torch's own kernels alone while the body runs: for what comes in many shapes and goes to oneDNN by itself, which
    keeps code for each (gelu by erf; 65 KiB a shape, forward and backward).
    """
    import torch

    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def _rounding_allowed() -> Iterator[None]:
    import torch

    before = torch._C._get_fp32_precision_getter("mkldnn", "matmul")
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16")
    try:
        yield
    finally:
        torch._C._set_fp32_precision_setter("mkldnn", "matmul", before)


@functools.cache
def _reaches_exact_kernels() -> bool:
    """Whether a product keeps the thirteenth bit of its factors: bfloat16 has eight, tf32 eleven."""
    import torch

    if not (are_offered() and torch.backends.cpu.get_cpu_capability() == "AVX512" and torch._C._has_mkldnn):
        return False
    if not hasattr(torch._C, "_set_fp32_precision_setter"):  # a torch from before the setting
        return False
    fine, ones = torch.full((SIZE, SIZE), 1 + 2.0**-12), torch.ones(SIZE, SIZE)
    with _rounding_allowed():
        return bool((fine @ ones == SIZE * (1 + 2.0**-12)).all())
