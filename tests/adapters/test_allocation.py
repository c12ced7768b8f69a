"""Ranks within a budget of bytes, and adapters whose linears have ranks of their own, beside PEFT."""

from __future__ import annotations

import json
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
from edgetune.adapters.allocation import allocate, check_wishes, table
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


def directions_of(model: ModelConfig, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    return {place: 1 + float(rng.lognormal(1)) for place in model.linears()}


def size_of(ranks: dict[str, int], model: ModelConfig) -> int:
    """Of the file; that it is `save_adapter`'s is tested below."""
    config = LoraConfig(rank_pattern=ranks).resolved(model)
    return file_bytes(config, lora.slots(config, model))


def everywhere(rank: int, model: ModelConfig) -> dict[str, int]:
    return {place: min(rank, *shape) for place, shape in model.linears().items()}


def bounds(budget: int, model: ModelConfig) -> tuple[int, dict[str, int]]:
    """Half of the rank that the budget affords everywhere, and four times that."""
    even = max(rank for rank in range(1, 200) if size_of(everywhere(rank, model), model) <= budget)
    return -(-even // 2), everywhere(4 * even, model)


@pytest.mark.parametrize("budget", [2_000, 9_001, 40_000, 10_000_000])
def test_the_file_never_exceeds_the_budget(model: ModelConfig, budget: int, tmp_path: Path) -> None:
    made = allocate(LoraConfig(adapter_budget=budget), model, directions_of(model))
    slots = lora.slots(made, model)
    values = {name: np.ones(shape, np.float32) for slot in slots for name, shape in slot.names.items()}
    save_adapter(tmp_path, made, values)
    size = (tmp_path / MODEL).stat().st_size
    assert size == file_bytes(made, slots) <= budget
    assert made.scaling == 2
    if budget == 10_000_000:
        assert made.rank_pattern == {place: min(shape) for place, shape in model.linears().items()}


@pytest.mark.parametrize("rank", [1, 2, 7, 8])
def test_equal_directions_get_one_rank_everywhere(model: ModelConfig, rank: int) -> None:
    even = everywhere(rank, model)
    config = LoraConfig(adapter_budget=size_of(even, model))
    assert allocate(config, model, dict.fromkeys(even, 3.5)).rank_pattern == even


@pytest.mark.parametrize("budget", [40_000, 123_456])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_follow_the_directions(model: ModelConfig, seed: int, budget: int) -> None:
    """Against the largest t of a fine grid whose whole ranks fit; what is left then holds no further rank."""
    directions = directions_of(model, seed)
    made = allocate(LoraConfig(adapter_budget=budget), model, directions).rank_pattern or {}
    low, high = bounds(budget, model)
    best: dict[str, int] = {}
    for t in np.geomspace(0.01, 100, 4000):
        ranks = {place: min(max(int(t * e), low), high[place]) for place, e in directions.items()}
        if size_of(ranks, model) > budget:
            break
        best = ranks
    assert made.keys() == best.keys() and sum(made.values()) >= sum(best.values()) > low * len(best)
    assert all(best[place] <= made[place] <= high[place] for place in best)
    for place, rank in made.items():
        assert rank == high[place] or size_of(made | {place: rank + 1}, model) > budget


def test_more_directions_get_more_rank(model: ModelConfig) -> None:
    even = dict.fromkeys(model.linears(), 4.0)
    config = LoraConfig(adapter_budget=size_of(everywhere(4, model), model))
    ranks = [(allocate(config, model, even | {Q: e}).rank_pattern or {})[Q] for e in (0.5, 3.0, 4.0, 6.0, 9.0, 400.0)]
    assert ranks == sorted(ranks) and ranks[0] == 2 and ranks[2] == 4 and ranks[-1] == 16, "from R / 2 to 4 R"
    made = allocate(config, model, even)
    assert "14 of 14 linears" in (shown := table(made, model, even))
    assert len(shown.splitlines()) == 2 + model.num_hidden_layers


def test_less_than_rank_1_everywhere_goes_where_most_directions_are(model: ModelConfig) -> None:
    directions = directions_of(model)
    first = sorted(directions, key=lambda place: -directions[place])[:3]
    budget = size_of(dict.fromkeys(first, 1), model)
    made = allocate(LoraConfig(adapter_budget=budget), model, directions)
    assert made.rank_pattern == {place: 1 for place in model.linears() if place in first}


def test_what_is_refused(model: ModelConfig) -> None:
    with pytest.raises(BudgetError, match=r"300 bytes holds no adapter: .* rank 1 at one linear, takes \d+\. Give"):
        allocate(LoraConfig(adapter_budget=300), model, directions_of(model))
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
