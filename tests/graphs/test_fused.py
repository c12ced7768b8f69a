"""Linears that share an input as one: which ones, where each part lies, and what becomes of their adapters."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import tiny_config
from tiny_encoder import encoder_hf

from edgetune.adapter_file import AdapterSlot, by_slot
from edgetune.graphs.fused import Place, adapter_slots, places
from edgetune.models import ENCODERS, FAMILIES
from edgetune.models.config import DecoderConfig

BLOCK = "model.layers.0"


def tiny(family: str = "llama", **overrides: int | bool) -> DecoderConfig:
    return FAMILIES[family].config_from_hf(tiny_config(family, **overrides))


def names(config: DecoderConfig, weights: str) -> list[str]:
    """The slots of the first block, by their last part."""
    slots = adapter_slots(config, lambda _: weights)
    return [slot.name.rpartition(".")[2] for slot in slots if slot.name.startswith(f"{BLOCK}.")]


ONE = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
APART = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_what_shares_an_input_is_one_slot() -> None:
    slots = adapter_slots(tiny(), lambda _: "int4")
    assert len(slots) == 8
    path = f"{BLOCK}.self_attn"
    parts = {f"{path}.q_proj": 72, f"{path}.k_proj": 24, f"{path}.v_proj": 24}
    assert slots[0] == AdapterSlot(f"{path}.qkv_proj", 72, 120, parts)
    assert slots[1] == AdapterSlot(f"{path}.o_proj", 72, 72, {f"{path}.o_proj": 72})
    found = places(tiny(), lambda _: "int4")
    assert found.keys() == tiny().matrices().keys()
    assert found[f"{path}.v_proj"] == Place(f"{path}.qkv_proj", (120, 72), 96)
    assert found[f"{path}.v_proj"].rows(slice(3, 9)) == slice(99, 105)
    assert found["model.embed_tokens"] == Place("model.embed_tokens", (301, 72), 0)


@pytest.mark.parametrize(
    ("overrides", "weights", "expected"),
    [
        ({}, "nf4", ONE),
        ({"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4}, "nf4", APART),
        ({"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4}, "int4", ONE),
        ({"intermediate_size": 89}, "standard", ["qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ({"intermediate_size": 89}, "fp32", ONE),
    ],
)
def test_a_part_without_bytes_of_its_own_stays_apart(
    overrides: dict[str, int], weights: str, expected: list[str]
) -> None:
    assert names(tiny(**overrides), weights)[: len(expected)] == expected


def test_other_formats_and_an_encoder_stay_apart() -> None:
    slots = adapter_slots(tiny(), lambda name: "fp32" if name.endswith("v_proj") else "int4")
    assert [slot.name.rpartition(".")[2] for slot in slots[:5]] == [*APART, "gate_up_proj"]
    config = ENCODERS["bert"].config_from_hf(encoder_hf("bert"))
    assert [slot.name for slot in adapter_slots(config, lambda _: "int4")] == list(config.linears())


@pytest.mark.parametrize("adapted", ["qv", "k", "qkv"])
def test_an_adapter_of_some_parts_changes_those_alone(adapted: str) -> None:
    """X A B with the tensors of the slot, against each part's own product beside the others."""
    rng = np.random.default_rng(0)
    sizes, r = {"q": 7, "k": 3, "v": 5}, 2
    tensors = {f"{name}.lora_A": rng.normal(size=(11, r)).astype(np.float32) for name in adapted}
    tensors |= {f"{name}.lora_B": rng.normal(size=(r, sizes[name])).astype(np.float32) for name in adapted}
    feeds = by_slot(tensors, [AdapterSlot("qkv", 11, 15, sizes), AdapterSlot("o", 7, 11, {"o": 11})])
    assert {name: value.shape for name, value in feeds.items()} == {
        "qkv.lora_A": (11, r * len(adapted)), "qkv.lora_B": (r * len(adapted), 15)
    }  # fmt: skip
    x = rng.normal(size=(4, 11)).astype(np.float32)
    zero = np.zeros((11, r), np.float32)
    parts = [
        x @ tensors.get(f"{name}.lora_A", zero) @ tensors.get(f"{name}.lora_B", np.zeros((r, size), np.float32))
        for name, size in sizes.items()
    ]
    np.testing.assert_allclose(x @ feeds["qkv.lora_A"] @ feeds["qkv.lora_B"], np.concatenate(parts, 1), atol=1e-5)
