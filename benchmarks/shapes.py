"""Models of well-known shapes with random weights, written tensor by tensor, so that no benchmark downloads one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.models import FAMILIES
from edgetune.weights import TensorInfo, write_safetensors

LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window": 512,
        "sliding_window_pattern": 6, "query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "rope_scaling": LLAMA_3_SCALING,
    },
}  # fmt: skip


def write_shape(name: str, folder: Path, *, seed: int = 0, num_hidden_layers: int | None = None) -> Path:
    """A bfloat16 model folder of a named shape, and a byte tokenizer; fewer layers for a quick check."""
    hf = SHAPES[name] | {"hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
    if num_hidden_layers is not None:
        hf["num_hidden_layers"] = num_hidden_layers
    config = FAMILIES[hf["model_type"]].config_from_hf(hf)
    shapes: dict[str, tuple[int, ...]] = {f"{m}.weight": shape for m, shape in config.matrices().items()}
    shapes |= config.vectors()
    rng = np.random.default_rng(seed)
    norm = 1.0 - config.norm_offset  # what norms multiply by is 1, about

    def produce(tensor: str) -> np.ndarray:
        shape = shapes[tensor]
        centre, spread = (0.0, 1 / math.sqrt(shape[-1])) if len(shape) == 2 else (norm * ("norm" in tensor), 0.02)
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(spread) + np.float32(centre)
        return (values.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16 by truncation

    folder.mkdir(parents=True, exist_ok=True)
    infos = {tensor: TensorInfo("BF16", shape) for tensor, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", infos, produce)
    (folder / "config.json").write_text(json.dumps(hf, indent=1), encoding="utf-8")
    write_byte_tokenizer(folder)
    return folder


def write_byte_tokenizer(folder: Path) -> None:
    """One token per byte, after <unk>, <s> and </s>: real text becomes real ids whatever the vocabulary's size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
