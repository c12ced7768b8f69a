"""Rows = FAMILIES x (dense, every grid): the exported graph against torch, and against an independent client."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import tiny_config, write_model
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file
from tiny_run import adapter_tensors

from edgetune.adapter_file import by_slot
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.lora import LoraConfig, onnx_tensors
from edgetune.base import open_base
from edgetune.exporter import agreement, export, parity, pieces
from edgetune.exporter.merging import BaseWeights, RoundedWeights, round_to
from edgetune.graphs import FORMATS
from edgetune.graphs.decoder import decoder_graph
from edgetune.graphs.fused import adapter_slots
from edgetune.grids import GRIDS, nf4
from edgetune.models import FAMILIES
from edgetune.models.decoder import load_decoder
from edgetune.quantizer import quantize

ROWS = [(family, grid) for family in FAMILIES for grid in (None, *GRIDS)]
ADAPTER = LoraConfig(r=3, lora_alpha=5)


def make_base(folder: Path, family: str, grid: str | None, **overrides: Any) -> Path:
    model = write_model(folder / "model", tiny_config(family, **overrides))
    return model if grid is None else quantize(model, grid, folder / "base")


def write_graph(folder: Path, base: Path, *, slots: bool = True, weights: str | None = None) -> Path:
    """The graph of a base as it is, or rounded to `weights`."""
    folder.mkdir()
    opened = open_base(base)
    source = BaseWeights(opened) if weights is None else RoundedWeights(opened, weights, None, merge=False)
    found = adapter_slots(opened.config, source.format_of) if slots else ()
    builder = decoder_graph(
        source, data_file="model.onnx.data", context_length=256, slots=found, contrib=weights != "standard"
    )
    builder.save(folder, "model.onnx")
    return folder / "model.onnx"


def graph_feeds(base: Path, config: LoraConfig, tensors: dict[str, np.ndarray], weights: str | None = None) -> Any:
    """An adapter as inputs of the graph of `write_graph`."""
    opened = open_base(base)
    source = BaseWeights(opened) if weights is None else RoundedWeights(opened, weights, None, merge=False)
    return by_slot(onnx_tensors(config, tensors), adapter_slots(opened.config, source.format_of))


class Client:
    """A second, minimal client of the graph: what its inputs and outputs are for, and nothing of edgetune."""

    def __init__(self, model: Path, *, fp32: bool = True) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if fp32:
            options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.empty = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }

    def run(
        self,
        ids: np.ndarray,
        cache: Mapping[str, np.ndarray] | None = None,
        feeds: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        cache = cache or {name: np.repeat(value, len(ids), 0) for name, value in self.empty.items()}
        past = next(iter(cache.values())).shape[2]
        inputs = {"input_ids": ids, "attention_mask": np.ones((len(ids), past + ids.shape[1]), np.int64), **cache}
        names = [output.name for output in self.session.get_outputs()]
        result = dict(zip(names, self.session.run(names, inputs | dict(feeds or {})), strict=True))
        return result.pop("logits"), {name.replace("present", "past_key_values"): v for name, v in result.items()}

    def greedy(self, prompt: list[int], count: int, feeds: Mapping[str, np.ndarray] | None = None) -> list[int]:
        logits, cache = self.run(np.array([prompt]), feeds=feeds)
        tokens = [int(logits[0, -1].argmax())]
        while len(tokens) < count:
            logits, cache = self.run(np.array([tokens[-1:]]), cache, feeds)
            tokens.append(int(logits[0, -1].argmax()))
        return tokens


@pytest.mark.parametrize(("family", "grid"), ROWS)
def test_logits_match_torch_with_and_without_an_adapter(tmp_path: Path, family: str, grid: str | None) -> None:
    base = make_base(tmp_path, family, grid)
    client = Client(write_graph(tmp_path / "graph", base))
    ids = np.random.default_rng(3).integers(0, 301, (2, 37))
    decoder = load_decoder(base)
    with torch.no_grad():
        plain = decoder(torch.from_numpy(ids)).numpy()
        config, tensors = adapter_tensors(base, ADAPTER)
        load_tensors(attach(decoder, config), tensors)
        tuned = decoder(torch.from_numpy(ids)).numpy()
    assert np.abs(tuned - plain).max() > 1, "the adapter has to change something"
    np.testing.assert_allclose(client.run(ids)[0], plain, atol=1e-4, rtol=0)
    np.testing.assert_allclose(client.run(ids, feeds=graph_feeds(base, config, tensors))[0], tuned, atol=1e-4, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_graph_of_parts_that_stay_apart(tmp_path: Path, *, qk_norm: bool) -> None:
    family = "qwen3" if qk_norm else "qwen2"  # with norms of q and k; with biases
    config = tiny_config(
        family, hidden_size=36, num_attention_heads=3, num_key_value_heads=3, head_dim=4, intermediate_size=92
    )
    base = quantize(write_model(tmp_path / "model", config), "nf4", tmp_path / "base")
    client = Client(write_graph(tmp_path / "graph", base))
    inputs = {item.name for item in client.session.get_overridable_initializers()}
    assert "model.layers.0.self_attn.q_proj.lora_A" in inputs
    decoder = load_decoder(base)
    lora, tensors = adapter_tensors(base, ADAPTER)
    load_tensors(attach(decoder, lora), tensors)
    ids = np.random.default_rng(3).integers(0, 301, (2, 19))
    with torch.no_grad():
        expected = decoder(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(client.run(ids, feeds=graph_feeds(base, lora, tensors))[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head_dim", [8, 12, 16])  # standard operators for 8 and 12, the contrib one for 16
def test_a_sequence_in_pieces_gives_the_logits_of_the_whole(tmp_path: Path, family: str, head_dim: int) -> None:
    base = make_base(tmp_path, family, None, head_dim=head_dim)
    client = Client(write_graph(tmp_path / "graph", base))
    ids = np.random.default_rng(4).integers(0, 301, (1, 90))
    whole, _ = client.run(ids)
    parts, cache = [], None
    for start, stop in ((0, 1), (1, 50), (50, 51), (51, 52), (52, 90)):
        logits, cache = client.run(ids[:, start:stop], cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4, rtol=0)
    with torch.no_grad():
        np.testing.assert_allclose(whole, load_decoder(base)(torch.from_numpy(ids)).numpy(), atol=1e-4, rtol=0)


def test_an_nf4_weight_in_row_ranges_gives_the_same_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, "qwen2", "nf4")
    ids = np.random.default_rng(5).integers(0, 301, (1, 20))
    whole = Client(write_graph(tmp_path / "whole", base)).run(ids)[0]
    monkeypatch.setattr(nf4, "PIECE_BYTES", 4 * 72 * 50)
    model = write_graph(tmp_path / "pieces", base)
    ops = Counter(node.op_type for node in onnx.load(model, load_external_data=False).graph.node)
    # A block of 64 starts at every eighth row of 72 or 88, so 50 rows become 48 or 40: three ranges for the 120 rows of
    # q, k and v, four for the 176 of gate and up, two each for o and down, seven for the 301 rows of the head.
    assert ops["MatMulBnb4"] == 2 * (3 + 4 + 2 + 2) + 7
    assert ops["Concat"] == 2 * 4 + 1 + 1  # and one makes the shape of the hidden states
    assert (tmp_path / "whole" / "model.onnx.data").read_bytes() == (
        tmp_path / "pieces" / "model.onnx.data"
    ).read_bytes()
    np.testing.assert_allclose(Client(model).run(ids)[0], whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_dim", [8, 16])  # the standard attention, and where it may be the contrib one
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_has_a_cpu_kernel_and_the_checker_passes(
    tmp_path: Path, family: str, weights: str, head_dim: int
) -> None:
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    path = write_graph(tmp_path / "graph", make_base(tmp_path, family, None, head_dim=head_dim), weights=weights)
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    kernels = {
        (kernel.op_name, kernel.domain)
        for kernel in state.get_all_opkernel_def()
        if kernel.provider == "CPUExecutionProvider"
    }
    missing = {(node.op_type, node.domain) for node in model.graph.node} - kernels
    assert not missing
    assert not {"Constant", "ConstantOfShape"} & {node.op_type for node in model.graph.node}
    assert model.ir_version == 10
    opsets = {item.domain: item.version for item in model.opset_import}
    assert opsets == ({"": 23} if weights == "standard" else {"": 23, "com.microsoft": 1})
    assert ({node.domain for node in model.graph.node} == {""}) is (weights == "standard")
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert all(name.startswith("/") for name in names)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_tied_table_is_stored_once(tmp_path: Path, weights: str) -> None:
    base = open_base(make_base(tmp_path, "llama", None))
    path = write_graph(tmp_path / "graph", base.folder, weights=weights)
    table = round_to(weights, base.dequantize("model.embed_tokens"))
    table = table.get("codes", table.get("weight"))
    spans = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert not tensor.name.startswith("lm_head.weight")
        if tensor.name.startswith("model.embed_tokens.weight") and not tensor.name.endswith(
            ("scales", "scales.rows", "absmax")
        ):
            spans[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    offset, length = next(iter(spans.values()))
    assert length == table.nbytes
    assert all(offset <= start and start + size <= offset + length for start, size in spans.values())


@pytest.mark.parametrize("vocab_size", [301, 302])  # columns in 4 bits cannot be cut where their number is odd
@pytest.mark.parametrize("weights", FORMATS)
def test_the_pieces_are_the_graph(tmp_path: Path, weights: str, vocab_size: int) -> None:
    """The same logits as the graph in one session, in tiles of the vocabulary; every node in one piece."""
    base = make_base(tmp_path, "qwen3", None, vocab_size=vocab_size, head_dim=16)
    path = write_graph(tmp_path / "graph", base, weights=weights)
    ids = np.random.default_rng(10).integers(0, vocab_size, (1, 19))
    whole, _ = Client(path, fp32=False).run(ids)
    graph = parity.Graph(path, open_base(base).config, {}, fp32_compute=False)
    model = onnx.load(path, load_external_data=False)
    *body, head = pieces.cut(model)
    assert [node.name for piece in (*body, head) for node in piece.nodes] == [node.name for node in model.graph.node]
    assert len(body) == 1 + 2 + 1
    tiles = list(pieces.row_ranges(head, path.parent, vocab_size, 100))
    if weights == "nf4" or (weights == "standard" and vocab_size % 2):
        assert [rows for rows, _ in tiles] == [slice(0, vocab_size)]
    else:
        assert [rows.start for rows, _ in tiles] == [0, 96, 192, 288]
    graph._heads = lambda: tiles  # type: ignore[assignment]
    item = agreement.Probe(ids[0], np.full(19, -100))
    [(rows, logits)] = list(graph.spool([item], tmp_path / "spool").blocks())
    assert rows == slice(0, 19)
    np.testing.assert_allclose(logits, whole[0], atol=1e-4, rtol=0)
    if weights != "int8-dynamic":  # the one scale of its activations is that of a step
        [(_, logits)] = list(graph.spool_in_steps(item, tmp_path / "steps").blocks())
        np.testing.assert_allclose(logits, whole[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_dim", [8, 16])  # the standard attention, and where it may be the contrib one
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_runs_every_family_in_pieces(tmp_path: Path, family: str, head_dim: int) -> None:
    """One for each block, whatever its attention and norms; with an adapter, at once and through the cache."""
    base = make_base(tmp_path, family, "int4", head_dim=head_dim)
    path, config = write_graph(tmp_path / "graph", base), open_base(base).config
    names = [node.name for node in onnx.load(path, load_external_data=False).graph.node]
    *body, head = pieces.cut(onnx.load(path, load_external_data=False))
    assert [node.name for piece in (*body, head) for node in piece.nodes] == names
    assert len(body) == 1 + config.num_hidden_layers + 1
    work = tmp_path / "work"
    work.mkdir()
    decoder = load_decoder(base)
    lora, tensors = adapter_tensors(base, ADAPTER)
    load_tensors(attach(decoder, lora), tensors)
    items, _ = agreement.probes([], config.vocab_size, 64)
    expected = parity.spool_logits(decoder, items, work / "torch")
    feeds = graph_feeds(base, lora, tensors)
    figures = parity.check_logits(path, config, feeds, items, expected, work, fast=False)
    assert figures["rows"] >= 1000
    assert max(figures["max_abs_logit"], figures["max_abs_logit_cached"]) < 1e-4

    rows = [item.ids.tolist() for item in items[:2]]
    pair = []
    for given in (feeds, {}):
        logits = [Client(path).run(np.array([row]), feeds=given)[0] for row in rows]
        pair.append(np.concatenate(logits, 1))
    change = np.abs(pair[0] - pair[1]).max() / np.abs(pair[1]).max()
    assert parity.probe_change(path, config, feeds, rows, work) == pytest.approx(change, rel=1e-3)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_graph_of_any_weights_computes_with_them(tmp_path: Path, weights: str) -> None:
    """Torch over the weights dequantized beforehand, against the graph that dequantizes them itself."""
    base = open_base(make_base(tmp_path, "qwen2", None))
    rounded = tmp_path / "rounded"
    shutil.copytree(base.folder, rounded)
    matrices = base.config.matrices()
    tensors = {name: base.weights.float32(name) for name in base.weights}
    for module, shape in matrices.items():
        codes = round_to(weights, tensors[f"{module}.weight"])
        tensors[f"{module}.weight"] = np.ascontiguousarray(FORMATS[weights].dequantize(codes, shape))
    save_file(tensors, rounded / "model.safetensors")
    ids = np.random.default_rng(8).integers(0, 301, (2, 23))
    with torch.no_grad():
        expected = load_decoder(rounded)(torch.from_numpy(ids)).numpy()
    path = write_graph(tmp_path / "graph", base.folder, weights=weights)
    items = [agreement.Probe(row, np.full(len(row), -100)) for row in ids]
    spool = parity.Graph(path, base.config, {}, fp32_compute=True).spool(items, tmp_path / "spool")
    got = np.concatenate([logits for _, logits in spool.blocks()])
    np.testing.assert_allclose(got, expected.reshape(-1, 301), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_runtime_without_contrib_operators_reads_standard_weights(tmp_path: Path, family: str) -> None:
    """ONNX's own reference implementation, with an adapter and with a cache."""
    base = make_base(tmp_path, family, "int4", head_dim=16)
    path = write_graph(tmp_path / "graph", base, weights="standard")
    config, tensors = adapter_tensors(base, ADAPTER)
    feeds = graph_feeds(base, config, tensors, "standard")
    ids = np.random.default_rng(9).integers(0, 301, (1, 8))
    client = Client(path)
    reference = ReferenceEvaluator(str(path))
    cache = dict(client.empty)
    for start, stop in ((0, 5), (5, 8)):
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": np.ones((1, stop), np.int64), **cache, **feeds}
        found = dict(zip(reference.output_names, reference.run(None, inputs), strict=True))
        expected, _ = client.run(ids[:, start:stop], cache, feeds)
        np.testing.assert_allclose(found.pop("logits"), expected, atol=1e-3, rtol=0)
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}


def test_slots_are_optional_inputs_of_any_rank(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", "int4")
    model = write_graph(tmp_path / "graph", base)
    session = Client(model).session
    optional = {item.name: item.shape for item in session.get_overridable_initializers()}
    shapes = {
        "self_attn.qkv_proj": (72, 72 + 24 + 24), "self_attn.o_proj": (72, 72), "mlp.gate_up_proj": (72, 88 + 88),
        "mlp.down_proj": (88, 72),
    }  # fmt: skip
    assert optional.pop("logits_to_keep") == [1]
    assert {name: shape[name[-1] == "B"] for name, shape in optional.items()} == {
        f"model.layers.{i}.{path}.lora_{part}": shape["AB".index(part)]
        for i in range(2) for path, shape in shapes.items() for part in "AB"
    }  # fmt: skip
    without = Client(write_graph(tmp_path / "without", base, slots=False))
    assert [item.name for item in without.session.get_overridable_initializers()] == ["logits_to_keep"]
    ids = np.random.default_rng(6).integers(0, 301, (1, 9))
    assert np.array_equal(Client(model).run(ids)[0], without.run(ids)[0]), "empty slots change nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_torch_and_graph_agree(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path, family, None)
    decoder = load_decoder(base)
    tokens = [7, 80, 3]
    with torch.no_grad():
        for _ in range(60):
            tokens.append(int(decoder(torch.tensor([tokens]))[0, -1].argmax()))
    assert Client(write_graph(tmp_path / "graph", base)).greedy([7, 80, 3], 60) == tokens[3:]


def test_stories260k_tells_the_expected_story(tmp_path: Path, real: Callable[[str], Path]) -> None:
    oracle = json.loads((real("stories260k") / "oracle.json").read_text(encoding="utf-8"))
    bundle = export(real("stories260k"), out=tmp_path / "bundle")
    client = Client(bundle.model_path)
    assert client.greedy(oracle["prompt_ids"], 200) == oracle["expected_new_token_ids"]
    first = client.run(np.array([oracle["prompt_ids"]]))[0][0, -1, :8]
    np.testing.assert_allclose(first, oracle["first_step_logits_first_8"], atol=oracle["logit_tolerance"], rtol=0)
