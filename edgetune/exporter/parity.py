"""Does the exported graph compute what was trained? Bytes first, then logits, torch against onnxruntime.

    bytes      every weight in the written file, read back, equals the base's own
    exact      logits in fp32 compute: max difference <= 1e-3, top-1 agreement >= 99.9 %, also through the KV cache
    fast       the int8-activation kernels that a device will run: another computation, so its KL and top-1 are
               reported, and gated on what it is for: token accuracy on held-out rows may drop by one point at most

At least 1,000 positions: held-out rows first, seeded token ids where they do not suffice. Torch's logits are spooled to
disk, so that torch's and onnxruntime's copies of a model are never in memory together.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch

from edgetune import host
from edgetune.errors import ExportError, ParityError
from edgetune.exporter.agreement import Agreement, Probe, batches, loss_of, num_positions
from edgetune.exporter.merging import BaseWeights, RoundedWeights
from edgetune.graphs import FORMATS
from edgetune.models.config import DecoderConfig
from edgetune.models.decoder import Decoder

MAX_ABS_LOGIT = 1e-3
MIN_TOP1 = 0.999
MAX_ACCURACY_DROP = 0.01


class Graph:
    """An exported decoder on onnxruntime. `feeds` are adapter inputs."""

    def __init__(
        self, model: Path, config: DecoderConfig, feeds: Mapping[str, np.ndarray], *, fp32_compute: bool
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = host.threads()
        options.log_severity_level = 3
        options.enable_mem_pattern = options.enable_cpu_mem_arena = False
        graph: Path | bytes = model
        if fp32_compute:
            options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
            # DequantizeLinear and MatMul are fused into MatMulNBits, also with 8 bits and one scale for a row.
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
            graph = _in_fp32(model)
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._feeds, self._config = dict(feeds), config
        self._outputs = [output.name for output in self._session.get_outputs()]

    def without_adapter(self) -> Graph:
        """The same session, fed with no adapter."""
        graph = copy.copy(self)
        graph._feeds = {}
        return graph

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Logits float32 [B, T, vocab] of ids [B, T]."""
        return self._run(ids, self._empty(len(ids)))["logits"]

    def logits_in_steps(self, ids: np.ndarray) -> np.ndarray:
        """The same for ids [1, T] through the cache: half at once, then single tokens, then the rest at once."""
        half = ids.shape[1] // 2
        cuts = [0, *range(half, min(half + 5, ids.shape[1])), ids.shape[1]]
        cache, parts = self._empty(1), []
        for start, stop in pairwise(cuts):
            result = self._run(ids[:, start:stop], cache)
            parts.append(result.pop("logits"))
            cache = {name.replace("present", "past_key_values"): value for name, value in result.items()}
        return np.concatenate(parts, 1)

    def _run(self, ids: np.ndarray, cache: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        past = next(iter(cache.values())).shape[2]
        mask = np.ones((len(ids), past + ids.shape[1]), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask, **cache, **self._feeds}
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))

    def _empty(self, batch: int) -> dict[str, np.ndarray]:
        empty = np.zeros((batch, self._config.num_key_value_heads, 0, self._config.head_dim), np.float32)
        layers = range(self._config.num_hidden_layers)
        return {f"past_key_values.{i}.{kind}": empty for i in layers for kind in ("key", "value")}


def _in_fp32(model: Path) -> bytes:
    """The model with 8-bit products in fp32 compute: their kernels do not know `force_fp32` (measured on 1.31.1)."""
    loaded = ir.load(model)
    for node in list(loaded.graph):
        if node.op_type == "MatMulNBits" and node.attributes["bits"].as_int() == 8:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        elif node.op_type == "DynamicQuantizeMatMul":
            _replace_dynamic(loaded.graph, node)
    serialized: bytes = ir.to_proto(loaded).SerializeToString()
    return serialized


def _replace_dynamic(graph: ir.Graph, node: ir.Node) -> None:
    """The sum x dequantized(codes) + bias in standard operators, in place of a product of rounded activations."""
    x, codes, scales, zero, *bias = node.inputs
    assert zero is not None and zero.const_value is not None and scales is not None and scales.shape is not None
    zeros = ir.tensor(np.full(scales.shape.numpy(), zero.const_value.numpy()), name=f"{node.name}/zeros")
    value = ir.Value(name=zeros.name, const_value=zeros, type=ir.TensorType(zeros.dtype), shape=ir.Shape(scales.shape))
    graph.register_initializer(value)
    weight = ir.node("DequantizeLinear", [codes, scales, value], {"axis": 1})
    nodes = [weight, ir.node("MatMul", [x, weight.outputs[0]])]
    if bias:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias[0]]))
    graph.insert_before(node, nodes)
    nodes[-1].outputs[0].name = node.outputs[0].name
    node.outputs[0].replace_all_uses_with(nodes[-1].outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def spool_logits(decoder: Decoder, items: Sequence[Probe], path: Path) -> np.ndarray:
    """Torch's logits of all positions in order, float32 [positions, vocab], mapped from `path`."""
    spool = np.memmap(path, np.float32, "w+", shape=(num_positions(items), decoder.config.vocab_size))
    at = 0
    for ids, group in batches(items):
        with torch.no_grad():
            logits = decoder(torch.from_numpy(ids)).numpy()
        for row, probe in zip(logits, group, strict=True):
            spool[at : at + len(probe.ids)] = row[: len(probe.ids)]
            at += len(probe.ids)
    return spool


def compare(graph: Graph, items: Sequence[Probe], expected: np.ndarray) -> dict[str, Any]:
    """Agreement of the graph with spooled logits."""
    agreement, at = Agreement(), 0
    for ids, group in batches(items):
        for row, probe in zip(graph.logits(ids), group, strict=True):
            agreement.add(expected[at : at + len(probe.ids)], row[: len(probe.ids)])
            at += len(probe.ids)
    return agreement.figures()


def probe_change(
    model: Path, config: DecoderConfig, feeds: Mapping[str, np.ndarray], rows: Sequence[Sequence[int]]
) -> float:
    """How far an adapter moves the base's logits on probe rows: the largest change of one by the largest logit."""
    tuned = Graph(model, config, feeds, fp32_compute=True)
    base = tuned.without_adapter()
    pairs = [(tuned.logits(ids), base.logits(ids)) for ids in (np.array([row], np.int64) for row in rows)]
    return float(max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(b).max() for _, b in pairs))


def task_metric(graph: Graph, items: Sequence[Probe]) -> dict[str, Any]:
    """Mean NLL (nats per token) and token accuracy on the supervised positions of held-out probes."""
    totals = np.zeros(3)
    for ids, group in batches(items):
        for row, probe in zip(graph.logits(ids), group, strict=True):
            totals += loss_of(row[: len(probe.ids)], probe.labels)
    return {"loss": totals[0] / totals[2], "token_accuracy": totals[1] / totals[2], "positions": int(totals[2])}


def check_bytes(model: Path, source: BaseWeights, produced: Mapping[str, str]) -> None:
    """Every weight in the written file equals the base's own bytes; of a rounded one, the bytes that were produced.

    Raises ParityError naming the first tensor that differs.
    """
    written = read_back(model)
    if isinstance(source, RoundedWeights):
        differing = [
            name for name, digest in produced.items() if hashlib.sha256(written[name].data).hexdigest() != digest
        ]
    else:
        differing = [name for name, array in _expected(source) if not np.array_equal(written[name], array)]
    if differing:
        raise ParityError(
            f"{len(differing)} tensors in {model} differ from the base, first {differing[0]}: the bundle would not "
            f"hold the bytes that were trained on. Check the disk and export again; if it stays, report it as a defect"
        )


def _expected(source: BaseWeights) -> Iterator[tuple[str, np.ndarray]]:
    """Initializer name -> what it must hold, from the base."""
    for module in source.config.matrices():
        for kind, array in source.codes(module).items():
            name = f"{module}.weight" if kind == "weight" else f"{module}.weight.{kind}"
            # Float16 scales are widened, which is exact.
            yield name, array if array.dtype == np.uint8 else array.astype(np.float32)
    for name in source.config.vectors():
        yield name, source.vector(name)


def read_back(model: Path) -> dict[str, np.ndarray]:
    """The initializers of a model file, those in its data file mapped."""
    values = ir.load(model).graph.initializers.values()
    return {str(value.name): value.const_value.numpy() for value in values if value.const_value is not None}


class _WrittenLinear(torch.nn.Module):
    """y = x W^T + bias over a weight as it was written, dequantized on every call."""

    def __init__(self, weights: str, codes: Mapping[str, np.ndarray], shape: tuple[int, int], bias: Any) -> None:
        super().__init__()
        self._weights, self._codes, self._shape, self._bias = weights, codes, shape, bias

    def _rows(self, rows: np.ndarray | None = None) -> torch.Tensor:
        weight = FORMATS[self._weights].dequantize(self._codes, self._shape, rows)
        return torch.from_numpy(np.require(weight, requirements="W"))  # torch wants memory that it could write to

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self._rows(), self._bias)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        unique, inverse = np.unique(ids.numpy(), return_inverse=True)
        return self._rows(unique)[torch.from_numpy(inverse.reshape(ids.shape))]


def use_written_weights(decoder: Decoder, model: Path, weights: str) -> None:
    """Replace every matrix of a decoder by the one in a written model file: torch's view of rounded weights."""
    written = read_back(model)
    matrices = decoder.config.matrices()
    for module, shape in matrices.items():
        name = f"{module}.weight"
        found = {key.removeprefix(name).lstrip("."): value for key, value in written.items() if key.startswith(name)}
        # The weight itself, or its parts; longer names are views of the same bytes.
        codes = {key or "weight": value for key, value in found.items() if "." not in key}
        path, _, leaf = module.removeprefix("model.").rpartition(".")
        parent = decoder.get_submodule(path)
        setattr(parent, leaf, _WrittenLinear(weights, codes, shape, getattr(parent, leaf).bias))
    if decoder.config.tie_word_embeddings:
        decoder.lm_head = decoder.embed_tokens


def check_logits(
    model: Path,
    config: DecoderConfig,
    feeds: Mapping[str, np.ndarray],
    items: Sequence[Probe],
    expected: np.ndarray,
    *,
    fast: bool,
    held_out: Sequence[Probe] = (),
) -> dict[str, Any]:
    """The gate on logits; its figures. `expected` are torch's logits for `items`.

    The task metric is measured on `held_out` probes. With `fast` the kernels that round activations are measured too,
    and gated on that metric.
    Raises ParityError where fp32 compute is off by more than 1e-3, whole or through the cache, or its top-1 agrees
    below 99.9 %, or where int8 activations cost more than one point of token accuracy.
    """
    graph = Graph(model, config, feeds, fp32_compute=True)
    figures = compare(graph, items, expected)
    first = Agreement()
    first.add(expected[: len(items[0].ids)], graph.logits_in_steps(items[0].ids[None])[0])
    figures["max_abs_logit_cached"] = first.figures()["max_abs_logit"]
    _check_exact(figures)
    if held_out:
        figures["task"] = {"exact": task_metric(graph, held_out)}
    if fast:
        graph = Graph(model, config, feeds, fp32_compute=False)
        figures["fast"] = compare(graph, items, expected)
        if held_out:
            figures["task"]["fast"] = task_metric(graph, held_out)
            _check_task(**figures["task"])
    return figures


def _check_exact(figures: Mapping[str, Any]) -> None:
    worst = max(figures["max_abs_logit"], figures["max_abs_logit_cached"])
    if worst > MAX_ABS_LOGIT or figures["top1_agreement"] < MIN_TOP1:
        raise ParityError(
            f"The exported graph does not compute what was trained: over {figures['rows']} positions the largest logit "
            f"difference is {figures['max_abs_logit']:.2e}, {figures['max_abs_logit_cached']:.2e} through the cache "
            f"(allowed {MAX_ABS_LOGIT:.0e}), and top-1 agreement {figures['top1_agreement']:.2%} "
            f"(wanted {MIN_TOP1:.1%}). Nothing was written. Report the model's config.json and the version of "
            f"onnxruntime as a defect"
        )


def _check_task(exact: Mapping[str, Any], fast: Mapping[str, Any]) -> None:
    drop = exact["token_accuracy"] - fast["token_accuracy"]
    if drop > MAX_ACCURACY_DROP:
        raise ParityError(
            f"Int8 activations cost {drop:.1%} of token accuracy on {fast['positions']} held-out positions "
            f"({exact['token_accuracy']:.1%} to {fast['token_accuracy']:.1%}; one point is allowed). Nothing was "
            f"written. Export with --weights fp32, or train longer"
        )


def check_rounding(figures: Mapping[str, Any], stored: str, weights: str, *, alpha: float | None) -> None:
    """The gate on a rounding of weights that an adapter was trained around; `figures` are those of the manifest.

    `alpha` is the share of the adapter that was merged, None where it stays beside the graph.

    Raises ExportError where rounding moved a matrix further than the adapter did, or cost more than one point of token
    accuracy on held-out rows: what was trained may be lost in it.
    """
    problems = []
    above = [name for name, ratio in figures["error_over_delta"].items() if ratio > 1]
    if above:
        change = "training" if alpha in (None, 1) else f"{alpha:g} of training"
        problems.append(
            f"it moves {len(above)} of {len(figures['error_over_delta'])} matrices further than {change} did, "
            f"{figures['worst_layer']} {figures['max_error_over_delta']:.2f} times as far"
        )
    before, after = figures["token_accuracy_before"], figures["token_accuracy_after"]
    if before is not None and before - after > MAX_ACCURACY_DROP:
        problems.append(f"token accuracy on held-out rows drops from {before:.1%} to {after:.1%}")
    if not problems:
        return
    loss = ""
    if figures["loss_before"] is not None:
        loss = f", held-out loss goes from {figures['loss_before']:.4f} to {figures['loss_after']:.4f}"
    ways = [f"Keep --weights {stored}, which is exact" if alpha is None else "Leave --merge out, which is exact"]
    if above and alpha not in (None, 1):
        ways.append("merge more with a larger --alpha")
    if weights != "int8":
        ways.append("take --weights int8, which is near lossless")
    if stored == "nf4" and weights != "nf4":
        ways.append("train again on an int4 base (`edgetune quantize --grid int4`), which is exact and fast")
    raise ExportError(
        f"Rounding {stored} weights to {weights} loses the adapter: {'; '.join(problems)}. Over {figures['rows']} "
        f"positions logits change by up to {figures['max_abs_logit']:.3g}, KL {figures['kl']:.2e}{loss}. Nothing was "
        f"written. {', or '.join(ways)}, or write it all the same with --accept-loss"
    )
