"""One block of an encoder forward and backward by hand, in buffers that every step uses again.

    forward    q, k, v = x Wq, x Wk, x Wv      o = attention(q, k, v)
               s1 = x + o Wo                   x2 = norm(s1)
               u = x2 Wi                       s2 = x2 + gelu(u) Wd        y = norm(s2)
    kept       q, k, v, o, s1, u, s2: what `Activations` names. Norms, gelu and scores are computed again.

Texts lie one after the other, [N, hidden] with N their tokens: there is no padding, and attention takes each text for
itself, in tiles of queries. The same formulas as `models.encoder`, which the tests hold beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from edgetune.models.encoder import Block, Embeddings, Encoder, LayerNorm
from edgetune.planner.job import TILE_QUERIES
from edgetune.products import without_onednn
from edgetune.training.blocks import BlockPass, softmax, softmax_backward


def gelu(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """X times the normal distribution function of x, into `out`."""
    with without_onednn():
        torch.ops.aten.gelu.out(x, approximate="none", out=out)
    return out


def gelu_backward(d: torch.Tensor, x: torch.Tensor) -> None:
    """Turns d, the gradient of gelu(x), into that of x."""
    with without_onednn():
        torch.ops.aten.gelu_backward.grad_input(d, x, approximate="none", grad_input=d)


@dataclass(frozen=True)
class Activations:
    """What a block keeps from its forward to its backward pass; N tokens of all texts."""

    q: torch.Tensor  # [N, hidden]
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    s1: torch.Tensor  # before the norm after attention
    u: torch.Tensor  # [N, inner], before gelu
    s2: torch.Tensor  # before the norm after the MLP


class _Tile(NamedTuple):
    """Attention of t queries of one text to its n tokens, for all heads."""

    at: slice  # of the queries, in [N]
    q: torch.Tensor  # [heads, t, head_dim], scaled
    probabilities: torch.Tensor  # [heads, t, n]


class EncoderPass:
    """The two passes over any block of an encoder, for texts of so many tokens each."""

    def __init__(self, encoder: Encoder, lengths: Sequence[int]) -> None:
        self.workspace, self.inner, self.positions = encoder.workspace, encoder.config.intermediate_size, sum(lengths)
        self.texts = list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))
        self._products = BlockPass(encoder.workspace, (), 1, self.positions)

    def embed(self, embeddings: Embeddings, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """`Embeddings.forward` of the texts' ids [N], all of type 0, into `out` [N, hidden]."""
        embeddings.word_embeddings.lookup(ids, out).add_(embeddings.token_types[0])
        for start, stop in self.texts:
            out[start:stop].add_(embeddings.positions[: stop - start])
        return normalize(out, embeddings.norm, out)

    def forward(self, block: Block, x: torch.Tensor, y: torch.Tensor | None, name: str) -> Activations:
        """Fills y [N, hidden] from x [N, hidden]; the activations lie in buffers that start with `name`.

        Without y the block ends at what backward needs.
        """
        attention, after_attention, up, output = block.parts
        hidden, inner = x.shape[1], self.inner

        def kept(key: str, width: int) -> torch.Tensor:
            return self.workspace.take(self.positions, width, f"{name}.{key}")

        made = Activations(
            *(kept(key, inner if key == "u" else hidden) for key in ("q", "k", "v", "o", "s1", "u", "s2"))
        )
        linear = self._products._linear
        linear(attention.query, x, made.q)
        linear(attention.key, x, made.k)
        linear(attention.value, x, made.v)
        for tile, _, v in self._tiles(made, attention.heads):
            self._heads(made.o, tile.at, attention.heads).copy_(torch.bmm(tile.probabilities, v, out=tile.q))
        linear(after_attention.dense, made.o, made.s1)
        x2 = normalize(made.s1.add_(x), after_attention.norm, self.workspace.like(x, "h"))
        linear(up, x2, made.u)
        activated = gelu(made.u, self.workspace.take(self.positions, inner, "inner"))
        linear(output.dense, activated, made.s2)
        made.s2.add_(x2)
        if y is not None:
            normalize(made.s2, output.norm, y)
        return made

    def backward(self, block: Block, x: torch.Tensor, made: Activations, d: torch.Tensor, *, to_input: bool) -> None:
        """Turns d, the gradient of the block's output, into that of its input, and fills the adapter's gradients.

        `to_input` False leaves d unfinished: below this block nobody asks for it. Overwrites the activations.
        """
        attention, after_attention, up, output = block.parts
        take, inner = self.workspace.take, self.inner
        linear_backward = self._products._linear_backward

        self._normalize_backward(made.s2, output.norm, d)  # d is that of s2: of x2, and of the MLP's output
        activated = gelu(made.u, take(self.positions, inner, "inner"))
        d_u = take(self.positions, inner, "d_inner")
        linear_backward(output.dense, activated, d, d_u, first=True)
        gelu_backward(d_u, made.u)
        x2 = normalize(made.s1, after_attention.norm, self.workspace.like(x, "h"))
        linear_backward(up, x2, d_u, d)
        self._normalize_backward(made.s1, after_attention.norm, d)  # now of s1: of x, and of attention's output
        d_o = self.workspace.like(x, "d_h")
        linear_backward(after_attention.dense, made.o, d, d_o, first=True)
        self._attend_backward(made, d_o, attention.heads)
        d_x = d if to_input else None
        for layer, grad in ((attention.query, made.q), (attention.key, made.k), (attention.value, made.v)):
            linear_backward(layer, x, grad, d_x)

    def _heads(self, x: torch.Tensor, at: slice, heads: int) -> torch.Tensor:
        """Rows of x [N, hidden] by head: [heads, rows, head_dim], in the same memory."""
        return x[at].view(at.stop - at.start, heads, -1).transpose(0, 1)

    def _tiles(self, made: Activations, heads: int) -> Iterator[tuple[_Tile, torch.Tensor, torch.Tensor]]:
        """The tiles in turn, with keys and values of their text, each in the memory of the one before."""
        take, head_dim = self.workspace.take, made.q.shape[1] // heads
        for first, last in self.texts:
            k, v = (self._heads(x, slice(first, last), heads) for x in (made.k, made.v))
            for start in range(first, last, TILE_QUERIES):
                at = slice(start, min(start + TILE_QUERIES, last))
                count = at.stop - at.start
                q = take(heads * count, head_dim, "attention.q").view(heads, count, head_dim)
                torch.mul(self._heads(made.q, at, heads), head_dim**-0.5, out=q)
                scores = take(heads * count, last - first, "attention.scores").view(heads, count, last - first)
                torch.bmm(q, k.transpose(1, 2), out=scores)
                softmax(scores, -1, False, out=scores)
                yield _Tile(at, q, scores), k, v

    def _attend_backward(self, made: Activations, d_o: torch.Tensor, heads: int) -> None:
        """Puts the gradients of q, k and v in their place."""
        take, head_dim = self.workspace.take, made.q.shape[1] // heads
        left = iter(self.texts)
        first = last = 0
        for tile, k, v in self._tiles(made, heads):
            at, count = tile.at, tile.at.stop - tile.at.start
            if at.start == last:  # the first tile of a text
                first, last = next(left)
                d_k, d_v = (
                    take(heads * (last - first), head_dim, name).zero_().view(heads, last - first, head_dim)
                    for name in ("d_k", "d_v")
                )
            d_part = take(heads * count, head_dim, "attention.d_o").view(heads, count, head_dim)
            d_part.copy_(self._heads(d_o, at, heads))
            d_scores = take(heads * count, last - first, "attention.d_scores").view(tile.probabilities.shape)
            torch.bmm(d_part, v.transpose(1, 2), out=d_scores)
            d_v.baddbmm_(tile.probabilities.transpose(1, 2), d_part)
            softmax_backward(d_scores, tile.probabilities, -1, torch.float32, grad_input=d_scores)
            d_k.baddbmm_(d_scores.transpose(1, 2), tile.q)
            found = torch.bmm(d_scores, k, out=d_part)
            torch.mul(found, head_dim**-0.5, out=self._heads(made.q, at, heads))
            if at.stop == last:  # no tile of this text reads them any more
                for grad, own in ((d_k, made.k), (d_v, made.v)):
                    self._heads(own, slice(first, last), heads).copy_(grad)

    def _normalize_backward(self, x: torch.Tensor, norm: LayerNorm, d: torch.Tensor) -> None:
        """Turns d [N, hidden], the gradient of norm(x), into that of x.

        dx = r (g - mean(g) - z mean(g z))   with g = d * weight, z = (x - mean(x)) r and r = 1 / deviation(x)
        """
        z, product = self.workspace.like(x, "h"), self.workspace.like(x, "d_h")
        inverse = _standardize(x, norm.eps, z)
        d.mul_(norm.weight)
        along = torch.mul(d, z, out=product).mean(1, keepdim=True)
        d.sub_(d.mean(1, keepdim=True)).addcmul_(z, along, value=-1).mul_(inverse)


def normalize(x: torch.Tensor, norm: LayerNorm, out: torch.Tensor) -> torch.Tensor:
    """LayerNorm of x [N, hidden] into `out`, which may be x."""
    _standardize(x, norm.eps, out)
    return out.mul_(norm.weight).add_(norm.bias)


def _standardize(x: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """(x - mean) / deviation of every row into `out`; returns 1 / deviation [N, 1]."""
    torch.sub(x, x.mean(1, keepdim=True), out=out)
    norm: torch.Tensor = torch.linalg.vector_norm(out, dim=1, keepdim=True)
    inverse = norm.square_().div_(x.shape[1]).add_(eps).rsqrt_()
    out.mul_(inverse)
    return inverse
