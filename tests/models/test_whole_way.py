"""Every family goes the whole way: quantize, plan, train, export, run. The tokens that come out are those of PEFT.

PEFT gets the base's dequantized weights and the run's adapter and computes without a cache, so an error of any verb
shows. Prompt and answer are longer than a sliding window.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import edgetune as et
from edgetune.adapters.base import load_adapter
from edgetune.models import FAMILIES, load_config
from edgetune.tokenizer import load_tokenizer
from tests.training.conftest import make_base, write_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuned_bundle_says_what_peft_says(tmp_path: Path, family: str) -> None:
    from peft_twin import peft_model

    base = make_base(tmp_path, family, num_hidden_layers=3)
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    config = et.TrainConfig(max_steps=3, batch_size=2, max_seq_length=64, learning_rate=1e-2)
    plan = et.plan(base, "host", data=rows, adapter=et.LoraConfig(r=3), config=config)
    run = et.train(plan, base, data=rows, out=tmp_path / "run")
    bundle = et.export(run, out=tmp_path / "bundle")
    made = et.generate(bundle, "abcd dcba", max_new_tokens=40)

    # In training mode, where bitsandbytes dequantizes and nothing is dropped: in evaluation it may repack for bfloat16.
    twin = peft_model(base, *load_adapter(run.folder, load_config(base)))
    ids = load_tokenizer(base).encode("abcd dcba")
    while len(ids) < made.prompt_tokens + len(made.token_ids):
        with torch.no_grad():
            ids.append(int(twin(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert len(made.token_ids) >= 20
    assert tuple(ids[made.prompt_tokens :]) == made.token_ids
