"""Ranks within a budget of bytes, and adapters whose linears have ranks of their own, beside PEFT."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from edgetune.adapters import lora
from edgetune.adapters.allocation import RANKS, allocate, check_wishes, table
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import MODEL, file_bytes, load_adapter, save_adapter
from edgetune.adapters.dora import DoraConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.errors import AdapterError, BudgetError, ConfigError
from edgetune.models import ModelConfig, load_config
from edgetune.models.decoder import load_decoder

Q, K, DOWN = (
    f"model.layers.{i}.{path}" for i, path in ((0, "self_attn.q_proj"), (1, "self_attn.k_proj"), (1, "mlp.down_proj"))
)
MIXED = {Q: 2, K: 5, DOWN: 16}
IDS = torch.randint(0, 301, (2, 33), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", tiny_config("llama"))


@pytest.fixture
def model(folder: Path) -> ModelConfig:
    return load_config(folder)


def norms_of(model: ModelConfig, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {place: float(rng.lognormal()) for place in model.linears()}


def gain(ranks: dict[str, int], norms: dict[str, float]) -> float:
    return sum(math.sqrt(rank) * norms[place] for place, rank in ranks.items())


@pytest.mark.parametrize("budget", [2_000, 9_001, 40_000, 10_000_000])
def test_the_file_never_exceeds_the_budget(model: ModelConfig, budget: int, tmp_path: Path) -> None:
    made = allocate(LoraConfig(adapter_budget=budget), model, norms_of(model))
    slots = lora.slots(made, model)
    values = {name: np.ones(shape, np.float32) for slot in slots for name, shape in slot.names.items()}
    save_adapter(tmp_path, made, values)
    size = (tmp_path / MODEL).stat().st_size
    assert size == file_bytes(made, slots) <= budget
    assert made.rank_pattern is not None and made.ranks <= set(RANKS)
    if budget == 10_000_000:
        shapes = model.linears()
        assert made.rank_pattern == {place: max(r for r in RANKS if r <= min(shapes[place])) for place in shapes}


def test_it_is_almost_the_best_of_all_allocations(model: ModelConfig) -> None:
    """Against every choice of ranks at three linears: what the greedy leaves is less than its last step."""
    for seed in range(5):
        norms = {place: norm for place, norm in norms_of(model, seed).items() if place in MIXED}
        made = allocate(LoraConfig(adapter_budget=12_000), model, norms).rank_pattern or {}
        shapes, best = model.linears(), 0.0
        for ranks in itertools.product(RANKS, repeat=3):
            chosen = {place: rank for place, rank in zip(norms, ranks, strict=True) if 0 < rank <= min(shapes[place])}
            if chosen:
                config = LoraConfig(rank_pattern=chosen).resolved(model)
                if file_bytes(config, lora.slots(config, model)) <= 12_000:
                    best = max(best, gain(chosen, norms))
        assert 0.93 * best <= gain(made, norms) <= best + 1e-9


def test_more_gradient_and_fewer_bytes_get_more_rank(model: ModelConfig) -> None:
    norms = dict.fromkeys(model.linears(), 1.0) | {Q: 9.0}
    made = allocate(LoraConfig(adapter_budget=20_000), model, norms)
    ranks = made.rank_pattern or {}
    assert ranks[Q] == max(ranks.values())
    assert ranks.get(K, 0) >= ranks.get(DOWN, 0), "k_proj is smaller"
    assert f"{len(ranks)} of 14 linears" in (shown := table(made, model, norms))
    assert len(shown.splitlines()) == 2 + model.num_hidden_layers


def test_what_is_refused(model: ModelConfig) -> None:
    with pytest.raises(BudgetError, match=r"500 bytes holds no adapter: .* rank 2 at one linear, takes \d+\. Give"):
        allocate(LoraConfig(adapter_budget=500), model, norms_of(model))
    for given in ({"r": 4}, {"target_modules": ("q_proj",)}, {"lora_alpha": 4.0}):
        with pytest.raises(ConfigError, match=f"chooses linears and their ranks, .*{next(iter(given))} is set too"):
            check_wishes(LoraConfig(adapter_budget=9, **given))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"chosen for lora, not dora"):
        check_wishes(DoraConfig(adapter_budget=9))
    with pytest.raises(ConfigError, match=r"chosen by the torch engine, on rows: use `edgetune train`"):
        LoraConfig(adapter_budget=9).resolved(model)
    for pattern, found in (({}, "nothing"), ({"q_proj": 2}, "q_proj: 2"), ({Q: 0}, "q_proj: 0")):
        with pytest.raises(ConfigError, match=f"rank_pattern has .*{found}; full names"):
            LoraConfig(rank_pattern=pattern).resolved(model)


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_mixed_ranks(folder: Path, use_rslora: bool, tmp_path: Path) -> None:
    decoder = load_decoder(folder)
    config = LoraConfig(rank_pattern=MIXED, lora_alpha=3.0, use_rslora=use_rslora).resolved(decoder.config)
    parameters = attach(decoder, config)
    assert {name: len(value) for name, value in parameters.items() if "lora_A" in name} == {
        f"{place}.lora_A": rank for place, rank in MIXED.items()
    }
    for value in parameters.values():
        value.data.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(7)) * 0.2)
    tensors = {name: value.detach().numpy() for name, value in parameters.items()}
    save_adapter(tmp_path / "run", config, tensors, str(folder)) if (tmp_path / "run").mkdir() is None else None
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "run"
    )
    with torch.no_grad():
        np.testing.assert_allclose(peft.eval()(IDS).logits, decoder(IDS), atol=1e-5)
    loaded_config, loaded = load_adapter(tmp_path / "run", decoder.config)
    assert replace(loaded_config, lora_alpha=3.0) == config and loaded_config.scaling == pytest.approx(config.scaling)
    assert all(np.array_equal(loaded[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    "patterns", [{"rank_pattern": {"q_proj": 3, "0.mlp.down_proj": 7}}, {"alpha_pattern": {"k_proj": 5}}]
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_we_load_pefts_patterns(
    folder: Path, patterns: dict[str, dict[str, int]], use_dora: bool, tmp_path: Path
) -> None:
    """Each linear there has a scaling of its own."""
    settings = PeftLoraConfig(
        r=4, lora_alpha=11, target_modules=["q_proj", "k_proj", "down_proj"], task_type="CAUSAL_LM", use_dora=use_dora,
        **patterns,
    )  # fmt: skip
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), settings).eval()
    torch.manual_seed(3)
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.2)
    peft.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(folder)
    config, tensors = load_adapter(tmp_path / "adapter", decoder.config)
    load_tensors(attach(decoder, config.resolved(decoder.config)), tensors)
    with torch.no_grad():
        np.testing.assert_allclose(peft(IDS).logits, decoder(IDS), atol=1e-4)


def test_patterns_that_do_not_fit_are_refused(folder: Path, model: ModelConfig, tmp_path: Path) -> None:
    config = LoraConfig(rank_pattern=MIXED).resolved(model)
    save_adapter(
        tmp_path,
        config,
        {n: np.ones(s, np.float32) for slot in lora.slots(config, model) for n, s in slot.names.items()},
    )
    path = tmp_path / "adapter_config.json"
    peft = json.loads(path.read_text())
    for change, message in (
        ({"rank_pattern": {"(a+)+$": 2}}, r"'\(a\+\)\+\$' in rank_pattern; names of linears"),
        ({"rank_pattern": [3]}, r"no table in rank_pattern"),
        ({"rank_pattern": MIXED | {K: 6}}, r"has r = 6 for .*k_proj; its tensors have rank \[2, 5, 16\]"),
        ({"alpha_pattern": {K: 0}}, r"not as PEFT writes it"),
        ({"alpha_pattern": {K: "much"}}, r"not as PEFT writes it"),
    ):
        path.write_text(json.dumps(peft | change))
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path, model)
