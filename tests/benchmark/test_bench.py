from __future__ import annotations

import io
import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import tiny_config, write_model
from tiny_bundle import CONTEXT, random_adapter, random_reference, write_bundle

from edgetune import host
from edgetune.benchmark import bench, explain
from edgetune.benchmark.gates import GATE_KEYS
from edgetune.benchmark.plots import plots, save_plots
from edgetune.benchmark.prediction import predict_energy, predict_latency
from edgetune.benchmark.results import load_results, results_path, save_results
from edgetune.benchmark.tables import markdown, tables
from edgetune.benchmark.verdicts import judge
from edgetune.bundle import Bundle, load_bundle
from edgetune.charts import Line
from edgetune.device import Cluster, DeviceProfile, Targets, load_device
from edgetune.errors import BundleError, ConfigError, EdgetuneError
from edgetune.exporter import export
from edgetune.memory import MIB
from edgetune.quantizer import quantize
from edgetune.runtime.adapters import set_default_adapter

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
    assert (measured["adapter"], measured["adapters"]) == ("adapter", ["adapter"])
    assert "default adapter" not in explain(measured)
    base = bench(write_bundle(tmp_path / "base", random_reference()), "host", prompt_tokens=5, new_tokens=3, runs=1)
    assert base["adapter_overhead_percent"] is None
    assert "no adapter" in explain(base)
    folder = write_bundle(tmp_path / "none", random_reference(), random_adapter())
    none = bench(set_default_adapter(folder, None), "host", prompt_tokens=5, new_tokens=3, runs=1)
    assert (none["adapter"], none["adapter_overhead_percent"]) == (None, None)
    assert "no default adapter" in explain(none)
    assert f"(adapter) is its default: `edgetune adapter default {folder} adapter` makes one so" in explain(none)


def test_the_child_runs_on_as_many_cores_as_the_profile_has_threads(bundle: Bundle) -> None:
    device = load_device("host")
    device = replace(device, compute=replace(device.compute, threads=1))
    assert bench(bundle, device, prompt_tokens=4, new_tokens=2, runs=1, warmup=0)["threads"] == 1


def test_the_default_prompt_leaves_room_for_the_answer(bundle: Bundle) -> None:
    result = bench(bundle, "host", new_tokens=10, runs=1, warmup=0)
    assert result["prompt_tokens"] == CONTEXT - 10 < 128
    assert [length["prompt_tokens"] for length in result["lengths"]] == [16, CONTEXT - 10]
    notice = f"prompt lengths 128 and 512 cut to 38: the context holds {CONTEXT} tokens, 10 of them new"
    assert result["notices"][0] == notice
    assert notice in explain(result) and notice in markdown(result)


def test_the_figures_at_the_top_are_of_the_length_nearest_to_128(bundle: Bundle) -> None:
    result = bench(bundle, "host", prompt_tokens=[20, 4, 20], new_tokens=3, runs=1, warmup=0)
    four, twenty = result["lengths"]
    assert (four["prompt_tokens"], twenty["prompt_tokens"], result["prompt_tokens"]) == (4, 20, 20)
    assert twenty.items() - {("prompt_tokens", 20)} <= {k: v for k, v in result.items() if k in twenty}.items()
    assert four["peak_memory_bytes"] <= twenty["peak_memory_bytes"], "lengths ascend, so a peak is that of its length"
    assert result["past"] == [{"past_tokens": 64, "p50_ms": None}, {"past_tokens": 1024, "p50_ms": None}]


def test_long_prompts_and_long_pasts_where_the_context_holds_them(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama", max_position_embeddings=1100))
    exported = export(quantize(model, "int4", tmp_path / "base"), out=tmp_path / "bundle")
    result = bench(exported, "host", new_tokens=4, runs=1, warmup=0)
    assert [length["prompt_tokens"] for length in result["lengths"]] == [16, 128, 512]
    assert result["prompt_tokens"] == 128
    assert [entry["past_tokens"] for entry in result["past"] if entry["p50_ms"] > 0] == [64, 1024]
    assert not [notice for notice in result["notices"] if "cut to" in notice]


# ---- memory, cold loads, soak, comparison


@pytest.fixture(scope="module")
def full(bundle: Bundle) -> dict[str, Any]:
    """Everything that can be asked for, once, with gates of which one fails."""
    return bench(
        bundle, "pixel-9", prompt_tokens=[4, 9], new_tokens=4, runs=2, soak=1.2, compare=bundle,
        fail_if=["p99_ms<1e9", "load_ms <= 0", "soak.sustained_ratio==-1", "compare.p50_ms.ratio<0"],
    )  # fmt: skip


def test_every_gate_can_be_judged_from_a_full_result(full: dict[str, Any]) -> None:
    for key in GATE_KEYS:
        value: Any = full
        for name in key.split("."):
            value = value[name]
        assert value is None or isinstance(value, (int, float)), key
    assert [gate["failed"] for gate in full["gates"]] == [True, False, False, False]
    assert json.loads(json.dumps(full, allow_nan=False)) == full


def test_every_number_of_a_result_can_be_gated(full: dict[str, Any]) -> None:
    settings = {"format_version", "prompt_tokens", "new_tokens", "runs", "warmup", "threads"}
    top = {name for name, value in full.items() if isinstance(value, (int, float))} - settings
    assert top <= set(GATE_KEYS), f"add to GATE_KEYS: {sorted(top - set(GATE_KEYS))}"


def test_memory_over_time_is_the_kernels_and_below_the_peak(full: dict[str, Any]) -> None:
    for series in (full["memory"], full["soak"]["memory"]):
        assert len(series["seconds"]) == len(series["anonymous_bytes"]) == len(series["file_backed_bytes"]) > 1
        assert series["seconds"] == sorted(series["seconds"])
        assert min(series["file_backed_bytes"]) > 0
    assert series["moments"][0]["name"] == "load"
    assert max(full["memory"]["anonymous_bytes"]) <= full["peak_memory_bytes"]
    assert max(full["memory"]["file_backed_bytes"]) <= full["peak_file_backed_bytes"] < full["peak_rss_bytes"]


def test_a_cold_load_is_measured_or_its_lack_explained(full: dict[str, Any]) -> None:
    loads = full["loads"]
    assert len(loads["warm_ms"]) == 2
    if loads["cold_reason"] is None:
        assert len(loads["cold_ms"]) == 2 and full["cold_load_ms"] == pytest.approx(sum(loads["cold_ms"]) / 2)
    else:
        assert full["cold_load_ms"] is None
        assert f"no cold load: {loads['cold_reason']}" in full["notices"]


def test_a_bundle_beside_itself_is_the_same_size_and_has_ratios(full: dict[str, Any]) -> None:
    compared = full["compare"]
    assert compared["bundle_bytes"] == full["bundle_bytes"]
    for name in ("load_ms", "time_to_first_token_ms", "generation_tokens_per_second", "p50_ms", "peak_memory_bytes"):
        entry = compared[name]
        assert entry.keys() == {"this", "other", "ratio"} and min(entry.values()) > 0
    assert compared["peak_memory_bytes"]["ratio"] == pytest.approx(1, abs=0.2)


def test_measured_and_predicted_figures_share_no_column(full: dict[str, Any]) -> None:
    assert full["predicted"].keys().isdisjoint({"bundle_bytes", "load_ms", "peak_memory_bytes"})
    figures, lengths, verdict = (tables(full)[name] for name in ("", "Lengths", "Verdict for pixel-9"))
    assert figures[0] == ("", "measured here", "predicted for pixel-9")
    energy = next(row for row in figures if row[0] == "energy per token")
    assert energy[1] == "-" != energy[2]
    assert [name for name in lengths[0] if name.startswith("predicted")] == list(lengths[0][-2:])
    for name, measured, predicted, _, _, basis in verdict[1:]:
        assert (measured != "-", predicted != "-") == (basis == "measured", basis == "predicted"), name


def test_tables_are_whole_in_text_and_markdown(full: dict[str, Any]) -> None:
    text, document = explain(full), markdown(full)
    for name, rows in tables(full).items():
        assert len({len(row) for row in rows}) == 1, name
        assert all(row[0].strip() in text and row[0].strip() in document for row in rows)
    for block in document.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "| p99_ms<1000000000 |" in document and "FAILED" in document


def test_plots_are_files_of_their_own(full: dict[str, Any], tmp_path: Path) -> None:
    save_plots(full, tmp_path / "new" / "plots")
    names = {path.name for path in (tmp_path / "new" / "plots").iterdir()}
    assert names == {"latency.svg", "memory.svg", "soak.svg", "soak-memory.svg"} == {f"{n}.svg" for n in plots(full)}
    for path in (tmp_path / "new" / "plots").iterdir():
        ElementTree.parse(path)


def test_a_soak_is_drawn_at_the_ends_of_its_intervals(full: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}

    def line_chart(title: str, lines: list[Line], **named: Any) -> None:
        drawn[title] = lines

    monkeypatch.setattr("edgetune.benchmark.plots.line_chart", line_chart)
    plots(full | {"soak": full["soak"] | {"interval_s": 10.0, "generation_tokens_per_second": [7.0, None, 8.0]}})
    (rates,) = next(lines for title, lines in drawn.items() if title.startswith("Speed during"))
    assert (rates.xs, rates.ys) == ([10, 20, 30], [7, None, 8])
    memory = drawn["Memory while it is measured"]
    for line, key in zip(memory, ("anonymous_bytes", "file_backed_bytes"), strict=True):
        assert list(line.ys) == [size / MIB for size in full["memory"][key]]


def test_results_are_kept_beside_the_bundle_and_read_strictly(full: dict[str, Any], tmp_path: Path) -> None:
    path = results_path(tmp_path / "bundle")
    assert path == tmp_path / "bundle-bench.json"
    save_results(full, path)
    assert load_results(path) == full
    for text, message in (
        (json.dumps(full | {"format_version": 99}), "format_version 99 is newer"),
        ("{}", "is not the result of a benchmark"),
        ("[" * 100_000, "cannot be read"),
        ('"1"', "is not the result"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(BundleError, match=message):
            load_results(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        save_results(full, path)


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
    hot = predict_latency(int4, device, 100, 50)["sustained_tokens_per_second"]
    assert rate is not None and hot == pytest.approx(rate * device.thermal.sustained_ratio)
    # nf4 also writes and reads each weight as a float.
    nf4 = predict_latency(with_weights(bundle, "nf4", 90_000_000), device, 2, 2)
    assert nf4["time_to_first_token_ms"] == pytest.approx(90.0 + 1280.0 + 0.1)


@pytest.mark.parametrize(
    ("kind", "num_bytes", "read_bytes"),
    [
        ("standard", 62_500_000, 62_500_000),  # 4 bits, and an fp32 scale for 32 of them
        ("int8", 112_500_000, 112_500_000),
        ("int8-dynamic", 100_000_000, 100_000_000),
        ("fp16", 200_000_000, 400_000_000),  # and what was widened
        ("fp32", 400_000_000, 400_000_000),
    ],
)
def test_the_prediction_for_100_million_weights_of_any_kind(
    bundle: Bundle, kind: str, num_bytes: int, read_bytes: int
) -> None:
    device = profile(mem_bw_mb_s=1000, gflops_fp32_burst=8.0)
    made = with_weights(bundle, kind, num_bytes)
    first = [predict_latency(made, device, count, 2)["time_to_first_token_ms"] for count in (1, 128)]
    assert first == pytest.approx([max(read_bytes / 1e6, 25) + 0.1, 128 * 25 + 0.1])


def test_energy_by_hand() -> None:
    # 500 mW for 100 ms is 50 mJ, for 1.5 s 750 mJ. 1600 mWh are 5,760,000 mJ: 115,200 tokens, 1,000 of them 0.868 %.
    watch = load_device("galaxy-watch-7")
    assert (watch.power.max_avg_mw, watch.power.battery_mwh) == (500, 1600)
    energy = predict_energy(watch, 1500.0, 10.0)
    assert (energy["mj_per_prompt"], energy["mj_per_token"]) == pytest.approx((750, 50))
    assert (energy["tokens_per_charge"], energy["reason"]) == (pytest.approx(115_200), None)
    assert energy["battery_percent_per_1000_tokens"] == pytest.approx(0.868, abs=1e-3)
    unknown = predict_energy(watch, None, None)
    assert unknown["mj_per_token"] is None and "galaxy-watch-7 takes is unknown" in unknown["reason"]
    mains = predict_energy(load_device("rpi-5"), 1500.0, 10.0)
    assert mains["mj_per_token"] > 0 and mains["tokens_per_charge"] is None
    assert "rpi-5 runs on mains" in mains["reason"]


def test_no_kernel_or_unknown_weights_are_not_predicted(bundle: Bundle) -> None:
    device = profile()
    slow = replace(device, runtime=replace(device.runtime, int4_kernel=False))
    keys = ("time_to_first_token_ms", "generation_tokens_per_second", "sustained_tokens_per_second")
    unknown = dict.fromkeys(keys)
    for weights in ("int4", "int8", "standard"):
        assert predict_latency(with_weights(bundle, weights, 9000), slow, 8, 8) == unknown
    assert predict_latency(with_weights(bundle, "int8-dynamic", 9000), slow, 8, 8) != unknown
    assert predict_latency(with_weights(bundle, "int2", 9000), device, 8, 8) == unknown
    assert predict_latency(with_weights(bundle, "fp32", 9000), slow, 8, 8) != unknown


def test_bench_of_another_device_predicts_and_explains(bundle: Bundle) -> None:
    result = bench(bundle, "galaxy-watch-7", prompt_tokens=6, new_tokens=4, runs=1, warmup=0)
    assert result["predicted"] == predict_latency(bundle, load_device("galaxy-watch-7"), 6, 4)
    table = explain(result)
    assert "Verdict for galaxy-watch-7" in table
    for name, entry in result["verdict"].items():
        line = next(line for line in table.splitlines() if line.startswith(f"  {name} ") and entry["basis"] in line)
        assert line.endswith(entry["basis"])


# ---- errors


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"prompt_tokens": ()}, "prompt_tokens is empty"),
        ({"prompt_tokens": (5, -1)}, "prompt_tokens is -1"),
        ({"new_tokens": 1}, "new_tokens is 1"),
        ({"new_tokens": CONTEXT}, f"context of {CONTEXT}"),
        ({"runs": 0}, "runs is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"soak": -1}, "soak is -1"),
        ({"soak": float("nan")}, "soak is nan"),
    ],
)
def test_settings_out_of_range_are_refused(bundle: Bundle, setting: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench(bundle, "host", **setting)


def test_an_error_of_the_child_is_the_callers_error(bundle: Bundle) -> None:
    gone = replace(bundle, folder=bundle.folder.parent / "gone")
    with pytest.raises(BundleError, match=r"gone does not exist"):
        bench(gone, "host", new_tokens=4)


def test_a_child_that_dies_is_told_from_one_that_refuses(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EdgetuneError, match="ended with code 1"):
        bench(bundle, "host", new_tokens=4)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_worker_pins_itself(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgetune.benchmark.worker import main

    pinned: list[list[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: pinned.append(list(cores)))
    orders = [{"do": "load"}, {"do": "generate", "prompt_tokens": 3, "new_tokens": 2, "adapter": True}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(order) + "\n" for order in orders)))
    assert main([str(bundle.folder), "--threads=1"]) == 0
    assert pinned == [sorted(os.sched_getaffinity(0))[:1]]
    loaded, seconds = map(json.loads, capsys.readouterr().out.splitlines())
    assert loaded["has_adapter"] is True
    assert len(seconds) == 2 and min(seconds) > 0


def test_the_machine_is_described_before_memory_is_measured(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`platform` starts a program for it, whose memory a meter counts as the worker's until it is loaded."""
    from edgetune.benchmark import worker

    meters: list[str] = []

    def described() -> dict[str, Any]:
        meters.extend(thread.name for thread in threading.enumerate() if thread.name.startswith("edgetune-"))
        return {"cpu": "described"}

    monkeypatch.setattr(worker, "machine", described)
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None, raising=False)  # this process stays where it is
    monkeypatch.setattr("sys.stdin", io.StringIO('{"do": "load"}\n'))
    assert worker.main([str(bundle.folder), "--threads=1"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"] == {"cpu": "described"}
    assert meters == []
