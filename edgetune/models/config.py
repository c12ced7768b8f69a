"""The shape of a decoder, read from a Hugging Face `config.json`. No torch: the planner and the device read it too."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetune.errors import ModelError

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
DEFAULT_TARGET_MODULES = tuple(path.rpartition(".")[2] for path in LINEARS)


@dataclass(frozen=True)
class RopeScaling:
    """`rope_type` is "linear" (only `factor` counts) or "llama3"."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class AttentionKind:
    """What attention may differ in from layer to layer."""

    rope_theta: float | None  # None: positions are not embedded (NoPE, arXiv 2305.19466)
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # positions that one sees, its own included; None: all up to its own

    def window_within(self, length: int) -> int | None:
        """The sliding window where it is shorter than a sequence of this length."""
        return self.sliding_window if self.sliding_window is not None and self.sliding_window < length else None


@dataclass(frozen=True)
class BlockNorms:
    """Names of a block's RMSNorms. Those after, where there are any, come before the residual sum."""

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        every = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in every if name is not None)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with RMSNorm, grouped heads and a gated MLP. Keys as in HF.

    Layer i has attention of kind `attention_kinds[layer_kinds[i]]`. Norms multiply by weight + `norm_offset`, scores
    by `attention_scale`, and what the embedding gives by `embedding_scale`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    norm_offset: float
    block_norms: BlockNorms
    embedding_scale: float
    attention_scale: float
    attention_kinds: tuple[AttentionKind, ...]
    layer_kinds: tuple[int, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of one block's linears, by their path inside the block."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = (
            (q, hidden),
            (kv, hidden),
            (kv, hidden),
            (hidden, q),
            (inner, hidden),
            (inner, hidden),
            (hidden, inner),
        )
        return dict(zip(LINEARS, shapes, strict=True))

    @property
    def kept_widths(self) -> dict[str, int]:
        """What a block of a training graph may keep from forward to backward, as rows: name -> features."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        widths = {"q": q, "k": kv, "v": kv, "o": q, "x2": self.hidden_size}
        widths |= {"gate": self.intermediate_size, "up": self.intermediate_size}
        inside = {"attention_out": self.block_norms.after_attention, "mlp_out": self.block_norms.after_mlp}
        return widths | {name: self.hidden_size for name, norm in inside.items() if norm}

    @property
    def largest_linear(self) -> int:
        """Weights of a block's largest matrix."""
        return max(n * k for n, k in self.linear_shapes.values())

    def has_bias(self, linear: str) -> bool:
        """Whether the linear at this path inside a block adds a bias."""
        if linear.startswith("mlp."):
            return self.mlp_bias
        return self.o_bias if linear.endswith("o_proj") else self.qkv_bias

    def block(self, index: int) -> str:
        """The name of a block."""
        return f"model.layers.{index}"

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out_features, in_features) of every block linear, by its full name `model.layers.0.self_attn.q_proj`."""
        return {
            f"{self.block(i)}.{path}": shape
            for i in range(self.num_hidden_layers)
            for path, shape in self.linear_shapes.items()
        }

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every weight that a grid stores: the embedding, the block linears and an untied head, in file order."""
        table = (self.vocab_size, self.hidden_size)
        head = {} if self.tie_word_embeddings else {"lm_head": table}
        return {"model.embed_tokens": table} | self.linears() | head

    def vectors(self) -> dict[str, tuple[int]]:
        """Every other tensor, by its full name: norms and biases."""
        shapes: dict[str, tuple[int]] = {}
        for i in range(self.num_hidden_layers):
            at = f"{self.block(i)}."
            shapes |= {at + f"{norm}.weight": (self.hidden_size,) for norm in self.block_norms.names}
            if self.qk_norm:
                shapes |= {at + f"self_attn.{norm}.weight": (self.head_dim,) for norm in ("q_norm", "k_norm")}
            shapes |= {
                at + f"{path}.bias": shape[:1] for path, shape in self.linear_shapes.items() if self.has_bias(path)
            }
        return shapes | {"model.norm.weight": (self.hidden_size,)}

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor of a file is one that says nothing new."""
        return name.endswith("rotary_emb.inv_freq") or (self.tie_word_embeddings and name.startswith("lm_head."))

    @property
    def num_parameters(self) -> int:
        return sum(n * k for n, k in self.matrices().values()) + sum(n for (n,) in self.vectors().values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decoder_config(
    hf: Mapping[str, Any], *, layers: Sequence[AttentionKind] | None = None, **family: Any
) -> DecoderConfig:
    """What the families share: the HF keys of a Llama-like decoder, checked. `family` sets what differs.

    `layers` are the kinds of attention from the first layer to the last; None rotates alike in all of them.
    """
    hidden = integer(hf, "hidden_size")
    heads = integer(hf, "num_attention_heads")
    kv_heads = integer(hf, "num_key_value_heads", heads)
    head_dim = integer(hf, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads} in config.json."
        )
    if head_dim % 2:
        raise ModelError(f"head_dim {head_dim} in config.json is odd; rotary embedding needs an even one.")
    if hf.get("use_sliding_window"):
        raise ModelError("use_sliding_window true in config.json is not supported; set it to false for full attention.")
    if layers is None:
        layers = [rotary(hf)] * integer(hf, "num_hidden_layers")
    kinds = tuple(dict.fromkeys(layers))
    eos = hf.get("eos_token_id")
    return DecoderConfig(
        **{
            "model_type": str(hf["model_type"]),
            "vocab_size": integer(hf, "vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": integer(hf, "intermediate_size"),
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": activation(hf, "hidden_act", "silu"),
            "rms_norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
            "norm_offset": 0.0,
            "block_norms": BlockNorms(),
            "embedding_scale": 1.0,
            "attention_scale": head_dim**-0.5,
            "attention_kinds": kinds,
            "layer_kinds": tuple(map(kinds.index, layers)),
            "max_position_embeddings": integer(hf, "max_position_embeddings", 2048),
            "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
            "qkv_bias": False,
            "o_bias": False,
            "mlp_bias": False,
            "qk_norm": False,
            "bos_token_id": hf.get("bos_token_id"),
            "eos_token_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            **family,
        }
    )


def integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The positive integer at this key of a config.json."""
    value = hf.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json has {key} = {value!r}; a positive integer was expected.")
    return value


def activation(hf: Mapping[str, Any], key: str, default: str) -> str:
    """The name of the MLP's activation at this key."""
    name = hf.get(key) or default
    if name not in ACTIVATIONS:
        raise ModelError(f"{key} {name!r} in config.json is not supported; supported are {', '.join(ACTIVATIONS)}.")
    return str(name)


def rotary(hf: Mapping[str, Any], default_theta: float = 10000.0) -> AttentionKind:
    """Rotary attention as the keys of HF describe it, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = hf.get("rope_theta") or rope.get("rope_theta") or default_theta
    return AttentionKind(float(theta), _rope_scaling(rope))


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ModelError(
            f"rope scaling {kind!r} in config.json is not supported; supported are default, linear and llama3."
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return RopeScaling(kind, **{key: rope[key] for key in keys if key in rope})


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The raw `config.json` of a model or base folder.

    Raises:
        ModelError: the file is missing or is no JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}. "
            "A model folder needs config.json, *.safetensors and tokenizer.json."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no JSON: {error}. Fetch it again.") from error
    if not isinstance(hf, dict):
        raise ModelError(f"{path} holds a {type(hf).__name__}; an object was expected.")
    return hf
