"""What one call of each training graph allocates, in order: its larger values, each up to its last reader.

It follows `graphs.training` and `graphs.block` in the order in which onnxruntime runs a graph's nodes, and leaves out
what has less than a few numbers for each position, and what a call writes into memory of the client's
(`personalizer.graphs`). onnxruntime writes over an input that is read no more only where the graph's shapes say that it
fits: before attention, and nowhere behind it. A value's name here is the one in `graphs.block`; names serve as long as
the graph runs. The arena is empty before each call, so its size is that of the largest.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgetune.grids import row_tiles
from edgetune.models.config import DecoderConfig
from edgetune.planner.arena import Arena, Piece

FLOAT_BYTES, INT64_BYTES = 4, 8
HEAD_TILE_WEIGHTS = 1 << 21  # 8 MiB of float32 at once; `personalizer.graphs` cuts the head by it

WEIGHTS, WORK, LOGITS = PARTS = ("dequantized", "block_workspace", "logits")
Ranks = Mapping[str, int]  # of the adapted linears of a block, by their names in it


class Walk:
    """Micro-batches of `batch` windows of `length` tokens; `supervised` positions of each have a label.

    Each public method is a call of the graph of its name: what it leaves is the arena after it.
    """

    def __init__(self, model: DecoderConfig, batch: int, length: int, supervised: int) -> None:
        self.model, self.length, self.supervised, self.positions = model, length, supervised, batch * length
        self.hidden, self.inner = model.hidden_size, model.intermediate_size
        self.q, self.kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        self._begin({}, keep=False)

    def _begin(self, ranks: Ranks, *, keep: bool) -> None:
        self.arena, self._held = Arena(), dict[str, Piece]()
        self._block_ranks, self._keep = ranks, keep

    def _new(self, name: str, width: int, part: str = WORK) -> None:
        """A value of so many numbers for each position."""
        self._held[name] = self.arena.take(part, FLOAT_BYTES * self.positions * width)

    def _end(self, *names: str) -> None:
        self.arena.give(*(self._held.pop(name) for name in names))

    def _again(self, name: str, width: int, *read: str) -> None:
        """The value by an operation that cannot write over it; `read` are others that it reads last."""
        old = self._held.pop(name)
        self._new(name, width)
        self.arena.give(old)
        self._end(*read)

    def _scores(self, name: str) -> None:
        self._new(name, self.model.num_attention_heads * self.length)

    def _product(self, name: str, rows: int, columns: int, width: int) -> None:
        """A product with a matrix, which is dequantized for it."""
        numbers = self.arena.take(WORK, INT64_BYTES * rows)
        weight = self.arena.take(WEIGHTS, FLOAT_BYTES * rows * columns)
        self.arena.give(numbers)
        self._new(name, width)
        self.arena.give(weight)

    def _lora(self, linear: str, width: int) -> None:
        """What an adapter adds to a linear: zeros where it has none. With `_keep` what it has of the input stays."""
        rank = self._block_ranks.get(linear, 0)
        if rank:
            self._new(f"z {linear}", rank)
        self._new("lora", width)
        if rank and not self._keep:
            self._end(f"z {linear}")

    def _gradient(self, linear: str) -> None:
        if self._block_ranks.get(linear, 0):
            self._end(f"z {linear}")

    def start(self) -> Arena:
        """The embedding, and the masks of each kind of attention."""
        self._begin({}, keep=False)
        arena, pairs = self.arena, self.positions * self.length
        behind = arena.take(WORK, INT64_BYTES * self.length**2)
        ahead = arena.take(WORK, self.length**2)
        same, allowed = arena.take(WORK, pairs), arena.take(WORK, pairs)
        arena.give(same, ahead)
        choices = [arena.take(WORK, FLOAT_BYTES * pairs) for _ in "abc"]
        arena.give(behind, allowed, *choices)
        self._new("rows", self.hidden)
        return arena

    def _attended(self) -> None:
        """The first half of a block, up to x2; with `_keep` all that backward needs stays."""
        hidden, q, kv = self.hidden, self.q, self.kv
        norms = self.model.block_norms
        self._new("h", hidden)
        self._lora("self_attn.q_proj", q)
        self._product("qkv", q + 2 * kv, hidden, q + 2 * kv)
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            self._new(name, width)
        self._end("qkv", "lora")
        for name, width in (("q", q), ("k", kv)):
            if name == "k":
                self._lora("self_attn.k_proj", kv)
                self._end("lora")
            if self.model.qk_norm:
                self._new(f"{name}_raw", width)
            self._again(name, width)  # by head
            self._again(name, width)  # rotated
            if name == "q":
                self._again(name, width)  # scaled
            if self.model.qk_norm and not self._keep:
                self._end(f"{name}_raw")
        self._scores("raw")
        if not self._keep:
            self._end("q", "k")
        self._scores("p")
        self._end("raw")
        self._scores("raw")  # softmax
        self._end("raw")
        self._lora("self_attn.v_proj", kv)
        self._end("lora")
        self._again("v", kv)
        self._new("o", q)
        if not self._keep:
            self._end("h", "p", "v")
        self._again("o", q)
        self._lora("self_attn.o_proj", hidden)
        self._product("x2", hidden, q, hidden)
        if not self._keep:
            self._end("o")
        self._again("x2", hidden, "lora")
        if norms.after_attention:
            if self._keep:
                self._new("attended", hidden)
            self._again("x2", hidden)
        self._again("x2", hidden)

    def _gate_up(self) -> None:
        hidden, inner = self.hidden, self.inner
        self._new("h2", hidden)
        self._lora("mlp.gate_proj", inner)
        self._product("gate_up", 2 * inner, hidden, 2 * inner)
        self._new("gate", inner)
        self._new("up", inner)
        self._end("gate_up")
        self._again("gate", inner, "lora")

    def forward(self, ranks: Ranks) -> Arena:
        """A block with adapters of these ranks."""
        hidden, inner = self.hidden, self.inner
        self._begin(ranks, keep=False)
        self._attended()
        self._gate_up()
        self._again("gate", inner)  # its activation
        self._lora("mlp.up_proj", inner)
        self._end("h2")
        self._again("up", inner, "lora")
        self._again("gate", inner, "up")  # the product
        self._lora("mlp.down_proj", hidden)
        self._product("y", hidden, inner, hidden)
        self._end("gate")
        self._again("y", hidden, "lora")
        if self.model.block_norms.after_mlp:
            self._again("y", hidden)
        return self.arena

    def backward(self, ranks: Ranks) -> Arena:
        """The same, and the gradients of its adapters and of its input."""
        self._begin(ranks, keep=True)
        self._attended()
        self._gate_up()
        self._mlp_backward()
        self._attention_backward()
        return self.arena

    def _mlp_backward(self) -> None:
        hidden, inner = self.hidden, self.inner
        norms = self.model.block_norms
        silu = self.model.hidden_act == "silu"
        if silu:
            self._new("sigmoid", inner)
        self._new("active", inner)
        self._lora("mlp.up_proj", inner)
        self._again("up", inner, "lora")
        self._new("product", inner)
        if "mlp.down_proj" in self._block_ranks:
            self._new("z mlp.down_proj", self._block_ranks["mlp.down_proj"])
        self._gradient("mlp.down_proj")
        self._end("product")
        self._new("lora", inner)
        self._product("d", hidden, inner, inner)
        self._end("lora")
        self._new("d_gate", inner)
        self._end("up")
        if silu:
            self._new("slope", inner)
            self._again("slope", inner, "gate")
            self._again("slope", inner)
            self._again("slope", inner, "sigmoid")
        else:
            self._gelu_slope()
        self._again("d_gate", inner, "slope")
        self._gradient("mlp.gate_proj")
        self._again("d", inner, "active")  # d_up
        self._gradient("mlp.up_proj")
        self._end("h2")
        self._new("square", hidden)
        self._end("square")
        self._new("sum", hidden)
        self._new("lora", hidden)
        self._again("sum", hidden, "lora")
        self._new("joined", 2 * inner)
        self._end("d_gate", "d")
        self._product("d", 2 * inner, hidden, hidden)
        self._end("joined")
        self._again("sum", hidden, "d")
        self._norm_backward("sum", hidden, "x2")
        self._again("sum", hidden)  # with the gradient that goes around the MLP
        if norms.after_attention:
            self._new("around", hidden)
            self._end("attended")
            self._norm_backward("sum", hidden)
            self._end("around")

    def _gelu_slope(self) -> None:
        """See `graphs.backward.gelu_tanh_backward`."""
        inner = self.inner
        self._new("square", inner)
        self._new("t", inner)
        self._again("t", inner)
        self._new("scaled", inner)
        self._again("t", inner, "scaled")
        self._again("t", inner)
        self._again("square", inner)
        self._again("square", inner)
        self._again("square", inner)
        self._new("curved", inner)
        self._again("curved", inner)
        self._new("scaled", inner)
        self._end("gate")
        self._again("curved", inner, "scaled")
        self._again("curved", inner, "square")
        self._again("t", inner)
        self._again("t", inner)
        self._new("slope", inner)
        self._end("t", "curved")

    def _norm_backward(self, name: str, width: int, *read: str) -> None:
        """The gradient by a norm's input."""
        self._again(name, width)
        self._new("along", width)
        self._again("along", width)
        self._end(*read)
        self._again(name, width)
        self._again(name, width, "along")

    def _attention_backward(self) -> None:
        hidden, q, kv = self.hidden, self.q, self.kv
        self._gradient("self_attn.o_proj")
        self._end("o")
        self._again("v", kv)
        self._new("lora", q)
        self._product("d_o", hidden, q, q)
        self._again("d_o", q, "lora")
        self._again("d_o", q)
        self._scores("d_p")
        self._end("v")
        self._scores("along")
        self._end("along")
        self._scores("centred")
        self._end("d_p")
        self._scores("d_s")
        self._end("centred")
        self._new("d_q", q)
        self._end("k")
        self._again("d_q", q)
        self._again("d_q", q)
        self._gradient("self_attn.q_proj")
        self._new("d_k", kv)
        self._end("d_s", "q")
        self._again("d_k", kv)
        self._again("d_k", kv)
        self._gradient("self_attn.k_proj")
        self._new("d_v", kv)
        self._end("p", "d_o")
        self._again("d_v", kv)
        self._gradient("self_attn.v_proj")
        self._end("h")
        if self.model.qk_norm:
            self._end("q_raw", "k_raw")
        self._new("square", hidden)
        self._end("square")
        for name in ("dh", "lora", "lora2"):
            self._new(name, hidden)
        self._again("dh", hidden, "lora")
        self._again("dh", hidden, "lora2")
        self._new("joined", q + 2 * kv)
        self._end("d_q", "d_k", "d_v")
        self._product("d", q + 2 * kv, hidden, hidden)
        self._end("joined")
        self._again("dh", hidden, "d")
        self._norm_backward("dh", hidden)

    def head_start(self) -> Arena:
        """The labelled rows."""
        self._begin({}, keep=False)
        self.arena.take(LOGITS, FLOAT_BYTES * self.hidden * self.supervised)
        return self.arena

    def tile(self, *, gradient: bool) -> Arena:
        """A range of the head's rows; the first one is the largest."""
        self._begin({}, keep=gradient)
        arena, row = self.arena, FLOAT_BYTES * self.hidden * self.supervised
        rows = next(iter(row_tiles((self.model.vocab_size, self.hidden), HEAD_TILE_WEIGHTS)))
        count = rows.stop - rows.start
        numbers = arena.take(LOGITS, INT64_BYTES * count)
        arena.take(WEIGHTS, FLOAT_BYTES * count * self.hidden)
        arena.give(numbers)
        for _ in range(3):  # logits, their distance from the largest, its exponential
            arena.take(LOGITS, FLOAT_BYTES * count * self.supervised)
        if gradient:
            arena.take(LOGITS, row)
        return arena

    def head_end(self) -> Arena:
        """The gradient by the last block's output."""
        self._begin({}, keep=True)
        for _ in range(6):
            self.arena.take(LOGITS, FLOAT_BYTES * self.hidden * self.supervised)
        self.arena.take(LOGITS, FLOAT_BYTES * self.hidden * self.positions)
        return self.arena
