"""The encoder that BERT-like families share, in torch, over frozen weights.

Its modules are called as in Hugging Face's `BertModel`, whose tensors they read. The pieces (`embed`, `mask`, a block,
`pool`) are public, as those of the decoder are, for whoever drives them one at a time; `forward` chains them.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch reader knows
from torch import nn

from edgetune.base import EncoderBase, open_any_base
from edgetune.errors import ModelError
from edgetune.linear import FrozenLinear, Workspace, frozen_linear
from edgetune.models.encoder_config import NORM_EPSILON, POSITIONS, TOKEN_TYPES, WORDS, EncoderConfig


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (arXiv 1607.06450)."""

    def __init__(self, base: EncoderBase, name: str) -> None:
        super().__init__()
        self.eps = base.config.layer_norm_eps
        self.weight, self.bias = (torch.from_numpy(base.vector(f"{name}.{kind}")) for kind in ("weight", "bias"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Embeddings(nn.Module):
    """The sum of the rows of a token, its position and its type, normed."""

    def __init__(self, base: EncoderBase, workspace: Workspace) -> None:
        super().__init__()
        self.word_embeddings = frozen_linear(base, WORDS, workspace)
        first = base.config.position_offset
        self.positions = torch.from_numpy(base.vector(f"{POSITIONS}.weight"))[first:]
        self.token_types = torch.from_numpy(base.vector(f"{TOKEN_TYPES}.weight"))
        self.norm = LayerNorm(base, "embeddings.LayerNorm")

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
        x = self.word_embeddings.lookup(input_ids) + self.token_types[token_type_ids]
        return self.norm(x + self.positions[: input_ids.shape[1]])  # type: ignore[no-any-return]


class _Output(nn.Module):
    """norm(x + dense(y)): what ends both halves of a block."""

    def __init__(self, base: EncoderBase, name: str, workspace: Workspace) -> None:
        super().__init__()
        self.dense = frozen_linear(base, f"{name}.dense", workspace)
        self.norm = LayerNorm(base, f"{name}.LayerNorm")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.dense(y))  # type: ignore[no-any-return]


class _SelfAttention(nn.Module):
    """Every token sees every token of its text."""

    def __init__(self, base: EncoderBase, name: str, workspace: Workspace) -> None:
        super().__init__()
        self.heads, self.head_dim = base.config.num_attention_heads, base.config.head_dim
        self.query = frozen_linear(base, f"{name}.query", workspace)
        self.key = frozen_linear(base, f"{name}.key", workspace)
        self.value = frozen_linear(base, f"{name}.value", workspace)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """One layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, base: EncoderBase, index: int, workspace: Workspace) -> None:
        super().__init__()
        name = base.config.block(index)
        self.attention = nn.ModuleDict(
            {
                "self": _SelfAttention(base, f"{name}.attention.self", workspace),
                "output": _Output(base, f"{name}.attention.output", workspace),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": frozen_linear(base, f"{name}.intermediate.dense", workspace)})
        self.output = _Output(base, f"{name}.output", workspace)

    @property
    def parts(self) -> tuple[_SelfAttention, _Output, FrozenLinear, _Output]:
        """Attention, what ends its half, the first linear of the MLP, and what ends the block, by their types."""
        found = self.attention["self"], self.attention["output"], self.intermediate["dense"], self.output
        return cast("tuple[_SelfAttention, _Output, FrozenLinear, _Output]", found)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """X [B, T, hidden] and the mask of `Encoder.mask` -> [B, T, hidden]."""
        x = self.attention["output"](x, self.attention["self"](x, mask))
        return self.output(x, F.gelu(self.intermediate["dense"](x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Embeddings, blocks and pooling over one base."""

    def __init__(self, base: EncoderBase) -> None:
        super().__init__()
        self.config: EncoderConfig = base.config
        self.weights = base.weights
        self.workspace = Workspace()
        self.embeddings = Embeddings(base, self.workspace)
        layers = nn.ModuleList(Block(base, index, self.workspace) for index in range(base.config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    @property
    def blocks(self) -> list[Block]:
        """The layers, by their type."""
        return [module for module in self.encoder.modules() if isinstance(module, Block)]

    def embed(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Ids [B, T] and types [B, T], None for all 0 -> [B, T, hidden]."""
        return self.embeddings(  # type: ignore[no-any-return]
            input_ids, torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        )

    def mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Mask [B, T], 1 for a token and 0 for padding -> [B, 1, 1, T], added to the scores: 0 and -inf."""
        return torch.zeros(attention_mask.shape).masked_fill_(attention_mask == 0, -torch.inf)[:, None, None]

    def hidden(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids, mask and types [B, T] -> what is pooled [B, T, hidden]. Rows may end in padding, and hold a token."""
        x, mask = self.embed(input_ids, token_type_ids), self.mask(attention_mask)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def pool(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, hidden] and mask [B, T] -> embeddings [B, hidden]."""
        pooled = self.pool_plain(hidden, attention_mask)
        return F.normalize(pooled, eps=NORM_EPSILON) if self.config.pooling.normalize else pooled

    def pool_plain(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The same, not normalized: what a head gets."""
        if self.config.pooling.mode == "cls":
            return hidden[:, 0]
        tokens = attention_mask.to(hidden.dtype)
        return (tokens[:, None] @ hidden)[:, 0] / tokens.sum(1, keepdim=True)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Ids, mask and types [B, T] -> embeddings [B, hidden]."""
        return self.pool(self.hidden(input_ids, attention_mask, token_type_ids), attention_mask)


def load_encoder(folder: str | Path) -> Encoder:
    """The encoder over a base/ folder (codes stay mapped) or over a plain model folder (dense).

    Raises:
        ModelError: as `open_any_base`, or it is a decoder.
    """
    base = open_any_base(folder)
    if not isinstance(base, EncoderBase):
        raise ModelError(f"{folder} is a decoder ({base.config.model_type}); an encoder such as bert was expected.")
    return Encoder(base).eval()
