"""Rows = ENCODERS x weights: the exported graph against torch, with and without an adapter, in padded batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_encoder import encoder_hf, rows, write_encoder
from tiny_run import adapter_tensors

from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.lora import LoraConfig, onnx_tensors
from edgetune.base import EncoderBase, open_any_base
from edgetune.exporter import encoder as gate
from edgetune.exporter import parity
from edgetune.exporter.merging import BaseWeights, RoundedWeights
from edgetune.graphs import FORMATS
from edgetune.graphs.encoder import encoder_graph
from edgetune.grids import GRIDS
from edgetune.models import ENCODERS
from edgetune.models.encoder import load_encoder
from edgetune.quantizer import quantize

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def make_base(folder: Path, family: str, grid: str | None, **options: Any) -> Path:
    model = write_encoder(folder / "model", encoder_hf(family), **options)
    return model if grid is None else quantize(model, grid, folder / "base")


def write_graph(folder: Path, base: Path, *, slots: bool = True, weights: str | None = None) -> Path:
    """The graph of a base as it is, or rounded to `weights`."""
    folder.mkdir()
    opened = open_any_base(base)
    assert isinstance(opened, EncoderBase)
    source = BaseWeights(opened) if weights is None else RoundedWeights(opened, weights, None, merge=False)
    names = opened.config.linears() if slots else ()
    builder = encoder_graph(source, data_file="model.onnx.data", slots=names, contrib=weights != "standard")
    builder.save(folder, "model.onnx")
    parity.check_loads(folder / "model.onnx")
    return folder / "model.onnx"


def run(model: Path, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(embedding, last_hidden_state) of a second, minimal client, in fp32 where the kernels can."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    embedding, hidden = session.run(None, feeds)
    return embedding, hidden


def torch_outputs(encoder: torch.nn.Module, inputs: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    tensors = [torch.from_numpy(array) for array in inputs]
    with torch.no_grad():
        return encoder(*tensors).numpy(), encoder.hidden(*tensors).numpy()


@pytest.mark.parametrize(("family", "grid"), [(family, grid) for family in ENCODERS for grid in (None, *GRIDS)])
def test_embeddings_match_torch_with_and_without_an_adapter(tmp_path: Path, family: str, grid: str | None) -> None:
    base = make_base(tmp_path, family, grid, normalize=False)
    model, inputs = write_graph(tmp_path / "graph", base), rows(encoder_hf(family))
    feeds, encoder = dict(zip(NAMES, inputs, strict=True)), load_encoder(base)
    plain = torch_outputs(encoder, inputs)
    config, tensors = adapter_tensors(base, LoraConfig(r=3, lora_alpha=5))
    load_tensors(attach(encoder, config), tensors)
    tuned = torch_outputs(encoder, inputs)
    assert np.abs(tuned[0] - plain[0]).max() > 0.1, "the adapter has to change something"
    at = inputs[1] == 1
    for wanted, adapter in ((plain, {}), (tuned, onnx_tensors(config, tensors))):
        embedding, hidden = run(model, feeds | adapter)
        np.testing.assert_allclose(embedding, wanted[0], atol=1e-5, rtol=0)
        np.testing.assert_allclose(hidden[at], wanted[1][at], atol=2e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_normalized_embeddings_have_length_one(tmp_path: Path, pooling: str) -> None:
    base = make_base(tmp_path, "bert", None, pooling=pooling)
    inputs = rows(encoder_hf())
    embedding, _ = run(write_graph(tmp_path / "graph", base), dict(zip(NAMES, inputs, strict=True)))
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedding, torch_outputs(load_encoder(base), inputs)[0], atol=1e-6, rtol=0)


def test_token_types_may_be_left_out_and_mean_zero(tmp_path: Path) -> None:
    model, inputs = write_graph(tmp_path / "graph", make_base(tmp_path, "bert", None)), rows(encoder_hf())
    feeds = dict(zip(NAMES, inputs, strict=True))
    given = run(model, feeds | {"token_type_ids": np.zeros_like(inputs[2])})
    without = run(model, {name: feeds[name] for name in NAMES[:2]})
    for one, other in zip(given, without, strict=True):
        np.testing.assert_array_equal(one, other)
    assert np.abs(run(model, feeds)[0] - without[0]).max() > 1e-3


@pytest.mark.parametrize("weights", FORMATS)
def test_a_graph_of_any_weights_computes_with_them(tmp_path: Path, weights: str) -> None:
    """Torch takes the weights as they were written; the gate's own client computes in fp32."""
    base = make_base(tmp_path, "bert", "int4" if weights == "standard" else None)
    model, encoder = write_graph(tmp_path / "graph", base, weights=weights), load_encoder(base)
    plain = torch_outputs(encoder, rows(encoder_hf()))[0]
    parity.use_written_weights(encoder, model, weights)
    texts = gate.seeded_texts(encoder.config)
    assert sum(int(feeds["attention_mask"].sum()) for feeds in texts) >= 1000
    expected = gate.run_torch(encoder, texts)
    found = gate.run_graph(model, {}, texts, fp32_compute=True)
    for (wanted, _), (got, _) in zip(expected, found, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4, rtol=0)
    change = np.abs(torch_outputs(encoder, rows(encoder_hf()))[0] - plain).max()
    assert (change < 1e-6) == (weights in ("fp32", "standard")), "weights that round change the embedding"


@pytest.mark.parametrize("weights", FORMATS)
def test_every_node_has_a_cpu_kernel(tmp_path: Path, weights: str) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    base = make_base(tmp_path, "bert", None)
    model = onnx.load(write_graph(tmp_path / "graph", base, weights=weights), load_external_data=False)
    kernels = {
        (kernel.op_name, kernel.domain)
        for kernel in state.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
    }
    assert {(node.op_type, node.domain) for node in model.graph.node} <= kernels
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Constant", "ConstantOfShape"})
    assert ({node.domain for node in model.graph.node} == {""}) is (weights == "standard")
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_without_slots_there_are_three_inputs(tmp_path: Path) -> None:
    base = make_base(tmp_path, "bert", None)
    loaded = onnx.load(write_graph(tmp_path / "graph", base, slots=False), load_external_data=False)
    assert [value.name for value in loaded.graph.input] == list(NAMES)
    assert [value.name for value in loaded.graph.output] == ["embedding", "last_hidden_state"]
