"""What `export` writes, what it refuses, and that its gate catches what is wrong."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import tiny_config, write_model
from safetensors.numpy import load_file, save_file
from tiny_run import write_run

from edgetune import exporter
from edgetune.adapters import lora
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import load_adapter
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.bundle import Bundle, explain, load_bundle
from edgetune.data import Row, read_rows
from edgetune.device import load_device
from edgetune.errors import (
    AdapterError,
    ConfigError,
    DataError,
    DeviceError,
    EdgetuneWarning,
    ExportError,
    ModelError,
    ParityError,
)
from edgetune.exporter import agreement, export, parity, pieces
from edgetune.exporter import job as export_job
from edgetune.graphs import FORMATS
from edgetune.graphs.builder import Builder
from edgetune.grids import int4
from edgetune.models.decoder import load_decoder
from edgetune.quantizer import quantize
from edgetune.runtime.adapters import add_adapter
from edgetune.runtime.evaluate import mean_nll
from edgetune.runtime.generate import generate
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer
from edgetune.weights import sha256_file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("exporter") / "model", tiny_config("qwen2"))


@pytest.fixture(scope="module")
def bases(model: Path) -> dict[str, Path]:
    return {grid: quantize(model, grid, model.parent / grid) for grid in ("int4", "nf4")}


def write_rows(path: Path, count: int = 40) -> Path:
    rows = [{"prompt": f"{i} plus {i} is", "completion": f" {2 * i}, of course"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def logits(bundle: Bundle, ids: np.ndarray, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(bundle.model_path, options, providers=["CPUExecutionProvider"])
    m = bundle.model
    cache = {
        f"past_key_values.{i}.{kind}": np.zeros((1, m.num_key_value_heads, 0, m.head_dim), np.float32)
        for i in range(m.num_hidden_layers)
        for kind in ("key", "value")
    }
    result: np.ndarray = session.run(
        ["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **cache, **feeds}
    )[0]
    return result


def test_a_run_becomes_a_bundle_with_its_adapter_in_three_forms(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["nf4"])
    bundle = export(SimpleNamespace(folder=run), out=tmp_path / "bundle")
    assert {path.name for path in bundle.folder.iterdir()} == {
        "model.onnx", "model.onnx.data", "adapter.onnx_adapter", "adapter.safetensors", "tokenizer.json",
        "tokenizer_config.json", "genai_config.json", "edgetune.json",
    }  # fmt: skip
    manifest = bundle.manifest
    assert manifest["base_sha256"] == sha256_file(bases["nf4"] / "model.safetensors")
    assert manifest["tokenizer_sha256"] == sha256_file(bases["nf4"] / "tokenizer.json")
    assert (manifest["grid"], manifest["weights"], manifest["merged"]) == ("nf4", "nf4", False)
    entry = manifest["adapters"]["adapter"]
    assert entry["binding"] == {
        "base_sha256": manifest["base_sha256"], "grid": "nf4", "tokenizer_sha256": manifest["tokenizer_sha256"],
        "r": 3, "lora_alpha": 5.0, "slots": [
            f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.qkv_proj", "mlp.down_proj")
        ], "activation": None, "virtual_tokens": 0, "positions": None, "reduction": None,
    }  # fmt: skip
    assert manifest["default_adapter"] == "adapter"
    assert manifest["rounding"] is None
    figures = manifest["parity"]
    assert figures["adapter"] == "run"
    assert figures["rows"] >= 1000
    assert 0 < figures["max_abs_logit"] <= 1e-4
    assert figures["top1_agreement"] == 1.0
    assert bundle.summary()["peak_rss_bytes"] > 0

    config, tensors = load_adapter(run, open_base(bases["nf4"]).config)
    feeds = load_file(bundle.folder / "adapter.safetensors")
    scaled = {name: value.T * (5 / 3 if name.endswith("B") else 1) for name, value in tensors.items()}
    assert {name.replace("qkv_proj", "q_proj") for name in feeds} == scaled.keys()
    for name, value in feeds.items():
        expected = scaled[name.replace("qkv_proj", "q_proj")]
        np.testing.assert_allclose(value[:, : expected.shape[1]], expected, rtol=1e-6)
        assert not value[:, expected.shape[1] :].any(), "of k and v, which have no adapter"
    read = onnxruntime.AdapterFormat.read_adapter(str(bundle.folder / "adapter.onnx_adapter")).get_parameters()
    assert {name: value.numpy().tobytes() for name, value in read.items()} == {n: v.tobytes() for n, v in feeds.items()}

    decoder = load_decoder(bases["nf4"])
    load_tensors(attach(decoder, config), tensors)
    ids = np.random.default_rng(1).integers(0, 301, (1, 30))
    with torch.no_grad():
        expected = decoder(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(logits(bundle, ids, feeds), expected, atol=1e-4)


@pytest.mark.parametrize("grid", ["int4", "nf4"])
def test_a_base_and_a_model_export_without_an_adapter(
    model: Path, bases: dict[str, Path], tmp_path: Path, grid: str
) -> None:
    from_base = export(bases[grid], out=tmp_path / "a")
    from_model = export(model, out=tmp_path / "b", weights=grid)
    assert not from_base.has_adapter
    assert from_base.adapter_tensors() == {}
    assert from_base.manifest["parity"]["adapter"] == "random", "the slots are compared with something in them"
    names = ("model.onnx", "model.onnx.data", "tokenizer.json")
    assert [sha256_file(from_model.folder / name) for name in names] == [
        sha256_file(from_base.folder / n) for n in names
    ]
    assert ("fast" in from_base.manifest["parity"]) is (grid == "int4")
    dense = export(model, out=tmp_path / "c")
    assert (dense.manifest["grid"], dense.manifest["weights"]) == (None, "fp32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"], "nothing else is left behind"


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_large_head_is_several_products_over_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, tied: bool
) -> None:
    """301 rows in ranges of 128: the last one is shorter."""
    model = write_model(tmp_path / "model", tiny_config("llama", tie_word_embeddings=tied))
    whole = export(model, out=tmp_path / "whole", device=load_device("host"), weights=weights)
    row_bytes = 3 * (16 if weights == "int4" else 32)  # three blocks for 72 columns; gate and up are 176 such rows
    monkeypatch.setattr(int4, "WHOLE_BYTES", 200 * row_bytes)
    monkeypatch.setattr(int4, "RANGE_BYTES", 130 * row_bytes)
    split = export(model, out=tmp_path / "split", device=load_device("host"), weights=weights)
    nodes = [onnx.load(b.folder / "model.onnx", load_external_data=False).graph.node for b in (whole, split)]
    heads = [
        [node.name for node in found if node.op_type == "MatMulNBits" and "lm_head" in node.name] for found in nodes
    ]
    assert heads == [["/lm_head/MatMulNBits"], [f"/lm_head/{start}/MatMulNBits" for start in (0, 128, 256)]]
    assert sha256_file(whole.folder / "model.onnx.data") == sha256_file(split.folder / "model.onnx.data")
    logits = [open_session(bundle, adapter=False).forward([3, 5, 7, 11, 13]) for bundle in (whole, split)]
    np.testing.assert_array_equal(*logits)
    *_, head = pieces.cut(onnx.load(split.model_path, load_external_data=False))
    ranges = [(rows.start, rows.stop) for rows, _ in pieces.row_ranges(head, split.folder, 301, 64)]
    assert ranges == [(0, 64), (64, 128), (128, 192), (192, 256), (256, 301)], "the gate takes so many rows at once"


def test_dense_embeddings_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    base = quantize(model, "nf4", tmp_path / "base", dense_embeddings=True)
    bundle = export(write_run(tmp_path / "run", base), out=tmp_path / "bundle")
    assert bundle.manifest["weights"] == "nf4"
    written = parity.Written(bundle.model_path)
    assert np.array_equal(written["lm_head.weight"], open_base(model).dequantize("lm_head"))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_models_export_in_float32(tmp_path: Path, dtype: str, shards: int) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"), dtype=dtype)
    if shards == 2:
        split(model)
    bundle = export(model, out=tmp_path / "bundle")
    assert bundle.manifest["parity"]["max_abs_logit"] < 1e-4
    assert len(bundle.manifest["base_sha256"]) == 64


def split(model: Path) -> None:
    """One weight file as two shards and an index."""
    from edgetune.weights import open_weights, write_safetensors

    weights = open_weights(model)
    names = list(weights)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        write_safetensors(model / file, {name: weights[name] for name in part}, weights.array)
    where = {name: file for file, part in halves.items() for name in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    (model / "model.safetensors").unlink()


def test_a_bundle_without_a_tokenizer(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"), tokenizer=False)
    bundle = export(model, out=tmp_path / "bundle")
    assert bundle.manifest["tokenizer_sha256"] is None
    assert bundle.model.eos_token_ids == (2,)
    with pytest.raises(ExportError, match=r"has no tokenizer.json to read .*rows.jsonl with"):
        export(model, out=tmp_path / "other", eval_data=write_rows(tmp_path / "rows.jsonl"))


def test_long_contexts_are_cut_to_what_a_device_can_fill(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("qwen3", max_position_embeddings=40960))
    bundle = export(model, out=tmp_path / "bundle")
    assert bundle.model.max_position_embeddings == export_job.CONTEXT_LIMIT
    genai = json.loads((bundle.folder / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["context_length"] == export_job.CONTEXT_LIMIT
    assert genai["search"]["max_length"] == 2048


# --- rounding again: merged, or around an adapter that was trained on other bytes

# In which weight of the graph a linear lies, from which row to which, and how many rows that has.
LIES = {
    "q_proj": ("qkv_proj", 0, 72, 120), "k_proj": ("qkv_proj", 72, 96, 120), "v_proj": ("qkv_proj", 96, 120, 120),
    "gate_proj": ("gate_up_proj", 0, 88, 176), "up_proj": ("gate_up_proj", 88, 176, 176),
}  # fmt: skip


def in_graph(written: parity.Written, module: str, part: str = "") -> np.ndarray:
    """What a linear has of an initializer of the graph: rows, or as many parts of a flat one."""
    path, _, name = module.rpartition(".")
    weight, start, stop, rows = LIES.get(name, (name, 0, 1, 1))
    array = written[f"{path}.{weight}.weight{part}".lstrip(".")]
    return array[len(array) * start // rows : len(array) * stop // rows]


ADAPTED = {f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")}
EXACT = {"int4": {"int4", "fp32", "standard"}, "nf4": {"nf4", "fp32"}}  # what the bytes of a base give without rounding
# Least and largest mean relative error of a matrix, as the formats' own steps give it on Gaussian weights.
ERRORS = {
    "fp32": (0, 0),
    "fp16": (1e-4, 3e-4),
    "int8": (0.003, 0.008),
    "int4": (0.05, 0.1),
    "nf4": (0.05, 0.1),
    "standard": (0.05, 0.1),
    "int8-dynamic": (0.004, 0.01),
}


@pytest.mark.parametrize("grid", ["int4", "nf4"])
@pytest.mark.parametrize("weights", FORMATS)
def test_every_kind_of_weights_around_an_adapter(
    bases: dict[str, Path], tmp_path: Path, grid: str, weights: str
) -> None:
    run, rows = write_run(tmp_path / "run", bases[grid]), write_rows(tmp_path / "rows.jsonl")
    bundle = export(run, out=tmp_path / "bundle", weights=weights, eval_data=rows, accept_loss=True)
    manifest = bundle.manifest
    assert (manifest["weights"], manifest["grid"], manifest["merged"]) == (weights, grid, False)
    assert manifest["parity"]["max_abs_logit"] < 1e-4, "the graph computes with the weights that were written"
    assert ("fast" in manifest["parity"]) is FORMATS[weights].ROUNDS_ACTIVATIONS
    assert len(bundle.adapter_tensors()) == 8
    prompt = [7, 80, 3]
    session = open_session(bundle)
    expected = logits(bundle, np.array([prompt]), bundle.adapter_tensors())[0, -1]
    np.testing.assert_allclose(next(session.logits(prompt))[-1], expected, atol=1e-4)
    assert generate(bundle, "Dear diary", max_new_tokens=5).token_ids
    # An independent look: the decoder that was trained, with and without its adapter.
    ids = np.random.default_rng(2).integers(0, 301, (1, 60))
    tuned = np.abs(logits(bundle, ids, bundle.adapter_tensors()) - merged_logits(run, bases[grid], ids)).max()
    with torch.no_grad():
        plain = np.abs(logits(bundle, ids, {}) - load_decoder(bases[grid])(torch.from_numpy(ids)).numpy()).max()
    rounding = manifest["rounding"]
    if weights in EXACT[grid]:
        assert rounding is None
        assert max(tuned, plain) < (15 if FORMATS[weights].ROUNDS_ACTIVATIONS else 1e-4)
    else:
        low, high = ERRORS[weights]
        assert low <= rounding["mean_relative_error"] <= high
        assert rounding["error_over_delta"].keys() == ADAPTED
        assert max(tuned, plain) < (0.1 if weights == "fp16" else 15)
        assert rounding["loss_after"] != rounding["loss_before"]
    told = explain(bundle.summary())
    assert f"{weights} weights, adapter beside it" in told
    assert ("  rounding  " in told) is (rounding is not None)


def test_rounding_is_measured_against_what_the_adapter_changes(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["nf4"])
    found = export(run, out=tmp_path / "bundle", weights="int4", accept_loss=True).manifest["rounding"]
    base, other = open_base(bases["nf4"]), parity.Written(tmp_path / "bundle" / "model.onnx")
    _, tensors = load_adapter(run, base.config)
    for module in ADAPTED:
        codes = {key: in_graph(other, module, f".{key}") for key in ("codes", "scales")}
        error = FORMATS["int4"].dequantize(codes, base.shape(module)) - base.dequantize(module)
        delta = tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"] * (5 / 3)
        ratio = np.linalg.norm(error) / np.linalg.norm(delta)
        assert found["error_over_delta"][module] == pytest.approx(ratio, rel=1e-4)


def weaker(run: Path, factor: float) -> Path:
    """The run with an adapter that changes less."""
    path = run / "adapter_model.safetensors"
    save_file({n: v * (factor if "lora_B" in n else 1) for n, v in load_file(path).items()}, path)
    return run


@pytest.mark.parametrize("merge", [False, True])
def test_rounding_that_loses_the_adapter_is_refused(bases: dict[str, Path], tmp_path: Path, merge: bool) -> None:
    run, rows = weaker(write_run(tmp_path / "run", bases["nf4"]), 0.1), write_rows(tmp_path / "rows.jsonl")
    message = (
        rf"Rounding {'the merged ' * merge}nf4 weights to int4 loses the adapter: it moves 4 of 4 matrices further "
        r"than training did, model\.layers\.\d\.\S+ \d\.\d\d times as far.* Over \d+ positions logits change by up to "
        r".*, KL .*, their held-out loss goes from .* to .*\. Nothing was written\. "
        rf"{'Leave --merge out' if merge else 'Keep --weights nf4'}, which is exact, or take --weights int8, which is "
        r"near lossless, or train again on an int4 base .*--accept-loss"
    )
    with pytest.raises(ExportError, match=message):
        export(run, out=tmp_path / "bundle", weights="int4", merge=merge, eval_data=rows)
    assert not (tmp_path / "bundle").exists()
    assert export(run, out=tmp_path / "bundle", weights="int8", merge=merge).manifest["rounding"]
    accepted = export(run, out=tmp_path / "accepted", weights="int4", merge=merge, accept_loss=True)
    assert accepted.manifest["rounding"]["max_error_over_delta"] > 1


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_an_adapter_that_has_hardly_learned_is_told_to_train_longer(
    bases: dict[str, Path], tmp_path: Path, weights: str
) -> None:
    run = weaker(write_run(tmp_path / "run", bases["nf4"]), 0.01)
    message = (
        r"Keep --weights nf4, which is exact, or train longer or with a larger --learning-rate, for a matrix has "
        r"changed by only 0\.1\d%, or train again on an int4 base"
    )
    with pytest.raises(ExportError, match=message):  # int8 is no way out: it would be refused next
        export(run, out=tmp_path / "bundle", weights=weights)
    rounding = export(run, out=tmp_path / "bundle", weights=weights, accept_loss=True).manifest["rounding"]
    base, (_, tensors) = open_base(bases["nf4"]), load_adapter(run, open_base(bases["nf4"]).config)
    changes = [
        np.linalg.norm(tensors[f"{module}.lora_B"] @ tensors[f"{module}.lora_A"]) * 5 / 3
        / np.linalg.norm(base.dequantize(module))
        for module in ADAPTED
    ]  # fmt: skip
    assert rounding["least_relative_change"] == pytest.approx(min(changes), rel=1e-4)


def test_rounding_that_costs_the_task_is_refused(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = write_run(tmp_path / "run", bases["nf4"]), write_rows(tmp_path / "rows.jsonl")
    counts = iter([(200.0, 50, 100), (210.0, 48, 100)])
    monkeypatch.setattr(agreement, "loss_of", lambda *_: next(counts))
    with pytest.raises(ExportError, match=r"to int8 loses .*rows drops from 50\.0% to 48\.0%.*from 2\.0000 to 2\.1000"):
        export(run, out=tmp_path / "bundle", weights="int8", eval_data=rows)


@pytest.mark.parametrize(("source", "weights"), [("dense", "fp16"), ("dense", "int8"), ("nf4", "int8")])
def test_rounding_without_an_adapter(
    model: Path, bases: dict[str, Path], tmp_path: Path, source: str, weights: str
) -> None:
    bundle = export({"dense": model, **bases}[source], out=tmp_path / "bundle", weights=weights)
    rounding = bundle.manifest["rounding"]
    assert rounding["max_error_over_delta"] is rounding["worst_layer"] is rounding["least_relative_change"] is None
    assert 0 < rounding["kl"] < 0.01, "the cost is the base's own, not that of the random adapter of the gate"
    assert f"moved weights by {rounding['mean_relative_error']:.2%} on average" in explain(bundle.summary())


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"larger than float16's 65,504\. Use --weights fp32"):
        FORMATS["fp16"].quantize(np.array([[1.0, 7e4]], np.float32))


def merged_logits(run: Path, base: Path, ids: np.ndarray) -> np.ndarray:
    """Torch with the adapter folded in, before any rounding."""
    decoder = load_decoder(base)
    config, tensors = load_adapter(run, decoder.config)
    load_tensors(attach(decoder, config), tensors)
    with torch.no_grad():
        result: np.ndarray = decoder(torch.from_numpy(ids)).numpy()
    return result


@pytest.mark.parametrize("grid", ["int4", "nf4"])
@pytest.mark.parametrize("weights", FORMATS)
def test_merged_bundles(bases: dict[str, Path], tmp_path: Path, grid: str, weights: str) -> None:
    run, rows = write_run(tmp_path / "run", bases[grid]), write_rows(tmp_path / "rows.jsonl")
    bundle = export(run, out=tmp_path / "bundle", merge=True, weights=weights, eval_data=rows, accept_loss=True)
    assert (bundle.manifest["merged"], bundle.manifest["weights"], bundle.slots) == (True, weights, ())
    assert not bundle.has_adapter
    assert not (bundle.folder / "adapter.onnx_adapter").exists()
    assert bundle.manifest["parity"]["max_abs_logit"] < 1e-4

    rounding = bundle.manifest["rounding"]
    low, high = ERRORS[weights]
    assert low <= rounding["mean_relative_error"] <= high
    assert rounding["error_over_delta"].keys() == ADAPTED
    assert rounding["max_error_over_delta"] == pytest.approx(
        rounding["error_over_delta"][rounding["worst_layer"]], abs=1e-6
    )
    assert rounding["loss_before"] > 1
    assert "error_over_delta" not in bundle.summary()["rounding"]
    assert bundle.summary()["rounding"]["kl"] == rounding["kl"]
    told = explain(bundle.summary())
    verdict = "MORE than" if rounding["max_error_over_delta"] > 1 else "less than"
    assert f"{weights} weights, adapter merged" in told
    assert f"{rounding['max_error_over_delta']:.2f} times as far as training did, {verdict} training" in told
    assert f"{rounding['loss_before']:.4f} -> {rounding['loss_after']:.4f}" in told
    # An independent look at the whole: how far is the bundle from the model that was trained?
    ids = np.random.default_rng(2).integers(0, 301, (1, 60))
    difference = np.abs(logits(bundle, ids, {}) - merged_logits(run, bases[grid], ids)).max()
    if weights == "fp32":
        assert difference < 1e-4
        assert rounding["loss_after"] == pytest.approx(rounding["loss_before"], abs=1e-5)
        assert rounding["max_abs_logit"] < 1e-4
    else:
        assert 1e-4 < difference < 15
        assert rounding["loss_after"] != rounding["loss_before"]
        assert rounding["kl"] > 0


@pytest.mark.parametrize("grid", ["int4", "nf4"])
def test_merging_keeps_the_codes_of_what_has_no_adapter(bases: dict[str, Path], tmp_path: Path, grid: str) -> None:
    bundle = export(write_run(tmp_path / "run", bases[grid]), out=tmp_path / "bundle", merge=True)
    assert bundle.manifest["weights"] == grid
    written, base = parity.Written(bundle.model_path), open_base(bases[grid])
    for module in base.config.matrices():
        same = np.array_equal(in_graph(written, module, ".codes"), base.codes(module)["codes"])
        assert same is (not module.endswith(("q_proj", "down_proj"))), module
    assert set(bundle.manifest["rounding"]["error_over_delta"]) < set(base.config.matrices())


def test_a_merged_matrix_is_the_sum_in_its_format(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["nf4"])
    bundle = export(run, out=tmp_path / "bundle", merge=True, weights="fp32")
    base, written = open_base(bases["nf4"]), parity.Written(bundle.model_path)
    _, tensors = load_adapter(run, base.config)
    for module, adapted in (("model.layers.1.mlp.down_proj", True), ("model.layers.1.mlp.up_proj", False)):
        expected = base.dequantize(module).astype(np.float64)
        if adapted:
            expected += tensors[f"{module}.lora_B"].astype(np.float64) @ tensors[f"{module}.lora_A"] * 5 / 3
        np.testing.assert_allclose(in_graph(written, module), expected, atol=1e-6)


# --- what the device chooses


@pytest.mark.parametrize(
    ("source", "device", "weights"),
    [
        ("dense", "pixel-9", "int4"),
        ("dense", "host", "nf4"),
        ("int4", "pixel-9", "int4"),
        ("int4", "pixel-watch-3", "int8-dynamic"),
        ("nf4", "host", "nf4"),
    ],
)
def test_the_profile_chooses_the_weights(
    model: Path, bases: dict[str, Path], tmp_path: Path, source: str, device: str, weights: str
) -> None:
    bundle = export({"dense": model, **bases}[source], out=tmp_path / "bundle", device=device)
    assert bundle.manifest["weights"] == weights


def test_a_run_is_exported_for_the_device_that_it_was_planned_for(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["int4"])
    (run / "plan.json").write_text('{"device": "rpi-4"}', encoding="utf-8")
    assert export(run, out=tmp_path / "a").manifest["weights"] == "int8-dynamic"
    assert export(run, out=tmp_path / "b", device=load_device("pixel-9")).manifest["weights"] == "int4"
    (run / "plan.json").write_text('{"device": "a profile that is gone"}', encoding="utf-8")
    assert export(run, out=tmp_path / "c").manifest["weights"] == "int4"
    with pytest.raises(DeviceError, match="there is no device 'pixel'"):
        export(run, out=tmp_path / "d", device="pixel")


def test_a_grid_chosen_against_the_profile_is_kept_and_warned_of(bases: dict[str, Path], tmp_path: Path) -> None:
    message = r"nf4 weights are slow on pixel-9: MatMulBnb4 .* 16 times slower than int4\. Its profile names int4\."
    with pytest.warns(EdgetuneWarning, match=message) as caught:
        bundle = export(write_run(tmp_path / "run", bases["nf4"]), out=tmp_path / "bundle", device="pixel-9")
    assert bundle.manifest["weights"] == "nf4"
    assert len(caught) == 1


# --- what is refused


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (
            "model",
            {"weights": "int2"},
            ExportError,
            "weights = 'int2'; choose from fp32, fp16, int8, int8-dynamic, standard, nf4, int4",
        ),
        ("model", {"merge": True}, ExportError, "has no adapter to merge"),
        ("base", {"weights": "nf4"}, ExportError, "is stored as int4; .* Quantize the original model for another grid"),
        ("run", {"eval_data": "none.jsonl"}, DataError, "none.jsonl"),
        ("none", {}, ModelError, "none"),
        ("empty", {}, ModelError, "config.json cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused(
    model: Path,
    bases: dict[str, Path],
    tmp_path: Path,
    kind: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    sources = {
        "model": model, "base": bases["int4"], "run": write_run(tmp_path / "run", bases["int4"]),
        "none": tmp_path / "none", "empty": tmp_path / "empty",
    }  # fmt: skip
    with pytest.raises(error, match=message):
        export(sources[kind], out=tmp_path / "bundle", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"], "nothing is left behind"


def test_runs_that_cannot_be_exported(bases: dict[str, Path], tmp_path: Path) -> None:
    run, base = tmp_path / "run", bases["int4"]
    write_run(run, base, base_sha256="f" * 64)
    with pytest.raises(ExportError, match=r"has SHA-256 .*, but .*run was trained on ffffffffffff"):
        export(run, out=tmp_path / "bundle")
    (run / "summary.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        ExportError, match=r"summary.json does not say which base was trained on \(KeyError\('base'\)\)"
    ):
        export(run, out=tmp_path / "bundle")
    (run / "adapter_config.json").unlink()
    with pytest.raises(ExportError, match=r"is a run that has not ended. Finish it with `edgetune train --resume"):
        export(run, out=tmp_path / "bundle")
    other = write_run(tmp_path / "other", base)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({n: v * ("lora_A" in n) for n, v in tensors.items()}, other / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"The adapter of .*other changes nothing\. Train it"):
        export(other, out=tmp_path / "bundle")
    save_file({n: v * np.float32(1e-12) for n, v in tensors.items()}, other / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="the run's adapter changes nothing: on the probe rows no output moves"):
        export(other, out=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_base_whose_weights_are_not_those_of_its_manifest(bases: dict[str, Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(bases["int4"], tmp_path / "base"))
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x5a")
    with pytest.raises(ExportError, match=r"but its manifest names .*`edgetune quantize` again"):
        export(base, out=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_model_with_the_tokenizer_of_another(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    content = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"]["!"] = 5000
    (copy / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match=r"token '!' with id 5000, but the model's embedding has"):
        export(copy, out=tmp_path / "bundle")


def test_a_folder_that_peft_wrote_names_its_base_itself(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["int4"])
    (run / "summary.json").unlink()
    (run / "plan.json").unlink()
    assert export(run, out=tmp_path / "bundle").has_adapter


def test_an_existing_folder_is_replaced_only_by_force_and_only_if_it_is_a_bundle(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export(model, out=out)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export(model, out=out)
    inode = out.stat().st_ino
    export(model, out=out, force=True)
    assert load_bundle(out) and out.stat().st_ino != inode
    (out / "extra").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bundle holds extra, which edgetune\.json does not name"):
        export(model, out=out, force=True)
    assert (out / "extra").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"is not empty and holds no edgetune\.json"):
        export(model, out=tmp_path / "home", force=True)
    assert (tmp_path / "home" / "letters").exists()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8-dynamic"])
def test_memory_stays_below_the_largest_tensor(tmp_path: Path, weights: str) -> None:
    """In a process that has exported before: nothing is whole on the heap, neither the table nor logits over it."""
    wide = {"vocab_size": 65536, "hidden_size": 512, "intermediate_size": 64, "tie_word_embeddings": True}
    write_model(tmp_path / "wide", tiny_config("llama", **wide), dtype="bfloat16")
    write_model(tmp_path / "tiny", tiny_config("llama"), dtype="bfloat16")
    code = """
import sys
from edgetune.exporter import export
from edgetune.memory import Meter
export("tiny", out="first", weights=sys.argv[1])
with Meter() as meter:
    before = meter.now_bytes
    export("wide", out="second", weights=sys.argv[1])
print(meter.peak_bytes - before)
"""
    command = [sys.executable, "-W", "error", "-c", code, weights]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    largest = max(size for _, size in placed(tmp_path / "second" / "model.onnx"))
    assert largest == 65536 * 512 * {"fp32": 4, "fp16": 2, "int8-dynamic": 1}[weights]
    assert int(done.stdout) < 1.5 * largest


def placed(model: Path) -> list[tuple[str, int]]:
    """Name and bytes of every initializer in the data file."""
    tensors = onnx.load(model, load_external_data=False).graph.initializer
    return [
        (tensor.name, int(entry.value)) for tensor in tensors for entry in tensor.external_data if entry.key == "length"
    ]


# --- the gate


def test_a_graph_that_onnxruntime_does_not_take_fails_the_gate(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = Builder.op

    def unknown(self: Builder, path: str, op_type: str, *args: Any, **attributes: Any) -> Any:
        return op(
            self, path, "Sigmoid2" if path.endswith("layers.1/mlp/silu/Sigmoid") else op_type, *args, **attributes
        )

    monkeypatch.setattr(Builder, "op", unknown)
    with pytest.raises(ParityError, match=r"does not take the exported graph: .*Sigmoid2"):
        export(model, out=tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def after_save(monkeypatch: pytest.MonkeyPatch, change: Callable[[Builder, Path], None]) -> None:
    """Damage what `Builder.save` wrote before the gate looks at it."""
    save = Builder.save

    def damaged(self: Builder, folder: Path, *args: Any) -> None:
        save(self, folder, *args)
        change(self, folder)

    monkeypatch.setattr(Builder, "save", damaged)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("grid", ["int4", "nf4"])
@pytest.mark.parametrize("suffix", ["mlp.gate_up_proj.weight.codes", "input_layernorm.weight"])
def test_one_wrong_bit_in_the_file_fails_the_gate(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: str, suffix: str, merge: bool
) -> None:
    name = f"model.layers.1.{suffix}"

    def flip(builder: Builder, folder: Path) -> None:
        data = bytearray((folder / "model.onnx.data").read_bytes())
        data[builder.placed[name].offset + 77] ^= 1
        (folder / "model.onnx.data").write_bytes(data)

    after_save(monkeypatch, flip)
    run = write_run(tmp_path / "run", bases[grid])
    with pytest.raises(ParityError, match=rf"1 tensors in .* differ from the base, first {name}"):
        export(run, out=tmp_path / "bundle", merge=merge)
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is written"


def test_a_graph_that_computes_something_else_fails_the_gate(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lora.onnx_tensors
    monkeypatch.setattr(
        lora, "onnx_tensors", lambda config, tensors: {n: v * 1.001 for n, v in real(config, tensors).items()}
    )
    run = write_run(tmp_path / "run", bases["int4"])
    with pytest.raises(ParityError, match=r"does not compute what was trained: over \d+ positions the largest logit"):
        export(run, out=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("slope", [0.05, 1, 300])
def test_the_gate_allows_in_proportion_to_the_logits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slope: float
) -> None:
    """The same model with logits of another size: what is right passes, what is wrong does not."""
    path = Path(shutil.copytree(model, tmp_path / "model")) / "model.safetensors"
    save_file({n: v * np.float32(slope if n == "model.norm.weight" else 1) for n, v in load_file(path).items()}, path)
    run = write_run(tmp_path / "run", quantize(path.parent, "int4", tmp_path / "base"))
    figures = export(run, out=tmp_path / "bundle").manifest["parity"]
    assert figures["logit_spread"] == pytest.approx(1.3 * slope, rel=0.01)
    assert (figures["max_abs_logit"] > 1e-3) is (slope == 300), "fp32's own rounding, where logits are in the hundreds"
    real = lora.onnx_tensors
    monkeypatch.setattr(
        lora, "onnx_tensors", lambda config, tensors: {n: v * 1.001 for n, v in real(config, tensors).items()}
    )
    with pytest.raises(ParityError, match=r"does not compute what was trained: .* at their standard deviation of"):
        export(run, out=tmp_path / "other")


def test_no_gate_is_wider_than_a_thousandth_for_usual_logits() -> None:
    allowed = [parity.allowed_difference(spread) for spread in (0, 0.01, 0.5, 1, 10, 100)]
    assert allowed == pytest.approx([1e-5, 1e-5, 5e-4, 1e-3, 1e-3, 1e-2])
    figures = {"max_abs_logit": np.inf, "max_abs_logit_cached": 0.0, "top1_agreement": 1.0, "rows": 9}
    for spread in (np.nan, 1.0):
        with pytest.raises(ParityError, match="the largest logit difference is inf"):
            parity._check_exact(figures | {"logit_spread": spread})


def test_a_cache_that_is_wrong_fails_the_gate(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = parity.Graph._call

    def forgetful(self: parity.Graph, session: Any, piece: Any, known: Any, cache: Any) -> dict[str, np.ndarray]:
        return call(self, session, piece, known, {name: value[:, :, 1:] for name, value in cache.items()})

    monkeypatch.setattr(parity.Graph, "_call", forgetful)
    with pytest.raises(ParityError, match="does not compute what was trained"):
        export(bases["nf4"], out=tmp_path / "bundle")


def test_logits_that_are_no_numbers_fail_the_gate() -> None:
    figures = agreement.Agreement()
    expected = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    wrong = expected.copy()
    wrong[2, 3] = np.nan
    with np.errstate(invalid="ignore"):
        figures.add(expected, wrong)
    assert figures.figures()["max_abs_logit"] == np.inf


def test_held_out_rows_of_the_run_gate_the_task(bases: dict[str, Path], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 60)
    shared = {"max_seq_length": 64, "seed": 3, "eval_fraction": 0.5, "data_sha256": sha256_file(rows)}
    run = write_run(tmp_path / "run", bases["int4"], data=str(rows), eval_data=None, **shared)
    figures = export(run, out=tmp_path / "split").manifest["parity"]
    assert figures["held_out_rows"] == 30
    assert figures["task"]["exact"]["positions"] == figures["task"]["fast"]["positions"] > 300
    assert figures["task"]["exact"]["loss"] == pytest.approx(figures["task"]["fast"]["loss"], rel=0.1)
    # The data changed since: which rows were held out is no longer known.
    write_rows(rows, 61)
    figures = export(run, out=tmp_path / "changed").manifest["parity"]
    assert figures["held_out_rows"] == 0
    assert "task" not in figures
    figures = export(run, out=tmp_path / "given", eval_data=rows).manifest["parity"]
    assert figures["held_out_rows"] == 61
    dense = write_run(tmp_path / "nf4", bases["nf4"])
    task = export(dense, out=tmp_path / "exact", eval_data=rows).manifest["parity"]["task"]
    assert task.keys() == {"exact"}, "there is no faster kernel for nf4"
    own = write_run(tmp_path / "own", bases["int4"], data="x", eval_data=str(rows), eval_data_sha256=sha256_file(rows))
    assert export(own, out=tmp_path / "bundle").manifest["parity"]["held_out_rows"] == 61


def test_a_fast_path_that_costs_the_task_fails_the_gate(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = write_run(tmp_path / "run", bases["int4"]), write_rows(tmp_path / "rows.jsonl")
    measured = itertools.cycle([0.5, 0.489])
    monkeypatch.setattr(
        parity, "task_metric", lambda *_: {"loss": 1.0, "token_accuracy": next(measured), "positions": 400}
    )
    with pytest.raises(ParityError, match=r"Int8 activations cost 1.1% of token accuracy on 400 .*50.0% to 48.9%"):
        export(run, out=tmp_path / "bundle", eval_data=rows)
    assert not (tmp_path / "bundle").exists()
    task = export(run, out=tmp_path / "bundle", eval_data=rows, accept_loss=True).manifest["parity"]["task"]
    assert task["fast"]["token_accuracy"] == 0.489


def test_agreement_counts_what_it_says() -> None:
    expected = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]], np.float32))
    got = np.log(np.array([[0.2, 0.7, 0.1], [0.1, 0.8, 0.1]], np.float32))
    figures = agreement.Agreement()
    figures.add(expected, got)
    kl = 0.7 * np.log(0.7 / 0.2) + 0.2 * np.log(0.2 / 0.7)
    assert figures.figures() == {
        "max_abs_logit": pytest.approx(np.log(3.5)), "top1_agreement": 0.5, "kl": pytest.approx(kl / 2), "rows": 2,
        "logit_spread": pytest.approx(np.sqrt(np.var(expected.astype(np.float64), axis=1).mean())),
    }  # fmt: skip
    nll, correct, count = agreement.loss_of(got, np.array([1, -100]))
    assert (nll, correct, count) == (pytest.approx(-np.log(0.7)), 1, 1)


def test_the_rows_of_the_gate_are_drawn_from_the_whole_file() -> None:
    # A file that is sorted by what its rows are about, as the packaged sample's is: 7 below 300, 8 from there on.
    rows = [
        Row(np.full(9 + i % 3, 7 + i // 300, np.int32), np.arange(9 + i % 3, dtype=np.int32), i) for i in range(600)
    ]
    chosen, held_out = agreement.probes(rows, 301, 64)
    assert 1000 <= agreement.num_positions(chosen) < 1011
    assert sum(int(probe.ids[0]) == 8 for probe in chosen) / len(chosen) == pytest.approx(0.5, abs=0.15)
    assert len(held_out) == 600
    for probe in held_out:
        assert probe.labels.tolist() == [*range(1, len(probe.ids)), -100]
    again, _ = agreement.probes(rows, 301, 64)
    assert [probe.ids.tolist() for probe in again] == [probe.ids.tolist() for probe in chosen]
    longer, task = agreement.probes([replace(row, input_ids=row.input_ids.repeat(9)) for row in rows], 301, 64)
    assert agreement.num_positions(task) >= agreement.TASK_POSITIONS > agreement.num_positions(longer)
    assert 0.3 < sum(int(probe.ids[0]) == 8 for probe in task) / len(task) < 0.7, "those for the task metric too"
    few, none = agreement.probes(rows[:2], 301, 64)
    assert ([len(probe.ids) for probe in few][2:], len(none)) == ([64] * 16, 2)


def test_a_run_of_all_linears_with_rslora(bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, layers_to_transform=(1,))
    bundle = export(write_run(tmp_path / "run", bases["nf4"], config), out=tmp_path / "bundle")
    assert bundle.manifest["parity"]["max_abs_logit"] < 1e-4
    assert len(bundle.adapter_tensors()) == 8
    assert all("layers.1." in name for name in bundle.adapter_tensors())


def test_exporter_is_what_the_package_exports() -> None:
    import edgetune

    assert edgetune.export is exporter.export


def test_slots_for_the_adapter_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["int4"])
    bundle = export(run, out=tmp_path / "bundle", slots="adapter")
    parts = ("self_attn.qkv_proj", "mlp.down_proj")
    assert [slot.name for slot in bundle.slots] == [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    graph = onnx.load(bundle.model_path, load_external_data=False).graph
    assert sum(".lora_A" in value.name for value in graph.input) == 4
    whole = export(run, out=tmp_path / "whole")
    ids = np.random.default_rng(1).integers(0, 301, (1, 30))
    feeds = bundle.adapter_tensors()
    np.testing.assert_array_equal(logits(bundle, ids, feeds), logits(whole, ids, feeds))
    other = write_run(tmp_path / "other", bases["int4"], LoraConfig(r=2, target_modules=("up_proj",)))
    with pytest.raises(AdapterError, match=r"adapts .*up_proj, which is .* --slots adapter, none with a slot"):
        add_adapter(bundle, other)
    with pytest.raises(ExportError, match=r"slots = 'adapter', and .* has none. Export a run"):
        export(bases["int4"], out=tmp_path / "none", slots="adapter")
    for options in ({"slots": "adapter", "merge": True}, {"slots": "some"}):
        with pytest.raises(ExportError, match=r"slots = .*; a graph takes adapters in all linears or in those of"):
            export(run, out=tmp_path / "none", **options)


def test_slots_are_those_of_the_weights_that_ship(tmp_path: Path) -> None:
    """Of this shape nf4 has no bytes of its own for k, and int8 has."""
    config = tiny_config("llama", hidden_size=36, num_attention_heads=3, num_key_value_heads=3, head_dim=4)
    base = quantize(write_model(tmp_path / "model", config), "nf4", tmp_path / "base")
    names = []
    for weights in ("nf4", "int8"):
        bundle = export(base, out=tmp_path / weights, weights=weights)
        graph = onnx.load(bundle.model_path, load_external_data=False).graph
        inputs = [value.name.removesuffix(".lora_A") for value in graph.input if value.name.endswith(".lora_A")]
        assert [slot.name for slot in bundle.slots] == inputs
        names.append(inputs[0].rpartition(".")[2])
    assert names == ["q_proj", "qkv_proj"]


def test_a_copied_run_keeps_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", bases["nf4"], base_sha256=sha256_file(bases["nf4"] / "model.safetensors"))
    moved = Path(shutil.copytree(run, tmp_path / "elsewhere" / "run"))
    assert export(moved, out=tmp_path / "bundle").manifest["base_sha256"] == sha256_file(
        bases["nf4"] / "model.safetensors"
    )


# --- how much is merged


def write_other_rows(path: Path, count: int = 30) -> Path:
    rows = [{"prompt": f"say {i}:", "completion": f" {i} {i} and {i + 1}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def mean_loss(run: Path, base: Path, alpha: float, rows: Path) -> float:
    """Torch's loss on supervised tokens with alpha times the adapter's change, before any rounding."""
    decoder = load_decoder(base)
    config, tensors = load_adapter(run, decoder.config)
    weaker = {name: value * np.float32(alpha if name.endswith("lora_B") else 1) for name, value in tensors.items()}
    load_tensors(attach(decoder, config), weaker)
    total, count = 0.0, 0
    for row in read_rows(rows, load_tokenizer(base), 256):
        with torch.no_grad():
            logits = decoder(torch.from_numpy(row.input_ids[None].astype(np.int64)))[0, :-1]
        labels = torch.from_numpy(row.labels[1:].astype(np.int64))
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("weights", ["fp32", "int4", "int8-dynamic", "standard"])
def test_a_sweep_measures_each_alpha_and_chooses_by_both_sets(
    bases: dict[str, Path], tmp_path: Path, weights: str
) -> None:
    run, base = write_run(tmp_path / "run", bases["int4"]), bases["int4"]
    new, old = write_rows(tmp_path / "new.jsonl"), write_other_rows(tmp_path / "old.jsonl")
    bundle = export(run, out=tmp_path / "bundle", merge=True, weights=weights, eval_data=new, retention_data=old)
    merge = bundle.manifest["merge"]
    assert [row["alpha"] for row in merge["sweep"]] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    tolerance = 1e-4 if weights == "fp32" else 0.2  # torch's losses are those before rounding
    for row in merge["sweep"]:
        for name, path in (("task", new), ("retention", old)):
            assert row[name]["loss"] == pytest.approx(mean_loss(run, base, row["alpha"], path), rel=tolerance)
            assert 0 <= row[name]["token_accuracy"] <= 1
            assert row[name]["positions"] > 100
    sums = {row["alpha"]: row["task"]["loss"] + row["retention"]["loss"] for row in merge["sweep"] if row["alpha"]}
    assert merge["alpha"] == min(sums, key=lambda alpha: sums[alpha])
    assert merge["chosen_by"] == "least sum of task and retention loss"
    assert (merge["adapter"]["r"], merge["adapter"]["lora_alpha"]) == (3, 5), "as it was trained"
    chosen = next(row for row in merge["sweep"] if row["alpha"] == merge["alpha"])
    task = bundle.manifest["parity"]["task"]
    assert chosen["task"] == task.get("fast", task["exact"]), "the graph of that row is the one that is shipped"
    told = explain(bundle.summary())
    assert f"merged    {merge['alpha']:g} of the adapter's change (least sum of task and retention loss;" in told
    table = [line.split() for line in told.splitlines() if line.startswith(" " * 12) and line.split()[0][0].isdigit()]
    assert [float(line[0]) for line in table] == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert [line[-1] == "chosen" for line in table] == [row["alpha"] == merge["alpha"] for row in merge["sweep"]]
    assert table[2][1] == f"{merge['sweep'][2]['task']['loss']:.4f}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "new.jsonl", "old.jsonl", "run"]


def test_what_is_merged_is_the_chosen_share(bases: dict[str, Path], tmp_path: Path) -> None:
    run, base = write_run(tmp_path / "run", bases["nf4"]), open_base(bases["nf4"])
    bundle = export(run, out=tmp_path / "bundle", merge=True, weights="fp32", alpha=0.3)
    merge = bundle.manifest["merge"]
    assert (merge["alpha"], merge["chosen_by"], merge["sweep"]) == (0.3, "user", [])
    assert "merged    0.3 of the adapter's change (user; 0 is the base, 1 as trained)" in explain(bundle.summary())
    module = "model.layers.1.mlp.down_proj"
    _, tensors = load_adapter(run, base.config)
    change = tensors[f"{module}.lora_B"].astype(np.float64) @ tensors[f"{module}.lora_A"] * 5 / 3
    written = parity.Written(bundle.model_path)[f"{module}.weight"]
    np.testing.assert_allclose(written, base.dequantize(module) + 0.3 * change, atol=1e-6)


def test_rounding_that_loses_the_merged_share_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    run, rows = write_run(tmp_path / "run", bases["int4"]), write_rows(tmp_path / "rows.jsonl")
    whole = export(run, out=tmp_path / "whole", merge=True).manifest["rounding"]
    message = (
        r"loses the adapter: it moves \d of 4 matrices further than 0.02 of training did, .* Leave --merge out, which "
        r"is exact, or merge more with a larger --alpha, or write it all the same"
    )
    for weights in (None, "int8"):  # which rounds less, and still too much
        with pytest.raises(ExportError, match=message):
            export(run, out=tmp_path / "bundle", merge=True, weights=weights, alpha=0.02, eval_data=rows)
    assert not (tmp_path / "bundle").exists()
    bundle = export(run, out=tmp_path / "bundle", merge=True, alpha=0.02, accept_loss=True)
    rounding = bundle.manifest["rounding"]
    assert rounding["max_error_over_delta"] > 1 > whole["max_error_over_delta"]
    assert "times as far as 0.02 of training did, MORE than 0.02 of training changed it" in explain(bundle.summary())


def test_without_a_retention_set_the_adapter_stays_as_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    run, rows = write_run(tmp_path / "run", bases["int4"]), write_rows(tmp_path / "rows.jsonl")
    bundle = export(run, out=tmp_path / "bundle", merge=True, eval_data=rows)
    merge = bundle.manifest["merge"]
    assert (merge["alpha"], merge["chosen_by"], len(merge["sweep"])) == (1.0, "as trained", 6)
    assert all(row["retention"] is None and row["task"]["loss"] > 0 for row in merge["sweep"])
    told = explain(bundle.summary())
    assert "task loss" in told
    assert "retention loss" not in told
    given = export(run, out=tmp_path / "given", merge=True, eval_data=rows, alpha=0.5).manifest["merge"]
    assert [row["alpha"] for row in given["sweep"]] == [0.0, 0.5], "the base and what the user chose"
    plain = export(run, out=tmp_path / "plain", merge=True).manifest["merge"]
    assert (plain["alpha"], plain["chosen_by"], plain["sweep"]) == (1.0, "as trained", [])
    assert export(run, out=tmp_path / "beside").manifest["merge"] is None


def test_the_base_is_the_row_of_alpha_zero(bases: dict[str, Path], tmp_path: Path) -> None:
    run, rows = write_run(tmp_path / "run", bases["int4"]), write_rows(tmp_path / "rows.jsonl")
    merged = export(run, out=tmp_path / "bundle", merge=True, eval_data=rows, alpha=1.0).manifest["merge"]["sweep"][0]
    base = export(bases["int4"], out=tmp_path / "base")
    nll = mean_nll(base, read_rows(rows, load_tokenizer(bases["int4"]), 256))
    assert (merged["task"]["loss"], merged["task"]["positions"]) == (pytest.approx(nll["nll"], rel=1e-4), nll["tokens"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.5}, ExportError, "say how an adapter is merged. Give them with --merge"),
        ({"retention_data": "old.jsonl"}, ExportError, "say how an adapter is merged. Give them with --merge"),
        ({"merge": True, "alpha": 0.0}, ExportError, r"alpha = 0.0; a number above 0, the base, and up to 1"),
        ({"merge": True, "alpha": 1.5}, ExportError, "alpha = 1.5; a number above 0"),
        ({"merge": True, "alpha": float("nan")}, ExportError, "alpha = nan; a number above 0"),
        ({"merge": True, "retention_data": "none.jsonl"}, DataError, "none.jsonl"),
        ({"merge": True, "retention_data": "old.jsonl"}, ExportError, "no held-out rows of the new task .*--eval-data"),
    ],
)
def test_what_cannot_be_weighed_is_refused(
    bases: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_other_rows(tmp_path / "old.jsonl")
    run = write_run(tmp_path / "run", bases["int4"])
    with pytest.raises(error, match=message):
        export(run, out=tmp_path / "bundle", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.jsonl", "run"]
