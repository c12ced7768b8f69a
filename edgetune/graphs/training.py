"""Training as plain inference graphs: what stock onnxruntime needs to personalize a bundle, in any language.

    start        input_ids, position_ids, segment_ids [B, T]     -> x [N, H]; mask.k, cos.k, sin.k of attention kind k
    forward      x, mask, cos, sin, a block's weights, adapter, scaling      -> y
    backward     the same and dy                                 -> dx, gradient of each adapter tensor
    forward_kept, backward_kept: the same; the former also gives kept.*, [N, …] each, and the latter takes them
    head_start   x, labels [N]                                   -> hidden [M, H], targets [M] of the M labelled rows
    head_tile    hidden, targets, sums, rows of the head         -> the sums, with a range of the vocabulary
    head_end     x, labels, targets, sums, scale [1]             -> loss_sum, dx [N, H]
    loss_tile, loss_end: the same without the gradient
    optimizer.*  parameter, gradient, moments, rates             -> parameter and moments

A graph holds no weights: they are inputs, the bytes of the inference graph's data file under the names that they have
there, without `model.layers.i.` where a graph serves every block. A client maps the file, so the weights are on disk
and in memory once. The backward graph computes its block's forward again from the stored x, so only the blocks' inputs
are kept; in one graph with the forward, onnxruntime would merge the two and keep everything. Where there is memory for
what a block keeps (`DecoderConfig.kept_widths`), the other pair saves that third of the work. The loss is the one pass
over the head of `objectives.sft`: a tile dequantizes one range of rows, so neither the logits nor the head exist whole.

Adapter tensors have the names and the layout of the inference graph, but B without the scaling, so that the optimizer
sees PEFT's parameters. A linear without an adapter is fed one of rank 0, which changes nothing: to onnxruntime-web
inputs with a default are none. Left out: dropout, and grids whose weights no operator dequantizes alone (nf4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgetune.graphs import FORMATS, backward
from edgetune.graphs.backward import Nodes
from edgetune.graphs.block import Block
from edgetune.graphs.builder import Builder, part_name
from edgetune.graphs.fused import FormatOf
from edgetune.models.config import DecoderConfig
from edgetune.optimizers import OPTIMIZERS

FORMATS_TRAINED = ("int4", "fp32")
OPTIMIZERS_WRITTEN = ("adamw", "sgd")
_FLOAT, _DOUBLE = int(ir.DataType.FLOAT), int(ir.DataType.DOUBLE)
_SUMS = ("highest", "total", "of_target")  # [M, 1] each: largest logit, sum of exp(logit - it), the target's logit


def training_graphs(config: DecoderConfig, format_of: FormatOf, context_length: int) -> dict[str, Builder]:
    """The graphs by name; `format_of` a matrix is its key in `FORMATS`, the same in all blocks."""
    head = format_of(head_name(config))
    return {
        "start": _start(config, format_of("model.embed_tokens"), context_length),
        "forward": _forward(config, format_of, keep=False),
        "backward": _backward(config, format_of, recall=False),
        "forward_kept": _forward(config, format_of, keep=True),
        "backward_kept": _backward(config, format_of, recall=True),
        "head_start": _head_start(config),
        "head_tile": _tile(config, head, gradient=True),
        "head_end": _head_end(config, head, gradient=True),
        "loss_tile": _tile(config, head, gradient=False),
        "loss_end": _head_end(config, head, gradient=False),
        **{f"optimizer.{name}": _optimizer(name) for name in OPTIMIZERS_WRITTEN},
    }


def head_name(config: DecoderConfig) -> str:
    """The matrix that the last hidden states are multiplied with."""
    return "model.embed_tokens" if config.tie_word_embeddings else "lm_head"


def _graph(name: str) -> tuple[Builder, Nodes]:
    builder = Builder(name, "")
    return builder, Nodes(builder, f"/{name}")


def _matrix(b: Builder, name: str, weights: str, rows: int | str, columns: int) -> dict[str, ir.Value]:
    """The inputs of a matrix."""
    operands = FORMATS[weights].operands(rows, columns)
    return {key: b.input(part_name(name, key), dtype, shape) for key, (dtype, shape) in operands.items()}


def _rows(b: Builder, weights: str, matrix: dict[str, ir.Value], ids: ir.Value, columns: int) -> ir.Value:
    value: ir.Value = FORMATS[weights].emit_rows(b, f"/{b.name}/rows", matrix, ids, columns)
    return value


def _start(c: DecoderConfig, weights: str, context_length: int) -> Builder:
    """The embedding, and what blocks share. Layers that embed no positions get tables that rotate by nothing."""
    b, n = _graph("start")
    shape: list[int | str] = ["batch_size", "sequence_length"]
    ids, positions, segments = (b.input(name, "int64", shape) for name in ("input_ids", "position_ids", "segment_ids"))
    table = _matrix(b, "model.embed_tokens.weight", weights, c.vocab_size, c.hidden_size)
    x = _rows(b, weights, table, ids, c.hidden_size)
    if c.embedding_scale != 1:
        x = n("Mul", x, n.number(c.embedding_scale))
    b.output(x, "x", "float32", ["positions", c.hidden_size])
    behind, allowed = _allowed(n, segments)
    half = c.head_dim // 2
    for index, kind in enumerate(c.attention_kinds):
        seen = allowed
        if kind.sliding_window is not None:
            window = b.constant(f"/window/{kind.sliding_window}", np.array(kind.sliding_window, np.int64))
            seen = n("And", allowed, n("Less", behind, window))
        mask = n("Unsqueeze", n("Where", seen, n.number(0.0), n.number(-np.inf)), n.whole(1))
        b.output(mask, f"mask.{index}", "float32", ["batch_size", 1, "sequence_length", "sequence_length"])
        for name, still in (("cos", 1.0), ("sin", 0.0)):
            if kind.rope_theta is None:
                size = n("Concat", n("Shape", positions), n.whole(half), axis=0)
                row = n("Expand", n.number(still), size)
            else:
                row = n("Gather", b.input(f"{name}_cache.{index}", "float32", [context_length, half]), positions)
            b.output(row, f"{name}.{index}", "float32", [*shape, half])
    return b


# segments [B, T] ── Equal(each other) ── And(no key ahead)
def _allowed(n: Nodes, segments: ir.Value) -> tuple[ir.Value, ir.Value]:
    """How far a key is behind a query, int64 [T, T], and whether it is of the same row and not ahead, [B, T, T]."""
    index = n.every(n("Squeeze", n("Shape", segments, start=1, end=2), n.whole(0)), segments)
    behind = n("Sub", n("Unsqueeze", index, n.whole(1)), index)
    same = n("Equal", n("Unsqueeze", segments, n.whole(2)), n("Unsqueeze", segments, n.whole(1)))
    return behind, n("And", same, n("GreaterOrEqual", behind, n.whole(0)))


def _forward(c: DecoderConfig, format_of: FormatOf, *, keep: bool) -> Builder:
    """Any block, forward."""
    b, _ = _graph("forward_kept" if keep else "forward")
    block = Block(b, c, format_of)
    b.output(block.forward(), "y", "float32", ["positions", c.hidden_size])
    for name, width in c.kept_widths.items() if keep else ():
        b.output(block.kept[name], f"kept.{name}", "float32", ["positions", width])
    return b


def _backward(c: DecoderConfig, format_of: FormatOf, *, recall: bool) -> Builder:
    """Any block, backward."""
    b, _ = _graph("backward_kept" if recall else "backward")
    block = Block(b, c, format_of)
    width: list[int | str] = ["positions", c.hidden_size]
    if recall:
        block.recall()
    else:
        block.forward(to_output=False)
    d_x, gradients = block.backward(b.input("dy", "float32", width))
    b.output(d_x, "dx", "float32", width)
    for name, (value, shape) in gradients.items():
        b.output(value, f"{name}.gradient", "float32", shape)
    return b


def _labelled(b: Builder, n: Nodes, c: DecoderConfig) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """The inputs x, labels and the last norm's weight, and the indices [M] of the rows that have a label."""
    x = b.input("x", "float32", ["positions", c.hidden_size])
    labels = b.input("labels", "int64", ["positions"])
    norm = b.input("model.norm.weight", "float32", [c.hidden_size])
    return x, labels, norm, n("Squeeze", n("NonZero", n("GreaterOrEqual", labels, n.whole(0))), n.whole(0))


def _head_start(c: DecoderConfig) -> Builder:
    """The last norm, of the labelled rows alone."""
    b, n = _graph("head_start")
    x, labels, norm, rows = _labelled(b, n, c)
    hidden = n("RMSNormalization", n("Gather", x, rows), norm, axis=-1, epsilon=c.rms_norm_eps)
    b.output(hidden, "hidden", "float32", ["labelled", c.hidden_size])
    b.output(n("Gather", labels, rows), "targets", "int64", ["labelled"])
    return b


def _tile(c: DecoderConfig, weights: str, *, gradient: bool) -> Builder:
    """Rows of the head from `first_row` on, added to the sums of every labelled position."""
    b, n = _graph("head_tile" if gradient else "loss_tile")
    x = b.input("hidden", "float32", ["labelled", c.hidden_size])
    targets, first_row = b.input("targets", "int64", ["labelled"]), b.input("first_row", "int64", [1])
    highest, total, of_target = (b.input(name, "float32", ["labelled", 1]) for name in _SUMS)
    matrix = _matrix(b, "head", weights, "rows", c.hidden_size)
    count = n("Shape", next(iter(matrix.values())), start=0, end=1)
    weight = _rows(b, weights, matrix, n.every(n("Squeeze", count, n.whole(0)), x), c.hidden_size)
    logits = backward.linear(n, x, weight, None)
    raised = n("Max", highest, n("ReduceMax", logits, n.whole(1)))
    shrunk = n("Exp", n("Sub", highest, raised))
    powers = n("Exp", n("Sub", logits, raised))
    local, last = n("Unsqueeze", n("Sub", targets, first_row), n.whole(1)), n("Sub", count, n.whole(1))
    inside = n("And", n("GreaterOrEqual", local, n.whole(0)), n("LessOrEqual", local, last))
    found = n("GatherElements", logits, n("Min", n("Max", local, n.whole(0)), last), axis=1)
    sums = (
        raised,
        n("Add", n("Mul", total, shrunk), n("ReduceSum", powers, n.whole(1))),
        n("Where", inside, found, of_target),
    )
    for name, value in zip(_SUMS, sums, strict=True):
        b.output(value, f"{name}.next", "float32", ["labelled", 1])
    if gradient:
        weighted = b.input("weighted", "float32", ["labelled", c.hidden_size])
        added = n("Add", n("Mul", weighted, shrunk), backward.linear_backward(n, powers, weight))
        b.output(added, "weighted.next", "float32", ["labelled", c.hidden_size])
    return b


def _head_end(c: DecoderConfig, weights: str, *, gradient: bool) -> Builder:
    """The loss from the sums, and `scale` times its gradient down to the last block's output."""
    b, n = _graph("head_end" if gradient else "loss_end")
    highest, total, of_target = (b.input(name, "float32", ["labelled", 1]) for name in _SUMS)
    losses = n("Sub", n("Add", highest, n("Log", total)), of_target)
    loss_sum = n("ReduceSum", n("Cast", losses, to=_DOUBLE), n.whole(0, 1), keepdims=0)
    b.output(n("Cast", loss_sum, to=_FLOAT), "loss_sum", "float32", [])
    if not gradient:
        return b
    x, _, norm, rows = _labelled(b, n, c)
    targets, scale = b.input("targets", "int64", ["labelled"]), b.input("scale", "float32", [1])
    weighted = b.input("weighted", "float32", ["labelled", c.hidden_size])
    matrix = _matrix(b, f"{head_name(c)}.weight", weights, c.vocab_size, c.hidden_size)
    own = _rows(b, weights, matrix, targets, c.hidden_size)
    d_hidden = n("Mul", n("Sub", n("Div", weighted, total), own), scale)
    d_rows = backward.rms_norm_backward(n, n("Gather", x, rows), norm, c.rms_norm_eps, d_hidden)
    zeros = n("Expand", n.number(0.0), n("Shape", x))
    d_x = n("ScatterND", zeros, n("Unsqueeze", rows, n.whole(1)), d_rows)
    b.output(d_x, "dx", "float32", ["positions", c.hidden_size])
    return b


def _optimizer(name: str) -> Builder:
    """One update of one tensor [rows, columns], its gradient clipped first: the rule of that name in `optimizers`."""
    b, n = _graph(f"optimizer.{name}")
    rule = OPTIMIZERS[name].rule
    shape: list[int | str] = ["rows", "columns"]
    p, g = b.input("parameter", "float32", shape), b.input("gradient", "float32", shape)
    rate, decay, norm, most = (
        b.input(key, "float32", [1]) for key in ("learning_rate", "weight_decay", "grad_norm", "max_grad_norm")
    )
    one = n.number(1.0)
    g = n("Mul", g, n("Min", one, n("Div", most, n("Add", norm, n.number(1e-6)))))
    if not rule.MOMENTS:
        p = n("Sub", p, n("Mul", rate, n("Add", g, n("Mul", p, decay))))
        b.output(p, "parameter.next", "float32", shape)
        return b
    m, v = b.input("exp_avg", "float32", shape), b.input("exp_avg_sq", "float32", shape)
    first, second = _corrections(n, b.input("updates", "int64", [1]), rule.BETAS)
    beta1, beta2 = rule.BETAS
    m = n("Add", m, n("Mul", n("Sub", g, m), n.number(1 - beta1)))
    v = n("Add", n("Mul", v, n.number(beta2)), n("Mul", n("Mul", g, g), n.number(1 - beta2)))
    step = n("Div", m, n("Add", n("Div", n("Sqrt", v), second), n.number(rule.EPSILON)))
    p = n("Mul", p, n("Sub", one, n("Mul", rate, decay)))
    p = n("Sub", p, n("Mul", step, n("Div", rate, first)))
    for key, value in (("parameter", p), ("exp_avg", m), ("exp_avg_sq", v)):
        b.output(value, f"{key}.next", "float32", shape)
    return b


def _corrections(n: Nodes, updates: ir.Value, betas: tuple[float, float]) -> tuple[Any, Any]:
    """1 - beta1^t and sqrt(1 - beta2^t), which float32 would round to a few digits."""
    t, one = n("Cast", updates, to=_DOUBLE), n.b.constant("/double/1", np.array(1.0, np.float64))
    first, second = (
        n("Sub", one, n("Pow", n.b.constant(f"/double/{beta}", np.array(beta, np.float64)), t)) for beta in betas
    )
    return n("Cast", first, to=_FLOAT), n("Cast", n("Sqrt", second), to=_FLOAT)
