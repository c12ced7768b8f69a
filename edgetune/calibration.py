"""The machine that runs this, measured once, as a device profile: `edgetune doctor --calibrate`.

    host-calibrated.toml               extends `host` with the measured compute; --device takes it
    host-calibrated.calibration.json   every sample behind it, with versions and date

The GFLOP/s are the median over all products of `speed`, of their medians (sustained) and their best samples (burst);
the bandwidth is that of copying. Decoding and the floor have no key in a profile: they are in the second file, for
whoever checks what the planner counts for them. `planner.work.step_work` lets weights be decoded at the bandwidth of
copying; `decoding_mb_s` is how fast that goes by the same count of bytes.

Left out: heat. The measurement takes seconds; what soaks for minutes first should calibrate under load.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgetune import __version__, host
from edgetune.device import ISA, load_device
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.memory import format_mib, measure_floor
from edgetune.planner.work import DECODE_BYTES
from edgetune.weights import write_atomic

__all__ = ["calibrate", "explain"]

FORMAT_VERSION = 1
SECONDS = 1.5  # of each of nine measurements
BUSY_LOAD = 0.5  # processes that run beside: with more of them the figures are too low


def calibrate(out: str | Path, *, force: bool = False, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure this machine and write its profile to `out`, a TOML file, and the samples beside it.

    Args:
        out: the profile; its id is the file's name.
        force: replace an earlier calibration.
        seconds: how long each of the nine measurements takes.

    Returns:
        `device` and `calibration`, the two files; and what is in the second, without its samples.

    Raises:
        ConfigError: `out` is no TOML file, exists, or cannot be written.
        EdgetuneError: the measuring process failed.
    """
    out = Path(out)
    samples_file = out.with_suffix(".calibration.json")
    _check_writable(out, samples_file, force=force)
    threads, load = host.threads(), os.getloadavg()[0]
    samples = _samples(threads, seconds)
    has_torch = importlib.util.find_spec("torch") is not None
    result = {
        "format_version": FORMAT_VERSION,
        "edgetune": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "isa": [name for name in ISA if name in host.isa()],
        "library": samples.pop("library"),
        "load_average": load,
        "compute": {"threads": threads, **_compute(samples)},
        "decoding_mb_s": {
            grid: round(statistics.median(rates) * DECODE_BYTES / 1e6)
            for grid, rates in samples["decoded_weights_per_second"].items()
        },
        "floor_bytes": measure_floor("torch", threads) if has_torch else None,
    }
    try:
        write_atomic(samples_file, json.dumps({**result, "samples": samples}, indent=1) + "\n")
        write_atomic(out, _profile(out, samples_file, result))
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}. Choose another --out.") from error
    load_device(out)
    return {"device": str(out), "calibration": str(samples_file), **result}


def explain(result: dict[str, Any]) -> str:
    """What `calibrate` returned, for people."""
    compute, floor = result["compute"], result["floor_bytes"]
    decoding = ", ".join(f"{grid} {rate / 1000:,.3g} GB/s" for grid, rate in result["decoding_mb_s"].items())
    lines = [
        f"{result['device']}: this machine with {compute['threads']} threads, measured with {result['library']}",
        f"  products      {compute['gflops_fp32_sustained']:,g} GFLOP/s sustained, "
        f"{compute['gflops_fp32_burst']:,g} at best",
        f"  memory        {compute['mem_bw_mb_s'] / 1000:,.3g} GB/s copied",
        f"  decoding      {decoding}, {DECODE_BYTES:g} bytes per weight as plans count it",
        f"  floor         {'unknown' if floor is None else format_mib(floor)} before any model",
    ]
    if floor is None:
        lines.append("torch, which trains, is not installed: pip install 'edgetune[train]' and calibrate again.")
    if result["load_average"] > BUSY_LOAD:
        lines.append(
            f"Something else was running (load {result['load_average']:.2f}), so the figures may be too low: calibrate "
            "again with --force when this machine is idle."
        )
    return "\n".join(lines)


def _check_writable(out: Path, samples_file: Path, *, force: bool) -> None:
    if out.suffix != ".toml":
        raise ConfigError(f"{out} is no name of a device profile. Give --out a file that ends in .toml.")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise ConfigError(
            f"{out} cannot be written: {out.parent} is no folder that you may write. Choose another --out."
        )
    for path, mark in ((out, f"calibration = {_string(samples_file.name)}"), (samples_file, '"products_gflops"')):
        if not path.exists() and not path.is_symlink():
            continue
        if not force:
            raise ConfigError(f"{path} exists. Replace it with --force, or choose another --out.")
        if path.is_symlink() or not path.is_file() or mark not in path.read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(f"{path} is no calibration, so --force does not replace it. Choose another --out.")


def _samples(threads: int, seconds: float) -> dict[str, Any]:
    """What `speed` prints, with threads that wait for each other as they do while training."""
    command = [sys.executable, "-m", "edgetune.speed", str(threads), str(seconds)]
    environment = {**host.THREAD_SETTINGS, **os.environ}
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if child.returncode:
        last = child.stderr.strip().splitlines()[-1:] or [""]
        raise EdgetuneError(
            f"measuring ended with code {child.returncode}: {last[0][:200]}. `edgetune doctor` tells what works here."
        )
    samples: dict[str, Any] = json.loads(child.stdout)
    return samples


def _compute(samples: dict[str, Any]) -> dict[str, Any]:
    """The keys of a profile's [compute], from the samples."""
    products = [rates for kinds in samples["products_gflops"].values() for rates in kinds.values()]
    return {
        "gflops_fp32_burst": _three_digits(statistics.median(map(max, products))),
        "gflops_fp32_sustained": _three_digits(statistics.median(map(statistics.median, products))),
        "mem_bw_mb_s": round(statistics.median(samples["copy_mb_s"])),
    }


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _profile(out: Path, samples_file: Path, result: dict[str, Any]) -> str:
    name = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in out.stem.lower())[:48]
    compute = "\n".join(f"{key} = {value}" for key, value in result["compute"].items())
    return f"""# This machine, measured by `edgetune doctor --calibrate`; every sample is in the calibration file.
schema = 1
id = {_string(name)}
name = "This machine, calibrated"
extends = "host"

[compute]
{compute}

[provenance]
source = [{_string(f"edgetune {__version__} doctor --calibrate, {result['library']}")}]
confidence = "measured"
checked = {result["date"][:10]}
calibration = {_string(samples_file.name)}
"""


def _string(text: str) -> str:
    """A TOML string: its escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
