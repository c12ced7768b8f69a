"""First values of LoRA beside PEFT's and beside whole decompositions, and what they refuse."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from edgetune.adapters.attach import AdaptedLinear, attach, load_tensors
from edgetune.adapters.base import load_adapter
from edgetune.adapters.dora import DoraConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.errors import ConfigError, EdgetuneError, ModelError
from edgetune.models import load_config
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.planner import plan
from edgetune.planner.plans import TrainConfig
from edgetune.training.initialization import initialize
from edgetune.training.inputs import Inputs, read_inputs
from edgetune.training.loop import train
from edgetune.weights import sha256_file
from tests.training.conftest import at_step, interrupt, make_base, make_plan, write_rows

IDS = torch.randint(0, 301, (2, 33), generator=torch.Generator().manual_seed(4))


def initialized(base: Path, rows: Path, config: LoraConfig, **overrides: Any) -> tuple[Decoder, Inputs, list[str]]:
    made = make_plan(base, adapter=config, **overrides)
    inputs = read_inputs(made, base, "", rows, None, False)
    decoder = load_decoder(base)
    decoder.workspace.tile_weights = 2000
    attach(decoder, made.adapter, made.seed)
    told: list[str] = []
    initialize(decoder, inputs, nullcontext(), told.append)
    return decoder, inputs, told


def adapted(decoder: Decoder) -> list[AdaptedLinear]:
    return [module for module in decoder.modules() if isinstance(module, AdaptedLinear)]


@pytest.mark.parametrize(("family", "grid"), [("llama", "int4"), ("qwen2", "nf4"), ("gemma3_text", "int4")])
def test_loftq_recovers_what_quantization_lost(family: str, grid: str, tmp_path: Path) -> None:
    base, rows = make_base(tmp_path, family, grid), write_rows(tmp_path / "rows.jsonl", 4)
    before = sha256_file(base / "model.safetensors")
    model = tmp_path / "model"
    config = LoraConfig(r=8, lora_alpha=12, init_lora_weights="loftq", init_from=str(model))
    decoder, _, told = initialized(base, rows, config)
    assert told == [f"loftq: the adapter starts at what quantization lost of {model}, so not as the base"]
    original = open_base(model)
    for layer in adapted(decoder):
        lost = torch.from_numpy(original.dequantize(layer.slot.place)) - layer.base_layer.dequantize()
        found = layer.merged_weight() - layer.base_layer.dequantize()
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        best = left[:, :8] * values[:8] @ right[:8]
        caught, most = (1 - ((lost - x).norm() / lost.norm()) ** 2 for x in (found, best))
        assert 0.95 * most < caught < most + 1e-5, layer.slot.place
        a, b = layer.tensors["lora_A"], layer.tensors["lora_B"]
        np.testing.assert_allclose(a.detach().norm(dim=1), b.detach().norm(dim=0), rtol=1e-3)
    with torch.no_grad():
        wanted, plain, found = (m(IDS) for m in (load_decoder(model), load_decoder(base), decoder))
    assert (found - wanted).square().mean() < 0.9 * (plain - wanted).square().mean()
    assert sha256_file(base / "model.safetensors") == before


def test_a_rank_beyond_the_weights(tmp_path: Path) -> None:
    """What is left of A stays random and of B zero, so that it can learn."""
    base, rows = make_base(tmp_path, "llama", "int4"), write_rows(tmp_path / "rows.jsonl", 4)
    small = min(min(shape) for shape in load_config(base).linears().values())
    config = LoraConfig(r=small + 5, init_lora_weights="loftq", init_from=str(tmp_path / "model"))
    decoder, _, _ = initialized(base, rows, config)
    original = open_base(tmp_path / "model")
    layer = next(layer for layer in adapted(decoder) if min(layer.base_layer.shape) == small)
    a, b = (layer.tensors[name].detach() for name in ("lora_A", "lora_B"))
    assert b[:, small:].eq(0).all()
    assert a[small:].norm(dim=1).min() > 0
    np.testing.assert_allclose(layer.merged_weight(), original.dequantize(layer.slot.place), atol=1e-5)


def test_eva_is_the_inputs_decomposition(tmp_path: Path) -> None:
    base, rows = make_base(tmp_path, "llama", "int4"), write_rows(tmp_path / "rows.jsonl", 12)
    config = LoraConfig(r=4, init_lora_weights="eva", layers_to_transform=(1,))
    decoder, inputs, told = initialized(base, rows, config, batch_size=3)
    assert told == ["eva: the adapter starts at the main directions of the rows' activations; it does nothing yet"]
    assert len(inputs.windows) > 2
    assert not decoder.workspace.sizes, "what it took is not there beside a step's buffers"
    seen: dict[str, list[torch.Tensor]] = {}
    for layer in adapted(decoder):
        place = layer.slot.place
        layer.register_forward_pre_hook(
            lambda _, x, place=place: seen.setdefault(place, []).append(x[0].flatten(0, -2))
        )
    plain = load_decoder(base)
    for window in inputs.windows:
        ids, positions, segments = (
            torch.from_numpy(x[: window.num_tokens])[None]
            for x in (window.input_ids, window.position_ids, window.segment_ids)
        )
        with torch.no_grad():
            assert torch.equal(decoder(ids, positions, segments), plain(ids, positions, segments))
    for layer in adapted(decoder):
        x = torch.cat(seen[layer.slot.place]).double()
        a = layer.tensors["lora_A"].detach().double()
        assert not layer.tensors["lora_B"].any()
        np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-5)
        _, values, _ = torch.linalg.svd(x, full_matrices=False)
        assert (x @ a.T).square().sum() > 0.95 * values[:4].square().sum()


@pytest.mark.parametrize("kind", ["loftq", "eva"])
def test_a_run_goes_on_without_the_original_and_peft_reads_it(kind: str, tmp_path: Path) -> None:
    base, rows = make_base(tmp_path, "llama", "nf4"), write_rows(tmp_path / "rows.jsonl", 24)
    origin = str(tmp_path / "model") if kind == "loftq" else None
    config = TrainConfig(max_steps=4, batch_size=2, max_seq_length=64, learning_rate=0.01)
    made = plan(
        base, "host", data=rows, config=config, adapter=LoraConfig(r=4, init_lora_weights=kind, init_from=origin)
    )
    run = train(made, base, data=rows, out=tmp_path / "run")
    name = "adapter_model.safetensors"
    config_read, tensors = load_adapter(run.folder, made.model_config)
    decoder = load_decoder(tmp_path / "model")
    load_tensors(attach(decoder, config_read), tensors)
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), run.folder
    ).eval()
    with torch.no_grad():
        np.testing.assert_allclose(peft(IDS).logits, decoder(IDS), atol=1e-4)
    train(made, base, data=rows, out=tmp_path / "again", on_progress=at_step(2, interrupt))
    (tmp_path / "model").rename(tmp_path / "gone")
    again = train(made, base, data=rows, out=tmp_path / "again", resume=True)
    assert sha256_file(again.folder / name) == sha256_file(run.folder / name)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"init_lora_weights": "pissa"}, ConfigError, r"'pissa' freezes what is left .* Take loftq"),
        ({"init_lora_weights": "pissa_niter_4"}, ConfigError, r"'pissa_niter_4' freezes"),
        ({"init_lora_weights": "olora"}, ConfigError, r"'olora'; choose from kaiming, loftq, eva"),
        ({"init_from": "model"}, ConfigError, r"init_from is for init_lora_weights = 'loftq', and that is 'kaiming'"),
        ({"init_lora_weights": "loftq"}, ConfigError, r"Say where that is with --init-from"),
        ({"init_lora_weights": "loftq", "init_from": "nowhere"}, ModelError, r"nowhere"),
        ({"init_lora_weights": "loftq", "init_from": "base"}, ModelError, r"is on the int4 grid; the original model"),
        ({"init_lora_weights": "loftq", "init_from": "wide"}, ModelError, r"has model\.\S+ of shape \(.*not what this"),
        ({"init_lora_weights": "loftq", "init_from": "other"}, ModelError, r"differs\. Give --init-from the original"),
        ({"init_lora_weights": "eva", "r": 70}, ConfigError, r"fewer than r = 70 directions .*Lower r"),
    ],
)
def test_what_cannot_start_is_refused(
    settings: dict[str, Any], error: type[EdgetuneError], message: str, tmp_path: Path
) -> None:
    base, rows = make_base(tmp_path, "llama", "int4"), write_rows(tmp_path / "rows.jsonl", 3)
    write_model(tmp_path / "wide", tiny_config("llama", intermediate_size=160))
    write_model(tmp_path / "other", tiny_config("llama"), seed=9)
    if settings.get("init_from"):
        settings = settings | {"init_from": str(tmp_path / settings["init_from"])}
    with pytest.raises(error, match=message):
        initialized(base, rows, LoraConfig(**settings))


def test_what_other_methods_and_engines_refuse(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", "int4")
    with pytest.raises(ConfigError, match=r"'loftq' is for lora: dora starts at the norms"):
        DoraConfig(init_lora_weights="loftq").resolved(load_config(base))
    with pytest.raises(ConfigError, match=r"init_lora_weights cannot be set here"):
        plan(base, "host", adapter=LoraConfig(init_lora_weights="eva"), engine="ort")
