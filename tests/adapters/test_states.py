"""Adapters at places that are no linear's: bottlenecks, LoReFT, prompts, prefixes and the model's own vectors, their
files and what they refuse.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import tiny_config, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgetune.adapters import bitfit, full, ln_tuning
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import load_adapter, save_adapter
from edgetune.adapters.bitfit import BitfitConfig
from edgetune.adapters.bottleneck import PLACEMENTS, BottleneckConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.full import FullConfig
from edgetune.adapters.ln_tuning import LnTuningConfig
from edgetune.adapters.loreft import LoreftConfig
from edgetune.adapters.lst import LstConfig
from edgetune.adapters.p_tuning import PTuningConfig
from edgetune.adapters.prefix import PrefixConfig
from edgetune.adapters.prompt import PromptConfig
from edgetune.adapters.states import EncodedTokens
from edgetune.data import Row, pack, stack
from edgetune.errors import AdapterError, ConfigError
from edgetune.models import load_config
from edgetune.models.config import DecoderConfig
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.training.backprop import Path as Walk
from edgetune.training.backprop import loss_and_gradients

IDS = torch.randint(0, 301, (2, 33), generator=torch.Generator().manual_seed(4))
VIRTUAL = {"prompt": PromptConfig(num_virtual_tokens=5), "prefix": PrefixConfig(num_virtual_tokens=5)}
ENCODED = PTuningConfig(num_virtual_tokens=5, encoder_hidden_size=16)
PEFT_CONFIGS = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "projected prefix": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16
    ),
}


def adapted(folder: Path, config: AdapterConfig) -> tuple[Decoder, AdapterConfig, dict[str, np.ndarray]]:
    """A decoder with an adapter of random values."""
    decoder = load_decoder(folder)
    config = config.resolved(decoder.config)
    parameters = attach(decoder, config, seed=5)
    generator = torch.Generator().manual_seed(7)
    for value in parameters.values():
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return decoder, config, {name: value.detach().numpy() for name, value in parameters.items()}


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids)
    return found if isinstance(found, torch.Tensor) else found.logits[:, -ids.shape[1] :]


OURS: list[tuple[AdapterConfig, str]] = [
    *((config, family) for config in (*VIRTUAL.values(), ENCODED, LnTuningConfig()) for family in ("llama", "qwen3")),
    (LnTuningConfig(layers_to_transform=(1,)), "gemma3_text"),
    (LnTuningConfig(target_modules=("norm",)), "llama"),
    (LnTuningConfig(target_modules=("q_norm", "post_feedforward_layernorm"), layers_to_transform=(0,)), "gemma3_text"),
]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # so PEFT says of every norm
@pytest.mark.parametrize(("ours", "family"), OURS)
def test_peft_loads_ours(tmp_path: Path, ours: AdapterConfig, family: str) -> None:
    folder = write_model(tmp_path / "model", tiny_config(family))
    decoder, config, tensors = adapted(folder, ours)
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run", config, tensors, str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run").eval()
    assert (logits(loaded) - logits(decoder)).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_we_load_pefts(tmp_path: Path, kind: str, family: str) -> None:
    folder = write_model(tmp_path / "model", tiny_config(family))
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, copy.deepcopy(PEFT_CONFIGS[kind])).eval()
    model.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(folder)
    plain = logits(decoder)
    config, tensors = load_adapter(tmp_path / "adapter", decoder.config)
    load_tensors(attach(decoder, config.resolved(decoder.config)), tensors)
    assert (logits(decoder) - plain).abs().max() > 1e-2
    assert (logits(model) - logits(decoder)).abs().max() < 1e-5


def test_p_tuning_learns_as_pefts_encoder(tmp_path: Path) -> None:
    """Loss and gradients with the same values; the file of either is the prompt that they make."""
    folder = write_model(tmp_path / "model", tiny_config("qwen3"))
    decoder, config, tensors = adapted(folder, ENCODED)
    (window,) = pack([Row(ids := IDS[0].numpy().astype(np.int32), ids, 1)], 40, virtual_tokens=5)
    loss = loss_and_gradients(decoder, [stack([window])], Walk(0, 1), dropout_key=(0, 0), check=lambda: None)

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, copy.deepcopy(PEFT_CONFIGS["p-tuning"])).eval()
    encoder = model.prompt_encoder["default"]
    theirs = dict(encoder.named_parameters())
    names = {"embedding": "embedding.weight"} | {
        f"{kind}_{i}": f"mlp_head.{2 * i}.{kind}" for i in range(3) for kind in ("weight", "bias")
    }
    assert theirs.keys() == set(names.values())
    for name, value in tensors.items():
        theirs[names[name]].data.copy_(torch.from_numpy(value))
    labels = IDS[:1].clone()
    labels[:, 0] = -100  # which PEFT asks of the last virtual token, and no row here of anything
    expected = model(IDS[:1], labels=labels).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    parameters = dict(decoder.prompt.tensors.items()) if isinstance(decoder.prompt, EncodedTokens) else {}
    assert parameters.keys() == names.keys()
    for name, value in parameters.items():
        wanted = theirs[names[name]].grad
        assert wanted.norm() > 1e-4
        assert (value.grad - wanted).norm() / wanted.norm() < 1e-5, name

    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_adapter(tmp_path / "ours", config, tensors)
    for writer in ("ours", "theirs"):
        found, prompt = load_adapter(tmp_path / writer, decoder.config)
        assert found == VIRTUAL["prompt"].resolved(decoder.config)
        assert prompt.keys() == {"prompt_embeddings"}
        np.testing.assert_allclose(prompt["prompt_embeddings"], encoder(torch.arange(5)).detach(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # so PEFT says of every norm
@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", None), ("gemma3_text", None), ("qwen3", ["input_layernorm", "k_norm", "norm"]), ("qwen3", ["norm"])],
)
def test_we_load_pefts_norms(tmp_path: Path, family: str, targets: list[str] | None) -> None:
    folder = write_model(tmp_path / "model", tiny_config(family))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=targets)).eval()
    torch.manual_seed(3)
    for value in model.parameters():
        if value.requires_grad:
            value.data.add_(torch.randn(value.shape) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(folder)
    config, tensors = load_adapter(tmp_path / "adapter", decoder.config)
    assert config == config.resolved(decoder.config)
    assert (
        targets is not None
        or config.changed(layers_to_transform=None, target_modules=None).resolved(decoder.config) == config
    ), "PEFT's default is ours"
    load_tensors(attach(decoder, config), tensors)
    assert (logits(model) - logits(decoder)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "config", [LnTuningConfig(), BitfitConfig(layers_to_transform=(1,)), FullConfig(layers_to_transform=(1,))]
)
def test_the_models_own_tensors_are_trained_in_their_place(tmp_path: Path, config: AdapterConfig) -> None:
    folder = write_model(tmp_path / "model", tiny_config("qwen2"))
    decoder = load_decoder(folder)
    expected = logits(decoder)
    parameters = attach(decoder, config.resolved(decoder.config))
    assert torch.equal(logits(decoder), expected)
    assert {id(p) for p in decoder.parameters()} == {id(p) for p in parameters.values()}
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in parameters.items())
    for value in parameters.values():
        value.data.mul_(1.1)
    changed = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name in parameters:
        changed.get_parameter(name).data.mul_(1.1)
    np.testing.assert_allclose(logits(decoder), logits(changed), atol=1e-5, rtol=1e-5)


def test_a_norm_of_queries_or_keys_is_of_all_heads(tmp_path: Path) -> None:
    model = load_config(write_model(tmp_path / "model", tiny_config("qwen3")))
    assert isinstance(model, DecoderConfig)
    found = ln_tuning.places(model)
    at, size = "model.layers.1.self_attn", model.head_dim
    assert model.num_attention_heads != model.num_key_value_heads > 1
    assert found[f"{at}.q_norm"] == (size, size * model.num_attention_heads)
    assert found[f"{at}.k_norm"] == (size, size * model.num_key_value_heads)
    assert found["model.norm"] == (model.hidden_size, model.hidden_size)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_transformers_loads_trained_blocks(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path / "model", tiny_config(family))
    decoder, config, tensors = adapted(folder, FullConfig(layers_to_transform=(1,)))
    assert {name.startswith("model.layers.1.") for name in tensors} == {True}
    save_adapter(tmp_path, config, tensors, str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = load_file(tmp_path / "adapter_model.safetensors")
    missing, unexpected = model.load_state_dict(found, strict=False)
    assert not unexpected
    assert not [name for name in missing if ".layers.1." in name]
    assert (logits(model) - logits(decoder)).abs().max() < 1e-5


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_bottleneck_starts_as_the_base(tmp_path: Path, placement: str) -> None:
    folder = write_model(tmp_path / "model", tiny_config("gemma3_text"))
    decoder = load_decoder(folder)
    expected = logits(decoder)
    config = BottleneckConfig(placement=placement).resolved(decoder.config)
    parameters = attach(decoder, config, seed=1)
    assert torch.equal(logits(decoder), expected)
    assert {id(p) for p in decoder.parameters()} == {id(p) for p in parameters.values()}
    assert len(parameters) == 2 * len(PLACEMENTS[placement]) * decoder.config.num_hidden_layers


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("non_linearity", ["relu", "silu", "tanh"])
def test_a_bottleneck_is_its_formula(tmp_path: Path, placement: str, non_linearity: str) -> None:
    folder = write_model(tmp_path / "model", tiny_config("llama"))
    config = BottleneckConfig(r=3, placement=placement, non_linearity=non_linearity)
    decoder, _, tensors = adapted(folder, config)
    place = PLACEMENTS[placement][-1]
    down, up = (torch.from_numpy(tensors[f"model.layers.1.{place}.adapter_{name}"]) for name in ("down", "up"))
    block = decoder.blocks[1]
    seen: dict[str, torch.Tensor] = {}
    block.mlp.register_forward_hook(lambda _, given, made: seen.update(h=given[0], y=made))
    before = {}
    block.before_mlp.register_forward_hook(lambda _, given, made: before.update(x2=given[0]))
    after: dict[str, torch.Tensor] = {}
    block.register_forward_hook(lambda _, given, made: after.update(y=made))
    logits(decoder)
    x = seen["h"] if placement == "parallel" else seen["y"]
    act = {"relu": torch.relu, "silu": torch.nn.functional.silu, "tanh": torch.tanh}[non_linearity]
    expected = before["x2"] + seen["y"] + act(x @ down.T) @ up.T
    np.testing.assert_allclose(after["y"], expected, atol=1e-5)


STATES = (
    BottleneckConfig(r=3, layers_to_transform=(1,)), LoreftConfig(r=3, positions="l4", layers_to_transform=(1,)),
    LstConfig(reduction=4, layers_to_transform=(1,)),
)  # fmt: skip
OWN = (
    LnTuningConfig(target_modules=("norm", "input_layernorm")),
    BitfitConfig(target_modules=("v_proj", "q_proj"), layers_to_transform=(1,)),
    FullConfig(layers_to_transform=(0,)),
)


@pytest.mark.parametrize("config", [*STATES, *VIRTUAL.values(), *OWN])
def test_saved_and_loaded_bit_for_bit(tmp_path: Path, config: AdapterConfig) -> None:
    folder = write_model(tmp_path / "model", tiny_config("qwen2"))
    _, config, tensors = adapted(folder, config)
    save_adapter(tmp_path, config, tensors)
    found, loaded = load_adapter(tmp_path, load_config(folder))
    assert found == config
    assert list(loaded) == list(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BottleneckConfig(r=73), r"r = 73; an integer from 1 to the hidden size 72"),
        (
            BottleneckConfig(placement="adapterdrop"),
            r"placement = 'adapterdrop'; choose from houlsby, pfeiffer, parallel",
        ),
        (BottleneckConfig(non_linearity="gelu"), r"non_linearity = 'gelu'; choose from relu, silu, tanh"),
        (BottleneckConfig(layers_to_transform=(2,)), r"layers_to_transform has \[2\]; choose from 0 to 1"),
        (LstConfig(reduction=5), r"reduction = 5; a divisor of the hidden size 72 was expected: 1, 2, 3, 4, 6, 8"),
        (LstConfig(layers_to_transform=(2,)), r"layers_to_transform has \[2\]; choose from 0 to 1"),
        (LoreftConfig(r=0), r"r = 0; an integer from 1 to the hidden size 72"),
        (LoreftConfig(positions="f0+l7"), r"positions = 'f0\+l7'; such as f7\+l7, f7 or l7 was expected"),
        (LoreftConfig(positions="l7+f7"), r"positions = 'l7\+f7'; such as"),
        (LoreftConfig(positions=""), r"positions = ''; such as"),
        (PromptConfig(num_virtual_tokens=0), r"num_virtual_tokens = 0; an integer from 1 to \d+, what the model's"),
        (PrefixConfig(num_virtual_tokens=1 << 20), r"num_virtual_tokens = 1048576"),
        (PTuningConfig(num_virtual_tokens=0), r"num_virtual_tokens = 0; an integer from 1"),
        (PTuningConfig(encoder_hidden_size=0), r"encoder_hidden_size = 0; an integer of 1 or more was expected"),
        (
            LnTuningConfig(target_modules=("q_norm",)),
            r"\['q_norm'\]; choose from input_layernorm, post_attention_layernorm, norm",
        ),
        (LnTuningConfig(target_modules=()), r"target_modules has nothing; choose from input_layernorm"),
        (LnTuningConfig(layers_to_transform=(2,)), r"layers_to_transform has \[2\]; choose from 0 to 1"),
        (BitfitConfig(), r"no linear of this llama has a bias to train\. Take --adapter ln_tuning"),
    ],
)
def test_wrong_settings_are_refused_by_value(config: AdapterConfig, message: str, tmp_path: Path) -> None:
    model = load_config(write_model(tmp_path / "m", tiny_config("llama")))
    with pytest.raises(ConfigError, match=message):
        config.resolved(model)


def test_biases_that_are_not_there_are_refused(tmp_path: Path) -> None:
    model = load_config(write_model(tmp_path / "m", tiny_config("qwen2")))
    with pytest.raises(ConfigError, match=r"\['o_proj'\]; linears with a bias are q_proj, k_proj, v_proj\."):
        BitfitConfig(target_modules=("q_proj", "o_proj")).resolved(model)
    with pytest.raises(ConfigError, match=r"target_modules has nothing"):
        BitfitConfig(target_modules=()).resolved(model)
    for method in (bitfit, full):
        with pytest.raises(AdapterError, match=r"not as edgetune writes it: layers_to_transform: missing; "):
            method.config_from_peft({}, {}, {})


def test_wrong_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tiny_config("llama"))
    model = load_config(folder)

    def refused(config: AdapterConfig, message: str, tensors: dict[str, np.ndarray] | None = None, **said: Any) -> None:
        _, config, good = adapted(folder, config)
        save_adapter(tmp_path, config, good if tensors is None else tensors)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path, model)

    refused(
        VIRTUAL["prompt"], r"num_virtual_tokens = 9, .* prompt_embeddings has shape \[5, 72\]", num_virtual_tokens=9
    )
    refused(VIRTUAL["prefix"], r"num_transformer_submodules = 2", num_transformer_submodules=2)
    wide = {"prompt_embeddings": np.ones((5, 80), np.float32)}
    refused(VIRTUAL["prompt"], r"prompt_embeddings has shape \[5, 80\]; \[5, 72\] was expected", wide)
    refused(
        BottleneckConfig(r=3), r"placement: found 'both'; expected one of houlsby, pfeiffer, parallel", placement="both"
    )
    refused(BottleneckConfig(r=3), r"not as edgetune writes it: r: missing\. Train again", r=None)
    refused(BottleneckConfig(r=3), r"writes it: r: found '3'; expected an integer: Rank", r="3")
    refused(
        FullConfig(),
        r"writes it: layers_to_transform\.1: found 1\.5; expected an integer",
        layers_to_transform=[0, 1.5],
    )
    refused(BottleneckConfig(r=3), r"mlp_output\.adapter_down has shape \[3, 72\]; \[4, 72\] was expected", r=4)
    refused(LstConfig(reduction=4), r"edgetune writes it: reduction: found 0; expected an integer", reduction=0)
    refused(LstConfig(reduction=4), r"side_down has shape \[32, 18\]; \[32, 9\] was expected", reduction=8)
    refused(LoreftConfig(r=3), r"not as edgetune writes it: positions = 'all'; such as", positions="all")
    refused(LoreftConfig(r=3), r"block_output\.rotate_layer has shape \[3, 72\]; \[4, 72\] was expected", r=4)
    refused(VIRTUAL["prompt"], r"peft_type 'CARTRIDGE'; supported are", peft_type="CARTRIDGE")
    norms = {f"model.layers.{i}.input_layernorm.weight": np.ones(72, np.float32) for i in range(2)}
    refused(LnTuningConfig(), r"sets modules_to_save, which LN tuning", norms, modules_to_save=["lm_head"])
    other = norms | {"model.layers.1.post_attention_layernorm.weight": np.ones(72, np.float32)}
    refused(LnTuningConfig(), r"other norms in one block than in another", other)
    refused(LnTuningConfig(), r"norm\.weight has shape \[80\]; \[72\]", {"model.norm.weight": np.ones(80, np.float32)})


@pytest.mark.parametrize(("hidden", "reduction"), [(72, 2), (75, 1)])
def test_a_ladder_is_half_as_wide_where_that_divides(tmp_path: Path, hidden: int, reduction: int) -> None:
    model = load_config(write_model(tmp_path / "model", tiny_config("llama")))
    assert LstConfig().resolved(replace(model, hidden_size=hidden)).reduction == reduction


def test_a_ladder_is_its_formula_and_starts_as_the_base(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tiny_config("gemma3_text"))
    decoder = load_decoder(folder)
    plain = logits(decoder)
    outputs: list[torch.Tensor] = []
    for block in decoder.blocks:
        block.register_forward_hook(lambda _, given, made: outputs.append(made))
    config = LstConfig(reduction=4).resolved(decoder.config)
    parameters = attach(decoder, config, seed=1)
    assert torch.equal(logits(decoder), plain)
    assert {id(p) for p in decoder.parameters()} == {id(p) for p in parameters.values()}
    lower, upper = (parameters[f"model.layers.{i}.side.side_down"].detach() for i in range(2))
    assert not torch.equal(lower, upper), "each rung has a start of its own"
    for value in (lower, upper):  # uniform in ±1/sqrt(18)
        assert (
            value.abs().max() <= 18**-0.5 and abs(value.mean()) < 0.02 and value.std() == pytest.approx(0.136, rel=0.1)
        )
    generator = torch.Generator().manual_seed(3)
    for value in parameters.values():
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    outputs.clear()
    found = logits(decoder)
    norms = [decoder.blocks[1].before_attention, decoder.norm]
    t = {name.removeprefix("model."): value.detach() for name, value in parameters.items()}
    z = torch.zeros(*IDS.shape, 18)
    for i, (x, norm) in enumerate(zip(outputs, norms, strict=True)):
        a = z + norm(x).view(*IDS.shape, 18, 4).sum(-1) / 2  # sqrt(4) times the mean
        z = a + torch.relu(a @ t[f"layers.{i}.side.side_down"].T) @ t[f"layers.{i}.side.side_up"].T
    expected = decoder.lm_head(decoder.norm(outputs[-1] + z @ t["side_output.side_upsample"].T / 2**0.5))
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-2
