"""Calibration: what is measured, the profile that comes of it, and whatever stands in its way."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune import calibration, host, speed
from edgetune.calibration import calibrate, explain
from edgetune.device import load_device
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.grids import GRIDS

SECONDS = 0.01  # one sample of each measurement
SAMPLES = {
    "products_gflops": {
        "a": {"forward": [50.0, 41.04, 40.0], "backward": [60.0, 30.0, 45.56]},
        "b": {"forward": [90.0, 80.0, 70.0], "backward": [20.0, 10.0, 15.0]},
    },
    "copy_mb_s": [9000.4, 12000.0, 100.0],
    "decoded_weights_per_second": {"nf4": [1e9, 3e9, 2e9], "int4": [5e8]},
}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No measurement: these samples, this floor, and an idle machine."""
    copied: dict[str, Any] = json.loads(json.dumps(SAMPLES)) | {"library": "torch 9.9"}
    monkeypatch.setattr(calibration, "_samples", lambda threads, seconds: copied)
    monkeypatch.setattr(calibration, "measure_floor", lambda engine, threads: 150 << 20)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.01, 0.0, 0.0))
    return copied


def test_the_profile_is_this_machine_with_what_was_measured(known: dict[str, Any], tmp_path: Path) -> None:
    result = calibrate(tmp_path / "My Host.toml")
    profile, plain = load_device(result["device"]), load_device("host")
    assert (profile.id, profile.kind) == ("my-host", "host")
    assert (profile.cpu, profile.runtime, profile.duty) == (plain.cpu, plain.runtime, plain.duty)
    compute = profile.compute
    assert compute.gflops_fp32_sustained == 43.3  # the median of 41.04, 45.56, 80 and 15
    assert compute.gflops_fp32_burst == 55.0  # of 50, 60, 90 and 20
    assert compute.mem_bw_mb_s == 9000
    assert compute.threads == host.threads()
    assert profile.provenance.confidence == "measured"
    assert profile.provenance.source[0].endswith("doctor --calibrate, torch 9.9")
    stored = json.loads(Path(result["calibration"]).read_text())
    assert Path(result["calibration"]) == tmp_path / profile.provenance.calibration
    assert stored["samples"] == SAMPLES and stored["format_version"] == 1
    assert stored["date"][:10] == str(profile.provenance.checked)
    assert stored["decoding_mb_s"] == result["decoding_mb_s"] == {"nf4": 17125, "int4": 4281}  # 8.5625 bytes each
    assert stored["floor_bytes"] == 150 << 20


def test_its_calibration_file_is_needed(known: dict[str, Any], tmp_path: Path) -> None:
    result = calibrate(tmp_path / "host.toml")
    Path(result["calibration"]).unlink()
    with pytest.raises(EdgetuneError, match="confidence 'measured' needs one"):
        load_device(result["device"])


def test_what_people_read(known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = explain(calibrate(tmp_path / "host.toml"))
    for part in (
        "measured with torch 9.9",
        "43.3 GFLOP/s",
        "55 at best",
        "9 GB/s",
        "nf4 17.1 GB/s, int4 4.28 GB/s",
        "150 MiB",
    ):
        assert part in text
    assert text.startswith(f"{tmp_path / 'host.toml'}: this machine with ")
    assert "not installed" not in text and "Something else" not in text
    known["library"] = "numpy 9.9"
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    monkeypatch.setattr(calibration.importlib.util, "find_spec", lambda name: None)
    result = calibrate(tmp_path / "other.toml")
    assert result["floor_bytes"] is None
    assert re.search(r"floor +unknown.*torch.*not installed: pip install.*load 1\.50", explain(result), re.DOTALL)


def test_an_earlier_calibration_is_replaced_by_force_alone(known: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "host.toml"
    calibrate(out)
    known["copy_mb_s"] = [5000.0]
    with pytest.raises(ConfigError, match=r"host.toml exists. Replace it with --force"):
        calibrate(out)
    assert load_device(out).compute.mem_bw_mb_s == 9000
    known["library"] = "torch 10"
    calibrate(out, force=True)
    assert load_device(out).compute.mem_bw_mb_s == 5000
    out.unlink()
    with pytest.raises(ConfigError, match=r"host.calibration.json exists"):
        calibrate(out)


@pytest.mark.parametrize("name", ["host.toml", "host.calibration.json"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_force_replaces_nothing_of_the_user_s(known: dict[str, Any], tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "mine").write_text("mine")
    path = tmp_path / name
    {"file": lambda: path.write_text("mine"), "folder": path.mkdir, "link": lambda: path.symlink_to("mine")}[kind]()
    with pytest.raises(ConfigError, match="is no calibration, so --force does not replace it"):
        calibrate(tmp_path / "host.toml", force=True)
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({"mine", name})


def test_places_that_cannot_be_written(known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.toml"):
        calibrate(tmp_path / "host.json")
    with pytest.raises(ConfigError, match="none is no folder that you may write"):
        calibrate(tmp_path / "none" / "host.toml")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match="is no folder that you may write"):
        calibrate(tmp_path / "host.toml")
    monkeypatch.undo()
    monkeypatch.setattr(calibration, "_samples", lambda *_: json.loads(json.dumps(SAMPLES)) | {"library": ""})

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibration, "write_atomic", full)
    with pytest.raises(ConfigError, match=r"No space left on device\. Choose another --out"):
        calibrate(tmp_path / "host.toml")
    assert list(tmp_path.iterdir()) == []


def test_a_measuring_process_that_dies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = subprocess.CompletedProcess([], -4, stdout="", stderr="one line\nIllegal instruction\n")
    monkeypatch.setattr(subprocess, "run", lambda *words, **settings: ended)
    with pytest.raises(EdgetuneError, match=r"measuring ended with code -4: Illegal instruction.*edgetune doctor"):
        calibrate(tmp_path / "host.toml")
    assert list(tmp_path.iterdir()) == []


def test_it_is_measured_as_training_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With as many threads, which wait for each other in the same way, unless the user says otherwise."""
    seen: list[Any] = []
    real = subprocess.run

    def measure(words: list[str], **settings: Any) -> Any:
        if "edgetune.speed" not in words:  # platform asks the system
            return real(words, **settings)
        seen.append((words[-2:], {name: settings["env"].get(name) for name in host.THREAD_SETTINGS}))
        return subprocess.CompletedProcess(words, 0, json.dumps(SAMPLES | {"library": "torch 9"}), "")

    monkeypatch.setattr(calibration.subprocess, "run", measure)
    monkeypatch.setattr(calibration, "measure_floor", lambda *words: seen.append(words) or 1 << 20)
    monkeypatch.setattr(host, "threads", lambda: 3)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.6, 0.0, 0.0))
    name = "a-name-of-a-machine-that-is-longer-than-an-id-may-be-" * 2
    result = calibrate(tmp_path / f"{name}.toml", seconds=7.0)
    assert seen == [(["3", "7.0"], host.THREAD_SETTINGS), ("torch", 3)]
    profile = load_device(result["device"])
    assert profile.compute.threads == 3 and name.startswith(profile.id)
    assert "load 0.60" in explain(result)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    calibrate(tmp_path / "again.toml")
    assert seen[2][1]["GOMP_SPINCOUNT"] == "1"


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_samples_of_this_machine(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "DECODED_MATRICES", 2)
    if library == "numpy":
        monkeypatch.setitem(sys.modules, "torch", None)
    samples = speed.measure(torch.get_num_threads(), SECONDS)
    assert samples.pop("library").split()[0] == library
    assert samples["products_gflops"].keys() == speed.PRODUCTS.keys()
    assert samples["decoded_weights_per_second"].keys() == GRIDS.keys()
    rates = [rate for kinds in samples["products_gflops"].values() for rate in kinds.values()]
    rates += [samples["copy_mb_s"], *samples["decoded_weights_per_second"].values()]
    assert all(rate and all(np.isfinite(value) and value > 0 for value in rate) for rate in rates)


def test_rates_on_a_clock_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of 3 ms on 6 units: samples of at least 20 ms are seven calls, so 2,000 units per second."""
    now = 0.0

    def work() -> None:
        nonlocal now
        now += 0.003

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now)
    samples = speed.rates(work, 6.0, 0.1)
    assert samples == pytest.approx([2000.0] * 5)
    assert now == pytest.approx(0.003 * (1 + 5 * 7))


def test_products_are_multiplied_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counted operations are those of the call: 2 m n k, both ways."""
    counted: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    real = speed.rates

    def rates(work: Any, amount: float, seconds: float) -> list[float]:
        if getattr(work, "keywords", None):
            left, right = work.args
            counted.append((amount, tuple(left.shape), tuple(right.shape)))
            assert tuple(work.keywords["out"].shape) == (left.shape[0], right.shape[1])
        return real(work, amount, seconds)

    monkeypatch.setattr(speed, "rates", rates)
    monkeypatch.setattr(speed, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "DECODED_MATRICES", 2)
    speed.measure(torch.get_num_threads(), SECONDS)
    assert len(counted) == 2 * len(speed.PRODUCTS)
    for gigaflop, (m, k), (inner, n) in counted:
        assert inner == k and gigaflop * 1e9 == pytest.approx(2 * m * n * k)
    shapes = [shape for t, i, o in speed.PRODUCTS.values() for shape in (((t, i), (i, o)), ((t, o), (o, i)))]
    assert [(left, right) for _, left, right in counted] == shapes, "y = x W^T, and dx = dy W"


def test_what_is_copied_and_decoded_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of little memory an eighth for each array; and the matrices by turns, so that no cache holds them."""
    amounts: list[float] = []
    copied: list[int] = []
    decoded: list[Any] = []

    def rates(work: Any, amount: float, seconds: float) -> list[float]:
        amounts.append(amount)
        for _ in range(6):
            work()
        return [1.0]

    def copy(target: Any, source: Any) -> None:
        copied.extend((target.nbytes, source.nbytes))

    def dequantize(codes: Any, *words: Any) -> None:
        decoded.append(codes)

    for grid in GRIDS.values():
        monkeypatch.setattr(grid, "dequantize", dequantize)
    available = type("Memory", (), {"available": 8 << 20})
    monkeypatch.setattr(speed.psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(speed, "rates", rates)
    monkeypatch.setattr(speed, "DECODED_MATRICES", 3)
    speed._measure(np.matmul, copy, lambda array: array, 0.0)
    assert set(copied) == {1 << 20}
    assert amounts[-1 - len(GRIDS)] == pytest.approx(2.097152)  # MB read and written
    assert amounts[-len(GRIDS) :] == [1536 * 576] * len(GRIDS)
    assert len(set(map(id, decoded))) == 3 * len(GRIDS)


def test_as_many_threads_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(speed, "_measure", lambda *words: {})
    assert speed.measure(3, SECONDS)["library"].startswith("torch")
    assert asked == [3]


def test_end_to_end(tmp_path: Path) -> None:
    result = calibrate(tmp_path / "host.toml", seconds=SECONDS)
    assert load_device(tmp_path / "host.toml").compute.gflops_fp32_sustained > 0
    assert result["library"].startswith("torch ") and result["floor_bytes"] > 50 << 20
    samples = json.loads(Path(result["calibration"]).read_text())["samples"]
    assert result["compute"]["mem_bw_mb_s"] == round(statistics.median(samples["copy_mb_s"]))
