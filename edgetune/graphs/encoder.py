"""The inference graph of an encoder: token ids to one embedding for each text.

    input_ids [batch_size, sequence_length], attention_mask [batch_size, sequence_length] (1: token)    int64
    token_type_ids [batch_size, sequence_length], all 0 where it is left out                           int64, optional
    <linear>.lora_A [in, r], <linear>.lora_B [r, out]                                                  float32, optional
 -> embedding [batch_size, hidden_size], pooled and normalized as the model says                       float32
    last_hidden_state [batch_size, sequence_length, hidden_size], for clients that pool for themselves float32

    logits [batch_size, outputs], or of each token [batch_size, sequence_length, outputs], where there is a head

Inputs, `last_hidden_state` and `logits` are called as in the exports of Hugging Face's optimum, so its clients find
them. Initializers keep the base's names plus a suffix. Rows of a batch may end in padding, and hold at least one token.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Protocol

import numpy as np
import onnx_ir as ir

from edgetune.adapters.head import BIAS, Head
from edgetune.graphs import FORMATS, ops
from edgetune.graphs.builder import Builder
from edgetune.grids.int4 import Fill
from edgetune.models.encoder_config import NORM_EPSILON, POSITIONS, TOKEN_TYPES, WORDS, EncoderConfig

_BOOL, _FLOAT = int(ir.DataType.BOOL), int(ir.DataType.FLOAT)
_ROWS = ["batch_size", "sequence_length"]


class Matrices(Protocol):
    """Where the graph's weights come from; as in `graphs.decoder`."""

    @property
    def config(self) -> EncoderConfig:
        """The encoder's shape."""

    def format_of(self, module: str) -> str:
        """The key in `FORMATS` of a matrix."""

    def fill(self, module: str, arrays: dict[str, np.ndarray]) -> None:
        """Fill the arrays of a matrix in that format; called when they are written."""

    def vector(self, name: str) -> np.ndarray:
        """A tensor that is no matrix, float32."""


def encoder_graph(
    source: Matrices, *, data_file: str, slots: Collection[str] = (), contrib: bool = True, head: Head | None = None
) -> Builder:
    """The graph, ready to be saved. `slots` are the linears that take an adapter.

    Without `contrib` it is of standard operators alone, which all formats of its weights have to allow.
    """
    return _Encoder(source, Builder("encoder", data_file, contrib=contrib), slots, head).build()


class _Encoder:
    """What the parts of one graph share while it is built."""

    def __init__(self, source: Matrices, builder: Builder, slots: Collection[str], head: Head | None) -> None:
        self.source, self.config, self.b, self.slots, self.head = source, source.config, builder, slots, head

    def build(self) -> Builder:
        b, c = self.b, self.config
        ids, mask = b.input("input_ids", "int64", _ROWS), b.input("attention_mask", "int64", _ROWS)
        x = ops.flat(b, "/embeddings", self._embeddings(ids), c.hidden_size)
        self.shape = ops.row_shape(b, ids)
        seen = self._seen(ids, mask)
        for i in range(c.num_hidden_layers):
            x = self._layer(x, c.block(i), seen)
        flat, x = x, ops.by_row(b, "/pooling", x, self.shape)
        embedding = self._pooled(x, mask)
        b.output(embedding, "embedding", "float32", ["batch_size", c.hidden_size])
        b.output(x, "last_hidden_state", "float32", [*_ROWS, c.hidden_size])
        if self.head is not None and self.head.of_tokens:
            logits = ops.by_row(b, "/classifier", self._logits(flat, self.head), self.shape)
            b.output(logits, "logits", "float32", [*_ROWS, len(self.head.tensors[BIAS])])
        elif self.head is not None:
            logits = self._logits(self.pooled, self.head)
            b.output(logits, "logits", "float32", ["batch_size", len(self.head.tensors[BIAS])])
        return b

    # ids ─────────── rows of words ─┐
    # token_type_ids ── Gather ───── Add ─ Add ── LayerNormalization
    # Slice(positions, offset, offset + s) ─┘
    def _embeddings(self, ids: ir.Value) -> ir.Value:
        b, c = self.b, self.config
        # Other symbols than those of the ids: left out, it is one row of one token, and onnxruntime may otherwise take
        # what is looked up by it for as large as its neighbours, and write their sum there.
        types = b.optional_input(
            "token_type_ids", ["type_batch_size", "type_sequence_length"], np.zeros((1, 1), np.int64)
        )
        emit = FORMATS[self.source.format_of(WORDS)].emit_embedding
        x = emit(b, _path(WORDS), ids, f"{WORDS}.weight", c.matrices()[WORDS], self._fill(WORDS))
        types = b.op(f"{_path(TOKEN_TYPES)}/Gather", "Gather", [self._table(TOKEN_TYPES), types], axis=0)
        x = b.op(f"{_path(TOKEN_TYPES)}/Add", "Add", [x, types])
        first = b.constant("/positions/first", np.array([c.position_offset], np.int64))
        length = b.op("/positions/Shape", "Shape", [ids], start=1, end=2)
        last = b.op("/positions/Add", "Add", [length, first])
        axis = b.constant("/axis/0", np.array([0], np.int64))
        positions = b.op(f"{_path(POSITIONS)}/Slice", "Slice", [self._table(POSITIONS), first, last, axis])
        return self._norm(b.op(f"{_path(POSITIONS)}/Add", "Add", [x, positions]), "embeddings.LayerNorm")

    # mask ── Cast ── Unsqueeze [b, 1, 1, s] ── Expand [b, 1, s, s]
    def _seen(self, ids: ir.Value, mask: ir.Value) -> ir.Value:
        """Which tokens each token sees: all of its text. The operator takes no mask of one row for all of them."""
        b = self.b
        axes = b.constant("/mask/axes", np.array([1, 2], np.int64))
        seen = b.op("/mask/Unsqueeze", "Unsqueeze", [b.op("/mask/Cast", "Cast", [mask], to=_BOOL), axes])
        one = b.constant("/mask/one", np.array([1], np.int64))
        length = b.op("/mask/Shape", "Shape", [ids], start=1, end=2)
        shape = b.op("/mask/Concat", "Concat", [one, one, length, one], axis=0)
        return b.op("/mask/Expand", "Expand", [seen, shape])

    def _layer(self, x: ir.Value, name: str, seen: ir.Value) -> ir.Value:
        """One block, as `models.encoder.Block` has it, on hidden states [b*s, hidden]."""
        b, heads, attention = self.b, self.config.num_attention_heads, f"{name}.attention"
        parts = [f"{attention}.self.{part}" for part in ("query", "key", "value")]
        q, k, v = (ops.by_row(b, _path(part), self._linear(x, part), self.shape) for part in parts)
        path = f"{_path(attention)}/self/Attention"
        h = b.op(path, "Attention", [q, k, v, seen], q_num_heads=heads, kv_num_heads=heads)
        x = self._output(x, ops.flat(b, f"{_path(attention)}/self", h, self.config.hidden_size), f"{attention}.output")
        h = self._linear(x, f"{name}.intermediate.dense")
        h = b.op(f"{_path(name)}/intermediate/Gelu", "Gelu", [h])
        return self._output(x, h, f"{name}.output")

    def _output(self, x: ir.Value, y: ir.Value, name: str) -> ir.Value:
        """The value norm(x + dense(y))."""
        y = self._linear(y, f"{name}.dense")
        return self._norm(self.b.op(f"{_path(name)}/Add", "Add", [x, y]), f"{name}.LayerNorm")

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        """The linear `name` with its bias, and its adapter slot."""
        b, shape = self.b, self.config.matrices()[name]
        bias = self._vector(f"{name}.bias", shape[:1])
        emit = FORMATS[self.source.format_of(name)].emit_linear
        y: ir.Value = emit(b, _path(name), x, f"{name}.weight", shape, self._fill(name), bias=bias)
        return ops.lora(b, _path(name), x, y, name, shape) if name in self.slots else y

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        scale, bias = (self._vector(f"{name}.{kind}", (self.config.hidden_size,)) for kind in ("weight", "bias"))
        path, epsilon = f"{_path(name)}/LayerNormalization", self.config.layer_norm_eps
        return self.b.op(path, "LayerNormalization", [x, scale, bias], axis=-1, epsilon=epsilon)

    # mean:  mask ── Cast ─┬─ Unsqueeze [b, 1, s] ── MatMul(x) ── Squeeze ── Div ── [b, hidden]
    #                      └─ ReduceSum ─────────────────────────────────────┘
    def _pooled(self, x: ir.Value, mask: ir.Value) -> ir.Value:
        b, second = self.b, self.b.constant("/axis/1", np.array([1], np.int64))
        if self.config.pooling.mode == "cls":
            pooled = b.op("/pooling/Gather", "Gather", [x, b.constant("/pooling/first", np.array(0, np.int64))], axis=1)
        else:
            tokens = b.op("/pooling/Cast", "Cast", [mask], to=_FLOAT)
            row = b.op("/pooling/Unsqueeze", "Unsqueeze", [tokens, second])
            total = b.op("/pooling/Squeeze", "Squeeze", [b.op("/pooling/MatMul", "MatMul", [row, x]), second])
            count = b.op("/pooling/ReduceSum", "ReduceSum", [tokens, second], keepdims=1)
            pooled = b.op("/pooling/Div", "Div", [total, count])
        self.pooled = pooled
        if not self.config.pooling.normalize:
            return pooled
        norm = b.op("/normalize/ReduceL2", "ReduceL2", [pooled, second], keepdims=1)
        least = b.constant("/normalize/least", np.array(NORM_EPSILON, np.float32))
        return b.op("/normalize/Div", "Div", [pooled, b.op("/normalize/Max", "Max", [norm, least])])

    def _logits(self, x: ir.Value, head: Head) -> ir.Value:
        """The head's outputs of x [n, hidden]."""
        weight, bias = (
            self.b.weight(name, "float32", value.shape, partial(np.asarray, value))
            for name, value in head.tensors.items()
        )
        return self.b.op("/classifier/Gemm", "Gemm", [x, weight, bias], transB=1)

    def _table(self, name: str) -> ir.Value:
        return self._vector(f"{name}.weight", self.config.vectors()[f"{name}.weight"])

    def _vector(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        return self.b.weight(name, "float32", shape, lambda: self.source.vector(name))

    def _fill(self, module: str) -> Fill:
        return lambda arrays: self.source.fill(module, arrays)


def _path(module: str) -> str:
    """`encoder.layer.0.output.dense` -> `/encoder/layer.0/output/dense`."""
    return "/" + module.replace(".", "/").replace("layer/", "layer.")
