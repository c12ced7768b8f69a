"""A block of a training graph: its forward pass, and the gradients of its input and of its adapter.

    h = norm(x)     q, k, v = h Wq, h Wk, h Wv, rotated     o = attention(q, k, v)     x2 = x + o Wo
    h2 = norm(x2)   gate, up = h2 Wg, h2 Wu                  y = x2 + (act(gate) * up) Wd

Each linear adds what its adapter makes of its input. A family may norm q and k by head, and o Wo and the MLP's output
before they are added. Everything that differs from block to block is an input, so one graph serves all of them: 90
sessions took 60 MiB on the SmolLM2-135M shape. Backward dequantizes every matrix once more rather than keeping it since
forward, so that one of them exists at a time. It computes the block's forward again, or takes what that has kept
(`DecoderConfig.kept_widths`); norms, attention's scores and the MLP's product are made of it anew, as `training.blocks`
does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from edgetune.graphs import FORMATS, backward, fused, ops
from edgetune.graphs.backward import Attended, Heads, Lora, Nodes
from edgetune.graphs.builder import Builder, part_name
from edgetune.models.config import DecoderConfig

Linears = Sequence[str]  # modules inside a block that multiply the same input
QKV: Linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT: Linears = ("self_attn.o_proj",)
GATE_UP: Linears = ("mlp.gate_proj", "mlp.up_proj")
DOWN: Linears = ("mlp.down_proj",)


Gradients = dict[str, tuple[ir.Value, list[int | str]]]


class Block:
    """A block's nodes; after `forward`, what its backward needs. `format_of` a matrix is its key in `FORMATS`."""

    def __init__(self, b: Builder, config: DecoderConfig, format_of: fused.FormatOf) -> None:
        self.b, self.config, at = b, config, f"{config.block(0)}."
        self.format = FORMATS[format_of(f"{at}{OUT[0]}")]
        # The matrices of the data file, by their names inside a block, each with the linears whose rows it stacks.
        self.members: dict[str, Linears] = {
            slot.name.removeprefix(at): [part.removeprefix(at) for part in slot.modules]
            for slot in fused.adapter_slots(config, format_of)
            if slot.name.startswith(at)
        }
        length: int | str = "sequence_length"
        half: list[int | str] = ["batch_size", length, config.head_dim // 2]
        self.x = b.input("x", "float32", ["positions", config.hidden_size])
        self.mask = b.input("mask", "float32", ["batch_size", 1, length, length])
        self.tables = b.input("cos", "float32", half), b.input("sin", "float32", half)
        self.norms = {name: b.input(name, "float32", size) for name, size in self._norm_sizes().items()}
        self.matrices = {name: self._matrix(name, members) for name, members in self.members.items()}
        self.biases = {
            name: b.input(f"{name}.bias", "float32", self._shape(members)[:1])
            for name, members in self.members.items()
            if config.has_bias(members[0])
        }
        scaling = b.input("scaling", "float32", [1])
        self.adapters = {linear: self._adapter(linear, scaling) for linear in config.linear_shapes}
        n = Nodes(b, "/shape")
        self.heads = Heads(n("Shape", self.mask, start=0, end=1), n("Shape", self.mask, start=2, end=3))
        self.z: dict[str, ir.Value] = {}  # of each linear, what its adapter's backward needs
        self.raw: dict[str, ir.Value] = {}  # what a norm inside the block took
        self.kept: dict[str, ir.Value] = {}  # of `config.kept_widths`, after `forward`
        self.gradients: Gradients = {}

    def _norm_sizes(self) -> dict[str, tuple[int]]:
        """The norms of a block, without its name."""
        at, vectors = f"{self.config.block(0)}.", self.config.vectors()
        return {name.removeprefix(at): n for name, n in vectors.items() if name.startswith(at) and "norm." in name}

    def _matrix(self, name: str, members: Linears) -> dict[str, ir.Value]:
        operands = self.format.operands(*self._shape(members))
        return {key: self.b.input(part_name(f"{name}.weight", key), *operand) for key, operand in operands.items()}

    def _matrices_of(self, linears: Linears) -> list[tuple[str, Linears]]:
        """The matrices that hold these linears, in order."""
        return [(name, members) for name, members in self.members.items() if members[0] in linears]

    def _shape(self, members: Linears) -> tuple[int, int]:
        shapes = [self.config.linear_shapes[member] for member in members]
        return sum(rows for rows, _ in shapes), shapes[0][1]

    def _adapter(self, linear: str, scaling: ir.Value) -> Lora:
        rows, columns = self.config.linear_shapes[linear]
        rank = f"{linear}.r"
        a = self.b.input(f"{linear}.lora_A", "float32", [columns, rank])
        b = self.b.input(f"{linear}.lora_B", "float32", [rank, rows])
        return Lora(a, b, scaling)

    def forward(self, *, to_output: bool = True) -> ir.Value:
        """The block's output; without `to_output` only what backward needs, and x2, what the MLP is added to."""
        norms = self.config.block_norms
        self.h = self._norm(norms.before_attention, self.x)
        q, k, v = self._linears(QKV, self.h)
        self.o = self._attend(q, k, v)
        (attended,) = self._linears(OUT, self.o)
        self.kept = {"q": q, "k": k, "v": v, "o": self.o}
        if norms.after_attention:
            self.kept["attention_out"] = attended
            attended = self._norm(norms.after_attention, attended)
        self.x2 = self.b.op("/attention/Add", "Add", [self.x, attended])
        self.h2 = self._norm(norms.before_mlp, self.x2)
        self.gate, self.up = self._linears(GATE_UP, self.h2)
        self.kept |= {"x2": self.x2, "gate": self.gate, "up": self.up}
        self.product = ops.GATES[self.config.hidden_act](self.b, "/mlp", self.gate, self.up)
        if not to_output and not norms.after_mlp:
            self._z(DOWN[0], self.product)
            return self.x2
        (added,) = self._linears(DOWN, self.product)
        if norms.after_mlp:
            self.kept["mlp_out"] = added
            added = self._norm(norms.after_mlp, added)
        return self.b.op("/mlp/Add", "Add", [self.x2, added])

    def recall(self) -> None:
        """In the place of `forward` before `backward`: what it kept is an input, the rest is computed again."""
        norms = self.config.block_norms
        self.kept = {
            name: self.b.input(f"kept.{name}", "float32", ["positions", width])
            for name, width in self.config.kept_widths.items()
        }
        self.h = self._norm(norms.before_attention, self.x)
        self._attend(self.kept["q"], self.kept["k"], self.kept["v"])
        self.o, self.x2 = self.kept["o"], self.kept["x2"]
        self.h2 = self._norm(norms.before_mlp, self.x2)
        self.gate, self.up = self.kept["gate"], self.kept["up"]
        self.product = ops.GATES[self.config.hidden_act](self.b, "/mlp", self.gate, self.up)
        for norm, name in ((norms.after_attention, "attention_out"), (norms.after_mlp, "mlp_out")):
            if norm:
                self.raw[norm] = self.kept[name]
        for linears, x in ((QKV, self.h), (OUT, self.o), (GATE_UP, self.h2), (DOWN, self.product)):
            for linear in linears:
                self._z(linear, x)

    def backward(self, d_y: ir.Value) -> tuple[ir.Value, Gradients]:
        """The gradient of the block's input, and those of its adapter tensors; after `forward`, or `recall`."""
        norms, n = self.config.block_norms, Nodes(self.b, "/backward")
        d_added = self._norm_backward(norms.after_mlp, d_y) if norms.after_mlp else d_y
        d_product = self._linears_backward(DOWN, self.product, [d_added])
        slope = backward.GATES_BACKWARD[self.config.hidden_act](n, self.gate)
        d_gate = n("Mul", n("Mul", d_product, self.up), slope)
        d_up = ops.GATES[self.config.hidden_act](self.b, "/backward/gate", self.gate, d_product)
        d_h2 = self._linears_backward(GATE_UP, self.h2, [d_gate, d_up])
        d_x2 = n("Add", d_y, self._norm_backward(norms.before_mlp, d_h2))
        d_attended = self._norm_backward(norms.after_attention, d_x2) if norms.after_attention else d_x2
        d_o = self._linears_backward(OUT, self.o, [d_attended])
        d_h = self._linears_backward(QKV, self.h, self._attend_backward(d_o))
        return n("Add", d_x2, self._norm_backward(norms.before_attention, d_h)), self.gradients

    def _attend(self, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
        """Attention of rows q, k, v: rows again."""
        c, n = self.config, Nodes(self.b, "/attention")
        count, kv_heads, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        if c.qk_norm:
            q, k = self._norm("self_attn.q_norm", q, heads=count), self._norm("self_attn.k_norm", k, heads=kv_heads)
        q, k = (
            backward.rotate(n, backward.by_head(n, x, self.heads, heads, d), self.tables)
            for x, heads in ((q, count), (k, kv_heads))
        )
        v = backward.by_head(n, v, self.heads, kv_heads, d)
        o, self.attended = backward.attention(n, q, k, v, self.mask, self.heads, kv_heads, count, c.attention_scale)
        return backward.by_row(n, o, count * d)

    attended: Attended

    def _attend_backward(self, d_o: ir.Value) -> list[ir.Value]:
        """Gradients of the rows q, k and v."""
        c, n = self.config, Nodes(self.b, "/backward/attention")
        count, kv_heads, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        d_heads = backward.by_head(n, d_o, self.heads, count, d)
        d_q, d_k, d_v = backward.attention_backward(n, self.attended, d_heads, c.attention_scale)
        d_q, d_k = (backward.rotate(n, x, self.tables, backward=True) for x in (d_q, d_k))
        d_q, d_k, d_v = (
            backward.by_row(n, x, heads * d) for x, heads in ((d_q, count), (d_k, kv_heads), (d_v, kv_heads))
        )
        if c.qk_norm:
            d_q = self._norm_backward("self_attn.q_norm", d_q, heads=count)
            d_k = self._norm_backward("self_attn.k_norm", d_k, heads=kv_heads)
        return [d_q, d_k, d_v]

    def _linears(self, linears: Linears, x: ir.Value) -> list[ir.Value]:
        """What each of them makes of x, with its adapter."""
        made: list[ir.Value] = []
        for name, members in self._matrices_of(linears):
            n = Nodes(self.b, f"/{name}")
            y = backward.linear(n, x, self._weight(n, name, members, x), self.biases.get(name))
            sizes = [self.config.linear_shapes[member][0] for member in members]
            made += [y] if len(members) == 1 else n.split(y, sizes, axis=1)
        return [self._adapted(linear, x, y) for linear, y in zip(linears, made, strict=True)]

    def _adapted(self, linear: str, x: ir.Value, y: ir.Value) -> ir.Value:
        n = Nodes(self.b, f"/{linear}/lora")
        added, self.z[linear] = backward.lora(n, x, self.adapters[linear])
        return n("Add", y, added)

    def _z(self, linear: str, x: ir.Value) -> None:
        """What a linear's adapter needs backward, where its output is not computed."""
        adapter, n = self.adapters[linear], Nodes(self.b, f"/{linear}/lora")
        self.z[linear] = n("Mul", n("MatMul", x, adapter.a), adapter.scaling)

    def _linears_backward(self, linears: Linears, x: ir.Value, d_y: Sequence[ir.Value]) -> ir.Value:
        """The gradient of x, their common input; notes those of their adapters."""
        parts = list(self._adapters_backward(linears, x, d_y))
        by_linear = dict(zip(linears, d_y, strict=True))
        for name, members in self._matrices_of(linears):
            n = Nodes(self.b, f"/backward/{name}")
            d = [by_linear[member] for member in members]
            joined = d[0] if len(d) == 1 else n("Concat", *d, axis=1)
            parts.append(backward.linear_backward(n, joined, self._weight(n, name, members, joined)))
        total, n = parts[0], Nodes(self.b, f"/backward/{linears[0]}/sum")
        for part in parts[1:]:
            total = n("Add", total, part)
        return total

    def _adapters_backward(self, linears: Linears, x: ir.Value, d_y: Sequence[ir.Value]) -> Iterator[ir.Value]:
        for linear, d in zip(linears, d_y, strict=True):
            n = Nodes(self.b, f"/backward/{linear}/lora")
            d_x, d_a, d_b = backward.lora_backward(n, x, self.z[linear], d, self.adapters[linear])
            rows, columns = self.config.linear_shapes[linear]
            self.gradients[f"{linear}.lora_A"] = d_a, [columns, f"{linear}.r"]
            self.gradients[f"{linear}.lora_B"] = d_b, [f"{linear}.r", rows]
            yield d_x

    def _weight(self, n: Nodes, name: str, members: Linears, beside: ir.Value) -> ir.Value:
        """The float32 matrix `name`, which is to be multiplied with `beside`.

        The rows are counted from that value's shape: of two equal nodes onnxruntime would make one, for forward and
        backward, and keep what it gives.
        """
        rows, columns = self._shape(members)
        value: ir.Value = self.format.emit_rows(
            self.b, f"{n.path}/weight", self.matrices[name], n.every(rows, beside), columns
        )
        return value

    def _norm(self, norm: str, x: ir.Value, *, heads: int | None = None) -> ir.Value:
        """RMSNorm of rows, or of each of their heads."""
        n, size = Nodes(self.b, f"/{norm}"), self.config.hidden_size
        if heads is not None:
            size = self.config.head_dim
            x = n("Reshape", x, n.whole(-1, size))
        self.raw[norm] = x
        weight, epsilon = self.norms[f"{norm}.weight"], self.config.rms_norm_eps
        normed = n("RMSNormalization", x, weight, axis=-1, epsilon=epsilon)
        return normed if heads is None else n("Reshape", normed, n.whole(-1, heads * size))

    def _norm_backward(self, norm: str, d_y: ir.Value, *, heads: int | None = None) -> ir.Value:
        n, size = Nodes(self.b, f"/backward/{norm}"), self.config.head_dim
        if heads is not None:
            d_y = n("Reshape", d_y, n.whole(-1, size))
        weight, epsilon = self.norms[f"{norm}.weight"], self.config.rms_norm_eps
        d_x = backward.rms_norm_backward(n, self.raw[norm], weight, epsilon, d_y)
        return d_x if heads is None else n("Reshape", d_x, n.whole(-1, heads * size))
