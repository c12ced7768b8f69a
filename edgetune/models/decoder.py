"""The decoder that all families share, in torch, over frozen weights.

Paths of the linears equal the Hugging Face names less their `model.` prefix. The pieces (`embed`, `context`, a layer,
`norm`, `lm_head`) are public because the trainer drives them one block at a time; `forward` chains them for whole
logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch reader knows
from torch import nn

from edgetune.base import Base, open_base
from edgetune.linear import FrozenLinear, Workspace, frozen_linear
from edgetune.models.config import AttentionKind, DecoderConfig
from edgetune.models.places import Prefix, Score, StateAdapter, VirtualTokens, pooled, prompt_positions
from edgetune.models.rope import rope_tables


@dataclass(frozen=True)
class Context:
    """What the layers of one kind share in one pass."""

    rotary: tuple[torch.Tensor, torch.Tensor] | None  # cos and sin, [B or 1, 1, T, head_dim/2]; None: no rotation
    mask: torch.Tensor | None  # [B, 1, T, T], added to the scores: 0 = may look, -inf = may not; None = plain causal
    virtual: torch.Tensor | None = None  # int64 [B or 1, T]: which virtual token stands at a position, -1: none does
    changed: torch.Tensor | None = None  # bool [B or 1, T]: where `block_output` changes the stream


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * factor over the last dimension (arXiv 1910.07467); factor = weight + offset."""

    def __init__(self, base: Base, name: str) -> None:
        super().__init__()
        self.name, self.eps, self.offset = name, base.config.rms_norm_eps, base.config.norm_offset
        self.register_buffer("weight", torch.from_numpy(base.weights.float32(f"{name}.weight")), persistent=False)
        self.weight: torch.Tensor

    @property
    def factor(self) -> torch.Tensor:
        """What it multiplies by, as the weight is now."""
        return self.weight + self.offset if self.offset else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.factor, self.eps)


def rotate(x: torch.Tensor, context: Context) -> torch.Tensor:
    """Rotary embedding of x [B, heads, T, head_dim], rotate-half convention; x itself where the kind has none."""
    if context.rotary is None:
        return x
    first, second = x.chunk(2, -1)
    cos, sin = context.rotary
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}  # fmt: skip


class Attention(nn.Module):
    """Grouped-query self-attention; rows of a window see only their own segment."""

    def __init__(self, base: Base, name: str, workspace: Workspace) -> None:
        super().__init__()
        self.config = base.config
        self.q_proj = frozen_linear(base, f"{name}.q_proj", workspace)
        self.k_proj = frozen_linear(base, f"{name}.k_proj", workspace)
        self.v_proj = frozen_linear(base, f"{name}.v_proj", workspace)
        self.o_proj = frozen_linear(base, f"{name}.o_proj", workspace)
        self.q_norm = RMSNorm(base, f"{name}.q_norm") if base.config.qk_norm else None
        self.k_norm = RMSNorm(base, f"{name}.k_norm") if base.config.qk_norm else None
        self.prefix: Prefix | None = None

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        batch, length, _ = x.shape
        heads, kv_heads, head_dim = (
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.head_dim,
        )
        q = self.q_proj(x).view(batch, length, heads, head_dim)
        k = self.k_proj(x).view(batch, length, kv_heads, head_dim)
        v = self.v_proj(x).view(batch, length, kv_heads, head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), context), rotate(k.transpose(1, 2), context)
        if self.prefix is not None and context.virtual is not None:
            k, v = self.prefix(k, v, context.virtual)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=context.mask, is_causal=context.mask is None, scale=self.config.attention_scale,
            enable_gqa=heads != kv_heads,
        )  # fmt: skip
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, heads * head_dim))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, base: Base, name: str, workspace: Workspace) -> None:
        super().__init__()
        self.act = ACTIVATIONS[base.config.hidden_act]
        self.gate_proj = frozen_linear(base, f"{name}.gate_proj", workspace)
        self.up_proj = frozen_linear(base, f"{name}.up_proj", workspace)
        self.down_proj = frozen_linear(base, f"{name}.down_proj", workspace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); some families norm what is added, too.

    `kind` is that of its attention.
    """

    def __init__(self, base: Base, index: int, workspace: Workspace) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.kind, norms = base.config.layer_kinds[index], base.config.block_norms
        self.before_attention = RMSNorm(base, f"{name}.{norms.before_attention}")
        self.after_attention = RMSNorm(base, f"{name}.{norms.after_attention}") if norms.after_attention else None
        self.before_mlp = RMSNorm(base, f"{name}.{norms.before_mlp}")
        self.after_mlp = RMSNorm(base, f"{name}.{norms.after_mlp}") if norms.after_mlp else None
        self.self_attn = Attention(base, f"{name}.self_attn", workspace)
        self.mlp = GatedMLP(base, f"{name}.mlp", workspace)
        self.index = index
        # Places of adapters: on what attention and MLP add to the stream, beside the MLP, of what that takes, and after
        # all of it.
        self.attention_output: StateAdapter | None = None
        self.mlp_output: StateAdapter | None = None
        self.mlp_parallel: StateAdapter | None = None
        self.block_output: StateAdapter | None = None
        self.side: StateAdapter | None = None  # beside the stream, so the block itself does not call it

    def forward(self, x: torch.Tensor, contexts: Sequence[Context]) -> torch.Tensor:
        """X [B, T, hidden] -> [B, T, hidden]."""
        y = self.self_attn(self.before_attention(x), contexts[self.kind])
        y = y if self.after_attention is None else self.after_attention(y)
        x = x + (y if self.attention_output is None else self.attention_output(y, y))
        h = self.before_mlp(x)
        y = self.mlp(h)
        y = y if self.after_mlp is None else self.after_mlp(y)
        y = y if self.mlp_output is None else self.mlp_output(y, y)
        y = x + (y if self.mlp_parallel is None else self.mlp_parallel(h, y))
        changed = contexts[self.kind].changed
        if self.block_output is None or changed is None:
            return y  # type: ignore[no-any-return]
        return torch.where(changed[..., None], self.block_output(y, y), y)


class Decoder(nn.Module):
    """Embedding, blocks, final norm and head over one base; a tied head is the embedding itself."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.config: DecoderConfig = base.config
        self.weights = base.weights
        self.workspace = Workspace(base.config.largest_linear)
        self.embed_tokens = frozen_linear(base, "model.embed_tokens", self.workspace)
        self.layers = nn.ModuleList(
            Block(base, index, self.workspace) for index in range(base.config.num_hidden_layers)
        )
        self.norm = RMSNorm(base, "model.norm")
        tied = base.config.tie_word_embeddings
        self.lm_head: FrozenLinear = self.embed_tokens if tied else frozen_linear(base, "lm_head", self.workspace)
        self.virtual_tokens = 0  # positions that each row gives to a trained prompt or prefix
        self.prompt: VirtualTokens | None = None
        self.prompt_positions: tuple[int, int] | None = None  # first and last ones of a prompt that an adapter changes
        self.side_output: StateAdapter | None = None
        self.side_group: int | None = None  # hidden size over the width of a network beside the blocks
        self.score: Score | None = None
        self._tables: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        self._length = 0  # of the tables

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def norm_above(self, index: int) -> RMSNorm:
        """The norm that takes what block `index` gives."""
        return self.norm if index + 1 == len(self.layers) else self.blocks[index + 1].before_attention

    def read_on_demand(self) -> None:
        """From here on no weight is read from disk before it is needed, but for the piece that is decoded next."""
        self.weights.read_on_demand()
        self.workspace.reads_ahead = True

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [B, T] -> [B, T, hidden]."""
        return self.embed_tokens.lookup(input_ids).mul_(self.config.embedding_scale)

    def context(
        self, length: int, position_ids: torch.Tensor | None = None, segment_ids: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
    ) -> list[Context]:  # fmt: skip
        """Rotary tables and mask of one pass, for each kind of attention.

        Args:
            length: T, the window's length.
            position_ids: [B, T], each below T, counted from zero in every segment; None counts 0..T-1.
            segment_ids: [B, T]; a position sees earlier ones of its own segment only. None is one segment.
            prompt_lengths: [B, T or 1], the tokens of the prompt that a position's segment begins with. None: all are.
        """
        if self._length < length:  # only as long as windows are: a 128k context would take 32 MiB
            self._tables = [_tables(kind, self.config.head_dim, length) for kind in self.config.attention_kinds]
            self._length = length
        windows = [kind.window_within(length) for kind in self.config.attention_kinds]
        masks = {window: _mask(segment_ids, length, window) for window in set(windows)}
        at = slice(length) if position_ids is None else position_ids
        virtual = self.virtual(length, position_ids, segment_ids)
        changed = self._changed(length, position_ids, segment_ids, prompt_lengths)
        return [
            Context(
                None if tables is None else (_by_head(tables[0][at]), _by_head(tables[1][at])),
                masks[window],
                virtual,
                changed,
            )
            for tables, window in zip(self._tables, windows, strict=True)
        ]

    def virtual(
        self, length: int, position_ids: torch.Tensor | None, segment_ids: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The virtual token at each position, as `Context` has it: a row's first ones; None where there are none."""
        if not self.virtual_tokens:
            return None
        at = torch.arange(length)[None] if position_ids is None else position_ids
        is_virtual = at < self.virtual_tokens
        if segment_ids is not None:
            is_virtual &= segment_ids >= 0  # padding counts from zero, too
        return torch.where(is_virtual, at, -1)

    def _changed(
        self, length: int, position_ids: torch.Tensor | None, segment_ids: torch.Tensor | None,
        prompt_lengths: torch.Tensor | None,
    ) -> torch.Tensor | None:  # fmt: skip
        """`Context.changed`."""
        if self.prompt_positions is None:
            return None
        at = torch.arange(length)[None] if position_ids is None else position_ids
        lengths = torch.full((1, 1), length) if prompt_lengths is None else prompt_lengths
        changed = prompt_positions(self.prompt_positions, at, lengths)
        return changed if segment_ids is None else changed & (segment_ids >= 0)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ids [B, T] -> logits [B, T, vocab], whole, or the outputs of a trained head [B, T, outputs]: for tests and
        evaluation of small models.
        """
        hidden = self.hidden(input_ids, position_ids, segment_ids, prompt_lengths)
        if self.score is not None:
            return hidden @ self.score.weight.T
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def hidden(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Ids [B, T] -> what the head multiplies [B, T, hidden].

        With positions the ids have those of virtual tokens, as windows do; else these are put before them and left out
        of the result. `prompt_lengths` are as in `context`.
        """
        before = self.virtual_tokens if position_ids is None else 0
        input_ids = F.pad(input_ids, (before, 0))
        contexts = self.context(input_ids.shape[1], position_ids, segment_ids, prompt_lengths)
        x = self.embed(input_ids)
        if self.prompt is not None and contexts[0].virtual is not None:
            x = self.prompt(x, contexts[0].virtual)
        z = None
        for index, block in enumerate(self.blocks):
            x = block(x, contexts)
            if block.side is not None and self.side_group is not None:
                p = pooled(self.norm_above(index)(x), self.side_group)
                a = p if z is None else z + p
                z = block.side(a, a)
        if self.side_output is not None:
            x = self.side_output(z, x)
        return self.norm(x[:, before:])  # type: ignore[no-any-return]


def _tables(kind: AttentionKind, head_dim: int, length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(cos, sin), each [length, head_dim/2]."""
    if kind.rope_theta is None:
        return None
    cos, sin = rope_tables(kind, head_dim, length)
    return torch.from_numpy(cos), torch.from_numpy(sin)


def _by_head(table: torch.Tensor) -> torch.Tensor:
    """[T, head_dim/2] or [B, T, head_dim/2] -> [1 or B, 1, T, head_dim/2]."""
    return table.unsqueeze(-3) if table.dim() == 3 else table[None, None]


def _mask(segment_ids: torch.Tensor | None, length: int, window: int | None) -> torch.Tensor | None:
    """The mask of a `Context` for segments [B, T] and a sliding window; None where plain causal is all."""
    if segment_ids is None:
        if window is None:
            return None
        segment_ids = torch.zeros(1, length)
    allowed = (segment_ids[:, :, None] == segment_ids[:, None, :]).tril_()
    if window is not None:
        allowed.triu_(1 - window)
    # Made float here: the attention kernel would turn a boolean mask into this once per layer, and keep each.
    return torch.zeros(allowed.shape).masked_fill_(~allowed, -torch.inf)[:, None]


def load_decoder(folder: str | Path) -> Decoder:
    """The decoder over a base/ folder (codes stay mapped) or over a plain model folder (dense).

    Raises:
        ModelError: as `open_base`.
    """
    return Decoder(open_base(folder)).eval()
