"""Whole training, step by step beside PEFT + bitsandbytes: the small version of benchmarks/lora_vs_peft.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgetune.adapters.lora import LoraConfig
from edgetune.quantizer import quantize
from tests.training.conftest import make_base, random_batch


def check(base: Path, vocab_size: int, config: LoraConfig) -> None:
    from peft_twin import compare

    def batches_of(step: int) -> list[dict[str, np.ndarray]]:
        return [random_batch(vocab_size, 2, 41, seed=2 * step + i) for i in range(2)]

    apart = compare(base, batches_of, steps=20, config=config)
    assert max(abs(row["loss"] - row["peft_loss"]) for row in apart) < 1e-4
    assert len({row["loss"] for row in apart}) == 20
    together = compare(base, batches_of, steps=20, config=config, same_adapter=True)
    assert max(row["gradient_difference"] for row in together) < 1e-4


@pytest.mark.parametrize(
    ("family", "grid", "config"),
    [
        ("llama", "nf4", LoraConfig(r=5, lora_alpha=9)),
        ("qwen3", "int4", LoraConfig(r=4, use_rslora=True, target_modules=("q_proj", "v_proj", "down_proj"))),
    ],
)
def test_twenty_steps(tmp_path: Path, family: str, grid: str, config: LoraConfig) -> None:
    check(make_base(tmp_path, family, grid), 301, config)


def test_twenty_steps_of_a_real_model(tmp_path: Path, real: Callable[[str], Path]) -> None:
    check(quantize(real("stories260k"), "nf4", tmp_path / "base"), 512, LoraConfig(r=8))
