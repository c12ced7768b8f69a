"""What adapter methods put at the places of a decoder, and the model's own tensors: passes by hand against autograd
over the whole model.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgetune import planner
from edgetune.adapters import loreft
from edgetune.adapters.attach import attach
from edgetune.adapters.base import load_adapter
from edgetune.adapters.bitfit import BitfitConfig
from edgetune.adapters.bottleneck import BottleneckConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.full import FullConfig
from edgetune.adapters.ln_tuning import LnTuningConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.loreft import LoreftConfig
from edgetune.adapters.lst import LstConfig
from edgetune.adapters.p_tuning import PTuningConfig
from edgetune.adapters.prefix import PrefixConfig
from edgetune.adapters.prompt import PromptConfig
from edgetune.checkpoint import read_checkpoint
from edgetune.data import IGNORED, Row, Window, pack, stack
from edgetune.errors import ConfigError, DataError
from edgetune.linear import Workspace
from edgetune.models import load_config
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.planner import costs
from edgetune.planner.job import Job
from edgetune.training.backprop import Path as Walk
from edgetune.training.backprop import loss_and_gradients
from edgetune.training.changed import prompt_lengths
from edgetune.training.forward import Batch, evaluate, keys_values, start_virtual_tokens
from edgetune.training.inputs import read_inputs
from edgetune.training.loop import train
from edgetune.training.reference import Reference
from edgetune.training.run import METRICS, Metrics
from tests.training.conftest import at_step, interrupt, make_base, make_plan, write_prompts, write_rows

CASES: dict[str, AdapterConfig] = {
    "houlsby": BottleneckConfig(r=3, placement="houlsby", non_linearity="silu"),
    "pfeiffer": BottleneckConfig(r=5, placement="pfeiffer", non_linearity="relu"),
    "parallel": BottleneckConfig(r=3, placement="parallel", non_linearity="tanh"),
    "some blocks": BottleneckConfig(r=3, placement="houlsby", layers_to_transform=(1, 3)),
    "prompt": PromptConfig(num_virtual_tokens=4),
    "prefix": PrefixConfig(num_virtual_tokens=4),
    "p-tuning": PTuningConfig(num_virtual_tokens=4, encoder_hidden_size=6),
    "norms": LnTuningConfig(),
    "norms of queries and keys": LnTuningConfig(target_modules=("q_norm", "k_norm", "norm"), layers_to_transform=(2,)),
    "norms of some blocks": LnTuningConfig(layers_to_transform=(1, 3)),
    "blocks": FullConfig(layers_to_transform=(1, 3)),
    "blocks with biases": FullConfig(),
    "biases": BitfitConfig(),
    "biases of some blocks": BitfitConfig(target_modules=("k_proj", "v_proj"), layers_to_transform=(1, 2)),
    "loreft": LoreftConfig(r=3, positions="f3+l2"),
    "lst": LstConfig(reduction=9),
    "lst of some": LstConfig(reduction=4, layers_to_transform=(1, 2)),
    "loreft of some": LoreftConfig(r=2, positions="l1", layers_to_transform=(1, 3)),
}
# Those that not every family has, and the families that have them.
FAMILIES = {
    "norms of queries and keys": ("gemma3_text", "qwen3"), "blocks with biases": ("qwen2",), "biases": ("qwen2",),
    "biases of some blocks": ("qwen2",),
}  # fmt: skip
LENGTHS = (9, 12, 7, 5, 20)
PROMPTS = (4, 8, 1, 3, 11)  # tokens of these rows before the first that is learned


def adapted(folder: Path, family: str, config: AdapterConfig) -> tuple[Decoder, dict[str, nn.Parameter], AdapterConfig]:
    """A decoder of four blocks with an adapter that is not zero."""
    decoder = load_decoder(make_base(folder, family, num_hidden_layers=4))
    resolved = config.resolved(decoder.config)
    parameters = attach(decoder, resolved, seed=5)
    generator = torch.Generator().manual_seed(6)
    for value in parameters.values():
        scale = 0.03 if resolved.thaws else 0.3  # of large matrices autograd's own rounding is too large
        value.data.add_(scale * torch.randn(value.shape, generator=generator))
    return decoder, parameters, resolved


def rows() -> list[Row]:
    rng = np.random.default_rng(3)
    return [Row(ids := rng.integers(0, 301, n).astype(np.int32), ids, line) for line, n in enumerate(LENGTHS)]


def prompted() -> list[Row]:
    """The same with prompts."""
    made = []
    for row, prompt in zip(rows(), PROMPTS, strict=True):
        labels = row.labels.copy()
        labels[:prompt] = IGNORED
        made.append(replace(row, labels=labels))
    return made


def autograd_loss(decoder: Decoder, batch: Batch) -> torch.Tensor:
    """The mean loss by the modules' own forward passes."""
    tensors = {key: torch.from_numpy(value) for key, value in batch.items()}
    prompts = torch.from_numpy(prompt_lengths(batch))
    logits = decoder(tensors["input_ids"], tensors["position_ids"], tensors["segment_ids"], prompts)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tensors["labels"].flatten(), ignore_index=-100)


def everywhere(*families: str) -> list[tuple[str, str]]:
    """Each case with each of these families, or with those that have it."""
    return [(case, family) for case in CASES for family in FAMILIES.get(case, families)]


@pytest.mark.parametrize(("case", "family"), everywhere("llama", "gemma3_text", "qwen3"))
def test_gradients_equal_autograd(tmp_path: Path, case: str, family: str) -> None:
    decoder, parameters, config = adapted(tmp_path, family, CASES[case])
    chosen = prompted() if config.prompt_positions else rows()
    batch = stack(pack(chosen, 40, virtual_tokens=config.virtual_tokens))
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
    windows = pack(prompted() if config.prompt_positions else rows(), 40, virtual_tokens=config.virtual_tokens)
    batch = stack(windows)
    walk = Walk(config.first_block, recompute_layers)
    loss_and_gradients(decoder, [batch], walk, dropout_key=(0, 0), check=lambda: None)
    count, length = batch["input_ids"].shape
    job = Job(
        model=decoder.config, adapter=config, optimizer="adamw", grid="nf4", batch_size=count,
        gradient_accumulation_steps=1, max_seq_length=length, recompute_layers=recompute_layers, fast_products=False,
        tile_weights=decoder.workspace.tile_weights, activation_offloading=False, dequantized_layers=0,
        step_rule="backprop", threads=1, supervised_per_window=-(-(sum(LENGTHS) - len(LENGTHS)) // count),
        rows_per_window=max(len(window.rows) for window in windows),
    )  # fmt: skip
    # Which the most of any window decides, and that of rows with prompts that are long enough.
    supervised = {"d_h", "inner", *(f"before.{index}" for index in range(4))}
    sizes, counted = decoder.workspace.sizes, costs.buffers(job)
    assert sizes.keys() == counted.keys()
    assert {k: v for k, v in sizes.items() if k not in supervised} == {
        k: v for k, v in counted.items() if k not in supervised
    }
    assert sum(job.tensor_sizes) == sum(value.numel() for value in parameters.values())
    if (counts := config.prompt_positions) is not None:
        changed = sum(min(prompt, sum(counts)) for prompt in PROMPTS)
        kept = {name: size for name, size in sizes.items() if name.startswith("before")}
        assert set(kept.values()) == {4 * changed * decoder.config.hidden_size}
        assert all(size <= counted[name] for name, size in kept.items())


def test_the_planner_counts_what_is_kept_of_long_prompts(tmp_path: Path) -> None:
    decoder, _, config = adapted(tmp_path, "llama", CASES["loreft"])
    row = prompted()[-1]
    batch = stack([Window((row, row), 40)] * 3)
    loss_and_gradients(decoder, [batch], Walk(0, 2), dropout_key=(0, 0), check=lambda: None)
    job = Job(
        model=decoder.config, adapter=config, optimizer="adamw", grid="nf4", batch_size=3, threads=1,
        gradient_accumulation_steps=1, max_seq_length=40, recompute_layers=2, step_rule="backprop",
        tile_weights=decoder.workspace.tile_weights, activation_offloading=False, dequantized_layers=0,
        supervised_per_window=18, rows_per_window=2,
    )  # fmt: skip
    assert decoder.workspace.sizes == costs.buffers(job)
    some = replace(job, rows_per_window=None)
    assert job.changed == 3 * 2 * 5 and some.changed == job.tokens


def test_a_prompt_ends_where_the_first_token_is_learned() -> None:
    batch = stack(pack(prompted()[:3], 40))
    lengths, segments = prompt_lengths(batch), batch["segment_ids"]
    order = [9, 12, 7]  # of the rows' lengths
    for window in range(len(segments)):
        for segment in set(segments[window][segments[window] >= 0].tolist()):
            at = segments[window] == segment
            assert set(lengths[window][at].tolist()) == {PROMPTS[order.index(int(at.sum()))]}
    (window,) = pack([replace(row, labels=np.full_like(row.labels, IGNORED)) for row in rows()[:2]], 40)
    assert prompt_lengths(stack([window]))[0].tolist()[:21] == [12] * 12 + [9] * 9, "all, where nothing is learned"
    said = [replace(row, prompt_length=2 + row.line) for row in prompted()[:2]]
    (window,) = pack([*said, prompted()[2]], 40)
    found = prompt_lengths(stack([window]))[0].tolist()
    assert found == [3] * 12 + [2] * 9 + [0] * (window.length - 21)


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


RESUMED = ("pfeiffer", "prompt", "prefix", "p-tuning", "norms", "biases", "blocks with biases", "loreft", "lst")


@pytest.mark.parametrize("case", RESUMED)
def test_stopped_and_resumed_to_the_bit(tmp_path: Path, case: str) -> None:
    write = write_prompts if case == "loreft" else write_rows
    base, data = make_base(tmp_path, *FAMILIES.get(case, ())), write(tmp_path / "rows.jsonl", 20)
    config = CASES[case]
    plan = make_plan(base, adapter=config, method=config.method, max_steps=4)
    whole = train(plan, base, data=data, out=tmp_path / "whole").summary
    train(plan, base, data=data, out=tmp_path / "twice", on_progress=at_step(2, interrupt))
    resumed = train(plan, base, data=data, out=tmp_path / "twice", resume=True).summary
    assert (whole["stopped"], resumed["stopped"]) == ("done", "done")
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]


@pytest.mark.parametrize("rule", ["backprop", "mezo"])
def test_what_a_prompts_network_learned_is_kept_as_a_prompt(tmp_path: Path, rule: str) -> None:
    base, data = make_base(tmp_path), write_rows(tmp_path / "rows.jsonl", 24)
    optimizer, config = "adamw" if rule == "backprop" else "sgd", CASES["p-tuning"]
    plan = make_plan(
        base, adapter=config, method=config.method, max_steps=8, step_rule=rule, learning_rate=1e-3,
        optimizer=optimizer, eval_fraction=0.0,
    )  # fmt: skip
    run = train(plan, base, data=data, out=tmp_path / "run")
    last = read_checkpoint(run.folder / "checkpoints", 8).tensors("adapter")
    assert sum(value.size for value in last.values()) == run.summary["trainable_parameters"] > 1000
    first = attach(load_decoder(base), plan.adapter, plan.seed)
    assert all((first[name].detach().numpy() != value).any() for name, value in last.items())
    x = last["embedding"]
    for i in range(3):
        x = (np.maximum(x, 0) if i else x) @ last[f"weight_{i}"].T + last[f"bias_{i}"]
    found, tensors = load_adapter(run.folder, load_config(base))
    assert isinstance(found, PromptConfig) and found.num_virtual_tokens == 4
    np.testing.assert_allclose(tensors["prompt_embeddings"], x, atol=1e-6)


@pytest.mark.parametrize("rule", ["backprop", "mezo"])
def test_loreft_learns_under_any_step_rule(tmp_path: Path, rule: str) -> None:
    base, data = make_base(tmp_path), write_prompts(tmp_path / "rows.jsonl", 24)
    config = LoreftConfig(r=4, positions="f3+l3")
    rate = 2e-2 if rule == "backprop" else 1e-4
    plan = make_plan(
        base, adapter=config, method=config.method, max_steps=12, step_rule=rule, learning_rate=rate,
        optimizer="adamw" if rule == "backprop" else "sgd",
    )  # fmt: skip
    run = train(plan, base, data=data, out=tmp_path / "run")
    losses = [line["loss"] for line in Metrics(run.folder / METRICS).lines() if "loss" in line]
    assert len(losses) == 12 and np.isfinite(losses).all()
    assert rule == "mezo" or losses[-1] < losses[0] - 0.5
    found, tensors = load_adapter(run.folder, load_config(base))
    assert found == plan.adapter and all(loreft.changes(
        {name: tensors[f"model.layers.{i}.block_output.{name}"] for name in loreft.PEFT_NAMES}
    ) for i in plan.adapter.blocks)  # fmt: skip


def test_rows_without_a_prompt_are_refused_where_positions_are_of_one(tmp_path: Path) -> None:
    base, data = make_base(tmp_path), write_rows(tmp_path / "rows.jsonl", 20)
    plan = make_plan(base, adapter=CASES["loreft"], method="loreft")
    message = r"rows\.jsonl has text rows, and loreft changes positions of a prompt.*or train with --adapter bottleneck"
    with pytest.raises(DataError, match=message):
        train(plan, base, data=data, out=tmp_path / "run")
    with pytest.raises(DataError, match=message):
        planner.plan(base, "host", data=data, adapter=CASES["loreft"])
    prompts = write_prompts(tmp_path / "prompts.jsonl", 20)
    message = "kl_weight = 1; it is measured on texts, and loreft changes positions of a prompt.* to --retention-data"
    for anchors in (data, prompts):  # texts have no prompt, and others are no texts
        with pytest.raises(ConfigError, match=message):
            planner.plan(base, "host", data=prompts, kl_data=anchors, adapter=CASES["loreft"])


def test_a_plan_beside_the_blocks_keeps_nothing_of_them(tmp_path: Path) -> None:
    base, data = make_base(tmp_path, num_hidden_layers=4), write_rows(tmp_path / "rows.jsonl", 24)
    config = planner.TrainConfig(max_seq_length=256, batch_size=4)
    lora, ladder = (
        planner.plan(base, "host", data=data, adapter=adapter, config=config) for adapter in (LoraConfig(), LstConfig())
    )
    least = planner.plan(base, "host", data=data, adapter=LoraConfig(), config=replace(config, recompute_layers=4))
    assert (ladder.parts["kept_activations"], ladder.recompute_layers) == (0, 0)
    assert ladder.predicted_peak_bytes < least.predicted_peak_bytes < lora.predicted_peak_bytes
    assert ladder.predicted_step_seconds < 0.6 * lora.predicted_step_seconds
    with pytest.raises(ConfigError, match=r"activation_offloading, recompute_layers cannot be set with lst"):
        planner.plan(
            base, "host", data=data, adapter=LstConfig(),
            config=replace(config, recompute_layers=2, activation_offloading=True),
        )  # fmt: skip
