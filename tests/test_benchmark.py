from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import CONTEXT, random_adapter, random_reference, write_bundle

from edgetune import host
from edgetune.benchmark import bench, explain, judge, predict_latency
from edgetune.bundle import Bundle, load_bundle
from edgetune.device import Cluster, DeviceProfile, Targets, load_device
from edgetune.errors import BundleError, ConfigError, EdgetuneError
from edgetune.memory import MIB

KEYS = {
    "load_ms", "load_peak_bytes", "time_to_first_token_ms", "prompt_tokens_per_second", "generation_tokens_per_second",
    "p50_ms", "p95_ms", "peak_memory_bytes", "bundle_bytes", "adapter_overhead_percent", "verdict",
}  # fmt: skip
TARGETS = {"time_to_first_token_ms", "generation_tokens_per_second", "load_ms", "bundle_mib", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    return load_bundle(write_bundle(folder, random_reference(), random_adapter()))


@pytest.fixture(scope="module")
def measured(bundle: Bundle) -> dict[str, Any]:
    return bench(bundle, "host", prompt_tokens=12, new_tokens=8, runs=2)


def test_the_keys_that_scripts_rely_on(measured: dict[str, Any], bundle: Bundle) -> None:
    assert measured.keys() >= KEYS
    assert json.loads(json.dumps(measured)) == measured
    assert measured["bundle_bytes"] == sum(path.stat().st_size for path in bundle.folder.iterdir())
    assert measured["threads"] <= host.threads()


def test_figures_agree_with_each_other(measured: dict[str, Any]) -> None:
    assert 0 < measured["p50_ms"] <= measured["p95_ms"]
    assert 0 <= measured["check_ms"] < measured["load_ms"]
    assert measured["prompt_tokens_per_second"] == pytest.approx(12e3 / measured["time_to_first_token_ms"])
    assert 0 < measured["floor_bytes"] < measured["load_peak_bytes"] <= measured["peak_memory_bytes"]
    assert measured["peak_memory_bytes"] < measured["peak_rss_bytes"] < 1 << 30


def test_an_adapter_has_an_overhead_and_a_base_has_none(measured: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(measured["adapter_overhead_percent"], float)
    base = bench(write_bundle(tmp_path / "base", random_reference()), "host", prompt_tokens=5, new_tokens=3, runs=1)
    assert base["adapter_overhead_percent"] is None
    assert "no adapter" in explain(base)


def test_the_child_runs_on_as_many_cores_as_the_profile_has_threads(bundle: Bundle) -> None:
    device = load_device("host")
    device = replace(device, compute=replace(device.compute, threads=1))
    assert bench(bundle, device, prompt_tokens=4, new_tokens=2, runs=1, warmup=0)["threads"] == 1


def test_the_default_prompt_leaves_room_for_the_answer(bundle: Bundle) -> None:
    result = bench(bundle, "host", new_tokens=10, runs=1, warmup=0)
    assert result["prompt_tokens"] == CONTEXT - 10 < 128
    assert bench(bundle, "host", prompt_tokens=CONTEXT - 10, new_tokens=10, runs=1, warmup=0)["prompt_tokens"]


# ---- verdicts


def test_on_host_everything_is_measured(measured: dict[str, Any]) -> None:
    verdict = measured["verdict"]
    assert verdict.keys() == TARGETS
    assert {entry["basis"] for entry in verdict.values()} == {"measured"}
    for name in TARGETS - {"bundle_mib"}:
        assert verdict[name]["value"] == measured[name]
    assert measured["predicted"] == {}


def test_another_device_is_never_judged_by_latencies_of_this_machine(bundle: Bundle, measured: dict[str, Any]) -> None:
    device = load_device("galaxy-watch-7")
    result = measured | {"predicted": {"time_to_first_token_ms": 2001.0, "generation_tokens_per_second": 8.5}}
    verdict = judge(result, device)
    wanted = device.targets
    assert verdict == {
        "time_to_first_token_ms": {
            "value": 2001.0, "wanted": wanted.time_to_first_token_ms, "pass": False, "basis": "predicted",
        },
        "generation_tokens_per_second": {
            "value": 8.5, "wanted": wanted.generation_tokens_per_second, "pass": True, "basis": "predicted",
        },
        "load_ms": {"value": None, "wanted": wanted.load_ms, "pass": None, "basis": "unknown"},
        "bundle_mib": {
            "value": measured["bundle_bytes"] / MIB, "wanted": wanted.bundle_mib, "pass": True, "basis": "measured",
        },
        "peak_memory_bytes": {
            "value": measured["peak_memory_bytes"], "wanted": device.memory.budget_mib * MIB, "pass": True,
            "basis": "predicted",
        },
    }  # fmt: skip


def test_a_profile_without_targets_still_judges_memory(measured: dict[str, Any]) -> None:
    device = replace(load_device("pixel-watch-3"), targets=Targets())
    device = replace(device, memory=replace(device.memory, budget_mib=1))
    verdict = judge(measured | {"predicted": {}}, device)
    assert {name: entry["pass"] for name, entry in verdict.items()} == {"peak_memory_bytes": False}


def with_weights(bundle: Bundle, kind: str, num_bytes: int) -> Bundle:
    files = bundle.manifest["files"] | {"model.onnx.data": {"bytes": num_bytes, "sha256": ""}}
    return replace(bundle, manifest=bundle.manifest | {"weights": kind, "files": files})


def profile(**compute: Any) -> DeviceProfile:
    device = load_device("galaxy-watch-7")
    clusters = (Cluster(cores=1, khz=1_300_000, big=True), Cluster(cores=4, khz=1_000_000, big=False))
    cpu = replace(device.cpu, cluster=clusters)
    return replace(device, cpu=cpu, compute=replace(device.compute, **compute))


def test_prediction_by_hand(bundle: Bundle) -> None:
    # 100e6 bytes of int4 are 160e6 weights. 1000 MB/s: 100 ms a pass and 160 bytes of cache per past token (2 layers
    # of key and value, 2 heads of 5 floats). 8 GFLOP/s: 40 ms a token. 65,000 cycles at 1.3 GHz: 0.05 ms a layer.
    device = profile(mem_bw_mb_s=1000, gflops_fp32_burst=8.0)
    int4 = with_weights(bundle, "int4", 100_000_000)
    first = [predict_latency(int4, device, count, 2)["time_to_first_token_ms"] for count in (2, 3, 129)]
    assert first == pytest.approx([100.1, 120.1, 128 * 40 + 0.1 + 100 + 128 * 160 / 1e6 + 0.1])
    rate = predict_latency(int4, device, 100, 50)["generation_tokens_per_second"]
    assert rate == pytest.approx(1e3 / (100 + 125 * 160 / 1e6 + 0.1))
    # nf4 also writes and reads each weight as a float.
    nf4 = predict_latency(with_weights(bundle, "nf4", 90_000_000), device, 2, 2)
    assert nf4["time_to_first_token_ms"] == pytest.approx(90.0 + 1280.0 + 0.1)


def test_no_kernel_or_unknown_weights_are_not_predicted(bundle: Bundle) -> None:
    device = profile()
    slow = replace(device, runtime=replace(device.runtime, int4_kernel=False))
    unknown = {"time_to_first_token_ms": None, "generation_tokens_per_second": None}
    for weights in ("int4", "int8", "standard"):
        assert predict_latency(with_weights(bundle, weights, 9000), slow, 8, 8) == unknown
    assert predict_latency(with_weights(bundle, "int8-dynamic", 9000), slow, 8, 8) != unknown
    assert predict_latency(with_weights(bundle, "int2", 9000), device, 8, 8) == unknown
    assert predict_latency(with_weights(bundle, "fp32", 9000), slow, 8, 8) != unknown


def test_bench_of_another_device_predicts_and_explains(bundle: Bundle) -> None:
    result = bench(bundle, "galaxy-watch-7", prompt_tokens=6, new_tokens=4, runs=1, warmup=0)
    assert result["predicted"] == predict_latency(bundle, load_device("galaxy-watch-7"), 6, 4)
    table = explain(result)
    assert "verdict for galaxy-watch-7" in table
    for name, entry in result["verdict"].items():
        line = next(line for line in table.splitlines() if line.startswith(f"  {name} "))
        assert line.endswith(entry["basis"])


# ---- errors


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"prompt_tokens": CONTEXT - 9, "new_tokens": 10}, rf"{CONTEXT - 9} prompt and 10 new tokens .* of {CONTEXT}"),
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"new_tokens": CONTEXT}, f"context of {CONTEXT}"),
        ({"runs": 0}, "runs is 0"),
        ({"warmup": -1}, "warmup is -1"),
    ],
)
def test_settings_out_of_range_are_refused(bundle: Bundle, setting: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(bundle, "host", **setting)


def test_an_error_of_the_child_is_the_callers_error(bundle: Bundle) -> None:
    gone = replace(bundle, folder=bundle.folder.parent / "gone")
    with pytest.raises(BundleError, match=r"gone has no edgetune\.json"):
        bench(gone, "host", new_tokens=4)


def test_a_child_that_dies_is_told_from_one_that_refuses(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EdgetuneError, match="ended with code 1"):
        bench(bundle, "host", new_tokens=4)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_child_pins_itself(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgetune.benchmark import main

    pinned: list[list[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(list(cores)))
    flags = ["--threads=1", "--prompt-tokens=3", "--new-tokens=2", "--runs=1", "--warmup=0"]
    assert main([str(bundle.folder), *flags]) == 0
    assert pinned == [sorted(os.sched_getaffinity(0))[:1]]
    assert json.loads(capsys.readouterr().out)["p50_ms"] > 0
