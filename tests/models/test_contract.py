"""Every family computes what transformers computes, on odd shapes, tied and untied, with and without packing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model
from transformers import AutoConfig, AutoModelForCausalLM

from edgetune.base import open_base
from edgetune.errors import ModelError
from edgetune.models import FAMILIES, load_config
from edgetune.models.config import DecoderConfig
from edgetune.models.decoder import load_decoder
from edgetune.models.rope import rope_tables
from edgetune.schema import Reader

ROWS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"tie_word_embeddings": family == "qwen2"}) for family in FAMILIES),
    ("llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": None}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "num_key_value_heads": 9}),
    ("qwen3", {"num_key_value_heads": 1, "rope_theta": 1e6}),
    ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 4}),
    ("smollm3", {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0, 1]}),
    ("smollm3", {"rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    ("smollm3", {"rope_theta": None}),
    ("gemma3_text", {"num_hidden_layers": 7, "sliding_window_pattern": None, "sliding_window": 96}),
    ("gemma3_text", {"attention_bias": True, "num_key_value_heads": 1, "rope_local_base_freq": None}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": None, "sliding_window": 1}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": None}),
]


def oracle(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize(("family", "overrides"), ROWS)
def test_logits_equal_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(family, **overrides)
    folder = write_model(tmp_path / "model", config)
    if config.get("attention_bias"):
        _add_biases(folder, config)
    ids = torch.randint(0, config["vocab_size"], (2, 97), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = oracle(folder)(ids).logits
        found = load_decoder(folder)(ids)
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() <= 1e-4


def _add_biases(folder: Path, config: dict[str, Any]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(9)
    without = () if config.get("mlp_bias") else ("mlp",)
    for name in [name for name in tensors if name.endswith("_proj.weight") and name.split(".")[3] not in without]:
        tensors[name.removesuffix("weight") + "bias"] = rng.standard_normal(len(tensors[name])).astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes_of_a_config_means_the_same(family: str, tmp_path: Path) -> None:
    """Its newer keys: `rope_parameters`, `layer_types`, `no_rope_layers`, and every default."""
    config = tiny_config(family, num_hidden_layers=5)
    rewritten = AutoConfig.for_model(**config).to_dict()
    assert rewritten.keys() - config.keys() >= {"rope_parameters"}
    assert FAMILIES[family].config_from_hf(rewritten) == FAMILIES[family].config_from_hf(config)


@pytest.mark.parametrize("length", [40, 11, 5])
def test_a_window_hides_what_lies_behind_it(length: int, tmp_path: Path) -> None:
    """Two layers of windows of 4 see 6 positions back, however long the sequence and whatever stands before."""
    config = tiny_config("gemma3_text", sliding_window=4, layer_types=["sliding_attention"] * 2)
    decoder = load_decoder(write_model(tmp_path / "model", config))
    ids = torch.randint(3, 301, (1, length), generator=torch.Generator().manual_seed(3))
    for back in range(min(length, 10)):
        other = ids.clone()
        other[0, length - 1 - back] = (other[0, length - 1 - back] + 7) % 301
        with torch.no_grad():
            changed = (decoder(other)[0, -1] - decoder(ids)[0, -1]).abs().max()
        assert (changed > 1e-4) == (back <= 6), back


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    decoder = load_decoder(write_model(tmp_path / "model", tiny_config(family)))
    rows = [torch.arange(5, 5 + n) for n in (7, 12, 3)]  # the second is longer than gemma3_text's window
    packed = torch.cat([*rows, torch.zeros(4, dtype=torch.long)])[None]
    positions = torch.cat([*(torch.arange(len(row)) for row in rows), torch.zeros(4, dtype=torch.long)])[None]
    segments = torch.tensor([0] * 7 + [1] * 12 + [2] * 3 + [-1] * 4)[None]
    with torch.no_grad():
        found = decoder(packed, positions, segments)
        start = 0
        for row in rows:
            alone = decoder(row[None])
            assert (found[:, start : start + len(row)] - alone).abs().max() < 1e-5
            start += len(row)
    assert torch.isfinite(found).all(), "padding sees itself and stays finite"


def test_llama_3_rope_scaling_equals_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    hf = tiny_config("llama", rope_scaling=scaling, rope_theta=500000.0, head_dim=64)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](
        LlamaConfig(
            head_dim=64, hidden_size=64, num_attention_heads=1, rope_parameters=scaling | {"rope_theta": 500000.0}
        ),
        device=torch.device("cpu"),
    )
    cos, sin = rope_tables(FAMILIES["llama"].config_from_hf(hf).attention_kinds[0], 64, 3000)
    angles = torch.arange(3000.0)[:, None] * theirs[None, :]
    assert np.abs(cos - angles.cos().numpy()).max() < 3e-4  # float32 angles of up to 3000 radians
    assert np.abs(sin - angles.sin().numpy()).max() < 3e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_config_survives_json(family: str, tmp_path: Path) -> None:
    config = load_config(write_model(tmp_path / "model", tiny_config(family)))
    assert (family != "llama") or config.attention_kinds[0].rope_scaling is not None
    assert Reader().read(DecoderConfig, json.loads(json.dumps(config.to_dict()))) == config


def test_parameters_are_counted(tmp_path: Path) -> None:
    for family in FAMILIES:
        base = open_base(write_model(tmp_path / family, tiny_config(family)))
        assert base.config.num_parameters == sum(int(np.prod(info.shape)) for info in base.weights.values())


def test_stories260k_writes_the_oracle_text(real: Callable[[str], Path]) -> None:
    folder = real("stories260k")
    golden = json.loads((folder / "oracle.json").read_text())
    decoder = load_decoder(folder)
    ids = list(golden["prompt_ids"])
    with torch.no_grad():
        first = decoder(torch.tensor([ids]))[0, -1, :8]
        assert np.abs(first.numpy() - golden["first_step_logits_first_8"]).max() < golden["logit_tolerance"]
        for _ in range(golden["num_new_tokens"]):
            ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    assert ids[len(golden["prompt_ids"]) :] == golden["expected_new_token_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2'; supported are " + ", ".join(FAMILIES)),
        ({"hidden_size": "72"}, r"hidden_size = '72'; a positive integer"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
        ({"num_key_value_heads": 2}, r"num_attention_heads 9 is not a multiple of num_key_value_heads 2"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope scaling 'yarn'"),
        ({"head_dim": 7}, r"head_dim 7"),
        ({"use_sliding_window": True}, r"use_sliding_window true"),
        *(
            ({"model_type": "gemma3_text"} | change, message)
            for change, message in [
                ({"use_bidirectional_attention": True}, r"use_bidirectional_attention = True in config.json is not"),
                ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping = 50.0"),
                ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30.0"),
                ({"hidden_activation": "relu"}, r"hidden_activation 'relu'.*silu, gelu_pytorch_tanh"),
                ({"sliding_window": 0}, r"sliding_window = 0; a positive integer"),
                ({"query_pre_attn_scalar": "256"}, r"query_pre_attn_scalar = '256'"),
                ({"layer_types": ["full_attention"]}, r"layer_types = \['full_attention'\]; .* each of 2 layers"),
                ({"layer_types": ["full_attention", "chunked_attention"]}, r"chunked_attention.*sliding_attention for"),
                (
                    {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}},
                    r"rope scaling 'yarn'",
                ),
            ]
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers = \[1\]; 0 or 1 for each of 2 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, r"no_rope_layers = \[1, 2\]"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, r"no_rope_layer_interval = 0; a positive integer"),
    ],
)
def test_wrong_configs_are_refused_by_value(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tiny_config("llama"))
    config = tiny_config(change.get("model_type", "llama")) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        load_config(folder)
