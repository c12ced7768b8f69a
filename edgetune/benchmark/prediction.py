"""What another device is predicted to do, from its profile alone: a roofline for speed, power times seconds for energy.

Sources of the formulas: the roofline is Williams et al. 2009 (doi 10.1145/1498765.1498785) with a term for dispatch;
the sustained speed is the profile's `thermal.sustained_ratio`, which is defined as sustained over burst speed; energy
is E = P t, as in the planner, with the profile's `power.max_avg_mw`, the most that it may draw on average under load.
An average is not more than that, so energies are upper bounds for a device whose profile is right.
"""

from __future__ import annotations

from typing import Any

from edgetune.bundle import DATA, Bundle
from edgetune.device import NBITS, DeviceProfile
from edgetune.runtime.session import CHUNK

# Bytes in the data file per weight: the codes, and an fp32 scale per block of 32 or 64 (nf4); one per row is no byte.
BYTES_PER_WEIGHT = {
    "int4": 0.625, "standard": 0.625, "nf4": 0.5625, "int8": 1.125, "int8-dynamic": 1.0, "fp16": 2.0, "fp32": 4.0
}  # fmt: skip
# What a kernel reads and writes beside the file: nf4 an fp32 copy of each weight, fp16 what was widened at load.
WIDENED_BYTES = {"nf4": 8, "fp16": 2}
# Cycles that onnxruntime spends on a layer's nodes beside their arithmetic: 25 us a layer at 2.6 GHz on x86-64, one
# thread, a decoder of 48 hidden units with 1 to 32 layers.
DISPATCH_CYCLES_PER_LAYER = 65_000


def predict_latency(
    bundle: Bundle, device: DeviceProfile, prompt_tokens: int, new_tokens: int
) -> dict[str, float | None]:
    """Time to first token and generation speed on another device by a roofline; None where no honest figure exists.

    With W the number of weights, one pass over n tokens takes

        max(bytes / bandwidth, 2 W n / burst fp32 FLOP/s) + layers * 65,000 cycles / clock

    where bytes are the weights file and the KV cache, for nf4 also 8 W, since its kernel writes and reads an fp32 copy
    of each weight on every call, and for fp16 2 W; the cycles go into dispatching nodes. A prompt goes through in
    pieces, as in the session. It is the least time: attention, adapters and heat are left out. The sustained speed,
    once the device is hot, is the burst speed times `thermal.sustained_ratio`. Unknown: 4- and 8-bit weights where the
    profile has no kernel for them (the fallback is tens of times slower), and loading, which repacks the weights.
    """
    kind, model = bundle.manifest["weights"], bundle.model
    has_kernel = kind not in NBITS or device.runtime.int4_kernel
    if kind not in BYTES_PER_WEIGHT or not has_kernel:
        return {
            "time_to_first_token_ms": None, "generation_tokens_per_second": None, "sustained_tokens_per_second": None
        }  # fmt: skip
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
    rate = 1 / seconds(1, prompt_tokens + new_tokens / 2)
    return {
        "time_to_first_token_ms": 1e3 * sum(seconds(tokens, past) for tokens, past in pieces),
        "generation_tokens_per_second": rate,
        "sustained_tokens_per_second": rate * device.thermal.sustained_ratio,
    }


def predict_energy(
    device: DeviceProfile, time_to_first_token_ms: float | None, generation_tokens_per_second: float | None
) -> dict[str, Any]:
    """Energy and battery by P t, with P the profile's `power.max_avg_mw` and t the given times; mW s are mJ.

    `mj_per_prompt` and `mj_per_token` are None where the times are; `battery_percent_per_1000_tokens` and
    `tokens_per_charge` also where the device has no battery. `reason` says why. They are for generated tokens alone.
    """
    power_mw, battery_mwh = device.power.max_avg_mw, device.power.battery_mwh
    energy: dict[str, Any] = {
        "power_mw": power_mw, "battery_mwh": battery_mwh or None, "mj_per_prompt": None, "mj_per_token": None,
        "battery_percent_per_1000_tokens": None, "tokens_per_charge": None, "reason": None,
    }  # fmt: skip
    if time_to_first_token_ms is None or generation_tokens_per_second is None:
        return energy | {"reason": f"how long {device.id} takes is unknown, so its energy is too"}
    per_token = power_mw / generation_tokens_per_second
    energy |= {"mj_per_prompt": power_mw * time_to_first_token_ms / 1e3, "mj_per_token": per_token}
    if not battery_mwh:
        return energy | {"reason": f"{device.id} runs on mains: its profile has no battery"}
    battery_mj = 3600 * battery_mwh
    return energy | {
        "battery_percent_per_1000_tokens": 100 * 1000 * per_token / battery_mj,
        "tokens_per_charge": battery_mj / per_token,
    }
