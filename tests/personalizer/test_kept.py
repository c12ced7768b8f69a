"""Blocks that keep what their backward needs: the same gradients to the bit, and the buffers that a plan counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune.adapters.lora import LoraConfig
from edgetune.models import load_config
from edgetune.planner import ort_parts
from edgetune.planner.job import Job
from tests.personalizer.test_gradients import FAMILIES, no_check, ort_rule
from tests.tiny_run import adapter_tensors
from tests.training.conftest import make_base, random_batch


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_changes_no_bit(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, family, "int4", num_hidden_layers=3)
    wanted = LoraConfig(r=3, lora_alpha=5, layers_to_transform=(1, 2))
    config, tensors = adapter_tensors(base, wanted)
    batches = [random_batch(301, 2, 19), random_batch(301, 1, 26, seed=1)]
    found = []
    for kept in (0, 1, 2):
        rule = ort_rule(base, tmp_path / f"graphs-{kept}", config, tensors, kept_layers=kept)
        assert rule.kept_layers == kept
        rule.graphs.loss_sum(batches[0], rule.adapter, no_check)
        assert not any(name.startswith("kept.") for name in rule.graphs.buffers._held), "an evaluation keeps nothing"
        loss, norm = rule.gradient(batches, (0, 0), no_check)
        found.append((loss, norm, {name: value.copy() for name, value in rule.gradients.items()}))
        held = {name for name in rule.graphs.buffers._held if name.startswith("kept.")}
        job = Job(
            model=load_config(base), adapter=config, optimizer="adamw", grid="int4", batch_size=2,
            gradient_accumulation_steps=2, max_seq_length=19, recompute_layers=2 - kept, tile_weights=1,
            activation_offloading=False, dequantized_layers=0, step_rule="backprop", threads=1,
            supervised_per_window=19,
        )  # fmt: skip
        assert sum(rule.graphs.buffers._held[name].nbytes for name in held) == ort_parts.kept_bytes(job)
        assert {name.rpartition(".")[2] for name in held} == {str(index) for index in range(3 - kept, 3)}
    for loss, norm, gradients in found[1:]:
        assert (loss, norm) == found[0][:2]
        for name, value in gradients.items():
            np.testing.assert_array_equal(value, found[0][2][name], err_msg=name)
