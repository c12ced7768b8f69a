"""What every client of a bundle does before its first call: choose an adapter's tensors, and load the graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgetune import host
from edgetune.adapter_file import is_name
from edgetune.bundle import MODEL, AnyBundle, load_adapter_tensors
from edgetune.errors import BundleError, ConfigError
from edgetune.output import folder_in_progress
from edgetune.runtime.prepacked import MANIFEST, align, find, identity, save_to, write_manifest

ARENA_ALIGNMENT = 256
ARENA_EXTENSION_BYTES = 1 << 24

# How long a thread of a training graph waits awake for its next node. Steps of the SmolLM2-135M shape over 256 tokens
# are 10 % faster by it on two free cores, and 4 to 10 % slower beside a busy process; with 100 us 20 % slower there.
SPIN_MICROSECONDS = 20


def is_file(adapter: bool | str | Path) -> bool:
    """Whether this means a file, and no adapter of the bundle."""
    return isinstance(adapter, Path) or (isinstance(adapter, str) and not is_name(adapter))


def adapter_tensors(bundle: AnyBundle[Any], adapter: bool | str | Path) -> dict[str, np.ndarray]:
    """The feeds of an adapter, checked: True is the bundle's default, False none, a name one of the bundle's.

    Raises AdapterError.
    """
    if adapter is False:
        return {}
    if isinstance(adapter, bool):
        return bundle.adapter_tensors()
    return load_adapter_tensors(bundle, adapter) if is_file(adapter) else bundle.adapter_tensors(str(adapter))


def load_graph(
    bundle: AnyBundle[Any], threads: int | None, *, fp32_compute: bool, prepacked: str | Path | None = None
) -> onnxruntime.InferenceSession:
    """Onnxruntime's session on a graph that is called with many shapes. `threads` None is all that there are.

    `fp32_compute` makes kernels that round activations to int8 compute in fp32, where they can. `prepacked` is a folder
    for packed weights: written by the first call, mapped by later ones.
    Raises BundleError where onnxruntime does not take the graph; ConfigError for less than one thread, or a folder
    that cannot be written or holds something else.
    """
    threads = host.threads() if threads is None else threads
    if threads < 1:
        raise ConfigError(f"threads is {threads}, expected at least 1; leave it out to use every core")
    if prepacked is None:
        return _session(bundle.model_path, _options(threads, fp32_compute=fp32_compute))
    folder, wanted = Path(prepacked), identity(bundle, fp32_compute=fp32_compute)
    if find(folder, wanted) is None:
        with folder_in_progress(folder, MANIFEST, force=True) as temporary:
            options = _options(threads, fp32_compute=fp32_compute)
            save_to(options, temporary)
            _session(bundle.model_path, options)
            align(temporary)
            write_manifest(temporary, wanted)
    return _session(folder / MODEL, _options(threads, fp32_compute=fp32_compute))


def load_part(path: Path, threads: int, arena_bytes: int) -> onnxruntime.InferenceSession:
    """Onnxruntime's session on one of several graphs that run one after the other, on weights that are fed.

    `arena_bytes` is what the largest of them is expected to need; what the first one says counts.
    Raises BundleError where onnxruntime does not take it.
    """
    options = _options(threads)
    _share_arena(arena_bytes)
    options.enable_cpu_mem_arena = True
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Threads that wait awake between two parts would do so on the cores that the next part needs. One pool for all
    # parts is no way: a process that has one can make no session with threads of its own any more.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    # Which sums become part of a product would depend on the rest of the graph, and so would the last bits of both.
    return _session(path, options, without=["MatMulAddFusion"])


_arena_is_shared = False


def _share_arena(num_bytes: int) -> None:
    """One arena for all parts that are loaded: they run one after the other, so it holds what the largest needs.

    Without it every weight that a call dequantizes is memory fresh from the system, page by page: 1.04 against 0.44 s
    for eight blocks of the SmolLM2-135M shape, forward and backward over 128 tokens, at the same peak.

    All of it is one range of addresses, in which free neighbours are joined; grown piece by piece it would stay in
    pieces. A page of it is memory from when it is first used. What is needed beyond the range is a second one.
    """
    global _arena_is_shared
    if _arena_is_shared:
        return
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    one_range = {
        "max_mem": 0, "arena_extend_strategy": 0, "initial_chunk_size_bytes": num_bytes,
        "max_dead_bytes_per_chunk": ARENA_ALIGNMENT, "max_power_of_two_extend_bytes": ARENA_EXTENSION_BYTES,
    }  # fmt: skip
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(one_range))
    _arena_is_shared = True


def _options(threads: int, *, fp32_compute: bool = False) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # the graph is a chain: there is nothing to run side by side
    options.log_severity_level = 3  # errors only: an input that may be left out is a warning to onnxruntime
    # Calls differ in shape, so a memory pattern is never used twice. The arena keeps what the longest call needed: 103
    # against 55 MiB anonymous after a prompt of 128 tokens on a 6-layer nf4 decoder, at no gain in speed.
    options.enable_mem_pattern = options.enable_cpu_mem_arena = False
    if fp32_compute:
        options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
    return options


def _session(
    path: Path, options: onnxruntime.SessionOptions, without: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    """`without` names graph optimizations that are left out."""
    providers = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers, disabled_optimizers=list(without))
    except Exception as error:  # the exceptions of onnxruntime share no other base
        reason = str(error).strip().partition("\n")[0][:300]
        raise BundleError(
            f"onnxruntime {onnxruntime.__version__} cannot load {path}: {reason}. Export the bundle "
            f"again, or install the onnxruntime that it was exported for"
        ) from error
