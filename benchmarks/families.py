"""Logits of every decoder family, and hidden states of every encoder family, against transformers: the largest
difference in fp32, on tiny random models with odd shapes; of encoders in a batch with padding and token types.

Run: python benchmarks/families.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import about
from shapes import LLAMA_3_SCALING
from transformers import AutoModel, AutoModelForCausalLM

from edgetune.models import ENCODERS, FAMILIES
from edgetune.models.decoder import load_decoder
from edgetune.models.encoder import load_encoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import tiny_config, write_model
from tiny_encoder import encoder_hf, rows, write_encoder

VARIANTS = {
    "as it comes": {},
    "head tied the other way": {"tie_word_embeddings": None},
    "one kv head": {"num_key_value_heads": 1},
    "five layers": {"num_hidden_layers": 5},  # of both kinds, where a family has two
    "linear rope scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    # Short enough an original context that all three bands of frequencies occur.
    "Llama 3 rope scaling": {"rope_scaling": LLAMA_3_SCALING | {"original_max_position_embeddings": 64}},
}
ENCODER_VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "one head": {"num_attention_heads": 1},
    "five layers, one token type": {"num_hidden_layers": 5, "type_vocab_size": 1},
    "eleven heads": {"num_attention_heads": 11},
}


def largest_difference(family: str, overrides: dict[str, object], folder: Path) -> float:
    config = tiny_config(family)
    if "tie_word_embeddings" in overrides:
        overrides = {"tie_word_embeddings": not config["tie_word_embeddings"]}
    write_model(folder, config | overrides)
    ids = torch.randint(0, config["vocab_size"], (2, 97), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return float((theirs(ids).logits - load_decoder(folder)(ids)).abs().max())


def largest_difference_of_encoder(family: str, overrides: dict[str, Any], folder: Path) -> float:
    config = encoder_hf(family, **overrides)
    write_encoder(folder, config)
    ids, mask, types = (torch.from_numpy(array) for array in rows(config))
    theirs = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        states = theirs(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        return float((states - load_encoder(folder).hidden(ids, mask, types))[mask == 1].abs().max())


def main() -> None:
    logits, hidden = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            for name, overrides in VARIANTS.items():
                logits[f"{family}, {name}"] = largest_difference(family, dict(overrides), Path(folder) / family)
        for family in ENCODERS:
            for name, changes in ENCODER_VARIANTS.items():
                at = Path(folder) / family / name
                hidden[f"{family}, {name}"] = largest_difference_of_encoder(family, changes, at)
    worst = {"max_abs_logit": max(logits.values()), "max_abs_hidden": max(hidden.values())}
    passed = max(worst.values()) <= 1e-4
    print(
        json.dumps({**worst, "wanted": 1e-4, "pass": passed, "rows": logits, "encoders": hidden, **about()}, indent=1)
    )


if __name__ == "__main__":
    main()
