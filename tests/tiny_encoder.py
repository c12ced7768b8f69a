"""A random encoder folder as Hugging Face and sentence-transformers write it: odd shapes, WordPiece over letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PADDING = {"bert": 0, "xlm-roberta": 1}


def encoder_hf(family: str = "bert", **overrides: Any) -> dict[str, Any]:
    """An HF config whose sizes are no multiple of 32; an override of None leaves the key out."""
    config: dict[str, Any] = {
        "model_type": family, "vocab_size": 301, "hidden_size": 66, "intermediate_size": 107, "num_hidden_layers": 2,
        "num_attention_heads": 3, "hidden_act": "gelu", "max_position_embeddings": 75, "type_vocab_size": 2,
        "layer_norm_eps": 1e-5, "pad_token_id": PADDING[family],
    }  # fmt: skip
    return {key: value for key, value in (config | overrides).items() if value is not None}


def write_encoder(
    folder: Path, config: dict[str, Any], *, pooling: str | None = "mean_tokens", normalize: bool = True, seed: int = 0
) -> Path:
    """Weights as transformers stores them, its pooler included; `pooling` None leaves sentence-transformers out."""
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoConfig, AutoModel

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with torch.device("meta"):
        shapes = AutoModel.from_config(AutoConfig.for_model(**config)).state_dict()
    tensors = {}
    for name, value in shapes.items():
        centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        tensors[name] = (centre + 0.2 * rng.standard_normal(tuple(value.shape))).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_wordpiece(folder)
    if pooling is not None:
        write_pooling(folder, config["hidden_size"], pooling, normalize)
    return folder


def write_pooling(folder: Path, size: int, pooling: str, normalize: bool) -> None:
    steps = ["Transformer", "Pooling", "Normalize"][: 2 + normalize]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": size, **modes}))


def write_wordpiece(folder: Path) -> None:
    """Letters, and letters that go on with a word, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(tokens[:5])
    tokenizer.enable_padding(length=64)  # as MiniLM's file has it; it must not be in force
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def rows(config: dict[str, Any], lengths: tuple[int, ...] = (31, 7, 1, 18)) -> tuple[np.ndarray, ...]:
    """Ids, mask and token types [rows, longest], int64; no token has the id of padding."""
    rng, padding = np.random.default_rng(3), config["pad_token_id"]
    shape = len(lengths), max(lengths)
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask, rng.integers(5, config["vocab_size"], shape), padding)
    return ids, mask, rng.integers(0, config["type_vocab_size"], shape) * mask
