"""One rule per operation of a decoder: what it emits into a graph. The weights' own rules stand with their format.

A rule takes a builder, the path that its nodes are named by, and values; it returns values. Only operators with a CPU
kernel in stock onnxruntime are used: ai.onnx opset 23 and, where those are faster, com.microsoft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgetune.adapter_file import PROMPT_LENGTH, AdapterSlot
from edgetune.adapters.loreft import parse_positions
from edgetune.graphs.builder import CONTRIB, Builder
from edgetune.models.config import DecoderConfig
from edgetune.models.rope import rope_tables

Produce = Callable[[], np.ndarray]
_INT32 = int(ir.DataType.INT32)


@dataclass(frozen=True)
class AttentionInputs:
    """What attention shares: rotary tables [context, head_dim/2] of each kind, and the lengths or positions."""

    tables: list[tuple[ir.Value, ir.Value] | None]  # None: layers of this kind do not rotate
    seqlens_k: ir.Value | None  # int32 [b] and int32 [], for the contrib operator
    total_sequence_length: ir.Value | None
    position_ids: ir.Value | None  # int64 [b, s], for the standard operators
    masks: list[ir.Value | None]  # bool [s, total] of each kind with a sliding window, for those too


def rms_norm(b: Builder, path: str, x: ir.Value, name: str, size: int, produce: Produce, epsilon: float) -> ir.Value:
    """The value x / sqrt(mean(x^2) + epsilon) * weight over the last dimension, of length `size`."""
    weight = b.weight(name, "float32", (size,), produce)
    return b.op(f"{path}/RMSNormalization", "RMSNormalization", [x, weight], axis=-1, epsilon=epsilon)


# x [b, s, heads*d] ── Reshape [b, s, heads, d] ── RMSNormalization ── Reshape [b, s, heads*d]
def head_norm(
    b: Builder, path: str, x: ir.Value, name: str, heads: int, head_dim: int, produce: Produce, epsilon: float
) -> ir.Value:
    """RMSNorm of each head on its own (Qwen3)."""
    split = b.constant(f"/shape/{heads}x{head_dim}", np.array([0, 0, heads, head_dim], np.int64))
    joined = b.constant(f"/shape/{heads * head_dim}", np.array([0, 0, heads * head_dim], np.int64))
    x = b.op(f"{path}/split/Reshape", "Reshape", [x, split])
    x = rms_norm(b, path, x, name, head_dim, produce, epsilon)
    return b.op(f"{path}/join/Reshape", "Reshape", [x, joined])


# x [n, K] ── MatMul(lora_A [K, r]) ── Gemm(lora_B [r, N], y) ── [n, N]
def lora(b: Builder, path: str, x: ir.Value, y: ir.Value, slot: str, shape: tuple[int, int]) -> ir.Value:
    """The sum y + (x A) B with A and B as optional inputs of any rank; left out they have rank 0 and change nothing.

    The scaling is folded into B. One symbol per slot names the rank, so slots may differ in theirs. Two calls for each
    slot: with empty ones a token of the SmolLM2-135M shape is still a microsecond longer for each call.
    """
    rows, columns = shape
    rank = f"{slot}.r"
    a = b.optional_input(f"{slot}.lora_A", [columns, rank], np.zeros((columns, 0), np.float32))
    c = b.optional_input(f"{slot}.lora_B", [rank, rows], np.zeros((0, rows), np.float32))
    return b.op(f"{path}/lora_B/Gemm", "Gemm", [b.op(f"{path}/lora_A/MatMul", "MatMul", [x, a]), c, y])


_NON_LINEARITIES = {"relu": "Relu", "tanh": "Tanh"}


# x [n, K] ── MatMul(adapter_down [K, r]) ── Relu │ Tanh │ Sigmoid, Mul ── Gemm(adapter_up [r, N], y) ── [n, N]
def bottleneck(b: Builder, path: str, x: ir.Value, y: ir.Value, slot: AdapterSlot) -> ir.Value:
    """The sum y + act(x D) U with D and U as optional inputs of any width; left out it is 0, which changes nothing."""
    rows, columns, width = slot.out_features, slot.in_features, f"{slot.name}.r"
    first, second = slot.inputs
    down = b.optional_input(first, [columns, width], np.zeros((columns, 0), np.float32))
    up = b.optional_input(second, [width, rows], np.zeros((0, rows), np.float32))
    z = b.op(f"{path}/adapter_down/MatMul", "MatMul", [x, down])
    if slot.activation == "silu":
        z = b.op(f"{path}/Mul", "Mul", [z, b.op(f"{path}/Sigmoid", "Sigmoid", [z])])
    else:
        kind = _NON_LINEARITIES[str(slot.activation)]
        z = b.op(f"{path}/{kind}", kind, [z])
    return b.op(f"{path}/adapter_up/Gemm", "Gemm", [z, up, y])


# ids, mask, prompt_length ── [b*s, 1]
def prompt_mask(b: Builder, ids: ir.Value, mask: ir.Value, positions: str) -> ir.Value:
    """1 at the new tokens that are among so many first or last positions of the prompt, else 0, for `loreft`.

    The optional input `prompt_length` [1 or b] is the number of its tokens, in every call of a sequence. Left out, the
    prompt is what the first call gives, so that nothing is changed where tokens lie in the cache already.
    """
    path, (first, last) = "/prompt", parse_positions(positions)
    given = b.optional_input(PROMPT_LENGTH, ["prompt_lengths"], np.array([-1], np.int64))
    zero, one = (b.constant(f"{path}/{n}", np.array(n, np.int64)) for n in (0, 1))
    total = _length(b, f"{path}/mask", mask)
    start = b.op(f"{path}/start/Sub", "Sub", [total, _length(b, f"{path}/ids", ids)])
    at = b.op(f"{path}/Range", "Range", [start, total, one])
    here = b.op(f"{path}/here/Where", "Where", [b.op(f"{path}/here/Equal", "Equal", [start, zero]), total, zero])
    length = b.op(f"{path}/Where", "Where", [b.op(f"{path}/given/Less", "Less", [given, zero]), here, given])
    length = b.op(f"{path}/Unsqueeze", "Unsqueeze", [length, b.constant("/shape/last", np.array([-1], np.int64))])
    inside = b.op(f"{path}/inside/Less", "Less", [at, length])
    begins = b.op(f"{path}/begins/Less", "Less", [at, b.constant(f"{path}/first", np.array(first, np.int64))])
    rest = b.op(f"{path}/Sub", "Sub", [length, b.constant(f"{path}/last", np.array(last, np.int64))])
    ends = b.op(f"{path}/ends/GreaterOrEqual", "GreaterOrEqual", [at, rest])
    chosen = b.op(f"{path}/And", "And", [inside, b.op(f"{path}/Or", "Or", [begins, ends])])
    chosen = b.op(f"{path}/Cast", "Cast", [chosen], to=int(ir.DataType.FLOAT))
    every = b.op(f"{path}/Expand", "Expand", [chosen, b.op(f"{path}/every/Shape", "Shape", [ids])])
    return b.op(f"{path}/Reshape", "Reshape", [every, b.constant("/shape/column", np.array([-1, 1], np.int64))])


# h [n, K] ── MatMul(reft_down [K, r]) ── Add(reft_bias [r]) ── Mul(mask [n, 1]) ── Gemm(reft_up [r, K], h) ── [n, K]
def loreft(b: Builder, path: str, h: ir.Value, slot: AdapterSlot, mask: ir.Value) -> ir.Value:
    """The sum h + mask * ((h D + c) U), with D = (W - R)^T, c and U = R as optional inputs of any rank; left out they
    have rank 0 and change nothing.
    """
    rank = f"{slot.name}.r"
    down, bias, up = (
        b.optional_input(name, [rank if size == 0 else size for size in shape], np.zeros(shape, np.float32))
        for name, shape in slot.shapes(0).items()
    )
    z = b.op(f"{path}/reft_down/MatMul", "MatMul", [h, down])
    z = b.op(f"{path}/Mul", "Mul", [b.op(f"{path}/reft_bias/Add", "Add", [z, bias]), mask])
    return b.op(f"{path}/reft_up/Gemm", "Gemm", [z, up, h])


# h [n, K] ─ Reshape [n, s, c] ─ ReduceMean ─ Mul(side_scale) ─ Add(z) ─┬─ MatMul(side_down) ─ Relu ─ Gemm(side_up)
#                                                                       └──────────────────────────────────┘
def rung(b: Builder, path: str, h: ir.Value, z: ir.Value | None, slot: AdapterSlot) -> ir.Value:
    """A rung of `lst` over what the one below gave, z; h is the normed output of its block. Left out it hands z on."""
    rank = f"{slot.name}.r"
    first, second = slot.inputs
    down = b.optional_input(first, [slot.in_features, rank], np.zeros((slot.in_features, 0), np.float32))
    up = b.optional_input(second, [rank, slot.out_features], np.zeros((0, slot.out_features), np.float32))
    scale = b.optional_input(f"{slot.name}.side_scale", [1], np.zeros(1, np.float32))
    groups = b.constant("/shape/side", np.array([-1, slot.in_features, slot.reduction], np.int64))
    h = b.op(f"{path}/Reshape", "Reshape", [h, groups])
    mean = b.op(
        f"{path}/ReduceMean", "ReduceMean", [h, b.constant("/shape/last", np.array([-1], np.int64))], keepdims=0
    )
    a = b.op(f"{path}/side_scale/Mul", "Mul", [mean, scale])
    if z is not None:
        a = b.op(f"{path}/Add", "Add", [z, a])
    inner = b.op(f"{path}/Relu", "Relu", [b.op(f"{path}/side_down/MatMul", "MatMul", [a, down])])
    return b.op(f"{path}/side_up/Gemm", "Gemm", [inner, up, a])


# z [n, s] ── Slice ── Gemm(side_upsample [r, K], x) ── [n, K]
def side_output(b: Builder, path: str, z: ir.Value, x: ir.Value, slot: AdapterSlot) -> ir.Value:
    """The sum x + z U with U as an optional input; left out it has no rows, as many as z then has columns."""
    ((name, shape),) = slot.shapes(0).items()
    up = b.optional_input(name, [f"{slot.name}.r", slot.out_features], np.zeros(shape, np.float32))
    rows = b.op(f"{path}/Shape", "Shape", [up], start=0, end=1)
    zero, one = (b.constant(f"/side/{n}", np.array([n], np.int64)) for n in (0, 1))
    z = b.op(f"{path}/Slice", "Slice", [z, zero, rows, one])
    return b.op(f"{path}/side_upsample/Gemm", "Gemm", [z, up, x])


# x [b, s, n] ── Reshape ── [b*s, n]
def flat(b: Builder, path: str, x: ir.Value, size: int) -> ir.Value:
    """The vectors of all positions, of length `size` each, below each other."""
    shape = b.constant(f"/shape/flat/{size}", np.array([-1, size], np.int64))
    return b.op(f"{path}/flat/Reshape", "Reshape", [x, shape])


# ids [b, s] ── Shape ── Concat(-1) ── [b, s, -1]
def row_shape(b: Builder, ids: ir.Value) -> ir.Value:
    """The shape that `by_row` gives values back."""
    rest = b.constant("/shape/rest", np.array([-1], np.int64))
    return b.op("/shape/Concat", "Concat", [b.op("/shape/Shape", "Shape", [ids]), rest], axis=0)


# x [b*s, n] ── Reshape ── [b, s, n]
def by_row(b: Builder, path: str, x: ir.Value, shape: ir.Value) -> ir.Value:
    """What `flat` made, undone."""
    return b.op(f"{path}/by_row/Reshape", "Reshape", [x, shape])


# x [b, s, n + m + …] ─ Split ─┬─ [b, s, n]
#                              ├─ [b, s, m] …
def split(b: Builder, path: str, x: ir.Value, sizes: Sequence[int]) -> Sequence[ir.Value]:
    """The last dimension cut into parts of these sizes."""
    lengths = b.constant(f"/shape/split/{'.'.join(map(str, sizes))}", np.array(sizes, np.int64))
    return b.op_many(f"{path}/Split", "Split", [x, lengths], [f"part.{i}" for i in range(len(sizes))], axis=-1)


# gate ─┬─ Sigmoid ─ Mul ─ Mul(up)
#       └────────────┘
def silu_gate(b: Builder, path: str, gate: ir.Value, up: ir.Value) -> ir.Value:
    """The product silu(gate) * up, with silu(x) = x * sigmoid(x)."""
    silu = b.op(f"{path}/silu/Mul", "Mul", [gate, b.op(f"{path}/silu/Sigmoid", "Sigmoid", [gate])])
    return b.op(f"{path}/Mul", "Mul", [silu, up])


# gate ── Gelu ── Mul(up)
def gelu_gate(b: Builder, path: str, gate: ir.Value, up: ir.Value) -> ir.Value:
    """The product gelu(gate) * up, with the approximation of gelu by tanh."""
    return b.op(f"{path}/Mul", "Mul", [b.op(f"{path}/Gelu", "Gelu", [gate], approximate="tanh"), up])


GATES = {"silu": silu_gate, "gelu_pytorch_tanh": gelu_gate}


def scaled(b: Builder, path: str, x: ir.Value, scale: float) -> ir.Value:
    """The product scale * x; x itself where the scale is 1."""
    if scale == 1:
        return x
    return b.op(f"{path}/Mul", "Mul", [x, b.constant(f"{path}/scale", np.array(scale, np.float32))])


# x [b, s, n] ── Slice(-k, end) ── [b, min(k, s), n]
def last_positions(b: Builder, path: str, x: ir.Value) -> ir.Value:
    """The last `logits_to_keep` positions of x; all of them where that optional input is 0 or left out."""
    keep = b.optional_input("logits_to_keep", [1], np.zeros(1, np.int64))
    start = b.op(f"{path}/Neg", "Neg", [keep])
    end = b.constant("/shape/end", np.array([np.iinfo(np.int64).max], np.int64))
    return b.op(f"{path}/Slice", "Slice", [x, start, end, b.constant("/shape/positions", np.array([1], np.int64))])


def has_fused_attention(config: DecoderConfig) -> bool:
    """Whether the contrib operator takes this head size; its rotary embedding wants a multiple of 16."""
    return config.head_dim % 16 == 0


def attention_inputs(
    b: Builder, ids: ir.Value, mask: ir.Value, config: DecoderConfig, context_length: int
) -> AttentionInputs:
    """The shared inputs of `attention`, from ids [b, s] and mask [b, total] (1 = token)."""
    tables = [
        None if kind.rope_theta is None else _tables(b, index, rope_tables(kind, config.head_dim, context_length))
        for index, kind in enumerate(config.attention_kinds)
    ]
    if b.contrib and has_fused_attention(config):
        return AttentionInputs(tables, *_lengths(b, mask), None, [])
    queries = _queries(b, ids, mask)
    masks = [
        None if kind.sliding_window is None else _window(b, f"/window.{index}", queries, mask, kind.sliding_window)
        for index, kind in enumerate(config.attention_kinds)
    ]
    positions = b.op("/positions/Expand", "Expand", [queries, b.op("/positions/Shape", "Shape", [ids])])
    return AttentionInputs(tables, None, None, positions, masks)


def _tables(b: Builder, kind: int, tables: tuple[np.ndarray, np.ndarray]) -> tuple[ir.Value, ir.Value]:
    cos, sin = tables
    return (
        b.weight(f"cos_cache.{kind}", "float32", cos.shape, lambda: cos),
        b.weight(f"sin_cache.{kind}", "float32", sin.shape, lambda: sin),
    )


# mask ─┬─ ReduceSum ── Sub(1) ── Cast ── seqlens_k [b]
#       └─ Shape ── Gather(1) ── Cast ── total_sequence_length
def _lengths(b: Builder, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    one = b.constant("/mask/one", np.array([1], np.int64))
    length = b.op("/mask/ReduceSum", "ReduceSum", [mask, one], keepdims=0)
    seqlens = b.op("/mask/seqlens/Cast", "Cast", [b.op("/mask/Sub", "Sub", [length, one])], to=_INT32)
    return seqlens, b.op("/mask/total/Cast", "Cast", [_length(b, "/mask", mask)], to=_INT32)


# ids, mask ── Range(total - s, total)
def _queries(b: Builder, ids: ir.Value, mask: ir.Value) -> ir.Value:
    """The positions of the new tokens, int64 [s]."""
    total = _length(b, "/mask", mask)
    start = b.op("/positions/Sub", "Sub", [total, _length(b, "/positions/ids", ids)])
    step = b.constant("/positions/step", np.array(1, np.int64))
    return b.op("/positions/Range", "Range", [start, total, step])


# queries ── Unsqueeze [s, 1] ── Sub(Range(0, total)) ── Less(window) ── [s, total]
def _window(b: Builder, path: str, queries: ir.Value, mask: ir.Value, window: int) -> ir.Value:
    """Whether a key is less than `window` positions behind a query; that it is not ahead is for the operator."""
    zero, one = (b.constant(f"/window/{n}", np.array(n, np.int64)) for n in (0, 1))
    keys = b.op(f"{path}/Range", "Range", [zero, _length(b, path, mask), one])
    column = b.op(f"{path}/Unsqueeze", "Unsqueeze", [queries, b.constant("/shape/last", np.array([-1], np.int64))])
    behind = b.op(f"{path}/Sub", "Sub", [column, keys])
    return b.op(f"{path}/Less", "Less", [behind, b.constant(f"{path}/length", np.array(window, np.int64))])


def _length(b: Builder, path: str, x: ir.Value) -> ir.Value:
    """The second dimension of x, int64 []."""
    axis = b.constant("/shape/second", np.array(1, np.int64))
    return b.op(f"{path}/Gather", "Gather", [b.op(f"{path}/Shape", "Shape", [x]), axis], axis=0)


def attention(
    b: Builder,
    path: str,
    qkv: Sequence[ir.Value | None],
    past: Sequence[ir.Value],
    shared: AttentionInputs,
    config: DecoderConfig,
    kind: int,
) -> Sequence[ir.Value]:
    """Causal grouped-query attention of a kind over past and new tokens.

    `qkv` are [b, s, heads*head_dim], for the contrib operator also all three side by side, with None for k and v;
    `past` and the returned present are key and value [b, kv_heads, length, head_dim].
    Returns (output [b, s, heads*head_dim], present key, present value).

    The contrib operator is preferred because past and present may be one buffer there. The standard operators take
    every even head size and compute the same; they ignore padding in the mask.
    """
    heads, kv_heads, scale = config.num_attention_heads, config.num_key_value_heads, config.attention_scale
    window = config.attention_kinds[kind].sliding_window
    outputs = ("output", "key", "value")
    tables = shared.tables[kind]
    if shared.position_ids is None:
        return b.op_many(
            f"{path}/GroupQueryAttention", "GroupQueryAttention",
            [*qkv, *past, shared.seqlens_k, shared.total_sequence_length, *(tables or ())],
            outputs, domain=CONTRIB, num_heads=heads, kv_num_heads=kv_heads, do_rotary=int(tables is not None),
            scale=scale, local_window_size=-1 if window is None else window,
        )  # fmt: skip
    q, k, v = qkv
    assert q is not None and k is not None
    if tables is not None:
        q, k = (
            b.op(
                f"{path}/{name}/RotaryEmbedding", "RotaryEmbedding", [x, *tables, shared.position_ids], num_heads=count
            )
            for name, x, count in (("q_rotary", q, heads), ("k_rotary", k, kv_heads))
        )
    return b.op_many(
        f"{path}/Attention", "Attention", [q, k, v, shared.masks[kind], *past], outputs,
        is_causal=1, q_num_heads=heads, kv_num_heads=kv_heads, scale=scale,
    )  # fmt: skip
