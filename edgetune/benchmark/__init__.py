"""What a bundle costs to run, measured in child processes and set against a device profile's targets.

    worker       the process that is measured; process is its parent's side
    page_cache   cold starts; timeline is memory over time
    measuring    which passes are run, and the figures of them; soaking is the long one
    prediction   another device's speed and energy, from its profile
    verdicts     the profile's targets; gates are limits that fail a benchmark
    tables       text and Markdown; plots are the same as SVG; results is the JSON on disk

Figures measured here and figures predicted for another device have keys of their own (`predicted`, `energy` and
`predicted_lengths` hold no measured one) and never share a column.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgetune import host
from edgetune.benchmark.gates import check_gates, parse_gates
from edgetune.benchmark.measuring import (
    Settings,
    measure_comparison,
    measure_loads,
    measure_soak,
    measure_speed,
)
from edgetune.benchmark.prediction import predict_energy, predict_latency
from edgetune.benchmark.results import FORMAT_VERSION
from edgetune.benchmark.tables import explain
from edgetune.benchmark.verdicts import judge
from edgetune.bundle import MANIFEST, Bundle, load_bundle
from edgetune.device import DeviceProfile, load_device
from edgetune.errors import ConfigError
from edgetune.weights import sha256_file

__all__ = ["bench", "check_gates", "explain"]

PROMPT_TOKENS = (16, 128, 512)
STEADY_PERCENT = 5.0  # runs that vary by more are no figure to quote


def bench(
    bundle: Bundle | str | Path,
    device: DeviceProfile | str | Path,
    *,
    prompt_tokens: int | Sequence[int] | None = None,
    new_tokens: int = 64,
    runs: int = 5,
    warmup: int = 1,
    soak: float = 0,
    compare: Bundle | str | Path | None = None,
    fail_if: str | Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a bundle in child processes and judge it by the targets of `device`.

    Prompts are seeded random tokens of the lengths `prompt_tokens` (16, 128 and 512), cut to what leaves room for
    `new_tokens` in the context, which `notices` says. The result holds
    - latencies of the length nearest to 128: medians over `runs` after `warmup` unmeasured ones, percentiles (`p50_ms`,
      `p90_ms`, …) over generated tokens; `variation_percent` is how far runs differ, the standard deviation of the
      generation speed over its mean; `lengths` has every length, `past` the time of a token at 64 and 1024 past ones;
    - memory, anonymous + swap with the floor included: `load_peak_bytes` while opening the bundle, `peak_memory_bytes`
      over that and the passes (`peak_rss_bytes` counts mapped files too, `peak_file_backed_bytes` them alone),
      `floor_bytes` after the imports; `memory` is their course;
    - `load_ms`, from a warm page cache: checking the hashes (`check_ms` of it), the session and the tokenizer;
      `cold_load_ms` after the bundle's files were dropped from it, None where `loads` says why that is impossible;
    - `adapter_overhead_percent`: time per token with against without the adapter fed to one session, measured in turns
      (the empty slots of the graph are in both); `adapter` is the bundle's default one, which was measured; both None
      where it has none of `adapters` as its default, and the base alone was measured;
    - `soak` where that is a number of seconds, `compare` with another bundle in turns (ratios are this / other);
    - `predicted` and `predicted_lengths`: the roofline's figures where the device is another one; `energy`, by the
      profile's power, from those times, on `host` from the measured ones;
    - `verdict`: target -> value, wanted, pass (None = unknown) and basis (measured, predicted, unknown);
    - `gates`: what each of `fail_if` came to; `check_gates` raises where one failed.

    Raises ConfigError, DeviceError, BundleError and what else opening a bundle raises.
    """
    say = say or (lambda text: None)
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    device = device if isinstance(device, DeviceProfile) else load_device(device)
    other = compare if isinstance(compare, Bundle | None) else load_bundle(compare)
    gates = parse_gates((fail_if,) if isinstance(fail_if, str) else fail_if, soak=soak > 0, compare=other is not None)
    for name, value, least in (("runs", runs, 1), ("warmup", warmup, 0), ("soak", soak, 0)):
        if not value >= least:
            raise ConfigError(f"{name} is {value}, expected at least {least}")
    contexts = [one.model.max_position_embeddings - one.virtual_tokens for one in (bundle, other) if one is not None]
    lengths, notices = _fit(prompt_tokens, new_tokens, min(contexts))
    threads = min(device.compute.threads, host.threads())
    settings = Settings(lengths, new_tokens, runs, warmup, threads, contexts[0])
    result: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "measured_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bundle": str(bundle.folder),
        "weights": bundle.manifest["weights"], "adapter": bundle.default_adapter, "adapters": list(bundle.adapters),
        "device": device.id, "prompt_tokens": settings.main_prompt_tokens,
        "new_tokens": new_tokens, "runs": runs, "warmup": warmup, "threads": threads,
    }  # fmt: skip
    say("loading it, cold and warm")
    result |= measure_loads(bundle.folder, [*bundle.manifest["files"], MANIFEST], threads, runs)
    say(f"{runs} runs at {', '.join(map(str, lengths))} prompt tokens")
    result |= measure_speed(bundle.folder, settings)
    result |= {"bundle_bytes": bundle.nbytes, "manifest_sha256": sha256_file(bundle.folder / MANIFEST)}
    result["compare"] = result["soak"] = None
    if other is not None:
        say(f"in turns with {other.folder}")
        compared = measure_comparison(bundle.folder, other.folder, settings)
        result["compare"] = {"bundle": str(other.folder), "bundle_bytes": other.nbytes, **compared}
    if soak:
        result["soak"] = measure_soak(bundle.folder, settings, soak, say)
    result |= _predicted(bundle, device, settings, result)
    result["verdict"] = judge(result, device)
    result["gates"] = [gate.judge(result) for gate in gates]
    result["notices"] = notices + _warnings(result)
    return result


def _fit(wanted: int | Sequence[int] | None, new_tokens: int, context: int) -> tuple[tuple[int, ...], list[str]]:
    """Lengths that leave room for the answer, ascending, and a notice where some were cut.

    Raises ConfigError where one is none, or nothing leaves room.
    """
    lengths = PROMPT_TOKENS if wanted is None else (wanted,) if isinstance(wanted, int) else tuple(wanted)
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"prompt_tokens is {min(lengths, default='empty')}, expected at least 1")
    if new_tokens < 2:
        raise ConfigError(f"new_tokens is {new_tokens}, expected at least 2")
    room = context - new_tokens
    if room < 1:
        raise ConfigError(
            f"{new_tokens} new tokens leave no room for a prompt in the context of {context}; ask for fewer"
        )
    cut = [str(count) for count in sorted(set(lengths)) if count > room]
    notice = (
        f"prompt length{'s' if len(cut) > 1 else ''} {' and '.join(cut)} cut to {room}: the context holds {context} "
        f"tokens, {new_tokens} of them new"
    )
    return tuple(sorted({min(count, room) for count in lengths})), [notice] if cut else []


def _predicted(bundle: Bundle, device: DeviceProfile, settings: Settings, measured: dict[str, Any]) -> dict[str, Any]:
    """`predicted`, `predicted_lengths` and `energy`; on `host` nothing but energy is."""
    if device.kind == "host":
        times, lengths, predicted = measured, [], {}
    else:
        shapes = {count: (count, settings.new_tokens) for count in settings.prompt_tokens}
        by_length = {count: predict_latency(bundle, device, *shape) for count, shape in shapes.items()}
        lengths = [{"prompt_tokens": count, **found} for count, found in by_length.items()]
        times = predicted = by_length[settings.main_prompt_tokens]
    energy = predict_energy(device, times["time_to_first_token_ms"], times["generation_tokens_per_second"])
    return {"predicted": predicted, "predicted_lengths": lengths, "energy": energy}


def _warnings(result: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know of them."""
    found = []
    if result["variation_percent"] > STEADY_PERCENT:
        found.append(
            f"runs differ by {result['variation_percent']:.0f} % (standard deviation over mean): the machine is busy "
            f"or hot. More --runs on an idle machine give figures to quote"
        )
    soak = result["soak"]
    if soak is not None and soak["slowed"]:
        ratio, window = f"{soak['sustained_ratio']:.0%}", f"{soak['window_s']:.3g} s"
        found.append(f"the speed fell to {ratio} of the first {window}: throttled, or beside another program")
    if result["cold_load_ms"] is None:
        found.append(f"no cold load: {result['loads']['cold_reason']}")
    if result["adapters"] and result["adapter"] is None:
        found.append(
            f"the base alone was measured, for none of the bundle's adapters ({', '.join(result['adapters'])}) is its "
            f"default: `edgetune adapter default {result['bundle']} {result['adapters'][0]}` makes one so"
        )
    return found
