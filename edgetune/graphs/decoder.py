"""The inference graph of a decoder, with a KV cache and the names that onnxruntime-genai expects.

    input_ids [batch_size, sequence_length], attention_mask [batch_size, total_sequence_length]        int64
    past_key_values.%d.key/.value [batch_size, kv_heads, past_sequence_length, head_dim]               float32
    <slot>.lora_A [in, r], <slot>.lora_B [r, out]                                                      float32, optional
    <place>.adapter_down [hidden, r], <place>.adapter_up [r, hidden], where there are bottlenecks      float32, optional
    <place>.reft_down [hidden, r], .reft_bias [r], .reft_up [r, hidden], where there are LoReFTs       float32, optional
    <place>.side_scale [1], .side_down [s, r], .side_up [r, s], then .side_upsample [s, hidden]        float32, optional
    prompt_length [1 or batch_size], the tokens of the first call where it is left out, with these     int64, optional
    logits_to_keep [1], 0 where it is left out                                                         int64, optional
 -> logits [batch_size, logits_length, vocab_size], present.%d.key/.value                              float32
    logits [batch_size, logits_length, outputs], of a trained head                                     float32

`logits_to_keep` is Hugging Face's: logits of so many last positions alone, of all with 0.

Initializers keep the base's names plus a suffix (`model.layers.0.mlp.down_proj.weight.codes`), so what was written can
be compared with what was trained; linears that share an input are one weight (`fused`). Between blocks the hidden
states of all positions lie below each other, [b*s, hidden]: one `Gemm` then adds an adapter. Rows of a batch may end in
padding; padding on the left is not supported.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from edgetune.adapter_file import AdapterSlot
from edgetune.adapters import loreft, lst
from edgetune.adapters.head import SCORE, Head
from edgetune.graphs import FORMATS, fused, ops
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
    source: Matrices, *, data_file: str, context_length: int, slots: Collection[AdapterSlot] = (),
    contrib: bool = True, head: Head | None = None,
) -> Builder:  # fmt: skip
    """The graph, ready to be saved. `slots` are those of the `adapter_slots` that it has, bottlenecks and LoReFTs.

    A trained `head` stands in the place of that over the vocabulary. Without `contrib` it is of standard operators
    alone, which all formats of its weights have to allow.
    """
    return _Decoder(source, Builder("decoder", data_file, contrib=contrib), slots, head).build(context_length)


class _Decoder:
    """What the parts of one graph share while it is built."""

    def __init__(
        self, source: Matrices, builder: Builder, slots: Collection[AdapterSlot], head: Head | None
    ) -> None:  # fmt: skip
        self.source, self.config, self.b, self.head = source, source.config, builder, head
        self.slots = {slot.name: slot for slot in slots}
        self.linears = {slot.name: slot for slot in fused.adapter_slots(source.config, source.format_of)}

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
        x = ops.flat(b, _path(embedding), x, c.hidden_size)
        self.shape = ops.row_shape(b, ids)
        positions = next((slot.positions for slot in self.slots.values() if slot.positions is not None), None)
        self.prompt = None if positions is None else ops.prompt_mask(b, ids, mask, positions)
        shared = ops.attention_inputs(b, ids, mask, c, context_length)
        present, z = [], None
        for i in range(c.num_hidden_layers):
            x, *kv = self._layer(x, i, past[i], shared)
            present.append(kv)
            z = self._rung(x, z, i)
        if z is not None and (output := self.slots.get(f"model.{lst.OUTPUT}")) is not None:
            x = ops.side_output(b, _path(output.name), z, x, output)
        x = ops.by_row(b, _path("model.norm"), self._norm(x, "model.norm"), self.shape)
        x = ops.last_positions(b, f"{_path('lm_head')}/logits_to_keep", x)
        if self.head is None:
            logits = self._product(x, "lm_head", embedding if c.tie_word_embeddings else "lm_head")
        else:
            logits = self._scores(x, self.head.tensors[SCORE])
        outputs = c.vocab_size if self.head is None else self.head.outputs
        b.output(logits, "logits", "float32", ["batch_size", "logits_length", outputs])
        for i, kv in enumerate(present):
            for value, kind in zip(kv, ("key", "value"), strict=True):
                b.output(value, f"present.{i}.{kind}", "float32", self._cache_shape("total_sequence_length"))
        return b

    def _scores(self, x: ir.Value, weight: np.ndarray) -> ir.Value:
        """X [b, n, hidden] times the transpose of a trained head's weight [outputs, hidden]."""
        weight = np.ascontiguousarray(weight.T)
        scores = self.b.weight(SCORE, "float32", weight.shape, lambda: weight)
        return self.b.op(f"{_path('lm_head')}/score/MatMul", "MatMul", [x, scores])

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
        qkv = self._qkv(h, name)
        h, key, value = ops.attention(self.b, _path(attention), qkv, past, shared, self.config, kind)
        h = ops.flat(self.b, _path(attention), h, self.config.linear_shapes["self_attn.o_proj"][1])
        h = self._linear(h, f"{attention}.o_proj")
        if norms.after_attention:
            h = self._norm(h, f"{name}.{norms.after_attention}")
        h = self._adapted(h, h, f"{name}.attention_output")
        x = self.b.op(f"{_path(attention)}/Add", "Add", [x, h])
        taken = h = self._norm(x, f"{name}.{norms.before_mlp}")
        if f"{name}.{fused.GATE_UP}" in self.linears:
            inner = self.config.intermediate_size
            gate, up = ops.split(self.b, _path(mlp), self._linear(h, f"{name}.{fused.GATE_UP}"), (inner, inner))
        else:
            gate, up = (self._linear(h, f"{name}.{part}") for part in fused.PARTS[fused.GATE_UP])
        h = self._linear(ops.GATES[self.config.hidden_act](self.b, _path(mlp), gate, up), f"{mlp}.down_proj")
        if norms.after_mlp:
            h = self._norm(h, f"{name}.{norms.after_mlp}")
        h = self._adapted(h, h, f"{name}.mlp_output")
        h = self._adapted(taken, h, f"{name}.mlp_parallel")
        x = self.b.op(f"{_path(mlp)}/Add", "Add", [x, h])
        place = f"{name}.{loreft.PLACE}"
        if place in self.slots and self.prompt is not None:
            x = ops.loreft(self.b, _path(place), x, self.slots[place], self.prompt)
        return x, key, value

    def _rung(self, x: ir.Value, z: ir.Value | None, index: int) -> ir.Value | None:
        """What the network beside the blocks has after block `index`, which gave x [b*s, hidden]."""
        slot = self.slots.get(f"model.layers.{index}.{lst.RUNG}")
        if slot is None:
            return z
        last = index + 1 == self.config.num_hidden_layers
        above = "model.norm" if last else f"model.layers.{index + 1}.{self.config.block_norms.before_attention}"
        return ops.rung(self.b, _path(slot.name), self._norm(x, above, _path(f"{slot.name}.norm")), z, slot)

    def _adapted(self, x: ir.Value, y: ir.Value, place: str) -> ir.Value:
        """Hidden states y with what a bottleneck at a place of `models.places` adds of x, both [b*s, hidden]."""
        slot = self.slots.get(place)
        return y if slot is None else ops.bottleneck(self.b, _path(place), x, y, slot)

    def _qkv(self, h: ir.Value, block: str) -> Sequence[ir.Value | None]:
        """What a block's attention takes, [b, s, heads*head_dim]: side by side where the operator wants no more."""
        config, attention = self.config, f"{block}.self_attn"
        counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        whole = f"{block}.{fused.QKV}"
        values: Sequence[ir.Value]
        if whole in self.linears:
            y = ops.by_row(self.b, _path(whole), self._linear(h, whole), self.shape)
            if not config.qk_norm and self.b.contrib and ops.has_fused_attention(config):
                return y, None, None
            values = ops.split(self.b, _path(attention), y, [count * config.head_dim for count in counts])
        else:
            parts = [f"{block}.{part}" for part in fused.PARTS[fused.QKV]]
            values = [ops.by_row(self.b, _path(part), self._linear(h, part), self.shape) for part in parts]
        if not config.qk_norm:
            return values
        q, k, v = values
        q, k = (
            self._head_norm(q, f"{attention}.q_norm", counts[0]),
            self._head_norm(k, f"{attention}.k_norm", counts[1]),
        )
        return q, k, v

    def _linear(self, x: ir.Value, name: str) -> ir.Value:
        """A linear of a block, or several as one: x [b*s, in] -> [b*s, out], with its adapter slot."""
        slot = self.linears[name]
        y = self._product(x, name, name)
        if name not in self.slots:
            return y
        return ops.lora(self.b, _path(name), x, y, name, (slot.out_features, slot.in_features))

    def _product(self, x: ir.Value, name: str, weight: str) -> ir.Value:
        """X times the transpose of a weight (another's, for a tied head) plus the bias that the linears have."""
        slot = self.linears.get(name)
        modules = slot.modules if slot else {weight: self.config.matrices()[weight][0]}
        first = next(iter(modules))
        shape = sum(modules.values()), self.config.matrices()[first][1]
        bias = None
        if slot and self.config.has_bias(first.split(".", 3)[3]):
            bias = self.b.weight(f"{name}.bias", "float32", shape[:1], lambda: self._bias(slot))
        format_of = FORMATS[self.source.format_of(first)]

        def fill(arrays: dict[str, np.ndarray]) -> None:
            start = 0
            for module, rows in modules.items():
                self.source.fill(module, format_of.rows_of(arrays, shape, slice(start, start + rows)))
                start += rows

        y: ir.Value = format_of.emit_linear(self.b, _path(name), x, f"{weight}.weight", shape, fill, bias=bias)
        return y

    def _bias(self, slot: AdapterSlot) -> np.ndarray:
        return np.concatenate([self.source.vector(f"{module}.bias") for module in slot.modules])

    def _fill(self, module: str) -> Fill:
        return lambda arrays: self.source.fill(module, arrays)

    def _norm(self, x: ir.Value, name: str, path: str | None = None) -> ir.Value:
        weight = f"{name}.weight"
        epsilon = self.config.rms_norm_eps
        return ops.rms_norm(
            self.b, path or _path(name), x, weight, self.config.hidden_size, lambda: self.source.vector(weight), epsilon
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
