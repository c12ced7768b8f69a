"""One block forward and backward by hand, in buffers that every step uses again.

    forward    h = norm(x)       q, k, v = h Wq, h Wk, h Wv, rotated      o = attention(q, k, v)
               x2 = x + o Wo     gate, up = norm(x2) Wg, norm(x2) Wu      y = x2 + (act(gate) * up) Wd
    kept       q, k, v, o, x2, gate, up: what `Activations` names. Norms, products and scores are computed again.

A family may norm o Wo and the MLP's output before they are added, and an adapter may add to them then; these are kept
too where that is so. An adapter beside the MLP takes norm(x2), and one after the block some rows of y (`changed`).

Autograd would keep twice as much, and its temporaries come from the system anew in every step: on small models more
time went into fetching pages than into arithmetic. The same formulas as `models.decoder`, which the tests hold beside
them; attention is computed in tiles of queries, so scores never exist whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from edgetune.adapters.attach import AdaptedLinear
from edgetune.linear import FrozenLinear, Workspace
from edgetune.models.config import DecoderConfig
from edgetune.models.decoder import Block, Context, RMSNorm
from edgetune.models.places import StateAdapter
from edgetune.planner.job import TILE_QUERIES
from edgetune.products import fast_products
from edgetune.training.changed import change, change_backward, changed_rows
from edgetune.training.virtual import put_virtual, take_virtual, virtual_rows

Linear = FrozenLinear | AdaptedLinear

# Of each activation: f(x, out=...) and its backward (d, x, grad_input=...).
_ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input),
    "gelu_pytorch_tanh": (
        functools.partial(torch.ops.aten.gelu.out, approximate="tanh"),
        functools.partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
    ),
}
# Both take each row before they write it, so what is read and what is written may be the same memory.
softmax, softmax_backward = torch.ops.aten._softmax.out, torch.ops.aten._softmax_backward_data.out


@dataclass(frozen=True)
class Activations:
    """What a block keeps from its forward to its backward pass; N = B * T positions."""

    q: torch.Tensor  # [N, heads * head_dim], rotated
    k: torch.Tensor  # [N, kv_heads * head_dim], rotated
    v: torch.Tensor
    o: torch.Tensor  # [N, heads * head_dim]
    x2: torch.Tensor  # [N, hidden]
    gate: torch.Tensor  # [N, inner]
    up: torch.Tensor
    q_raw: torch.Tensor | None  # before q_norm, where the family has one
    k_raw: torch.Tensor | None
    attention_out: torch.Tensor | None  # [N, hidden], where a norm or an adapter takes what attention gives
    mlp_out: torch.Tensor | None  # [N, hidden], the same of the MLP


class _Tile(NamedTuple):
    """Attention of t queries of one window to all s positions up to them, for all heads."""

    window: int
    at: slice
    q: torch.Tensor  # [kv_heads, t * rep, head_dim], scaled
    probabilities: torch.Tensor  # [kv_heads, t * rep, s]
    k: torch.Tensor  # [kv_heads, s, head_dim]
    v: torch.Tensor


class BlockPass:
    """The two passes over any block of a decoder, for micro-batches of B windows of T positions."""

    def __init__(self, workspace: Workspace, contexts: Sequence[Context], batch: int, length: int) -> None:
        self.workspace, self.contexts, self.batch, self.length = workspace, contexts, batch, length
        self.positions = batch * length
        self.virtual = virtual_rows(contexts[0].virtual if contexts else None)
        self.changed = changed_rows(contexts[0].changed if contexts else None)

    def forward(self, block: Block, x: torch.Tensor, y: torch.Tensor | None, name: str) -> Activations:
        """Fills y [N, hidden] from x [N, hidden]; the activations lie in buffers that start with `name`.

        Without y the block ends at what backward needs.
        """
        config, attention, mlp = block.self_attn.config, block.self_attn, block.mlp
        q_width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        inner = config.intermediate_size

        def kept(key: str, width: int) -> torch.Tensor:
            return self.workspace.take(self.positions, width, f"{name}.{key}")

        activate, _ = _ACTIVATIONS[config.hidden_act]
        h = self._normed(x, block.before_attention, "h")
        q, k, v = kept("q", q_width), kept("k", kv_width), kept("v", kv_width)
        q_raw = k_raw = None
        if attention.q_norm is not None and attention.k_norm is not None:
            q_raw, k_raw = kept("q_raw", q_width), kept("k_raw", kv_width)
            self._linear(attention.q_proj, h, q_raw)
            self._linear(attention.k_proj, h, k_raw)
            for raw, out, norm in ((q_raw, q, attention.q_norm), (k_raw, k, attention.k_norm)):
                normalize(raw.view(-1, config.head_dim), norm, out.view(-1, config.head_dim))
        else:
            self._linear(attention.q_proj, h, q)
            self._linear(attention.k_proj, h, k)
        self._linear(attention.v_proj, h, v)
        context = self.contexts[block.kind]
        self._rotate(q, config.head_dim, context, 1)
        self._rotate(k, config.head_dim, context, 1)
        if attention.prefix is not None:
            put_virtual(attention.prefix.key, k, self.virtual, self.workspace)
            put_virtual(attention.prefix.value, v, self.virtual, self.workspace)
        o, x2, gate, up = kept("o", q_width), kept("x2", config.hidden_size), kept("gate", inner), kept("up", inner)
        attention_out = mlp_out = None
        if block.after_attention is not None or block.attention_output is not None:
            attention_out = kept("attention_out", config.hidden_size)
        if block.after_mlp is not None or block.mlp_output is not None:
            mlp_out = kept("mlp_out", config.hidden_size)
        made = Activations(q, k, v, o, x2, gate, up, q_raw, k_raw, attention_out, mlp_out)
        self._attend(made, context, config)
        self._linear(attention.o_proj, o, x2 if attention_out is None else attention_out)
        if attention_out is not None:
            self._added(attention_out, block.after_attention, block.attention_output, x2)
        x2.add_(x)
        h = self._normed(x2, block.before_mlp, "h")
        self._linear(mlp.gate_proj, h, gate)
        self._linear(mlp.up_proj, h, up)
        added = y if mlp_out is None else mlp_out
        if added is not None:
            product = activate(gate, out=self.workspace.take(self.positions, inner, "inner")).mul_(up)
            self._linear(mlp.down_proj, product, added)
        if y is not None:
            if mlp_out is not None:
                self._added(mlp_out, block.after_mlp, block.mlp_output, y)
            if block.mlp_parallel is not None:
                block.mlp_parallel.add(h, y)
            y.add_(x2)
            if block.block_output is not None:
                change(block.block_output, block.index, y, self.changed, self.workspace)
        return made

    def backward(self, block: Block, x: torch.Tensor, made: Activations, d: torch.Tensor, *, to_input: bool) -> None:
        """Turns d, the gradient of the block's output, into that of its input, and fills the adapter's gradients.

        `to_input` False leaves d unfinished: below this block nobody asks for it. Overwrites the activations.
        """
        config, attention, mlp = block.self_attn.config, block.self_attn, block.mlp
        to_input = to_input or is_trained(block.before_attention.weight)
        take, positions, inner = self.workspace.take, self.positions, config.intermediate_size
        activate, activate_backward = _ACTIVATIONS[config.hidden_act]

        if block.block_output is not None:
            change_backward(block.block_output, block.index, d, self.changed, self.workspace)
        d_out = self._added_backward(made.mlp_out, block.after_mlp, block.mlp_output, d)
        product = activate(made.gate, out=take(positions, inner, "inner")).mul_(made.up)
        d_product = take(positions, inner, "d_inner")
        self._linear_backward(mlp.down_proj, product, d_out, d_product, first=True)
        # From here "inner" is the gradient of up, and gate becomes its own.
        d_up = activate(made.gate, out=product).mul_(d_product)
        d_gate = made.gate
        activate_backward(made.up.mul_(d_product), made.gate, grad_input=d_gate)
        h = self._normed(made.x2, block.before_mlp, "h")
        d_h = take(positions, config.hidden_size, "d_h")
        self._linear_backward(mlp.gate_proj, h, d_gate, d_h, first=True)
        self._linear_backward(mlp.up_proj, h, d_up, d_h)
        if block.mlp_parallel is not None:
            block.mlp_parallel.add_gradients(h, d, d_h)
        normalize_backward(made.x2, block.before_mlp, d_h, d)

        d_out = self._added_backward(made.attention_out, block.after_attention, block.attention_output, d)
        d_o = take(positions, made.o.shape[1], "inner")
        self._linear_backward(attention.o_proj, made.o, d_out, d_o, first=True)
        context = self.contexts[block.kind]
        d_q, d_k, d_v = self._attend_backward(made, d_o, context, config)
        if attention.prefix is not None:
            take_virtual(attention.prefix.key, d_k, self.virtual, self.workspace)
            take_virtual(attention.prefix.value, d_v, self.virtual, self.workspace)
        self._rotate(d_q, config.head_dim, context, -1)
        self._rotate(d_k, config.head_dim, context, -1)
        if attention.q_norm is not None and attention.k_norm is not None:
            assert made.q_raw is not None and made.k_raw is not None
            for raw, grad, norm in ((made.q_raw, d_q, attention.q_norm), (made.k_raw, d_k, attention.k_norm)):
                by_head = grad.view(-1, config.head_dim)
                raw = raw.view(-1, config.head_dim)
                total = take(len(by_head), config.head_dim, "d_inner").zero_()
                normalize_backward(raw, norm, by_head, total)
                by_head.copy_(total)
        h = self._normed(x, block.before_attention, "h")
        parts = ((attention.q_proj, d_q), (attention.k_proj, d_k), (attention.v_proj, d_v))
        for index, (layer, grad) in enumerate(parts):
            self._linear_backward(layer, h, grad, d_h if to_input else None, first=index == 0)
        if to_input:
            normalize_backward(x, block.before_attention, d_h, d)

    def _added(
        self, out: torch.Tensor, norm: RMSNorm | None, adapter: StateAdapter | None, added: torch.Tensor
    ) -> None:
        """Fills `added` with what goes to the stream of `out`, that which attention or MLP gives."""
        added.copy_(out) if norm is None else normalize(out, norm, added)
        if adapter is not None:
            adapter.add(added, added)

    def _added_backward(
        self, out: torch.Tensor | None, norm: RMSNorm | None, adapter: StateAdapter | None, d: torch.Tensor
    ) -> torch.Tensor:
        """The gradient of `out` where d is that of what is added, in "d_h"; d itself where nothing is between them."""
        if out is None:
            return d
        d_out = self.workspace.like(d, "d_h").copy_(d)
        if adapter is not None:
            adapter.add_gradients(out if norm is None else self._normed(out, norm, "h"), d, d_out)
        if norm is not None:
            d_normed = self.workspace.like(d, "h").copy_(d_out)
            normalize_backward(out, norm, d_normed, d_out.zero_())
        return d_out

    def _normed(self, x: torch.Tensor, norm: RMSNorm, name: str) -> torch.Tensor:
        return normalize(x, norm, self.workspace.like(x, name))

    def _linear(self, layer: Linear, x: torch.Tensor, y: torch.Tensor) -> None:
        frozen = layer.base_layer if isinstance(layer, AdaptedLinear) else layer
        taken = layer.taken(x) if isinstance(layer, AdaptedLinear) else x
        with self._products():
            for rows, weight in frozen.tiles():
                torch.mm(taken, weight.T, out=y[:, rows])
        if frozen.bias is not None:
            y.add_(frozen.bias)
        if isinstance(layer, AdaptedLinear):
            layer.add(x, y)

    def _linear_backward(
        self, layer: Linear, x: torch.Tensor, d_y: torch.Tensor, d_x: torch.Tensor | None, *, first: bool = False
    ) -> None:
        """Adds to d_x, or sets it where it is the `first`; and to the gradients of the layer's adapter."""
        if isinstance(layer, AdaptedLinear):
            d_y = layer.before_frozen(x, d_y)
            if layer.slot.scales_input:
                d_taken = self.workspace.like(x, "adapter.x")
                self._linear_backward(layer.base_layer, x, d_y, d_taken, first=True)
                if d_x is not None and first:
                    d_x.zero_()
                layer.add_taken_gradient(x, d_taken, d_x)
                layer.add_gradients(x, d_y, d_x)
                return
        frozen = layer.base_layer if isinstance(layer, AdaptedLinear) else layer
        if frozen.bias is not None and is_trained(frozen.bias):
            add_to_gradient(frozen.bias, d_y)
        if frozen.held is not None and is_trained(frozen.held):
            gradient_of(frozen.held).addmm_(d_y.T, x)
        if d_x is not None:
            with self._products():
                for rows, weight in frozen.tiles():
                    if first and rows.start == 0:
                        torch.mm(d_y[:, rows], weight, out=d_x)
                    else:
                        d_x.addmm_(d_y[:, rows], weight)
        if isinstance(layer, AdaptedLinear):
            layer.add_gradients(x, d_y, d_x)

    def _products(self) -> AbstractContextManager[None]:
        return fast_products(self.positions == self.workspace.fast_positions)

    def _rotate(self, x: torch.Tensor, head_dim: int, context: Context, direction: int) -> None:
        """Rotary embedding of x [N, heads * head_dim] in place, rotate-half; backwards with direction -1."""
        if context.rotary is None:
            return
        heads = x.view(self.batch, self.length, -1, head_dim)
        first, second = heads.chunk(2, -1)
        cos, sin = (table.transpose(1, 2) for table in context.rotary)  # [B or 1, T, 1, head_dim/2]
        turned = self.workspace.take(len(x), x.shape[1] // 2, "rotated").view(first.shape)
        torch.mul(first, sin, out=turned)
        first.mul_(cos).addcmul_(second, sin, value=-direction)
        second.mul_(cos).add_(turned, alpha=direction)

    def _tiles(self, made: Activations, context: Context, config: DecoderConfig) -> Iterator[_Tile]:
        """The tiles in turn, each in the memory of the one before."""
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        assert context.mask is not None, "windows have segments"
        batch, length = self.batch, self.length
        q = made.q.view(batch, length, kv_heads, -1, head_dim)
        rep = q.shape[3]
        k, v = (x.view(batch, length, kv_heads, head_dim) for x in (made.k, made.v))
        for window in range(batch):
            for start in range(0, length, TILE_QUERIES):
                stop = min(start + TILE_QUERIES, length)
                rows = (stop - start) * rep
                part = self.workspace.take(kv_heads * rows, head_dim, "attention.q").view(kv_heads, rows, head_dim)
                by_head = part.view(kv_heads, stop - start, rep, head_dim)
                torch.mul(q[window, start:stop].transpose(0, 1), config.attention_scale, out=by_head)
                keys, values = (x[window, :stop].transpose(0, 1) for x in (k, v))
                scores = self.workspace.take(kv_heads * rows, stop, "attention.scores").view(kv_heads, rows, stop)
                torch.bmm(part, keys.transpose(1, 2), out=scores)
                by_query = scores.view(kv_heads, stop - start, rep, stop)
                by_query.add_(context.mask[window, :, start:stop, None, :stop])
                softmax(scores, -1, False, out=scores)
                yield _Tile(window, slice(start, stop), part, scores, keys, values)

    def _attend(self, made: Activations, context: Context, config: DecoderConfig) -> None:
        """Fills `made.o`."""
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        o = made.o.view(self.batch, self.length, kv_heads, -1, head_dim)
        for window, at, part, scores, _, values in self._tiles(made, context, config):
            found = torch.bmm(scores, values, out=part)
            o[window, at].copy_(found.view(kv_heads, at.stop - at.start, -1, head_dim).transpose(0, 1))

    def _attend_backward(
        self, made: Activations, d_o: torch.Tensor, context: Context, config: DecoderConfig
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q and k, rotated as those are, and of v; the latter two lie in k's and v's own memory."""
        take, batch, length = self.workspace.take, self.batch, self.length
        kv_heads, head_dim = config.num_key_value_heads, config.head_dim
        d_q = self.workspace.like(made.q, "d_q").view(batch, length, kv_heads, -1, head_dim)
        d_k, d_v = (
            take(batch * kv_heads * length, head_dim, name).zero_().view(batch, kv_heads, length, head_dim)
            for name in ("d_k", "d_v")
        )
        d_o = d_o.view(batch, length, kv_heads, -1, head_dim)
        for window, at, part, scores, keys, values in self._tiles(made, context, config):
            count = at.stop - at.start
            d_part = take(part.shape[0] * part.shape[1], head_dim, "attention.d_o").view(part.shape)
            by_head = d_part.view(kv_heads, count, -1, head_dim)
            by_head.copy_(d_o[window, at].transpose(0, 1))
            d_scores = take(scores.shape[0] * scores.shape[1], scores.shape[2], "attention.d_scores").view(scores.shape)
            torch.bmm(d_part, values.transpose(1, 2), out=d_scores)
            d_v[window, :, : at.stop].baddbmm_(scores.transpose(1, 2), d_part)
            softmax_backward(d_scores, scores, -1, torch.float32, grad_input=d_scores)
            d_k[window, :, : at.stop].baddbmm_(d_scores.transpose(1, 2), part)
            found = torch.bmm(d_scores, keys, out=d_part)
            torch.mul(found.view(by_head.shape).transpose(0, 1), config.attention_scale, out=d_q[window, at])
        for grad, own in ((d_k, made.k), (d_v, made.v)):
            own.view(batch, length, kv_heads, head_dim).copy_(grad.transpose(1, 2))
        return d_q.view(made.q.shape), made.k, made.v


def normalize(x: torch.Tensor, norm: RMSNorm, out: torch.Tensor) -> torch.Tensor:
    """RMSNorm of x [M, D] into `out`."""
    return torch.mul(x, _inverse_rms(x, norm.eps), out=out).mul_(norm.factor)


def normalize_backward(x: torch.Tensor, norm: RMSNorm, d_out: torch.Tensor, d_x: torch.Tensor) -> None:
    """Adds to d_x [M, D] the gradient of `normalize` for d_out [M, D], which is overwritten.

    dx = r g - x r^3 (g . x) / D   with g = d_out * factor and r = 1 / rms(x)
    dw = sum of d_out * x r over the rows, where the weight is trained
    """
    inverse, factor = _inverse_rms(x, norm.eps), norm.factor
    if is_trained(norm.weight):
        d_x.addcmul_(d_out.mul_(inverse), factor)
        add_to_gradient(norm.weight, d_out.mul_(x))
        along = d_out.mul_(factor).sum(1, keepdim=True).mul_(inverse**2).div_(-x.shape[1])
    else:
        d_x.addcmul_(d_out.mul_(factor), inverse)
        along = d_out.mul_(x).sum(1, keepdim=True).mul_(inverse**3).div_(-x.shape[1])
    d_x.addcmul_(x, along)


def is_trained(tensor: torch.Tensor) -> bool:
    """Whether one of the model's own tensors is trained in its place."""
    return isinstance(tensor, torch.nn.Parameter)


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    """`.grad`, which is made where it is missing."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


def add_to_gradient(vector: torch.Tensor, rows: torch.Tensor) -> None:
    """Adds the sum of the rows [M, D] to `.grad` of a trained vector [D]."""
    gradient_of(vector).add_(rows.sum(0))


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / rms(x) of every row, [M, 1]."""
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()
