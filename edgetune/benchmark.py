"""What a bundle costs to run, measured in a child process and set against a device profile's targets.

The child imports only what a device has, is pinned to as many cores as the profile has threads (fewer where this
machine has fewer), and prints one JSON object. So nothing that the caller holds in memory counts.

A figure measured here says nothing about another device. Where the profile is not `host`, latencies are predicted from
its compute and bandwidth by a roofline (`predict_latency`) or unknown, and each verdict says so in `basis`. Two figures
carry over: the size of the bundle is a property of the file (measured), and memory measured here is taken as the
prediction for the device, because it depends on the graph and on onnxruntime far more than on the processor.

Left out: cold caches, long runs, energy, several prompt lengths.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime

from edgetune import errors, host
from edgetune.bundle import DATA, Bundle, load_bundle
from edgetune.device import NBITS, DeviceProfile, load_device
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.memory import MIB, Meter, anonymous_bytes, format_mib
from edgetune.runtime.session import CHUNK, Session, open_session
from edgetune.tokenizer import load_tokenizer

# Bytes in the data file per weight: the codes, and an fp32 scale per block of 32 or 64 (nf4); one per row is no byte.
BYTES_PER_WEIGHT = {
    "int4": 0.625, "standard": 0.625, "nf4": 0.5625, "int8": 1.125, "int8-dynamic": 1.0, "fp16": 2.0, "fp32": 4.0
}  # fmt: skip
# What a kernel reads and writes beside the file: nf4 an fp32 copy of each weight, fp16 what was widened at load.
WIDENED_BYTES = {"nf4": 8, "fp16": 2}
# Cycles that onnxruntime spends on a layer's nodes beside their arithmetic: 25 us a layer at 2.6 GHz on x86-64, one
# thread, a decoder of 48 hidden units with 1 to 32 layers.
DISPATCH_CYCLES_PER_LAYER = 65_000
PROMPT_TOKENS = 128
REFUSED = 3  # exit code of a child that printed an EdgetuneError as JSON


def bench(
    bundle: Bundle | str | Path,
    device: DeviceProfile | str | Path,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = 64,
    runs: int = 5,
    warmup: int = 1,
) -> dict[str, Any]:
    """Measure a bundle in a child process and judge it by the targets of `device`.

    The prompt is seeded random tokens: 128 where `prompt_tokens` is None, or as many as leave room in the context for
    the answer. The result holds
    - latencies, medians over `runs` after `warmup` unmeasured ones; `p50_ms` and `p95_ms` are per generated token;
    - memory, anonymous + swap with the floor included: `load_peak_bytes` while opening the bundle, `peak_memory_bytes`
      over everything (`peak_rss_bytes` counts mapped files too), `floor_bytes` after the imports;
    - `load_ms`, from a warm page cache: checking the hashes (`check_ms` of it), the session and the tokenizer;
    - `adapter_overhead_percent`: time per token with against without the adapter fed to one session, measured in turns
      (the empty slots of the graph are in both); None where the bundle has no adapter;
    - `predicted`: the roofline's figures where the device is another one;
    - `verdict`: target -> value, wanted, pass (None = unknown) and basis (measured, predicted, unknown).

    Raises ConfigError, DeviceError, BundleError and what else opening a bundle raises.
    """
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    device = device if isinstance(device, DeviceProfile) else load_device(device)
    context = bundle.model.max_position_embeddings
    prompt = max(1, min(PROMPT_TOKENS, context - new_tokens)) if prompt_tokens is None else prompt_tokens
    settings = {"prompt_tokens": prompt, "new_tokens": new_tokens, "runs": runs, "warmup": warmup}
    for name, least in (("prompt_tokens", 1), ("new_tokens", 2), ("runs", 1), ("warmup", 0)):
        if settings[name] < least:
            raise ConfigError(f"{name} is {settings[name]}, expected at least {least}")
    if new_tokens >= context:
        raise ConfigError(
            f"{new_tokens} new tokens leave no room for a prompt in the context of {context}; ask for fewer"
        )
    if prompt + new_tokens > context:
        raise ConfigError(
            f"{prompt} prompt and {new_tokens} new tokens do not fit the context of {context}; ask for fewer"
        )
    settings["threads"] = min(device.compute.threads, host.threads())
    measured = _run_child(bundle.folder, settings)
    result = {"bundle": str(bundle.folder), "device": device.id, **settings, **measured, "bundle_bytes": bundle.nbytes}
    elsewhere = device.kind != "host"
    result["predicted"] = predict_latency(bundle, device, prompt, new_tokens) if elsewhere else {}
    result["verdict"] = judge(result, device)
    return result


def predict_latency(
    bundle: Bundle, device: DeviceProfile, prompt_tokens: int, new_tokens: int
) -> dict[str, float | None]:
    """Time to first token and generation speed on another device by a roofline; None where no honest figure exists.

    With W the number of weights, one pass over n tokens takes

        max(bytes / bandwidth, 2 W n / burst fp32 FLOP/s) + layers * 65,000 cycles / clock

    where bytes are the weights file and the KV cache, for nf4 also 8 W, since its kernel writes and reads an fp32 copy
    of each weight on every call, and for fp16 2 W; the cycles go into dispatching nodes. A prompt goes through in
    pieces, as in the session. It is the least time: attention, adapters and heat are left out. Unknown: 4- and 8-bit
    weights where the profile has no kernel for them (the fallback is tens of times slower), and loading, which repacks
    the weights.
    """
    kind, model = bundle.manifest["weights"], bundle.model
    has_kernel = kind not in NBITS or device.runtime.int4_kernel
    if kind not in BYTES_PER_WEIGHT or not has_kernel:
        return {"time_to_first_token_ms": None, "generation_tokens_per_second": None}
    file_bytes: int = bundle.manifest["files"][DATA]["bytes"]
    weights = file_bytes / BYTES_PER_WEIGHT[kind]
    cache_bytes_per_token = 2 * 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim

    clock_hz = 1e3 * max(cluster.khz for cluster in device.cpu.cluster)
    dispatch_s = model.num_hidden_layers * DISPATCH_CYCLES_PER_LAYER / clock_hz

    def seconds(tokens: int, past: float) -> float:
        num_bytes = file_bytes + past * cache_bytes_per_token + WIDENED_BYTES.get(kind, 0) * weights
        compute_s = 2 * weights * tokens / (device.compute.gflops_fp32_burst * 1e9)
        return max(num_bytes / (device.compute.mem_bw_mb_s * 1e6), compute_s) + dispatch_s

    pieces = [(min(CHUNK, prompt_tokens - start), start) for start in range(0, prompt_tokens, CHUNK)]
    return {
        "time_to_first_token_ms": 1e3 * sum(seconds(tokens, past) for tokens, past in pieces),
        "generation_tokens_per_second": 1 / seconds(1, prompt_tokens + new_tokens / 2),
    }


def judge(result: dict[str, Any], device: DeviceProfile) -> dict[str, dict[str, Any]]:
    """Each target that the profile sets, and its memory budget: value, wanted, pass, basis (the module's rule)."""
    here = device.kind == "host"
    verdict: dict[str, dict[str, Any]] = {}
    for name in ("time_to_first_token_ms", "generation_tokens_per_second", "load_ms"):
        wanted: float | None = getattr(device.targets, name)
        if wanted is not None:
            value = result[name] if here else result["predicted"].get(name)
            verdict[name] = _verdict(value, wanted, here, more_is_better=name.endswith("per_second"))
    if device.targets.bundle_mib is not None:
        verdict["bundle_mib"] = _verdict(result["bundle_bytes"] / MIB, device.targets.bundle_mib, measured=True)
    verdict["peak_memory_bytes"] = _verdict(result["peak_memory_bytes"], device.memory.budget_mib * MIB, here)
    return verdict


def _verdict(value: float | None, wanted: float, measured: bool, more_is_better: bool = False) -> dict[str, Any]:
    if value is None:
        return {"value": None, "wanted": wanted, "pass": None, "basis": "unknown"}
    passed = value >= wanted if more_is_better else value <= wanted
    return {"value": value, "wanted": wanted, "pass": passed, "basis": "measured" if measured else "predicted"}


def explain(result: dict[str, Any]) -> str:
    """The result of `bench` as a table for people: what was measured here, then the verdict on the device."""
    overhead, machine = result["adapter_overhead_percent"], result["machine"]
    peak, resident = format_mib(result["peak_memory_bytes"]), format_mib(result["peak_rss_bytes"])
    rows = {
        "load": f"{result['load_ms']:,.0f} ms, of them {result['check_ms']:,.0f} for checking hashes",
        "load peak": f"{format_mib(result['load_peak_bytes'])}, of them floor {format_mib(result['floor_bytes'])}",
        "time to first token": f"{result['time_to_first_token_ms']:,.1f} ms",
        "prompt": f"{result['prompt_tokens_per_second']:,.1f} tokens/s",
        "generation": f"{result['generation_tokens_per_second']:,.1f} tokens/s",
        "per token p50 / p95": f"{result['p50_ms']:.2f} / {result['p95_ms']:.2f} ms",
        "peak memory": f"{peak} anonymous + swap, {resident} resident with mapped files",
        "bundle": format_mib(result["bundle_bytes"]),
        "adapter overhead": "no adapter" if overhead is None else f"{overhead:+.1f} %",
    }
    lines = [
        f"{result['bundle']}: {result['prompt_tokens']} prompt and {result['new_tokens']} new tokens, "
        f"{result['runs']} runs",
        f"measured here ({machine['cpu']}, {result['threads']} of {machine['cores']} cores, "
        f"onnxruntime {machine['onnxruntime']}):",
        *(f"  {name:<21} {text}" for name, text in rows.items()),
        f"verdict for {result['device']}:",
    ]
    for name, entry in result["verdict"].items():
        word = {True: "pass", False: "FAIL", None: "unknown"}[entry["pass"]]
        value, wanted = (_for_people(name, entry[key]) for key in ("value", "wanted"))
        lines.append(f"  {name:<30} {value:>11}   wanted {wanted:>11}   {word:<7} {entry['basis']}")
    return "\n".join(lines)


def _for_people(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return format_mib(value) if name.endswith("_bytes") else f"{value:,.1f}"


def _run_child(folder: Path, settings: dict[str, int]) -> dict[str, Any]:
    """Run this module on the bundle in a fresh process; the figures that it printed."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    source = str(Path(__file__).parents[1])  # the caller's own code, whatever is installed
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    child = subprocess.run(
        [sys.executable, "-m", "edgetune.benchmark", str(folder.absolute()), *flags],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(settings["threads"])},
    )  # fmt: skip
    if child.returncode == 0:
        measured: dict[str, Any] = json.loads(child.stdout)
        return measured
    if child.returncode == REFUSED:
        refusal = json.loads(child.stdout)
        raise getattr(errors, refusal["error"])(refusal["message"])
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    raise EdgetuneError(
        f"the benchmark's process ended with code {child.returncode} ({last}); a negative code is a signal, -9 mostly "
        f"a lack of memory. `edgetune run {folder}` shows whether the bundle works at all"
    )


def _measure(
    folder: str, *, threads: int, prompt_tokens: int, new_tokens: int, runs: int, warmup: int
) -> dict[str, Any]:
    """All measured figures, in the process that calls this."""
    floor_bytes = anonymous_bytes()
    with Meter() as meter:
        start = time.perf_counter()
        bundle = load_bundle(folder)
        checked = time.perf_counter()
        session = open_session(bundle, threads=threads)
        if bundle.manifest["tokenizer_sha256"] is not None:
            load_tokenizer(bundle.folder)
        loaded = time.perf_counter()
        load_peak_bytes = max(meter.now_bytes, meter.peak_bytes)
        ids = np.random.default_rng(0).integers(0, bundle.model.vocab_size, prompt_tokens)
        for _ in range(warmup):
            _time_pass(session, ids, new_tokens)
        first, rest, rest_of_base = [], [], []
        for _ in range(runs):
            session.use_adapter(True)
            seconds = _time_pass(session, ids, new_tokens)
            first.append(seconds[0])
            rest.append(seconds[1:])
            if session.has_adapter:
                session.use_adapter(False)
                rest_of_base += _time_pass(session, ids, new_tokens)[1:]
    every = np.concatenate(rest)
    return {
        "load_ms": 1e3 * (loaded - start),
        "check_ms": 1e3 * (checked - start),
        "load_peak_bytes": load_peak_bytes,
        "time_to_first_token_ms": 1e3 * median(first),
        "prompt_tokens_per_second": prompt_tokens / median(first),
        "generation_tokens_per_second": median(len(one) / sum(one) for one in rest),
        "p50_ms": 1e3 * float(np.percentile(every, 50)),
        "p95_ms": 1e3 * float(np.percentile(every, 95)),
        "peak_memory_bytes": meter.peak_bytes,
        "peak_rss_bytes": meter.peak_rss_bytes,
        "floor_bytes": floor_bytes,
        "adapter_overhead_percent": 100 * (median(every) / median(rest_of_base) - 1) if rest_of_base else None,
        "machine": _machine(),
    }


def _time_pass(session: Session, ids: np.ndarray, new_tokens: int) -> list[float]:
    """Seconds to the first greedy token after `ids`, then seconds for each token after it; from an empty cache."""
    session.reset()
    times = [time.perf_counter()]
    pending: Sequence[int] | np.ndarray = ids
    for _ in range(new_tokens):
        pending = [int(session.forward(pending).argmax())]
        times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return {
        "cpu": name[1] if name else platform.processor() or host.arch(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The child: `python -m edgetune.benchmark bundle/ --threads=2 …`; one JSON object on stdout."""
    parser = argparse.ArgumentParser(prog="edgetune.benchmark")
    parser.add_argument("folder")
    for name in ("threads", "prompt-tokens", "new-tokens", "runs", "warmup"):
        parser.add_argument(f"--{name}", type=int, required=True)
    settings = vars(parser.parse_args(arguments))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["threads"]])
    code = 0
    try:
        answer = _measure(**settings)
    except EdgetuneError as error:
        answer, code = {"error": type(error).__name__, "message": str(error)}, REFUSED
    sys.stdout.write(json.dumps(answer) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
