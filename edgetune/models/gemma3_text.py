"""Gemma 3's text models (270M, 1B): most layers look back over a sliding window and rotate with a base of their own.

Against Llama: norms multiply by 1 + weight, and stand after attention and MLP too; queries and keys are normed per
head; scores are scaled by `query_pre_attn_scalar`; the MLP gates with gelu; embeddings are multiplied by
sqrt(hidden_size). (arXiv 2503.19786)

Left out: the models that see (`gemma3`), attention that looks ahead (EmbeddingGemma), and soft-capping of logits, which
Gemma 2 has and no Gemma 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetune.errors import ModelError
from edgetune.models.config import (
    DEFAULT_TARGET_MODULES,
    AttentionKind,
    BlockNorms,
    DecoderConfig,
    activation,
    decoder_config,
    integer,
    rotary,
)

NAME = "gemma3_text"
TARGET_MODULES = DEFAULT_TARGET_MODULES

_DEFAULTS = {
    "head_dim": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "sliding_window_pattern": 6, "tie_word_embeddings": True,
}  # fmt: skip
_NORMS = BlockNorms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    hf = {**_DEFAULTS, **hf}
    for key in ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"):
        if hf.get(key):
            raise ModelError(f"{key} = {hf[key]!r} in config.json is not supported; no text model of Gemma 3 sets it.")
    bias = bool(hf.get("attention_bias", False))
    return decoder_config(
        hf, layers=_layers(hf), qkv_bias=bias, o_bias=bias, qk_norm=True,
        hidden_act=activation(hf, "hidden_activation", "gelu_pytorch_tanh"), norm_offset=1.0, block_norms=_NORMS,
        embedding_scale=integer(hf, "hidden_size") ** 0.5,
        attention_scale=integer(hf, "query_pre_attn_scalar") ** -0.5,
    )  # fmt: skip


def _layers(hf: Mapping[str, Any]) -> list[AttentionKind]:
    """Old files have a rotary base for each kind and a pattern, new ones `rope_parameters` and `layer_types`."""
    ropes = hf.get("rope_parameters") or {}
    full = {**(ropes.get("full_attention") or {}), **(hf.get("rope_scaling") or {})}
    local = rotary({"rope_parameters": ropes.get("sliding_attention")}, hf.get("rope_local_base_freq") or 1e4)
    kinds = {
        "full_attention": rotary({"rope_parameters": full}, hf.get("rope_theta") or 1e6),
        "sliding_attention": replace(local, sliding_window=integer(hf, "sliding_window")),
    }
    count, pattern = integer(hf, "num_hidden_layers"), integer(hf, "sliding_window_pattern")
    types = hf.get("layer_types")
    if types is None:
        types = ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count)]
    if not isinstance(types, list) or len(types) != count or any(kind not in tuple(kinds) for kind in types):
        raise ModelError(
            f"config.json has layer_types = {types!r:.120}; one of {', '.join(kinds)} for each of {count} layers was "
            "expected."
        )
    return [kinds[kind] for kind in types]
