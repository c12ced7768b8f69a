"""Does the exported graph compute what was trained? Bytes first, then logits, torch against onnxruntime.

    loads      onnx's checker passes, and onnxruntime takes the whole graph: every node has a kernel
    bytes      every weight in the written file, read back, equals the base's own
    exact      logits in fp32 compute: max difference <= 1e-3 where they spread over 1 to 10, as most do, and in
               proportion outside of that; top-1 agreement >= 99.9 %; also through the KV cache
    fast       the int8-activation kernels that a device will run: another computation, so its KL and top-1 are
               reported, and gated on what it is for: token accuracy on held-out rows may drop by one point at most

At least 1,000 positions: held-out rows in a seeded order, token ids where they do not suffice. The gate runs in the
process that exports, inside its memory: torch dequantizes a matrix at a time, onnxruntime runs the graph in `pieces`,
and both spool logits to disk in tiles of the vocabulary.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from edgetune import host
from edgetune.adapter_file import PAST, PROMPT_LENGTH
from edgetune.data import IGNORED
from edgetune.errors import ExportError, ParityError
from edgetune.exporter.agreement import MIN_POSITIONS, Probe, Spool, compare, num_positions, task_of
from edgetune.exporter.merging import BaseWeights, RoundedWeights
from edgetune.exporter.pieces import Piece, cut, row_ranges, serialized
from edgetune.graphs import FORMATS
from edgetune.graphs.builder import part_name
from edgetune.graphs.fused import Place, places
from edgetune.grids import row_tiles, tile_rows
from edgetune.models.config import DecoderConfig
from edgetune.models.decoder import Decoder
from edgetune.models.encoder import Encoder

MAX_ABS_LOGIT = 1e-3  # where logits have a standard deviation from 1 to 10
_LEAST_SPREAD = 0.01  # logits that are all equal differ by rounding, too
MIN_TOP1 = 0.999
MAX_ACCURACY_DROP = 0.01
_INT8_ERROR = 0.008  # of a matrix that is rounded to 8 bits, against its weight: the upper end of what is usual
_TILE_WEIGHTS = 1 << 20  # of the head, at least: a session for each


class Graph:
    """An exported decoder on onnxruntime, a piece at a time. `feeds` are adapter inputs."""

    def __init__(
        self, model: Path, config: DecoderConfig, feeds: Mapping[str, np.ndarray], *, fp32_compute: bool
    ) -> None:
        self._model = onnx.load(model, load_external_data=False)
        self._options = session_options(model.parent, fp32_compute=fp32_compute)
        if fp32_compute:
            compute_in_fp32(self._model.graph)
        *self._pieces, head = cut(self._model)
        step = tile_rows((config.vocab_size, config.hidden_size), max(config.largest_linear, _TILE_WEIGHTS))
        self._heads = functools.partial(row_ranges, head, model.parent, config.vocab_size, step)
        self._feeds, self._config = dict(feeds), config

    def spool(self, items: Sequence[Probe], path: Path) -> Spool:
        """Logits of all probes; attention over a past, which a prefix is, takes one at a time."""
        prefixed = any(name.startswith(PAST) for name in self._feeds)
        spool = Spool(path, items, self._config.vocab_size, alone=prefixed)
        for batch, _, rows, logits in self._tiles([[ids] for ids in spool.ids], spool.prompt_lengths):
            spool.write(batch, rows, logits)
        return spool

    def spool_in_steps(self, item: Probe, path: Path) -> Spool:
        """The same of one probe through the cache: half at once, then single tokens, then the rest at once."""
        spool = Spool(path, [item], self._config.vocab_size)
        half = len(item.ids) // 2
        cuts = list(range(half, min(half + 5, len(item.ids))))
        for _, first, rows, logits in self._tiles([np.split(item.ids[None], cuts, axis=1)], spool.prompt_lengths):
            spool.write(0, rows, logits, first)
        return spool

    def _tiles(
        self, sequences: Sequence[Sequence[np.ndarray]], prompt_lengths: Sequence[np.ndarray]
    ) -> Iterator[tuple[int, int, slice, np.ndarray]]:
        """Runs batches of sequences, each in steps of ids [B, t] that follow each other through the cache.

        Yields (index of the batch, first position of the step, rows of the vocabulary, logits [B, t, rows]).
        """
        values = [list(self._steps(*each)) for each in zip(sequences, prompt_lengths, strict=True)]
        for piece in self._pieces:
            session = self._session(piece, values[0][0])
            for sequence, steps in zip(sequences, values, strict=True):
                cache = self._empty(piece, len(sequence[0]))
                for index, known in enumerate(steps):
                    found = self._call(session, piece, known, cache)
                    cache = {name: found.pop(name.replace("past_key_values", "present")) for name in cache}
                    steps[index] = {name: value for name, value in {**known, **found}.items() if name in piece.needed}
            del session
        firsts = [list(accumulate((step.shape[1] for step in sequence), initial=0)) for sequence in sequences]
        for rows, piece in self._heads():
            session = self._session(piece, values[0][0])
            for index, steps in enumerate(values):
                for first, known in zip(firsts[index], steps, strict=False):
                    yield index, first, rows, self._call(session, piece, known, {})["logits"]

    def _session(self, piece: Piece, known: Mapping[str, np.ndarray]) -> onnxruntime.InferenceSession:
        content = serialized(piece, known, self._model)
        return onnxruntime.InferenceSession(content, self._options, providers=["CPUExecutionProvider"])

    def _call(
        self,
        session: onnxruntime.InferenceSession,
        piece: Piece,
        known: Mapping[str, np.ndarray],
        cache: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """One step of one piece: the outputs by name."""
        feeds = {name: known[name] for name in [*piece.inputs, *piece.crossing] if name in known}
        feeds |= {name: value for name, value in (*self._feeds.items(), *cache.items()) if name in piece.inputs}
        return dict(zip(piece.outputs, session.run(piece.outputs, feeds), strict=True))

    def _empty(self, piece: Piece, batch: int) -> dict[str, np.ndarray]:
        """The cache before the first token: nothing, or the prefix of an adapter."""
        empty = np.zeros((1, self._config.num_key_value_heads, 0, self._config.head_dim), np.float32)
        first = {name: self._feeds.get(name, empty) for name in piece.inputs if name.startswith(PAST)}
        return {name: np.repeat(value, batch, axis=0) for name, value in first.items()}

    def _steps(self, sequence: Sequence[np.ndarray], prompt_lengths: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """The inputs of the graph for each step."""
        total = next((value.shape[2] for name, value in self._feeds.items() if name.startswith(PAST)), 0)
        for ids in sequence:
            total += ids.shape[1]
            mask = np.ones((len(ids), total), np.int64)
            yield {"input_ids": ids, "attention_mask": mask, PROMPT_LENGTH: prompt_lengths}


def session_options(folder: Path, *, fp32_compute: bool) -> onnxruntime.SessionOptions:
    """Of a model whose weights lie in `folder`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = host.threads()
    options.log_severity_level = 3
    options.enable_mem_pattern = options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if fp32_compute:
        options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
        # DequantizeLinear and MatMul are fused into MatMulNBits, also with 8 bits and one scale for a row.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options


def compute_in_fp32(graph: onnx.GraphProto) -> None:
    """8-bit products in fp32 compute: their kernels do not know `force_fp32` (measured on 1.31.1)."""
    nodes = list(graph.node)
    del graph.node[:]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in nodes:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "MatMulNBits" and attributes["bits"].i == 8:
            attributes["accuracy_level"].i = 0
        if node.op_type != "DynamicQuantizeMatMul":
            graph.node.append(node)
            continue
        # x dequantized(codes) + bias in standard operators, in place of a product of rounded activations
        x, codes, scales, zero, *bias = node.input
        point = next(numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == zero)
        graph.initializer.append(numpy_helper.from_array(np.full(shapes[scales], point), f"{node.name}/zeros"))
        weight, product = f"{node.name}/weight", f"{node.name}/product" if bias else node.output[0]
        operands = [codes, scales, f"{node.name}/zeros"]
        graph.node.append(helper.make_node("DequantizeLinear", operands, [weight], weight, axis=1))
        graph.node.append(helper.make_node("MatMul", [x, weight], [product], f"{node.name}/MatMul"))
        if bias:
            graph.node.append(helper.make_node("Add", [product, *bias], [node.output[0]], f"{node.name}/Add"))


def spool_logits(decoder: Decoder, items: Sequence[Probe], path: Path) -> Spool:
    """Torch's logits of all probes, those of a trained head where it has one."""
    score, weights = decoder.score, decoder.weights
    spool = Spool(path, items, decoder.config.vocab_size if score is None else len(score.weight))
    for block in decoder.blocks:  # the pages of a block are not kept mapped for the next one
        block.register_forward_hook(lambda *_: weights.unmap())
    with torch.no_grad():
        hidden = [
            decoder.hidden(torch.from_numpy(ids), prompt_lengths=torch.from_numpy(lengths)[:, None])
            for ids, lengths in zip(spool.ids, spool.prompt_lengths, strict=True)
        ]
        tiles = decoder.lm_head.tiles() if score is None else [(slice(0, len(score.weight)), score.weight)]
        for rows, weight in tiles:
            for batch, x in enumerate(hidden):
                spool.write(batch, rows, (x @ weight.T).numpy())
            weights.unmap()
    return spool


def probe_change(
    model: Path, config: DecoderConfig, feeds: Mapping[str, np.ndarray], rows: Sequence[Sequence[int]], work: Path
) -> float:
    """How far an adapter moves the base's logits on probe rows: the largest change of one by the largest logit.

    `work` is a folder for the logits of both.
    """
    items = [Probe(np.array(row, np.int64), np.full(len(row), IGNORED)) for row in rows]
    base = Graph(model, config, {}, fp32_compute=True).spool(items, work / "base")
    tuned = Graph(model, config, feeds, fp32_compute=True).spool(items, work / "tuned")
    largest = max(float(np.abs(logits).max()) for _, logits in base.blocks())
    return float(compare(base, tuned)["max_abs_logit"]) / largest


def task_metric(graph: Graph, items: Sequence[Probe], path: Path) -> dict[str, Any]:
    """Mean NLL (nats per token) and token accuracy on the supervised positions of held-out probes."""
    totals, group = np.zeros(3), []
    for index, probe in enumerate(items, 1):
        group.append(probe)
        if num_positions(group) >= MIN_POSITIONS or index == len(items):
            totals += task_of(group, graph.spool(group, path))
            group = []
    return {"loss": totals[0] / totals[2], "token_accuracy": totals[1] / totals[2], "positions": int(totals[2])}


def check_loads(model: Path) -> None:
    """The file as a whole, which the other checks see in pieces: a session without optimizing and packing costs little.

    Raises ParityError with what onnx's checker or onnxruntime says.
    """
    options = session_options(model.parent, fp32_compute=False)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnx.checker.check_model(str(model))
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of onnxruntime share no other base
        reason = str(error).strip().partition("\n")[0][:300]
        raise ParityError(
            f"onnxruntime {onnxruntime.__version__} does not take the exported graph: {reason}. Nothing was written. "
            f"Report the model's config.json and this message as a defect"
        ) from error


def check_bytes(
    model: Path, source: BaseWeights[Any], produced: Mapping[str, str], left_out: Collection[str] = ()
) -> None:  # fmt: skip
    """Every weight in the written file equals the base's own bytes; of a rounded one, the bytes that were produced.

    `left_out` are matrices that the graph does not have.

    Raises ParityError naming the first tensor that differs.
    """
    written = Written(model)
    if isinstance(source, RoundedWeights):
        differing = [
            name for name, digest in produced.items() if hashlib.sha256(written[name].data).hexdigest() != digest
        ]
    else:
        differing = list(_differing(source, written, left_out))
    if differing:
        raise ParityError(
            f"{len(differing)} tensors in {model} differ from the base, first {differing[0]}: the bundle would not "
            f"hold the bytes that were trained on. Check the disk and export again; if it stays, report it as a defect"
        )


def _differing(
    source: BaseWeights[Any], written: Mapping[str, np.ndarray], left_out: Collection[str]
) -> Iterator[str]:  # fmt: skip
    """The initializers that are not what the base says."""
    every = places(source.config, source.format_of)
    held = {module: place for module, place in every.items() if module not in left_out}
    for module, place in held.items():
        weights = FORMATS[source.format_of(module)]
        wrong: dict[str, None] = {}
        for rows, part in source.parts(module):
            arrays = {key: written[part_name(f"{place.weight}.weight", key)] for key in part}
            # Float16 scales are widened, which is exact.
            wrong |= {
                part_name(f"{place.weight}.weight", key): None
                for key, found in weights.rows_of(arrays, place.shape, place.rows(rows)).items()
                if not np.array_equal(found, part[key])
            }
        yield from wrong
    for name in source.config.vectors():
        vector, (module, _, kind) = source.vector(name), name.rpartition(".")
        whole, rows = name, slice(None)
        if module in held:
            whole, rows = f"{held[module].weight}.{kind}", held[module].rows(slice(0, len(vector)))
        if not np.array_equal(written[whole][rows], vector):
            yield whole


class Written(Mapping[str, np.ndarray]):
    """The initializers of a model file by name; those in its data file are mapped anew each time they are asked for.

    Views in 4 bits, which numpy cannot map, are left out.
    """

    def __init__(self, model: Path) -> None:
        tensors = onnx.load(model, load_external_data=False).graph.initializer
        self._folder = model.parent
        self._tensors = {tensor.name: tensor for tensor in tensors if tensor.data_type != onnx.TensorProto.UINT4}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            return numpy_helper.to_array(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(self._folder / place["location"], dtype, "r", int(place["offset"]), tuple(tensor.dims))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _WrittenLinear(torch.nn.Module):
    """y = x W^T + bias over a weight as it was written, dequantized on every call."""

    def __init__(
        self, weights: str, codes: Mapping[str, np.ndarray], place: Place, shape: tuple[int, int], bias: Any
    ) -> None:
        super().__init__()
        self._weights, self._codes, self._place, self._shape, self._bias = weights, codes, place, shape, bias

    def _rows(self, rows: slice | np.ndarray) -> torch.Tensor:
        at = self._place.rows(rows) if isinstance(rows, slice) else rows + self._place.start
        weight = FORMATS[self._weights].dequantize(self._codes, self._place.shape, at)
        return torch.from_numpy(np.require(weight, requirements="W"))  # torch wants memory that it could write to

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self._rows(slice(0, self._shape[0])), self._bias)

    def tiles(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in row_tiles(self._shape):
            yield rows, self._rows(rows)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        unique, inverse = np.unique(ids.numpy(), return_inverse=True)
        return self._rows(unique)[torch.from_numpy(inverse.reshape(ids.shape))]


def use_written_weights(torch_model: Decoder | Encoder, model: Path, weights: str) -> None:
    """Replace every matrix of a torch model by the one in a written model file: torch's view of rounded weights."""
    written = Written(model)
    held = places(torch_model.config, lambda _: weights)
    for module, shape in torch_model.config.matrices().items():
        name = f"{held[module].weight}.weight"
        found = {key.removeprefix(name).lstrip("."): value for key, value in written.items() if key.startswith(name)}
        # The weight itself, or its parts; longer names are views of the same bytes.
        codes = {key or "weight": value for key, value in found.items() if "." not in key}
        path, _, leaf = module.removeprefix("model.").rpartition(".")
        parent = torch_model.get_submodule(path)
        setattr(parent, leaf, _WrittenLinear(weights, codes, held[module], shape, getattr(parent, leaf).bias))
    if isinstance(torch_model, Decoder) and torch_model.config.tie_word_embeddings:
        torch_model.lm_head = torch_model.embed_tokens


def check_logits(
    model: Path,
    config: DecoderConfig,
    feeds: Mapping[str, np.ndarray],
    items: Sequence[Probe],
    expected: Spool,
    work: Path,
    *,
    fast: bool,
    held_out: Sequence[Probe] = (),
    accept_loss: bool = False,
) -> dict[str, Any]:
    """The gate on logits; its figures. `expected` are torch's logits for `items`; `work` is a folder for others.

    The task metric is measured on `held_out` probes. With `fast` the kernels that round activations are measured too,
    and gated on that metric.
    Raises ParityError where fp32 compute is off by more than `allowed_difference`, whole or through the cache, or its
    top-1 agrees below 99.9 %, or where int8 activations cost more than one point of token accuracy, unless that loss is
    accepted.
    """
    graph, path = Graph(model, config, feeds, fp32_compute=True), work / "graph"
    figures = compare(expected, graph.spool(items, path))
    figures["max_abs_logit_cached"] = compare(expected, graph.spool_in_steps(items[0], path))["max_abs_logit"]
    _check_exact(figures)
    if held_out:
        figures["task"] = {"exact": task_metric(graph, held_out, path)}
    if fast:
        graph = Graph(model, config, feeds, fp32_compute=False)
        figures["fast"] = compare(expected, graph.spool(items, path))
        if held_out:
            figures["task"]["fast"] = task_metric(graph, held_out, path)
            if not accept_loss:
                _check_task(**figures["task"])
    return figures


def allowed_difference(spread: float) -> float:
    """Of a logit in fp32 compute, by the standard deviation of the logits.

    1e-3 from 1 to 10. A narrower spread is allowed less, a thousandth of it, for the same difference says more there;
    a wider one a ten-thousandth, for the rounding of fp32 grows with its values.
    """
    return MAX_ABS_LOGIT * max(min(max(spread, _LEAST_SPREAD), 1.0), spread / 10)


def _check_exact(figures: Mapping[str, Any]) -> None:
    worst = max(figures["max_abs_logit"], figures["max_abs_logit_cached"])
    spread, allowed = figures["logit_spread"], allowed_difference(figures["logit_spread"])
    if not worst <= allowed or figures["top1_agreement"] < MIN_TOP1:  # a spread that is NaN allows nothing
        raise ParityError(
            f"The exported graph does not compute what was trained: over {figures['rows']} positions the largest logit "
            f"difference is {figures['max_abs_logit']:.2e}, {figures['max_abs_logit_cached']:.2e} through the cache "
            f"(allowed {allowed:.1e} at their standard deviation of {spread:.2g}), and top-1 agreement "
            f"{figures['top1_agreement']:.2%} (wanted {MIN_TOP1:.1%}). Nothing was written. Report the model's "
            f"config.json and the version of onnxruntime as a defect"
        )


def _check_task(exact: Mapping[str, Any], fast: Mapping[str, Any]) -> None:
    drop = exact["token_accuracy"] - fast["token_accuracy"]
    if drop > MAX_ACCURACY_DROP:
        raise ParityError(
            f"Int8 activations cost {drop:.1%} of token accuracy on {fast['positions']} held-out positions "
            f"({exact['token_accuracy']:.1%} to {fast['token_accuracy']:.1%}; one point is allowed). Nothing was "
            f"written. Export with --weights fp32, train longer, or take it as it is with --accept-loss"
        )


def check_rounding(
    figures: Mapping[str, Any], stored: str, weights: str, *, alpha: float | None, needs_merge: bool = False
) -> None:
    """The gate on a rounding of weights that an adapter was trained around; `figures` are those of the manifest.

    `alpha` is the share of the adapter that was merged, None where it stays beside the graph: never with `needs_merge`.

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
        loss = f", their held-out loss goes from {figures['loss_before']:.4f} to {figures['loss_after']:.4f}"
    exact = f"Keep --weights {stored}" if alpha is None else "Leave --merge out"
    ways = [f"{'Take --weights fp32' if needs_merge else exact}, which is exact"]
    if above and alpha not in (None, 1):
        ways.append("merge more with a larger --alpha")
    change = figures["least_relative_change"]
    tiny = bool(above) and change < _INT8_ERROR
    if tiny and alpha in (None, 1):
        ways.append(f"train longer or with a larger --learning-rate, for a matrix has changed by only {change:.2%}")
    if weights != "int8" and not tiny:
        ways.append("take --weights int8, which is near lossless")
    if stored == "nf4" and weights != "nf4":
        ways.append("train again on an int4 base (`edgetune quantize --grid int4`), which is exact and fast")
    rounded = f"{stored} weights" if alpha is None else f"the merged {stored} weights"
    raise ExportError(
        f"Rounding {rounded} to {weights} loses the adapter: {'; '.join(problems)}. Over {figures['rows']} "
        f"positions logits change by up to {figures['max_abs_logit']:.3g}, KL {figures['kl']:.2e}{loss}. Nothing was "
        f"written. {', or '.join(ways)}, or write it all the same with --accept-loss"
    )
