"""What this machine can do: libraries, kernels, instruction set, memory and its limits, and whether training works.

Nothing that may crash runs in this process. torch and bitsandbytes are tried in a child each, because a wheel built for
newer cores imports and then dies of SIGILL at its first kernel; the child's end says so, and the report goes on. The
NF4 result is compared with the plain numpy reading in `grids.nf4`.

Left out: speed. `calibration` measures that of this machine, `edgetune bench` that of a bundle.
"""

from __future__ import annotations

import os
import platform
import resource
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from edgetune import __version__, host
from edgetune.cgroup import cgroup_state, check_cgroup
from edgetune.device import ISA
from edgetune.errors import ConfigError
from edgetune.extras import EXTRAS
from edgetune.memory import format_mib, has_data_limit

CORE = ("numpy", "onnxruntime", "tokenizers", "safetensors", "psutil", "jinja2", "typer", "rich")
# Operators of the exported graphs that not every build of onnxruntime has.
KERNELS = {
    "MatMulNBits": "int4 and int8 linears",
    "MatMulBnb4": "nf4 linears",
    "GatherBlockQuantized": "int4 and int8 embedding",
    "FusedMatMul": "dense tied head",
    "GroupQueryAttention": "attention with a KV cache",
    "RMSNormalization": "norms",
}
SELF_TEST_SECONDS = 120  # torch alone takes more than 10 s to import on a small board
_NOT_INSTALLED = "not installed"

_TORCH_TEST = """
import torch
x = torch.arange(6.0).reshape(2, 3).requires_grad_()
(x @ x.T).sum().backward()
assert x.grad.tolist() == [[6.0, 10.0, 14.0], [6.0, 10.0, 14.0]], x.grad
print(torch.__version__)
"""
# Rows of 16 in blocks of 64: bitsandbytes 0.50 reads those back wrong with AVX-512 (so does it any row length that is a
# multiple of 16 and not of 64). edgetune reads codes itself, so that is told and does not fail the test.
_BITSANDBYTES_TEST = """
import numpy as np, torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from edgetune.grids.nf4 import LEVELS
weight = np.random.default_rng(0).standard_normal((16, 16), dtype=np.float32)
codes, state = quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
blocks = weight.reshape(-1, 64)
absmax = np.abs(blocks).max(1)
nearest = np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, blocks / absmax[:, None]).reshape(-1, 2)
assert np.array_equal(state.absmax.numpy(), absmax), "absmax is not the largest value of each block"
wrong = (codes.numpy().reshape(-1) != nearest[:, 0] * 16 + nearest[:, 1]).sum()
assert wrong == 0, f"{wrong} of {codes.numel()} codes are not the nearest level"
expected = (LEVELS[nearest].reshape(-1, 64) * absmax[:, None]).reshape(weight.shape)
right = np.array_equal(dequantize_4bit(codes, state).numpy(), expected)
print("codes and absmax are right" if right else
      "codes and absmax are right; its own dequantize_4bit is wrong here for rows of 16, which edgetune does not use")
"""


def examine() -> dict[str, Any]:
    """Everything that `edgetune doctor` reports, as plain values for JSON. Bytes are ints."""
    libraries = {name: _library(name, None) for name in CORE} | {name: _library(name, e) for name, e in EXTRAS.items()}
    self_tests = {
        "torch": _self_test("torch", _TORCH_TEST),
        "bitsandbytes": _self_test("bitsandbytes", _BITSANDBYTES_TEST),
    }
    missing = [name for name, library in libraries.items() if library["extra"] == "train" and not library["version"]]
    return {
        "edgetune": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": _machine(),
        "limits": {"cgroup": cgroup_state(), "rlimit_data_bytes": _rlimit_data()},
        "enforcement": _enforcement(),
        "libraries": libraries,
        "kernels": _kernels(),
        "self_tests": self_tests,
        "can_run": bool(libraries["onnxruntime"]["version"]),
        "can_train": not missing and all(test["passed"] for test in self_tests.values()),
    }


def explain(report: dict[str, Any]) -> str:
    """The report for people."""
    machine, limits, kernels = report["machine"], report["limits"], report["kernels"]
    cgroup, soft = limits["cgroup"], limits["rlimit_data_bytes"]["soft"]
    held = "none" if not cgroup["version"] else (
        f"version {cgroup['version']}, {'may be' if cgroup['writable'] else 'may not be'} set here, "
        f"limit {_size(cgroup['limit_bytes'])}"
    )  # fmt: skip
    lines = [
        f"edgetune {report['edgetune']} on Python {report['python']}, {report['platform']}",
        "",
        f"  processor     {machine['arch']}, {machine['usable_cores']} of {machine['cores']} cores; "
        f"{' '.join(machine['isa']) or 'extensions unknown'}",
        f"  memory        {format_mib(machine['memory_available_bytes'])} available of "
        f"{format_mib(machine['memory_total_bytes'])}, swap {format_mib(machine['swap_bytes'])}",
        f"  cgroup        {held}",
        f"  RLIMIT_DATA   {_size(soft)}; a run may lower it for itself",
        "",
        "  what can hold a run to its budget: train --enforce",
        *(
            f"    {level:<12}{'can' if why is None else f'CANNOT  {why}'}"
            for level, why in report["enforcement"].items()
        ),
        "",
        *(_library_line(name, library) for name, library in report["libraries"].items()),
        "",
        "  operators of onnxruntime on the processor",
    ]
    if kernels is None:
        lines.append("    unknown: this onnxruntime does not list them")
    else:
        lines += [f"    {'has' if kernels[name] else 'LACKS':<6}{name:<22}{use}" for name, use in KERNELS.items()]
    lines += ["", "  self-tests, each in a process of its own"]
    for name, test in report["self_tests"].items():
        word = "passed" if test["passed"] else "absent" if test["detail"] == _NOT_INSTALLED else "FAILED"
        lines.append(f"    {word:<8}{name:<14}{test['detail']}")
    can = [f"{verb} {'yes' if report[key] else 'no'}" for verb, key in (("run", "can_run"), ("train", "can_train"))]
    return "\n".join([*lines, "", f"  this machine can: {', '.join(can)}"])


def _size(num_bytes: int | None) -> str:
    return "unlimited" if num_bytes is None else format_mib(num_bytes)


def _library_line(name: str, library: dict[str, str | None]) -> str:
    return f"  {name:<17} {library['version'] or 'missing: ' + str(library['install'])}"


def _library(name: str, extra: str | None) -> dict[str, str | None]:
    try:
        found: str | None = version(name)
    except PackageNotFoundError:
        found = None
    install = f"pip install 'edgetune[{extra}]'" if extra else "pip install edgetune"
    return {"version": found, "extra": extra, "install": None if found else install}


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    return {
        "arch": host.arch(),
        "isa": [name for name in ISA if name in host.isa()],
        "cores": os.cpu_count(),
        "usable_cores": host.threads(),
        "memory_total_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "swap_bytes": psutil.swap_memory().total,
    }


def _rlimit_data() -> dict[str, int | None]:
    """The limits of this process on private writable memory; None is unlimited. The soft one may be lowered freely."""
    soft, hard = (
        None if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(resource.RLIMIT_DATA)
    )
    return {"soft": soft, "hard": hard}


def _enforcement() -> dict[str, str | None]:
    """Level -> why it cannot be had here; None where it can."""
    found: dict[str, str | None] = {"governor": None, "rlimit": None, "cgroup": None}
    if not has_data_limit():
        found["rlimit"] = "this system has no RLIMIT_DATA that counts private memory"
    try:
        check_cgroup()
    except ConfigError as error:
        found["cgroup"] = str(error)
    return found


def _kernels() -> dict[str, bool] | None:
    """Operator -> whether the CPU provider has it; None where this onnxruntime does not tell."""
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
    except ImportError:  # not part of onnxruntime's public interface
        return None
    found = {kernel.op_name for kernel in get_all_opkernel_def() if kernel.provider == "CPUExecutionProvider"}
    return {name: name in found for name in KERNELS}


def _self_test(name: str, code: str) -> dict[str, Any]:
    """Run `code` in a child; whether it ended well, and how it ended."""
    try:
        version(name)
    except PackageNotFoundError:
        return {"passed": False, "detail": _NOT_INSTALLED}
    command = [sys.executable, "-W", "ignore", "-c", code]
    try:
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SELF_TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return {"passed": False, "detail": f"no answer within {SELF_TEST_SECONDS} s"}
    if child.returncode == 0:
        return {"passed": True, "detail": _last_line(child.stdout)}
    if child.returncode < 0:
        number = -child.returncode
        known = {s.value: s.name for s in signal.Signals}
        hint = ": built for a newer processor than this one" if number == signal.SIGILL else ""
        return {"passed": False, "detail": f"killed by {known.get(number, f'signal {number}')}{hint}"}
    return {"passed": False, "detail": _last_line(child.stderr) or f"ended with code {child.returncode}"}


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else ""
