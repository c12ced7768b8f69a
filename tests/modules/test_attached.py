"""`attach` against torch.nn, autograd and PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_module import ImageNet2d, SensorNet, drawn, seeded
from torch import nn
from torch.nn.utils import parametrizations

import edgetune as et
from edgetune.grids import GRIDS
from edgetune.modules.layers import FrozenLayer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch.nn's own

NETS = [(SensorNet, (4, 3, 41)), (ImageNet2d, (4, 2, 13, 11))]


def with_frozen_weights(net: nn.Module, attached: et.AttachedModule, *, merged: bool = False) -> nn.Module:
    """An untouched copy of the network with the weights that the attached one computes with."""
    for name, layer in attached.frozen_layers().items():
        weight = layer.weight if merged else layer.frozen.dense()
        net.get_submodule(name).weight.data.copy_(weight.detach())
    return net


@pytest.fixture
def slow_path() -> object:
    """Encoder layers as their linears compute, which the fused operator of evaluation passes by."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("kind", "shape"), NETS)
def test_it_begins_as_the_rounded_network_and_merges(kind: type[nn.Module], shape: tuple[int, ...], grid: str) -> None:
    net, x = seeded(kind), torch.randn(shape)
    attached = et.attach(copy.deepcopy(net), et.LoraConfig(r=3, lora_alpha=5), grid=grid)
    rounded = with_frozen_weights(copy.deepcopy(net), attached)
    torch.testing.assert_close(attached(x), rounded(x), atol=2e-6, rtol=1e-5)
    drawn(attached)
    merged = with_frozen_weights(copy.deepcopy(net), attached, merged=True)
    torch.testing.assert_close(attached(x), merged(x), atol=5e-6, rtol=1e-5)
    assert (attached(x) - rounded(x)).abs().max() > 1e-2, "the adapter does something"
    with attached.disable_adapter():
        torch.testing.assert_close(attached(x), rounded(x), atol=2e-6, rtol=1e-5)


def test_an_evaluated_encoder_layer_computes_with_its_adapter() -> None:
    attached, x = drawn(et.attach(seeded(SensorNet))), torch.randn(2, 3, 40)
    expected = attached(x)
    with torch.no_grad():  # torch then fuses the encoder layer, and reads `weight`
        torch.testing.assert_close(attached(x), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "shape"), NETS)
def test_peft_loads_it_and_agrees(
    kind: type[nn.Module], shape: tuple[int, ...], tmp_path: Path, slow_path: object
) -> None:
    net, x = seeded(kind), torch.randn(shape)
    saved = ["gru", "head"] if kind is SensorNet else []
    config = et.LoraConfig(r=3, lora_alpha=5, use_rslora=True)
    attached = drawn(et.attach(copy.deepcopy(net), config, modules_to_save=saved))
    attached.save(tmp_path)
    twin = peft.PeftModel.from_pretrained(with_frozen_weights(net, attached), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(attached(x), twin(x), atol=1e-5, rtol=1e-5)

    attached(x).square().sum().backward()
    twin(x).square().sum().backward()
    theirs = {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}
    for name, value in attached.trainable().items():
        lora = name.endswith(("lora_A", "lora_B"))
        module, _, last = name.rpartition(".")
        key = f"{name}.default.weight" if lora else f"{module}.modules_to_save.default.{last}"
        torch.testing.assert_close(value.grad, theirs[f"base_model.model.{key}"], atol=1e-5, rtol=1e-4)


def test_what_peft_saves_is_loaded(tmp_path: Path) -> None:
    attached = drawn(et.attach(seeded(ImageNet2d), et.LoraConfig(r=2)))
    attached.save(tmp_path / "mine")
    peft.PeftModel.from_pretrained(seeded(ImageNet2d), tmp_path / "mine").save_pretrained(tmp_path / "theirs")
    other = et.attach(seeded(ImageNet2d), et.LoraConfig(r=2)).load(tmp_path / "theirs")
    for name, value in attached.trainable().items():
        torch.testing.assert_close(other.trainable()[name], value, atol=0, rtol=0)


def test_gradients_reach_the_adapter_alone_and_nothing_dense_is_kept() -> None:
    attached = et.attach(seeded(SensorNet)).train()
    before = attached.base_sha256
    drawn(attached)(torch.randn(3, 3, 40)).sum().backward()
    with_gradient = {name for name, value in attached.module.named_parameters() if value.grad is not None}
    assert with_gradient == set(attached.trainable())
    assert all(name.endswith(("lora_A", "lora_B")) for name in with_gradient)
    assert attached.base_sha256 == before, "statistics and codes are as they were"
    layer = attached.frozen_layers()["wide"]
    assert layer.frozen.nbytes == GRIDS["int4"].nbytes((40, 36 * 4)) < 40 * 36 * 4 * 4 / 6


def test_the_summary_says_what_stays_dense_and_why() -> None:
    attached = et.attach(seeded(SensorNet), modules_to_save=["head"])
    reports = {layer.name: layer for layer in attached.layers}
    assert {name for name, layer in reports.items() if layer.grid} == {
        "wide", "strided", "attention.linear1", "attention.linear2"
    }  # fmt: skip
    assert reports["stem"].adapted and reports["stem"].reason == "dense: 540 weights, fewer than 1,024"
    assert "groups" in reports["depthwise"].reason and not reports["depthwise"].adapted
    assert reports["gru"].reason.startswith("recurrent, stays dense")
    assert "in_proj_weight" in reports["attention.self_attn"].reason
    assert sum(layer.nbytes for layer in attached.layers) == attached.frozen_nbytes
    for text in ("gru", "recurrent, stays dense", "trained in full"):
        assert text in attached.summary()


def test_short_rows_and_layers_that_others_compute_with_stay_dense() -> None:
    hooked = nn.Linear(64, 64)
    hooked.register_forward_hook(lambda *_: None)
    net = nn.Sequential(
        nn.Linear(64, 64), parametrizations.weight_norm(nn.Linear(64, 64)), hooked, nn.Linear(8, 200),
        nn.Conv1d(40, 40, 3, padding=1, padding_mode="circular"),
    )  # fmt: skip
    reports = et.attach(net).layers
    reason = {layer.name: layer.reason for layer in reports}
    assert reason["0"] == ""
    assert "parametrization" in reason["1"] and "hook" in reason["2"] and "circular" in reason["4"]
    assert reason["3"] == "dense: rows of 8 are filled up to 32, which saves less than half"


def test_one_layer_under_two_names_is_adapted_once() -> None:
    shared = nn.Linear(40, 40)
    attached = et.attach(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert attached.module["a"] is attached.module["b"][0]
    assert set(attached.trainable()) == {"a.lora_A", "a.lora_B"}


def test_unbatched_rows_and_dilation() -> None:
    net = nn.Sequential(nn.Conv1d(40, 40, 3, dilation=2, padding="same"))
    attached, x = drawn(et.attach(copy.deepcopy(net))), torch.randn(40, 30)
    layer = attached.module[0]
    assert isinstance(layer, FrozenLayer)
    net[0].weight.data.copy_(layer.weight.detach())
    torch.testing.assert_close(attached(x), net(x), atol=5e-6, rtol=1e-5)


def test_what_cannot_be_attached() -> None:
    with pytest.raises(et.ModelError, match=r"no layer of this network can be adapted: 0: recurrent, stays dense"):
        et.attach(nn.Sequential(nn.GRU(3, 4)))
    with pytest.raises(et.ModelError, match="no layer of this module can be adapted: it has no weights"):
        et.attach(nn.ReLU())
    with pytest.raises(et.ModelError, match=r"is a single Linear\. Put it into a module"):
        et.attach(nn.Linear(40, 40))
    with pytest.raises(et.ModelError, match=r"0\.weight is float16 on cpu; float32 on the CPU was expected"):
        et.attach(nn.Sequential(nn.Linear(3, 4)).half())
    attached = et.attach(nn.Sequential(nn.Linear(40, 40)))
    with pytest.raises(et.ModelError, match="has an adapter already"):
        et.attach(attached.module)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"adapter": et.LoraConfig(target_modules=("hed",))},
            "'hed', which the network has no layer of. Did you mean head",
        ),
        (
            {"adapter": et.LoraConfig(target_modules=("gru",))},
            "target_modules has 'gru', and gru recurrent, stays dense",
        ),
        ({"adapter": et.LoraConfig(target_modules=())}, "target_modules has nothing"),
        ({"adapter": et.LoraConfig(layers_to_transform=(1,))}, "layers_to_transform speaks of a decoder's blocks"),
        ({"adapter": et.LoraConfig(r=0)}, "r = 0"),
        ({"adapter": et.LoraConfig(lora_alpha=-1)}, "lora_alpha = -1"),
        ({"adapter": et.LoraConfig(lora_dropout=1.0)}, "lora_dropout = 1.0"),
        ({"adapter": "lora"}, "a LoraConfig was expected"),
        ({"modules_to_save": ["heads"]}, "modules_to_save has 'heads'"),
        ({"grid": "int2"}, "grid = 'int2'"),
    ],
)
def test_settings_that_are_refused_leave_the_network_as_it_is(setting: dict[str, object], message: str) -> None:
    net = seeded(SensorNet)
    with pytest.raises(et.ConfigError, match=message.replace("(", r"\(")):
        et.attach(net, **setting)  # type: ignore[arg-type]
    assert not any(isinstance(layer, FrozenLayer) for layer in net.modules())
    assert all(value.requires_grad for value in net.parameters())


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    attached = drawn(et.attach(seeded(ImageNet2d), et.LoraConfig(r=2)))
    attached.save(tmp_path)
    with pytest.raises(et.AdapterError, match=r"has r = 2, attached is 4; lora_alpha = 4, attached is 8"):
        et.attach(seeded(ImageNet2d), et.LoraConfig(r=4)).load(tmp_path)
    with pytest.raises(et.AdapterError, match="is missing"):
        et.attach(seeded(SensorNet), et.LoraConfig(r=2)).load(tmp_path)
    with pytest.raises(et.AdapterError, match="is no adapter folder"):
        attached.load(tmp_path / "nowhere")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.a.lora_A.weight"][0] = np.nan
    save_file(tensors, file)
    with pytest.raises(et.AdapterError, match=r"a\.lora_A\.weight holds NaN"):
        attached.load(tmp_path)
    attached.trainable()["a.lora_A"].data[0] = torch.inf
    with pytest.raises(et.AdapterError, match="holds NaN or infinity, and is not saved"):
        attached.save(tmp_path)
