"""Training as plain inference graphs: what stock onnxruntime needs to personalize a bundle, in any language.

    start        input_ids, position_ids, segment_ids [B, T]   -> x [N, H], masks and rotary tables of each kind
    block.i      x, masks, tables, adapter, scaling            -> y                                      forward
    block.i      the same and dy                               -> dx, gradient of each adapter tensor    backward
    head.start   x, labels [N]                                 -> hidden [M, H], targets [M] of the M supervised rows
    head.tile.j  hidden, targets, highest, total, of_target, weighted -> the last four, with a range of the vocabulary
    head.end     x, labels, targets and the four, scale [1]    -> loss_sum, dx [N, H]
    loss.tile.j, loss.end: the same without the gradient
    optimizer    parameter, gradient, moments, rates           -> parameter and moments

The backward graph of a block computes its forward again from the stored x, so only the blocks' inputs are kept; in one
graph with the forward onnxruntime would merge the two and keep everything. The loss is the one pass over the head of
`objectives.sft`: a tile dequantizes one range of rows, so neither the logits nor the head exist whole.

All of them read the data file of the inference graph: the weights' bytes are on disk once. Adapter tensors have the
names and the layout that they have there, but B without the scaling, so that the optimizer sees PEFT's parameters. What
is left out of a call (rank 0) changes nothing. Left out: dropout, and grids other than int4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgetune.graphs import FORMATS, backward, ops
from edgetune.graphs.backward import Nodes
from edgetune.graphs.block import Block, placed
from edgetune.graphs.builder import Builder
from edgetune.graphs.decoder import Matrices
from edgetune.grids import row_tiles
from edgetune.optimizers import OPTIMIZERS

FORMATS_TRAINED = ("int4", "fp32")
OPTIMIZERS_WRITTEN = ("adamw", "sgd")
HEAD_TILE_WEIGHTS = 1 << 21  # 8 MiB of float32 at once
_FLOAT, _DOUBLE = int(ir.DataType.FLOAT), int(ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Written:
    """The files of one kind of graph, one for each block or tile where it is made of such, and what they take and give.

    Names and types are those of the first; `layers.0` in them stands for the number of the block.
    """

    files: list[str]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]

    def described(self) -> dict[str, Any]:
        """For `training.json`."""
        return asdict(self)


def write_graphs(builder: Builder, source: Matrices, folder: Path, context_length: int) -> dict[str, Written]:
    """Write every graph into `folder`, over the data file of `builder`, which lies in the folder above."""
    maker = _Maker(builder, source, context_length)
    layers = range(source.config.num_hidden_layers)
    tiles = list(row_tiles(source.config.matrices()[maker.head], HEAD_TILE_WEIGHTS))
    kinds: dict[str, Iterable[Builder]] = {
        "start": [maker.start()],
        "forward": (maker.block(i, gradient=False) for i in layers),
        "backward": (maker.block(i, gradient=True) for i in layers),
        "head_start": [maker.head_start()],
        "head_tiles": (maker.tile(i, rows, gradient=True) for i, rows in enumerate(tiles)),
        "head_end": [maker.head_end(gradient=True)],
        "loss_tiles": (maker.tile(i, rows, gradient=False) for i, rows in enumerate(tiles)),
        "loss_end": [maker.head_end(gradient=False)],
        **{f"optimizer.{name}": [optimizer_graph(builder, name)] for name in OPTIMIZERS_WRITTEN},
    }
    return {kind: _save(graphs, folder) for kind, graphs in kinds.items()}


def _save(graphs: Iterable[Builder], folder: Path) -> Written:
    files: list[str] = []
    signature: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for graph in graphs:
        file = f"{graph.name}.onnx"
        graph.save_graph(folder / file)
        signature = signature if files else graph.signature()
        files.append(file)
    return Written(files, *signature)


class _Maker:
    """Makes graphs over the weights that an inference graph has placed."""

    def __init__(self, builder: Builder, source: Matrices, context_length: int) -> None:
        self.builder, self.source, self.config, self.context_length = builder, source, source.config, context_length
        self.head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"

    def start(self) -> Builder:
        """The embedding, and what all blocks share."""
        b, c = self.builder.beside("start"), self.config
        n = Nodes(b, "/start")
        shape: list[int | str] = ["batch_size", "sequence_length"]
        ids, positions, segments = (
            b.input(name, "int64", shape) for name in ("input_ids", "position_ids", "segment_ids")
        )
        x = ops.scaled(b, "/start/scaled", self._lookup(b, "model.embed_tokens", ids), c.embedding_scale)
        b.output(n("Reshape", x, n.whole(-1, c.hidden_size)), "x", "float32", ["positions", c.hidden_size])
        behind, allowed = _allowed(n, segments)
        for index, kind in enumerate(c.attention_kinds):
            seen = allowed
            if kind.sliding_window is not None:
                window = b.constant(f"/window/{kind.sliding_window}", np.array(kind.sliding_window, np.int64))
                seen = n("And", allowed, n("Less", behind, window))
            mask = n("Unsqueeze", n("Where", seen, n.number(0.0), n.number(-np.inf)), n.whole(1))
            b.output(mask, f"mask.{index}", "float32", ["batch_size", 1, "sequence_length", "sequence_length"])
            if kind.rope_theta is not None:
                half = c.head_dim // 2
                for name in ("cos", "sin"):
                    table = b.weight(f"{name}_cache.{index}", "float32", (self.context_length, half), placed)
                    row = n("Gather", table, positions, axis=0)
                    b.output(row, f"{name}.{index}", "float32", [*shape, half])
        return b

    def block(self, index: int, *, gradient: bool) -> Builder:
        """Block `index`, forward or backward."""
        b = self.builder.beside(f"block.{index}.{'backward' if gradient else 'forward'}")
        block = Block(b, self.source, index)
        width: list[int | str] = ["positions", self.config.hidden_size]
        if not gradient:
            b.output(block.forward(), "y", "float32", width)
            return b
        d_x, gradients = block.backward(b.input("dy", "float32", width))
        b.output(d_x, "dx", "float32", width)
        for name, (value, shape) in gradients.items():
            b.output(value, f"{name}.gradient", "float32", shape)
        return b

    def head_start(self) -> Builder:
        """The last norm, of the supervised rows alone."""
        b, hidden = self.builder.beside("head.start"), self.config.hidden_size
        n = Nodes(b, "/head")
        x, labels, rows = self._supervised(b, n)
        normed = ops.rms_norm(
            b, "/head/norm", n("Gather", x, rows, axis=0), "model.norm.weight", hidden, placed,
            self.config.rms_norm_eps,
        )  # fmt: skip
        b.output(normed, "hidden", "float32", ["supervised", hidden])
        b.output(n("Gather", labels, rows, axis=0), "targets", "int64", ["supervised"])
        return b

    def tile(self, index: int, rows: slice, *, gradient: bool) -> Builder:
        """A range of the vocabulary, added to the running sums of every row."""
        b, hidden = self.builder.beside(f"{'head' if gradient else 'loss'}.tile.{index}"), self.config.hidden_size
        n = Nodes(b, "/tile")
        x = b.input("hidden", "float32", ["supervised", hidden])
        targets = b.input("targets", "int64", ["supervised"])
        highest, total, of_target = (
            b.input(k, "float32", ["supervised", 1]) for k in ("highest", "total", "of_target")
        )
        emit = FORMATS[self.source.format_of(self.head)].emit_weight
        weight = emit(b, "/tile", f"{self.head}.weight", self.config.matrices()[self.head], n.zero(x), rows)
        logits = backward.linear(n, x, weight, None)
        raised = n("Max", highest, n("ReduceMax", logits, n.whole(1)))
        shrunk = n("Exp", n("Sub", highest, raised))
        powers = n("Exp", n("Sub", logits, raised))
        local = n("Unsqueeze", n("Sub", targets, n.whole(rows.start)), n.whole(1))
        last = n.whole(rows.stop - rows.start - 1)
        inside = n("And", n("GreaterOrEqual", local, n.whole(0)), n("LessOrEqual", local, last))
        found = n("GatherElements", logits, n("Min", n("Max", local, n.whole(0)), last), axis=1)
        outputs = {
            "highest": raised,
            "total": n("Add", n("Mul", total, shrunk), n("ReduceSum", powers, n.whole(1))),
            "of_target": n("Where", inside, found, of_target),
        }
        for name, value in outputs.items():
            b.output(value, f"{name}.next", "float32", ["supervised", 1])
        if gradient:
            weighted = b.input("weighted", "float32", ["supervised", hidden])
            added = n("Add", n("Mul", weighted, shrunk), backward.linear_backward(n, powers, weight))
            b.output(added, "weighted.next", "float32", ["supervised", hidden])
        return b

    def head_end(self, *, gradient: bool) -> Builder:
        """The loss from the sums, and its gradient down to the last block's output."""
        b, c = self.builder.beside("head.end" if gradient else "loss.end"), self.config
        n = Nodes(b, "/end")
        highest, total, of_target = (
            b.input(k, "float32", ["supervised", 1]) for k in ("highest", "total", "of_target")
        )
        losses = n("Sub", n("Add", highest, n("Log", total)), of_target)
        loss_sum = n("ReduceSum", n("Cast", losses, to=_DOUBLE), n.whole(0, 1), keepdims=0)
        b.output(n("Cast", loss_sum, to=_FLOAT), "loss_sum", "float32", [])
        if not gradient:
            return b
        x, _, rows = self._supervised(b, n)
        targets, scale = b.input("targets", "int64", ["supervised"]), b.input("scale", "float32", [1])
        weighted = b.input("weighted", "float32", ["supervised", c.hidden_size])
        own = n("Reshape", self._lookup(b, self.head, n("Unsqueeze", targets, n.whole(0))), n.whole(-1, c.hidden_size))
        d_hidden = n("Mul", n("Sub", n("Div", weighted, total), own), scale)
        weight = b.weight("model.norm.weight", "float32", (c.hidden_size,), placed)
        d_rows = backward.rms_norm_backward(n, n("Gather", x, rows, axis=0), weight, c.rms_norm_eps, d_hidden)
        zeros = n("Expand", n.number(0.0), n("Shape", x))
        d_x = n("ScatterND", zeros, n("Unsqueeze", rows, n.whole(1)), d_rows)
        b.output(d_x, "dx", "float32", ["positions", c.hidden_size])
        return b

    def _supervised(self, b: Builder, n: Nodes) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The inputs x and labels, and the indices [M] of the rows that have a label."""
        x = b.input("x", "float32", ["positions", self.config.hidden_size])
        labels = b.input("labels", "int64", ["positions"])
        return x, labels, n("Squeeze", n("NonZero", n("GreaterOrEqual", labels, n.whole(0))), n.whole(0))

    def _lookup(self, b: Builder, module: str, ids: ir.Value) -> ir.Value:
        emit = FORMATS[self.source.format_of(module)].emit_embedding
        value: ir.Value = emit(
            b, f"/lookup/{module}", ids, f"{module}.weight", self.config.matrices()[module], _nothing
        )
        return value


# segments [B, T] ── Equal(each other) ── And(no key ahead)
def _allowed(n: Nodes, segments: ir.Value) -> tuple[ir.Value, ir.Value]:
    """How far a key is behind a query, int64 [T, T], and whether it is of the same row and not ahead, [B, T, T]."""
    zero, one = (n.b.constant(f"/index/{i}", np.array(i, np.int64)) for i in (0, 1))
    index = n("Range", zero, n("Squeeze", n("Shape", segments, start=1, end=2), n.whole(0)), one)
    behind = n("Sub", n("Unsqueeze", index, n.whole(1)), index)
    same = n("Equal", n("Unsqueeze", segments, n.whole(2)), n("Unsqueeze", segments, n.whole(1)))
    return behind, n("And", same, n("GreaterOrEqual", behind, zero))


def optimizer_graph(builder: Builder, name: str) -> Builder:
    """One update of one tensor [rows, columns], its gradient clipped first: the rule of that name in `optimizers`."""
    b, rule = builder.beside(f"optimizer.{name}"), OPTIMIZERS[name].rule
    n = Nodes(b, "/optimizer")
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
    beta1, beta2 = rule.BETAS
    m, v = b.input("exp_avg", "float32", shape), b.input("exp_avg_sq", "float32", shape)
    updates = n("Cast", b.input("updates", "int64", [1]), to=_DOUBLE)
    corrections = []
    for beta in (beta1, beta2):  # in double: 1 - beta^t loses its digits in float32
        power = n("Pow", b.constant(f"/beta/{beta}", np.array(beta, np.float64)), updates)
        corrections.append(n("Sub", b.constant("/one", np.array(1.0, np.float64)), power))
    first, second = n("Cast", corrections[0], to=_FLOAT), n("Cast", n("Sqrt", corrections[1]), to=_FLOAT)
    m = n("Add", m, n("Mul", n("Sub", g, m), n.number(1 - beta1)))
    v = n("Add", n("Mul", v, n.number(beta2)), n("Mul", n("Mul", g, g), n.number(1 - beta2)))
    step = n("Div", m, n("Add", n("Div", n("Sqrt", v), second), n.number(rule.EPSILON)))
    p = n("Mul", p, n("Sub", one, n("Mul", rate, decay)))
    p = n("Sub", p, n("Mul", step, n("Div", rate, first)))
    for key, value in (("parameter", p), ("exp_avg", m), ("exp_avg_sq", v)):
        b.output(value, f"{key}.next", "float32", shape)
    return b


def _nothing(arrays: dict[str, np.ndarray]) -> None:
    placed()
