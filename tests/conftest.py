"""Tiny models with odd shapes, one per family, and the door to real models kept outside the repository."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.host import THREAD_SETTINGS

for name, value in THREAD_SETTINGS.items():  # before torch starts its threads: beside other programs they would spin
    os.environ.setdefault(name, value)

REAL = Path(os.environ.get("EDGETUNE_REAL", Path(__file__).resolve().parents[2] / "shared" / "real"))


@pytest.fixture
def real() -> Callable[[str], Path]:
    """`real("stories260k")` is that folder, or a skip that says what is missing."""

    def find(name: str) -> Path:
        path = REAL / name
        if not path.exists():
            pytest.skip(f"{path} does not exist; set EDGETUNE_REAL to the folder of real models and data")
        return path

    return find


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """An HF config with shapes that are no multiple of 32 or 64, grouped heads and, for llama, scaled rope.

    An override of None leaves the key out.

    No row length is a multiple of 16 that is no multiple of 64: the AVX-512 path of bitsandbytes 0.50 dequantizes
    those wrongly (grids/test_contract.py), and it is an oracle here.
    """
    config: dict[str, Any] = {
        "model_type": family, "vocab_size": 301, "hidden_size": 72, "intermediate_size": 88, "num_hidden_layers": 2,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    per_family: dict[str, dict[str, Any]] = {
        "llama": {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "qwen2": {"tie_word_embeddings": False},
        "qwen3": {"head_dim": 24},
        "gemma3_text": {
            "rope_theta": 1000.0, "rope_local_base_freq": 100.0, "sliding_window": 11, "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 13,
        },
        "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 0},  # the default one is beyond this vocabulary
    }  # fmt: skip
    config |= per_family.get(family, {}) | overrides
    return {key: value for key, value in config.items() if value is not None}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of such a model, as Hugging Face stores them."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)
    }  # fmt: skip
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        norms = ["input_layernorm", "post_attention_layernorm"]
        if config["model_type"] == "gemma3_text":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {at + f"{norm}.weight": (hidden,) for norm in norms}
        for name, shape in {
            "self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():  # fmt: skip
            shapes[at + name + ".weight"] = shape
            if config["model_type"] == "qwen2" and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                shapes[at + name + ".bias"] = shape[:1]
        if config["model_type"] in ("qwen3", "gemma3_text"):
            shapes |= {at + "self_attn.q_norm.weight": (head,), at + "self_attn.k_norm.weight": (head,)}
    return shapes


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer of 256 bytes and `<unk> <s> </s>`; ids beyond are never produced."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    assert len(vocab) <= vocab_size
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE, "model_max_length": 256,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_model(
    folder: Path, config: dict[str, Any], *, seed: int = 0, dtype: str = "float32", tokenizer: bool = True
) -> Path:
    """A random model folder as Hugging Face would write it; dtype is float32, float16 or bfloat16."""
    import ml_dtypes
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    gemma = config["model_type"] == "gemma3_text"  # its norms multiply by 1 + weight
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        centre, spread = (float(not gemma), 0.2) if len(shape) == 1 and name.endswith("norm.weight") else (0.0, 0.15)
        if gemma and name == "model.embed_tokens.weight":
            spread = 0.05  # it is scaled up, and a tied head would say the last token again and again
        tensors[name] = (centre + spread * rng.standard_normal(shape)).astype(numpy_dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=1), encoding="utf-8")
    if tokenizer:
        write_tokenizer(folder, config["vocab_size"])
    return folder
