"""Each target of a profile against what was measured, or predicted where the profile is of another device.

A figure measured here says nothing about another device. Two carry over: the size of the bundle is a property of the
file (measured), and memory measured here is taken as the prediction for the device, because it depends on the graph and
on onnxruntime far more than on the processor.
"""

from __future__ import annotations

from typing import Any

from edgetune.device import DeviceProfile
from edgetune.memory import MIB


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
