"""Logits of every family against transformers, on tiny random models with odd shapes: the largest difference in fp32.

Run: python benchmarks/families.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from machine import about
from shapes import LLAMA_3_SCALING
from transformers import AutoModelForCausalLM

from edgetune.models import FAMILIES
from edgetune.models.decoder import load_decoder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from conftest import tiny_config, write_model

VARIANTS = {
    "as it comes": {},
    "head tied the other way": {"tie_word_embeddings": None},
    "one kv head": {"num_key_value_heads": 1},
    "five layers": {"num_hidden_layers": 5},  # of both kinds, where a family has two
    "linear rope scaling": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    # Short enough an original context that all three bands of frequencies occur.
    "Llama 3 rope scaling": {"rope_scaling": LLAMA_3_SCALING | {"original_max_position_embeddings": 64}},
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


def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in FAMILIES:
            for name, overrides in VARIANTS.items():
                rows[f"{family}, {name}"] = largest_difference(family, dict(overrides), Path(folder) / family)
    worst = max(rows.values())
    print(
        json.dumps({"max_abs_logit": worst, "wanted": 1e-4, "pass": worst <= 1e-4, "rows": rows, **about()}, indent=1)
    )


if __name__ == "__main__":
    main()
