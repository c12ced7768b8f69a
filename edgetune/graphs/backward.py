"""The rules of a training graph: each operation of a block forward, on flat rows, and its gradient.

    x, y, d…     float32 [N, features], N = B * T positions; d… is the gradient of the loss by what it is named after
    heads        float32 [B, heads, T, head_dim]

Written out in ordinary operators, because stock onnxruntime has no gradient kernels. The formulas are those of
`training.blocks`; what a rule's backward needs of its forward is handed to it, so a block's graph decides what is
computed again. Frozen weights get no gradient: theirs ends at the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from edgetune.graphs.builder import Builder


class Nodes:
    """Nodes under one path, each named by its operator and its number there."""

    def __init__(self, builder: Builder, path: str) -> None:
        self.b, self.path, self._count = builder, path, 0

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        self._count += 1
        return self.b.op(f"{self.path}/{op_type}.{self._count}", op_type, inputs, **attributes)

    def split(self, x: ir.Value, sizes: Sequence[int], axis: int) -> Sequence[ir.Value]:
        """The parts of x along an axis."""
        self._count += 1
        names = [f"output.{i}" for i in range(len(sizes))]
        return self.b.op_many(
            f"{self.path}/Split.{self._count}", "Split", [x, self.whole(*sizes)], names, axis=axis
        )  # fmt: skip

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.b.constant(f"/number/{value!r}", np.array(value, np.float32))

    def whole(self, *values: int) -> ir.Value:
        """Int64 [n]: axes, or a shape."""
        return self.b.constant("/whole/" + "x".join(map(str, values)), np.array(values, np.int64))

    def every(self, rows: ir.Value | int, beside: ir.Value) -> ir.Value:
        """Int64 [rows]: 0, 1, …, by a computation on `beside`."""
        zero, one = (self.b.constant(f"/index/{number}", np.array(number, np.int64)) for number in (0, 1))
        start = self("Mul", self("Squeeze", self("Shape", beside, start=0, end=1), self.whole(0)), zero)
        limit = self.b.constant(f"/index/{rows}", np.array(rows, np.int64)) if isinstance(rows, int) else rows
        return self("Range", start, limit, one)


# x ─┬─ Gemm(W^T) + bias ───────────────── Add ── y
#    └─ Gemm(A) ── Mul(scaling) ── Gemm(B) ─┘
def linear(n: Nodes, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    """The frozen product x W^T + bias for W [N, K]."""
    return n("Gemm", x, weight, *([] if bias is None else [bias]), transB=1)


def linear_backward(n: Nodes, d_y: ir.Value, weight: ir.Value) -> ir.Value:
    """Its gradient by x: d_y W."""
    return n("MatMul", d_y, weight)


class Lora(NamedTuple):
    """An adapter's inputs: A [K, r], B [r, N], and the scaling [1] that B is not yet multiplied by."""

    a: ir.Value
    b: ir.Value
    scaling: ir.Value


def lora(n: Nodes, x: ir.Value, adapter: Lora) -> tuple[ir.Value, ir.Value]:
    """The sum's second term, z B [N, features], and z = scaling * x A [N, r], which backward needs."""
    z = n("Mul", n("MatMul", x, adapter.a), adapter.scaling)
    return n("MatMul", z, adapter.b), z


def lora_backward(
    n: Nodes, x: ir.Value, z: ir.Value, d_y: ir.Value, adapter: Lora
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Gradients by x, A and B:  d_z = scaling * d_y B^T,  d_x = d_z A^T,  d_A = x^T d_z,  d_B = z^T d_y."""
    d_z = n("Mul", n("MatMul", d_y, n("Transpose", adapter.b, perm=[1, 0])), adapter.scaling)
    d_x = n("MatMul", d_z, n("Transpose", adapter.a, perm=[1, 0]))
    d_a = n("MatMul", n("Transpose", x, perm=[1, 0]), d_z)
    return d_x, d_a, n("MatMul", n("Transpose", z, perm=[1, 0]), d_y)


def rms_norm_backward(n: Nodes, x: ir.Value, weight: ir.Value, epsilon: float, d_y: ir.Value) -> ir.Value:
    """Gradient by x of x / rms(x) * weight over the last dimension.

    dx = r g - x r^3 mean(g x)   with g = d_y * weight and r = 1 / rms(x)
    """
    last = n.whole(-1)
    square = n("ReduceMean", n("Mul", x, x), last)
    r = n("Reciprocal", n("Sqrt", n("Add", square, n.number(epsilon))))
    g = n("Mul", d_y, weight)
    along = n("Mul", n("ReduceMean", n("Mul", g, x), last), n("Mul", r, n("Mul", r, r)))
    return n("Sub", n("Mul", g, r), n("Mul", x, along))


def silu_backward(n: Nodes, x: ir.Value) -> ir.Value:
    """The slope of x s(x) at x: s (1 + x (1 - s)), with s the sigmoid."""
    s, one = n("Sigmoid", x), n.number(1.0)
    return n("Mul", s, n("Add", n("Mul", x, n("Sub", one, s)), one))


def gelu_tanh_backward(n: Nodes, x: ir.Value) -> ir.Value:
    """The slope of x (1 + tanh u) / 2 at x, with u = c (x + a x^3): (1 + t) / 2 + x (1 - t^2) / 2 * c (1 + 3 a x^2)."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    one, half = n.number(1.0), n.number(0.5)
    square = n("Mul", x, x)
    u = n("Mul", n("Mul", x, n.number(c)), n("Add", n("Mul", square, n.number(a)), one))
    t = n("Tanh", u)
    slope = n("Mul", n("Add", n("Mul", square, n.number(3 * a)), one), n.number(c))
    curved = n("Mul", n("Mul", x, n("Sub", one, n("Mul", t, t))), slope)
    return n("Mul", n("Add", n("Add", one, t), curved), half)


GATES_BACKWARD: dict[str, Callable[[Nodes, ir.Value], ir.Value]] = {
    "silu": silu_backward,
    "gelu_pytorch_tanh": gelu_tanh_backward,
}


class Heads(NamedTuple):
    """How the rows of a graph are windows, as int64 [1] values that the graph computes."""

    batch: ir.Value
    length: ir.Value


# x [N, heads*d] ── Reshape [B, T, heads, d] ── Transpose [B, heads, T, d]
def by_head(n: Nodes, x: ir.Value, heads: Heads, count: int, head_dim: int) -> ir.Value:
    """Rows by head."""
    shape = n("Concat", heads.batch, heads.length, n.whole(count, head_dim), axis=0)
    return n("Transpose", n("Reshape", x, shape), perm=[0, 2, 1, 3])


def by_row(n: Nodes, x: ir.Value, width: int) -> ir.Value:
    """The opposite of `by_head`: [B, heads, T, d] -> [N, width]."""
    return n("Reshape", n("Transpose", x, perm=[0, 2, 1, 3]), n.whole(-1, width))


def rotate(n: Nodes, x: ir.Value, tables: tuple[ir.Value, ir.Value], *, backward: bool = False) -> ir.Value:
    """Rotary embedding of x [B, heads, T, d] by cos and sin [B, T, d/2]; its gradient turns the other way."""
    cos, sin = tables
    return n("RotaryEmbedding", x, cos, n("Neg", sin) if backward else sin)


class Attended(NamedTuple):
    """What attention's backward needs: `q` is scaled, and all query heads of a key head lie side by side."""

    q: ir.Value  # [B, kv_heads, rep * T, d]
    k: ir.Value  # [B, kv_heads, T, d]
    v: ir.Value
    probabilities: ir.Value  # [B, kv_heads, rep * T, T]
    apart: ir.Value  # int64 [4]: B, heads, T, -1


# q, k ── MatMul ── Add(mask) ── Softmax ── MatMul(v)
def attention(
    n: Nodes, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value, heads: Heads, kv_heads: int, count: int,
    scale: float,
) -> tuple[ir.Value, Attended]:  # fmt: skip
    """Grouped-query attention of rotated q [B, count, T, d] over k, v [B, kv_heads, T, d]: [B, count, T, d].

    `mask` [B, 1, T, T] is added to the scores: 0 or -inf.
    """
    rep = count // kv_heads
    rows = n("Mul", heads.length, n.whole(rep))
    grouped = n("Concat", heads.batch, n.whole(kv_heads), rows, n.whole(-1), axis=0)
    apart = n("Concat", heads.batch, n.whole(count), heads.length, n.whole(-1), axis=0)
    q = n("Reshape", n("Mul", q, n.number(scale)), grouped)
    scores = n("MatMul", q, n("Transpose", k, perm=[0, 1, 3, 2]))
    scores = n("Add", n("Reshape", scores, apart), mask)
    probabilities = n("Reshape", n("Softmax", scores, axis=-1), grouped)
    output = n("Reshape", n("MatMul", probabilities, v), apart)
    return output, Attended(q, k, v, probabilities, apart)


def attention_backward(n: Nodes, made: Attended, d_o: ir.Value, scale: float) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Gradients by q [B, heads, T, d], k and v [B, kv_heads, T, d] for d_o [B, heads, T, d].

    d_v = P^T d_o,   d_P = d_o v^T,   d_S = P (d_P - sum(d_P P)),   d_q = scale d_S k,   d_k = d_S^T (scale q)
    """
    q, k, v, p, apart = made
    d_o = n("Reshape", d_o, n("Shape", q))
    turned = [0, 1, 3, 2]
    d_v = n("MatMul", n("Transpose", p, perm=turned), d_o)
    d_p = n("MatMul", d_o, n("Transpose", v, perm=turned))
    d_s = n("Mul", p, n("Sub", d_p, n("ReduceSum", n("Mul", d_p, p), n.whole(-1))))
    d_k = n("MatMul", n("Transpose", d_s, perm=turned), q)
    d_q = n("Mul", n("MatMul", d_s, k), n.number(scale))
    return n("Reshape", d_q, apart), d_k, d_v
