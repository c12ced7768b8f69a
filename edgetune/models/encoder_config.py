"""The shape of an encoder with pooled output, read from a Hugging Face `config.json`. No torch: a device reads it too.

Its names are those of Hugging Face's `BertModel`: `encoder.layer.0.attention.self.query`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgetune.errors import ModelError
from edgetune.models.config import integer
from edgetune.models.pooling import Pooling

LINEARS = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "intermediate.dense", "output.dense",
)  # fmt: skip
ENCODER_TARGET_MODULES = tuple(dict.fromkeys(path.rpartition(".")[2] for path in LINEARS))
WORDS, POSITIONS, TOKEN_TYPES = (
    f"embeddings.{table}" for table in ("word_embeddings", "position_embeddings", "token_type_embeddings")
)
NORM_EPSILON = 1e-12  # an embedding whose norm is less is divided by this, as torch's `normalize` does
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")  # of a block, each after its residual sum
_HEADS = ("pooler.", "cls.", "lm_head.", "classifier.")  # what stands behind the hidden states: not computed here


@dataclass(frozen=True)
class EncoderConfig:
    """A bidirectional transformer that norms after each residual sum, with learned positions and gelu. Keys as in HF.

    `max_position_embeddings` is how many tokens a text may have. Position i is row i + `position_offset` of the
    `position_rows` in the table of positions.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float
    type_vocab_size: int
    position_rows: int
    position_offset: int
    max_position_embeddings: int
    pooling: Pooling

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of one block's linears, by their path inside the block. All have a bias."""
        hidden, inner = self.hidden_size, self.intermediate_size
        square = (hidden, hidden)
        return dict(zip(LINEARS, (square, square, square, square, (inner, hidden), (hidden, inner)), strict=True))

    @property
    def largest_linear(self) -> int:
        """Weights of a block's largest matrix."""
        return max(n * k for n, k in self.linear_shapes.values())

    def block(self, index: int) -> str:
        """The name of a block."""
        return f"encoder.layer.{index}"

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every block linear, by its full name."""
        return {
            f"{self.block(i)}.{path}": shape
            for i in range(self.num_hidden_layers)
            for path, shape in self.linear_shapes.items()
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every weight that a grid stores: the embedding of words and the block linears, in file order."""
        return {WORDS: (self.vocab_size, self.hidden_size)} | self.linears()

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Every other tensor, by its full name: norms, biases, and the tables of positions and token types."""
        hidden = (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {
            f"{POSITIONS}.weight": (self.position_rows, self.hidden_size),
            f"{TOKEN_TYPES}.weight": (self.type_vocab_size, self.hidden_size),
        }
        norms = ["embeddings.LayerNorm"]
        norms += [f"{self.block(i)}.{norm}" for i in range(self.num_hidden_layers) for norm in NORMS]
        shapes |= {f"{norm}.{kind}": hidden for norm in norms for kind in ("weight", "bias")}
        return shapes | {f"{name}.bias": shape[:1] for name, shape in self.linears().items()}

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor of a file is one that an embedding does not need."""
        return name.startswith(_HEADS) or name == "embeddings.position_ids"

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in (*self.matrices().values(), *self.vectors().values()))

    def pooled(self, pooling: Pooling) -> EncoderConfig:
        """The same with this pooling, and texts as long as that allows."""
        length = min(self.max_position_embeddings, pooling.max_seq_length or self.max_position_embeddings)
        return replace(self, pooling=pooling, max_position_embeddings=length)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def encoder_config(hf: Mapping[str, Any], *, position_offset: int = 0) -> EncoderConfig:
    """What the families share: the HF keys of a BERT-like encoder, checked.

    Raises:
        ModelError: a key has a value that is not supported; the message names both.
    """
    expected = {
        "position_embedding_type": "absolute", "hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False
    }  # fmt: skip
    for key, value in expected.items():
        if hf.get(key, value) not in (value, None):
            raise ModelError(f"{key} = {hf[key]!r} in config.json is not supported; supported is {value!r}.")
    hidden, heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
    if hidden % heads:
        raise ModelError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} in config.json.")
    rows = integer(hf, "max_position_embeddings", 512)
    if rows <= position_offset:
        raise ModelError(
            f"max_position_embeddings {rows} in config.json leaves no position after the {position_offset} that "
            f"{hf['model_type']} skips."
        )
    return EncoderConfig(
        model_type=str(hf["model_type"]),
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(hf, "intermediate_size"),
        num_hidden_layers=integer(hf, "num_hidden_layers"),
        num_attention_heads=heads,
        layer_norm_eps=float(hf.get("layer_norm_eps", 1e-12)),
        type_vocab_size=integer(hf, "type_vocab_size", 2),
        position_rows=rows,
        position_offset=position_offset,
        max_position_embeddings=rows - position_offset,
        pooling=Pooling(),
    )
