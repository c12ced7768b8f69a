"""The inference graph of a decoder, with a KV cache and the names that onnxruntime-genai expects.

    input_ids [batch_size, sequence_length], attention_mask [batch_size, total_sequence_length]        int64
    past_key_values.%d.key/.value [batch_size, kv_heads, past_sequence_length, head_dim]               float32
    <linear>.lora_A [in, r], <linear>.lora_B [r, out]                                                  float32, optional
    logits_to_keep [1], 0 where it is left out                                                         int64, optional
 -> logits [batch_size, logits_length, vocab_size], present.%d.key/.value                              float32

`logits_to_keep` is Hugging Face's: logits of so many last positions alone, of all with 0.

Initializers keep the base's names plus a suffix (`model.layers.0.mlp.up_proj.weight.codes`), so what was written can be
compared with what was trained. Rows of a batch may end in padding; padding on the left is not supported.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import onnx_ir as ir

from edgetune.graphs import FORMATS, ops
from edgetune.graphs.builder import Builder
from edgetune.grids.int4 import Fill
from edgetune.models.config import DecoderConfig


class Matrices(Protocol):
    """Where the graph's weights come from: a base, or a base with an adapter merged into it."""

    config: DecoderConfig

    def format_of(self, module: str) -> str:
        """The key in `FORMATS` of a matrix."""

    def fill(self, module: str, arrays: dict[str, np.ndarray]) -> None:
        """Fill the arrays of a matrix in that format; called when they are written."""

    def vector(self, name: str) -> np.ndarray:
        """A norm or bias, float32."""


def decoder_graph(
    source: Matrices, *, data_file: str, context_length: int, slots: bool, contrib: bool = True
) -> Builder:
    """The graph, ready to be saved. With `slots` every linear of every block takes an adapter.

    Without `contrib` it is of standard operators alone, which all formats of its weights have to allow.
    """
    return _Decoder(source, Builder("decoder", data_file, contrib=contrib), slots).build(context_length)


class _Decoder:
    """What the parts of one graph share while it is built."""

    def __init__(self, source: Matrices, builder: Builder, slots: bool) -> None:
        self.source, self.config, self.b, self.slots = source, source.config, builder, slots

    def build(self, context_length: int) -> Builder:
        b, c = self.b, self.config
        ids = b.input("input_ids", "int64", ["batch_size", "sequence_length"])
        mask = b.input("attention_mask", "int64", ["batch_size", "total_sequence_length"])
        cache = self._cache_shape("past_sequence_length")
        past = [
            [b.input(f"past_key_values.{i}.{kind}", "float32", cache) for kind in ("key", "value")]
            for i in range(c.num_hidden_layers)
        ]
        embedding = "model.embed_tokens"
        emit = FORMATS[self.source.format_of(embedding)].emit_embedding
        x = emit(b, _path(embedding), ids, f"{embedding}.weight", c.matrices()[embedding], self._fill(embedding))
        x = ops.scaled(b, f"{_path(embedding)}/scaled", x, c.embedding_scale)
        shared = ops.attention_inputs(b, ids, mask, c, context_length)
        present = []
        for i in range(c.num_hidden_layers):
            x, *kv = self._layer(x, i, past[i], shared)
            present.append(kv)
        x = ops.last_positions(b, f"{_path('lm_head')}/logits_to_keep", self._norm(x, "model.norm"))
        logits = self._linear(x, "lm_head", embedding if c.tie_word_embeddings else "lm_head")
        b.output(logits, "logits", "float32", ["batch_size", "logits_length", c.vocab_size])
        for i, kv in enumerate(present):
            for value, kind in zip(kv, ("key", "value"), strict=True):
                b.output(value, f"present.{i}.{kind}", "float32", self._cache_shape("total_sequence_length"))
        return b

    def _cache_shape(self, length: str) -> list[int | str]:
        return ["batch_size", self.config.num_key_value_heads, length, self.config.head_dim]

    def _layer(
        self, x: ir.Value, index: int, past: list[ir.Value], shared: ops.AttentionInputs
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """One block, as `models.decoder.Block` has it; also the layer's present key and value."""
        name, kind = f"model.layers.{index}", self.config.layer_kinds[index]
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        norms = self.config.block_norms
        h = self._norm(x, f"{name}.{norms.before_attention}")
        q, k, v = (self._linear(h, f"{attention}.{part}") for part in ("q_proj", "k_proj", "v_proj"))
        if self.config.qk_norm:
            q = self._head_norm(q, f"{attention}.q_norm", self.config.num_attention_heads)
            k = self._head_norm(k, f"{attention}.k_norm", self.config.num_key_value_heads)
        h, key, value = ops.attention(self.b, _path(attention), (q, k, v), past, shared, self.config, kind)
        h = self._linear(h, f"{attention}.o_proj")
        if norms.after_attention:
            h = self._norm(h, f"{name}.{norms.after_attention}")
        x = self.b.op(f"{_path(attention)}/Add", "Add", [x, h])
        h = self._norm(x, f"{name}.{norms.before_mlp}")
        gate, up = self._linear(h, f"{mlp}.gate_proj"), self._linear(h, f"{mlp}.up_proj")
        h = self._linear(ops.GATES[self.config.hidden_act](self.b, _path(mlp), gate, up), f"{mlp}.down_proj")
        if norms.after_mlp:
            h = self._norm(h, f"{name}.{norms.after_mlp}")
        return self.b.op(f"{_path(mlp)}/Add", "Add", [x, h]), key, value

    def _linear(self, x: ir.Value, name: str, module: str | None = None) -> ir.Value:
        """The linear `name` over the matrix of `module` (its own, but for a tied head), and its adapter slot."""
        module = module or name
        shape = self.config.matrices()[module]
        slot = self.slots and name in self.config.linears()
        bias = None
        if name in self.config.linears() and self.config.has_bias(name.split(".", 3)[3]):
            bias = self.b.weight(f"{name}.bias", "float32", shape[:1], lambda: self.source.vector(f"{name}.bias"))
        emit = FORMATS[self.source.format_of(module)].emit_linear
        y: ir.Value = emit(self.b, _path(name), x, f"{module}.weight", shape, self._fill(module), bias=bias)
        return ops.lora(self.b, _path(name), x, y, name, shape) if slot else y

    def _fill(self, module: str) -> Fill:
        return lambda arrays: self.source.fill(module, arrays)

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        weight = f"{name}.weight"
        epsilon = self.config.rms_norm_eps
        return ops.rms_norm(
            self.b, _path(name), x, weight, self.config.hidden_size, lambda: self.source.vector(weight), epsilon
        )

    def _head_norm(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        weight = f"{name}.weight"
        return ops.head_norm(
            self.b, _path(name), x, weight, heads, self.config.head_dim, lambda: self.source.vector(weight),
            self.config.rms_norm_eps,
        )  # fmt: skip


def _path(module: str) -> str:
    """`model.layers.0.mlp.up_proj` -> `/model/layers.0/mlp/up_proj`."""
    return "/" + module.replace(".", "/").replace("layers/", "layers.")
