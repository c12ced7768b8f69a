"""What adapter methods put at the places of a decoder, and the model's own vectors: passes by hand against autograd
over the whole model.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgetune.adapters.attach import attach
from edgetune.adapters.bitfit import BitfitConfig
from edgetune.adapters.bottleneck import BottleneckConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.ln_tuning import LnTuningConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.prefix import PrefixConfig
from edgetune.adapters.prompt import PromptConfig
from edgetune.data import Row, pack, stack
from edgetune.linear import Workspace
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.planner import costs
from edgetune.training.backprop import Path as Walk
from edgetune.training.backprop import loss_and_gradients
from edgetune.training.forward import Batch, evaluate, keys_values, start_virtual_tokens
from edgetune.training.inputs import read_inputs
from edgetune.training.loop import train
from edgetune.training.reference import Reference
from tests.training.conftest import at_step, interrupt, make_base, make_plan, write_rows

CASES: dict[str, AdapterConfig] = {
    "houlsby": BottleneckConfig(r=3, placement="houlsby", non_linearity="silu"),
    "pfeiffer": BottleneckConfig(r=5, placement="pfeiffer", non_linearity="relu"),
    "parallel": BottleneckConfig(r=3, placement="parallel", non_linearity="tanh"),
    "some blocks": BottleneckConfig(r=3, placement="houlsby", layers_to_transform=(1, 3)),
    "prompt": PromptConfig(num_virtual_tokens=4),
    "prefix": PrefixConfig(num_virtual_tokens=4),
    "norms": LnTuningConfig(),
    "norms of queries and keys": LnTuningConfig(target_modules=("q_norm", "k_norm", "norm"), layers_to_transform=(2,)),
    "norms of some blocks": LnTuningConfig(layers_to_transform=(1, 3)),
    "biases": BitfitConfig(),
    "biases of some blocks": BitfitConfig(target_modules=("k_proj", "v_proj"), layers_to_transform=(1, 2)),
}
# Those that not every family has, and the families that have them.
FAMILIES = {
    "norms of queries and keys": ("gemma3_text", "qwen3"), "biases": ("qwen2",), "biases of some blocks": ("qwen2",)
}  # fmt: skip
LENGTHS = (9, 12, 7, 5, 20)


def adapted(folder: Path, family: str, config: AdapterConfig) -> tuple[Decoder, dict[str, nn.Parameter], AdapterConfig]:
    """A decoder of four blocks with an adapter that is not zero."""
    decoder = load_decoder(make_base(folder, family, num_hidden_layers=4))
    resolved = config.resolved(decoder.config)
    parameters = attach(decoder, resolved, seed=5)
    generator = torch.Generator().manual_seed(6)
    for value in parameters.values():
        value.data.add_(0.3 * torch.randn(value.shape, generator=generator))
    return decoder, parameters, resolved


def rows() -> list[Row]:
    rng = np.random.default_rng(3)
    return [Row(ids := rng.integers(0, 301, n).astype(np.int32), ids, line) for line, n in enumerate(LENGTHS)]


def autograd_loss(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """The mean loss by the modules' own forward passes."""
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    logits = decoder(tensors["input_ids"], tensors["position_ids"], tensors["segment_ids"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten(), ignore_index=-100)


def everywhere(*families: str) -> list[tuple[str, str]]:
    """Each case with each of these families, or with those that have it."""
    return [(case, family) for case in CASES for family in FAMILIES.get(case, families)]


@pytest.mark.parametrize(("case", "family"), everywhere("llama", "gemma3_text", "qwen3"))
def test_gradients_equal_autograd(tmp_path: Path, case: str, family: str) -> None:
    decoder, parameters, config = adapted(tmp_path, family, CASES[case])
    batch = stack(pack(rows(), 40, virtual_tokens=config.virtual_tokens))
    expected = autograd_loss(decoder, batch)
    reference = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    for recompute_layers in range(5 - config.first_block):
        walk = Walk(config.first_block, recompute_layers)
        loss = loss_and_gradients(decoder, [batch], walk, dropout_key=(0, 0), check=lambda: None)
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        for name, value in parameters.items():
            assert value.grad is not None and value.grad.norm() > 1e-5, name
            assert (value.grad - reference[name]).norm() / reference[name].norm() < 2e-5, name
            value.grad = None
    evaluated = evaluate(decoder, [batch], check=lambda: None, first_block=config.first_block)
    assert evaluated == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(("case", "family"), everywhere("llama", "gemma3_text"))
@pytest.mark.parametrize("recompute_layers", [0, 2])
def test_the_planner_counts_the_buffers(tmp_path: Path, case: str, family: str, recompute_layers: int) -> None:
    decoder, parameters, config = adapted(tmp_path, family, CASES[case])
    batch = stack(pack(rows(), 40, virtual_tokens=config.virtual_tokens))
    walk = Walk(config.first_block, recompute_layers)
    loss_and_gradients(decoder, [batch], walk, dropout_key=(0, 0), check=lambda: None)
    count, length = batch["input_ids"].shape
    job = costs.Job(
        model=decoder.config, adapter=config, optimizer="adamw", grid="nf4", batch_size=count,
        gradient_accumulation_steps=1, max_seq_length=length, recompute_layers=recompute_layers, fast_products=False,
        tile_weights=decoder.workspace.tile_weights, activation_offloading=False, dequantized_layers=0,
        step_rule="backprop", threads=1, supervised_per_window=-(-(sum(LENGTHS) - len(LENGTHS)) // count),
    )  # fmt: skip
    supervised = {"d_h", "inner"}  # which the most of any window decides
    sizes, counted = decoder.workspace.sizes, costs.buffers(job)
    assert sizes.keys() == counted.keys()
    assert {k: v for k, v in sizes.items() if k not in supervised} == {
        k: v for k, v in counted.items() if k not in supervised
    }
    assert sum(job.tensor_sizes) == sum(value.numel() for value in parameters.values())


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_rows_of_a_window_have_virtual_tokens_of_their_own(tmp_path: Path, case: str) -> None:
    decoder, _, config = adapted(tmp_path, "llama", CASES[case])
    windows = pack(rows(), 40, virtual_tokens=config.virtual_tokens)
    assert len(windows) < len(LENGTHS), "some share a window"
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows():  # alone, and without a word of virtual tokens
            ids = torch.from_numpy(row.input_ids.astype(np.int64))
            total += nn.functional.cross_entropy(decoder(ids[None])[0, :-1], ids[1:], reduction="sum").item()
            count += len(ids) - 1
    assert evaluate(decoder, [stack(windows)], check=lambda: None) == pytest.approx(total / count, rel=1e-5)


def test_windows_with_virtual_tokens() -> None:
    row = Row(np.array([7, 8, 9], np.int32), np.array([-100, 8, 9], np.int32), 1)
    (window,) = pack([row, row], 12, virtual_tokens=2)
    assert (window.length, window.num_tokens, window.num_supervised) == (12, 6, 4)
    assert window.input_ids.tolist() == [0, 0, 7, 8, 9, 0, 0, 7, 8, 9, 0, 0]
    assert window.labels.tolist() == [-100, -100, 8, 9, -100, -100, -100, 8, 9, -100, -100, -100]
    assert window.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 0]
    assert window.segment_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1]


def test_a_prompt_is_the_prefix_that_the_model_makes_of_it(tmp_path: Path) -> None:
    decoder, parameters, _ = adapted(tmp_path, "gemma3_text", PromptConfig(num_virtual_tokens=6))
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 301, (2, 25)))
    with torch.no_grad():
        expected = decoder(ids)
        folded = torch.cat([part.clone() for kv in keys_values(decoder, *parameters.values()) for part in kv], 1)
        other = load_decoder(tmp_path / "base")
        (weight,) = attach(other, PrefixConfig(num_virtual_tokens=6).resolved(other.config)).values()
        weight.copy_(folded)
        assert (other(ids) - expected).abs().max() < 1e-5


def test_the_reference_of_an_objective_is_the_base_without_them(tmp_path: Path) -> None:
    base, data = make_base(tmp_path), tmp_path / "rows.jsonl"
    rows = [{"prompt": "c" * i, "chosen": "a" * (i % 3 + 1), "rejected": "b" * (i % 4 + 1)} for i in range(1, 9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for config in (LoraConfig(r=2), CASES["prompt"], CASES["prefix"]):
        plan = make_plan(base, adapter=config, method=config.method, objective="dpo", beta=0.2, label_smoothing=0.0)
        inputs = read_inputs(plan, base, "0", data, None, skip_bad=False)
        reference = Reference(tmp_path / config.method, inputs)
        windows = reference.add(Workspace(), nullcontext(), lambda: None, lambda _: None).windows
        found.append({row.input_ids.tobytes(): row.reference for window in windows for row in window.rows})
        assert sum(window.virtual_tokens for window in windows) == len(windows) * plan.adapter.virtual_tokens
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for row, logp in found[0].items():
        assert [each[row] for each in found[1:]] == [pytest.approx(logp, rel=1e-5)] * 2


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_they_start_as_tokens_of_the_vocabulary(tmp_path: Path, case: str) -> None:
    decoder, _, config = adapted(tmp_path, "llama", CASES[case])
    start_virtual_tokens(decoder, seed=11)
    chosen = torch.from_numpy(np.random.default_rng([11]).integers(0, 301, config.virtual_tokens))
    plain = load_decoder(tmp_path / "base")
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, 301, (1, 25)))
    with torch.no_grad():
        expected = plain(torch.cat([chosen[None], ids], 1))[:, config.virtual_tokens :]
        assert (decoder(ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["pfeiffer", "prompt", "prefix", "norms", "biases"])
def test_stopped_and_resumed_to_the_bit(tmp_path: Path, case: str) -> None:
    base, data = make_base(tmp_path, *FAMILIES.get(case, ())), write_rows(tmp_path / "rows.jsonl", 20)
    config = CASES[case]
    plan = make_plan(base, adapter=config, method=config.method, max_steps=4)
    whole = train(plan, base, data=data, out=tmp_path / "whole").summary
    train(plan, base, data=data, out=tmp_path / "twice", on_progress=at_step(2, interrupt))
    resumed = train(plan, base, data=data, out=tmp_path / "twice", resume=True).summary
    assert (whole["stopped"], resumed["stopped"]) == ("done", "done")
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]
