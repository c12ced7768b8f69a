"""Every adapter method keeps its contract on every kind of base, and its files are PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from edgetune.adapters import METHODS, ia3, vera
from edgetune.adapters.attach import AdaptedLinear, attach, load_tensors, set_dropout
from edgetune.adapters.base import load_adapter, save_adapter
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.ia3 import Ia3Config
from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.vera import VeraConfig
from edgetune.errors import AdapterError, ConfigError
from edgetune.grids import GRIDS
from edgetune.models import load_config
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.quantizer import quantize
from edgetune.training.blocks import BlockPass

BASES = ["dense", *GRIDS]
# Those at linears; the others have a test of their own (test_states.py).
OWN: dict[str, dict[str, object]] = {
    "lora": {"r": 3, "lora_alpha": 7.5},
    "dora": {"r": 3, "lora_alpha": 7.5},
    "ia3": {},
    "vera": {"r": 6, "d_initial": 0.4, "projection_prng_key": 9},
}
DROPOUT = {"lora": {"lora_dropout": 0.3}, "dora": {"lora_dropout": 0.3}, "vera": {"vera_dropout": 0.3}}
IDS = torch.randint(0, 301, (2, 33), generator=torch.Generator().manual_seed(4))


def base(kind: str, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    if not folder.exists():
        write_model(folder, tiny_config("llama"))
    return folder if kind == "dense" else quantize(folder, kind, tmp_path / kind, force=True)


def randomize(parameters: dict[str, torch.nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(7)
    for value in parameters.values():
        value.data.add_(torch.randn(value.shape, generator=generator) * 0.3)


def adapted(
    kind: str, method: str, tmp_path: Path, **settings: object
) -> tuple[Decoder, dict[str, torch.nn.Parameter]]:
    decoder = load_decoder(base(kind, tmp_path))
    config = METHODS[method].Config(**OWN[method], **settings).resolved(decoder.config)
    return decoder, attach(decoder, config, seed=5)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", OWN)
def test_it_starts_as_the_base(method: str, kind: str, tmp_path: Path) -> None:
    plain = load_decoder(base(kind, tmp_path))
    decoder, parameters = adapted(kind, method, tmp_path)
    with torch.no_grad():
        assert torch.equal(decoder(IDS), plain(IDS))
        randomize(parameters)
        assert not torch.allclose(decoder(IDS), plain(IDS), atol=1e-2)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", OWN)
def test_forward_is_the_merged_weight(method: str, kind: str, tmp_path: Path) -> None:
    decoder, parameters = adapted(kind, method, tmp_path)
    randomize(parameters)
    walk = BlockPass(decoder.workspace, [], 2, 5)
    for layer in (m for m in decoder.modules() if isinstance(m, AdaptedLinear)):
        x = torch.randn(2, 5, layer.slot.in_features, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            np.testing.assert_allclose(layer(x), x @ layer.merged_weight().T, atol=2e-4)
            y = torch.empty(10, layer.slot.out_features)
            walk._linear(layer, x.view(10, -1), y)
            np.testing.assert_allclose(y.view(2, 5, -1), layer(x), atol=2e-4)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", OWN)
def test_gradients_reach_the_adapter_alone(method: str, kind: str, tmp_path: Path) -> None:
    decoder, parameters = adapted(kind, method, tmp_path)
    randomize(parameters)
    decoder(IDS).square().mean().backward()
    assert {id(p) for p in decoder.parameters()} == {id(p) for p in parameters.values()}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", OWN)
def test_backward_is_autograds(method: str, kind: str, first: bool, tmp_path: Path) -> None:
    decoder, parameters = adapted(kind, method, tmp_path, **(DROPOUT.get(method, {}) if first else {}))
    randomize(parameters)
    decoder.workspace.tile_weights = 2000  # several tiles of a matrix
    walk = BlockPass(decoder.workspace, [], 1, 11)
    generator = torch.Generator().manual_seed(3)
    for layer in [m for m in decoder.modules() if isinstance(m, AdaptedLinear)][:7]:
        k, n = layer.slot.in_features, layer.slot.out_features
        layer.base_layer.bias = torch.randn(n, generator=generator)
        x, d_y, before = (torch.randn(11, width, generator=generator) for width in (k, n, k))
        layer.start_pass((1, 2))
        wanted_y = layer(x.requires_grad_())
        wanted_x, *wanted = torch.autograd.grad(wanted_y, [x, *layer.tensors.values()], d_y)
        d_x, given = before.clone(), d_y.clone()
        with torch.no_grad():
            x, y = x.detach(), torch.empty(11, n)
            layer.start_pass((1, 2))
            walk._linear(layer, x, y)
            np.testing.assert_allclose(y, wanted_y.detach(), rtol=1e-4, atol=1e-4)
            walk._linear_backward(layer, x, given, d_x, first=first)
            walk._linear_backward(layer, x, given, None)
        assert torch.equal(given, d_y), "others need it too"
        np.testing.assert_allclose(d_x, wanted_x if first else wanted_x + before, rtol=1e-3, atol=1e-3)
        for name, value in zip(layer.tensors, wanted, strict=True):
            np.testing.assert_allclose(
                layer.tensors[name].grad, 2 * value, rtol=1e-3, atol=1e-3, err_msg=f"{layer.slot.place}.{name}"
            )


@pytest.mark.parametrize("method", OWN)
def test_slots_name_every_parameter(method: str, tmp_path: Path) -> None:
    decoder, parameters = adapted(
        "dense", method, tmp_path, target_modules=("q_proj", "down_proj"), layers_to_transform=(1,)
    )
    config = next(m for m in decoder.modules() if isinstance(m, AdaptedLinear)).config
    slots = METHODS[method].slots(config, decoder.config)
    assert {name: tuple(p.shape) for name, p in parameters.items()} == {
        n: s for slot in slots for n, s in slot.names.items()
    }
    assert sum(slot.num_parameters for slot in slots) == sum(p.numel() for p in parameters.values())
    assert {slot.place for slot in slots} == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"}


@pytest.mark.parametrize("method", OWN)
def test_saved_and_loaded_bit_for_bit(method: str, tmp_path: Path) -> None:
    decoder, parameters = adapted("dense", method, tmp_path)
    randomize(parameters)
    tensors = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    config = next(m for m in decoder.modules() if isinstance(m, AdaptedLinear)).config
    save_adapter(tmp_path, config, tensors)
    loaded_config, loaded = load_adapter(tmp_path, decoder.config)
    assert loaded_config == config
    assert list(loaded) == list(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded[name], value)


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("method", OWN)
def test_peft_loads_our_adapter(method: str, tmp_path: Path) -> None:
    folder = base("dense", tmp_path)
    decoder, parameters = adapted("dense", method, tmp_path, layers_to_transform=(1,))
    randomize(parameters)
    config = next(m for m in decoder.modules() if isinstance(m, AdaptedLinear)).config
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run", config, {name: p.detach().numpy() for name, p in parameters.items()}, str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, tmp_path / "run").eval()
    with torch.no_grad():
        np.testing.assert_allclose(peft(IDS).logits, decoder(IDS), atol=1e-4)


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 5, "lora_alpha": 11, "use_rslora": True},
    "dora": {"peft_type": "LORA", "r": 5, "lora_alpha": 11, "use_dora": True},
    "ia3": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
    "vera": {"peft_type": "VERA", "r": 5, "projection_prng_key": 11},
}


@pytest.mark.parametrize("method", OWN)
def test_we_load_pefts(method: str, tmp_path: Path) -> None:
    folder = base("dense", tmp_path)
    settings = dict(PEFT_CONFIGS[method])
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[settings.pop("peft_type")]
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        kind(target_modules=["k_proj", "down_proj"], task_type="CAUSAL_LM", **settings),
    ).eval()
    torch.manual_seed(3)
    for p in peft.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape) * 0.2)
    peft.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(folder)
    config, tensors = load_adapter(tmp_path / "adapter", decoder.config)
    assert config.method == method
    load_tensors(attach(decoder, config), tensors)
    with torch.no_grad():
        np.testing.assert_allclose(peft(IDS).logits, decoder(IDS), atol=1e-4)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(gate|down)_proj"])
def test_we_load_pefts_adapter(targets: list[str] | str, tmp_path: Path) -> None:
    folder = base("dense", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft = get_peft_model(
        model, PeftLoraConfig(r=5, lora_alpha=11, target_modules=targets, task_type="CAUSAL_LM")
    ).eval()
    torch.manual_seed(3)
    for name, p in peft.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.2)
    peft.save_pretrained(tmp_path / "adapter")
    decoder = load_decoder(folder)
    config, tensors = load_adapter(tmp_path / "adapter", decoder.config)
    load_tensors(attach(decoder, config), tensors)
    with torch.no_grad():
        assert (peft(IDS).logits - decoder(IDS)).abs().max() < 1e-4


def test_dropout_is_chosen_by_its_counters(tmp_path: Path) -> None:
    decoder, parameters = adapted("dense", "lora", tmp_path, lora_dropout=0.5)
    randomize(parameters)
    with torch.no_grad():
        evaluated = decoder(IDS)
        set_dropout(decoder, (0, 3, 1))
        first = decoder(IDS)
        assert torch.equal(first, decoder(IDS)), "a recomputed pass sees the same masks"
        assert not torch.allclose(first, evaluated)
        set_dropout(decoder, (0, 4, 1))
        assert not torch.allclose(first, decoder(IDS))
        set_dropout(decoder, None)
        assert torch.equal(evaluated, decoder(IDS))


def test_dropout_keeps_the_mean(tmp_path: Path) -> None:
    decoder, _ = adapted("dense", "lora", tmp_path, lora_dropout=0.25)
    layer = next(m for m in decoder.modules() if isinstance(m, AdaptedLinear))
    layer.dropout_key = (1, 2)
    x = torch.full((400, layer.slot.in_features), 3.0)
    dropped = layer._dropped(x)
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert dropped.mean().item() == pytest.approx(3.0, rel=0.02)


def test_scaling(tmp_path: Path) -> None:
    model = load_config(write_model(tmp_path / "m", tiny_config("llama")))
    assert LoraConfig().resolved(model).scaling == 2
    assert LoraConfig(r=4, lora_alpha=6).resolved(model).scaling == 1.5
    assert LoraConfig(r=16, lora_alpha=6, use_rslora=True).resolved(model).scaling == 1.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=0), r"r = 0; an integer from 1 to the hidden size 72"),
        (LoraConfig(r=73), r"r = 73"),
        (LoraConfig(lora_alpha=-1), r"lora_alpha = -1"),
        (LoraConfig(lora_dropout=1.0), r"lora_dropout = 1.0"),
        (LoraConfig(target_modules=("wq",)), r"target_modules has \['wq'\]; choose from q_proj"),
        (LoraConfig(target_modules=()), r"target_modules has nothing"),
        (LoraConfig(layers_to_transform=(2,)), r"layers_to_transform has \[2\]; choose from 0 to 1"),
    ],
)
def test_wrong_settings_are_refused_by_value(config: LoraConfig, message: str, tmp_path: Path) -> None:
    model = load_config(write_model(tmp_path / "m", tiny_config("llama")))
    with pytest.raises(ConfigError, match=message):
        config.resolved(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(loraplus_lr_ratio=0.5), r"loraplus_lr_ratio = 0\.5; a number from 1 up"),
        (
            Ia3Config(target_modules=("k_proj",), feedforward_modules=("up_proj",)),
            r"\['up_proj'\]; choose from .*k_proj",
        ),
        (VeraConfig(r=0), r"r = 0; an integer from 1 to 65536"),
        (VeraConfig(vera_dropout=1.0), r"vera_dropout = 1\.0"),
        (VeraConfig(d_initial=0.0), r"d_initial = 0\.0; a number other than 0"),
        (VeraConfig(projection_prng_key=-1), r"projection_prng_key = -1"),
    ],
)
def test_wrong_settings_of_the_other_methods(config: AdapterConfig, message: str, tmp_path: Path) -> None:
    model = load_config(write_model(tmp_path / "m", tiny_config("llama")))
    with pytest.raises(ConfigError, match=message):
        config.resolved(model)


def test_what_ia3_and_vera_do_not_read_is_refused(tmp_path: Path) -> None:
    ones, places = {"q.0.1.k_proj.ia3_l": (8, 1), "q.0.2.k_proj.ia3_l": (1, 8)}, {"q.0.1.k_proj": (8, 8)}
    with pytest.raises(AdapterError, match=r"k_proj is scaled at its inputs in one block and at its outputs"):
        ia3.config_from_peft({}, ones, places)
    with pytest.raises(AdapterError, match=r"sets fan_in_fan_out"):
        ia3.config_from_peft({"fan_in_fan_out": True}, ones, places)
    with pytest.raises(AdapterError, match=r"bias = 'all', which VeRA here"):
        vera.config_from_peft({"bias": "all"}, {}, places)
    decoder, _ = adapted("dense", "vera", tmp_path)
    config = next(m for m in decoder.modules() if isinstance(m, AdaptedLinear)).config
    other = np.ones((6, 88), np.float32)
    with pytest.raises(AdapterError, match=r"vera_A is not what projection_prng_key = 9 gives"):
        vera.check_shared(config, {"base_model.vera_A": other})


def test_dora_folds_as_its_formula_says(tmp_path: Path) -> None:
    """Float64, and the norm's gradient left out: the formula of the paper, not of this code."""
    decoder, parameters = adapted("dense", "dora", tmp_path)
    randomize(parameters)
    layer = next(m for m in decoder.modules() if isinstance(m, AdaptedLinear))
    w = layer.base_layer.dequantize().double()
    a, b, m = (layer.tensors[name].detach().double() for name in ("lora_A", "lora_B", "magnitude"))
    v = w + 2.5 * b @ a
    x, d_y = (torch.randn(9, n, dtype=torch.float64) for n in (w.shape[1], w.shape[0]))
    magnitude, a_, b_ = (t.clone().requires_grad_() for t in (m, a, b))
    y = (x @ (w + 2.5 * b_ @ a_).T) * (magnitude / v.norm(dim=1))
    wanted = torch.autograd.grad(y, [a_, b_, magnitude], d_y)
    layer(x.float()).backward(d_y.float())
    for name, value in zip(("lora_A", "lora_B", "magnitude"), wanted, strict=True):
        np.testing.assert_allclose(layer.tensors[name].grad, value, rtol=1e-3, atol=1e-3)


def test_tensors_that_do_not_fit_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    _, parameters = adapted("dense", "lora", tmp_path)
    before = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    *others, last = other = {name: value + 1 for name, value in before.items()}
    short = {name: other[name] for name in others}
    for tensors, message in (
        (short, f"{last} is missing"), (other | {"lora_A": other[last]}, "lora_A has no place"),
        (short | {last: other[last][:1]}, rf"{last} has shape \[1, \d+\]; \[\d+, \d+\] was expected"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=f"The adapter does not fit: {message}"):
            load_tensors(parameters, tensors)
        assert all(np.array_equal(parameters[name].detach().numpy(), value) for name, value in before.items())


def test_wrong_adapters_are_refused_by_name(tmp_path: Path) -> None:
    decoder, parameters = adapted("dense", "lora", tmp_path)
    config = next(m for m in decoder.modules() if isinstance(m, AdaptedLinear)).config
    good = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    first = "model.layers.0.self_attn.q_proj.lora_"

    def refused(tensors: dict[str, np.ndarray], message: str, **peft: object) -> None:
        save_adapter(tmp_path, config, tensors)
        if peft:
            raw = json.loads((tmp_path / "adapter_config.json").read_text())
            (tmp_path / "adapter_config.json").write_text(json.dumps(raw | peft))
        with pytest.raises(AdapterError, match=message):
            load_adapter(tmp_path, decoder.config)

    refused({k: v for k, v in good.items() if k != first + "B"}, r"q_proj\.lora_B is missing")
    refused(good | {first + "B": np.ones((5, 3), np.float32)}, r"lora_B has shape \[5, 3\]; \[72, 3\] was expected")
    refused(good | {"model.layers.7.mlp.up_proj.lora_A": np.ones((3, 72), np.float32)}, r"layers\.7\.mlp\.up_proj")
    refused(good, r"lora_bias = True", lora_bias=True)
    refused(good, r"peft_type 'LOHA'; supported are 'lora', 'dora'", peft_type="LOHA")
    refused(good, r"r = 9; its tensors have rank \[3\]", r=9)
    with pytest.raises(AdapterError, match=r"holds NaN or infinity"):
        save_adapter(tmp_path, config, good | {first + "A": np.full((3, 72), np.nan, np.float32)})
    with pytest.raises(AdapterError, match=r"is no adapter folder"):
        load_adapter(tmp_path / "nowhere", decoder.config)
