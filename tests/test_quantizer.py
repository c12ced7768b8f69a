"""base/ folders: the right bytes, read by transformers where they should be, and nothing half-written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from conftest import tiny_config, write_model, write_tokenizer
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from edgetune.base import open_base
from edgetune.errors import ConfigError, ModelError
from edgetune.grids import GRIDS
from edgetune.models import FAMILIES
from edgetune.models.decoder import load_decoder
from edgetune.quantizer import quantize, read_manifest

IDS = torch.randint(0, 301, (2, 29), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantized_model(family: str, grid: str, dtype: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    model = write_model(tmp_path / "model", config, dtype=dtype)
    base = open_base(quantize(model, grid, tmp_path / "base"))
    assert base.grid == grid
    tensors = {f"{module}.weight": base.dequantize(module) for module in base.config.matrices()}
    tensors |= {name: base.weights.float32(name) for name in base.config.vectors()}
    dense = tmp_path / "dense"
    dense.mkdir()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    (dense / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()(IDS).logits
        assert (load_decoder(base.folder)(IDS) - expected).abs().max() < 1e-4
        original = load_decoder(model)(IDS)
        error = (expected - original).norm() / original.norm()
    assert 0.01 < error < 0.6, "quantization changes the model, but not beyond recognition"


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_an_nf4_base_with_dense_embeddings(family: str, double_quant: bool, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config(family))
    base = quantize(model, "nf4", tmp_path / "base", double_quant=double_quant, dense_embeddings=True)
    # In training mode bitsandbytes dequantizes; in evaluation on AVX-512 it repacks for bfloat16 kernels.
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    assert any(type(module).__name__ == "Linear4bit" for module in theirs.modules())
    with torch.no_grad():
        expected, found = theirs(IDS).logits, load_decoder(base)(IDS)
    assert (found - expected).abs().max() < 1e-4


def test_nf4_base_holds_the_bits_of_bitsandbytes(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"), dtype="bfloat16")
    stored = load_file(quantize(model, "nf4", tmp_path / "base") / "model.safetensors")
    weights = open_base(model).weights
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        codes, state = quantize_4bit(torch.from_numpy(weights.float32(name)).bfloat16(), blocksize=64, quant_type="nf4")
        np.testing.assert_array_equal(stored[name], codes.numpy())
        np.testing.assert_array_equal(stored[f"{name}.absmax"], state.absmax.numpy())


def test_shards_and_one_file_give_the_same_base(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("qwen2"))
    tensors = load_file(model / "model.safetensors")
    one = quantize(model, "int4", tmp_path / "one")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {}
    for i, members in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in members}, model / f"part-{i}.safetensors")
        where |= dict.fromkeys(members, f"part-{i}.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    two = quantize(model, "int4", tmp_path / "two")
    assert read_manifest(one)["base_sha256"] == read_manifest(two)["base_sha256"]


def test_codes_stay_mapped(tmp_path: Path) -> None:
    for grid in GRIDS:
        base = open_base(quantize(write_model(tmp_path / "m", tiny_config("llama")), grid, tmp_path / grid))
        for array in base.codes("model.layers.0.mlp.up_proj").values():
            assert not array.flags.owndata


def test_the_manifest_names_every_file_and_notices_a_cut_one(tmp_path: Path) -> None:
    base = quantize(write_model(tmp_path / "model", tiny_config("llama")), "int4", tmp_path / "base")
    manifest = read_manifest(base)
    assert set(manifest["files"]) == {p.name for p in base.iterdir()} - {"manifest.json"}
    assert manifest["grid"] == "int4"
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match=r"has 1000 bytes; its manifest says"):
        read_manifest(base)
    (base / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
    with pytest.raises(ModelError, match=r"format_version 2; this edgetune reads 1"):
        read_manifest(base)


def test_real_model_on_both_grids(real: Callable[[str], Path], tmp_path: Path) -> None:
    """stories260k: 172 is a multiple of neither 32 nor 64. Loss on its oracle text stays near the dense one."""
    folder = real("stories260k")
    golden = json.loads((folder / "oracle.json").read_text())
    ids = torch.tensor([golden["prompt_ids"] + golden["expected_new_token_ids"]])

    def nll(path: Path) -> float:
        with torch.no_grad():
            return float(torch.nn.functional.cross_entropy(load_decoder(path)(ids)[0, :-1], ids[0, 1:]))

    assert nll(folder) == pytest.approx(golden["mean_nll_of_expected_tokens"], abs=1e-3)
    for grid in GRIDS:
        assert nll(quantize(folder, grid, tmp_path / grid)) < golden["mean_nll_of_expected_tokens"] + 0.35


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (lambda m, t: quantize(m, "int5", t / "b"), ConfigError, r"grid = 'int5'; choose from nf4, int4"),
        (lambda m, t: quantize(m, "int4", t / "b", double_quant=True), ConfigError, r"double_quant needs grid 'nf4'"),
        (lambda m, t: quantize(quantize(m, "int4", t / "a"), "nf4", t / "b"), ModelError, r"on the int4 grid already"),
        (lambda m, t: quantize(m, "int4", m), ConfigError, r"exists and is not empty.*--force"),
        (lambda m, t: quantize(m, "int4", m, force=True), ConfigError, r"not empty and holds no manifest.json"),
        (lambda m, t: quantize(m, "int4", m.parent, force=True), ConfigError, r"not empty and holds no manifest.json"),
    ],
)
def test_wrong_requests(action: Callable[[Path, Path], Any], error: type, message: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))
    with pytest.raises(error, match=message):
        action(model, tmp_path)
    assert not (tmp_path / "b").exists()


def test_wrong_tensors_are_all_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.norm.weight")
    tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((3, 5), np.float32)
    tensors["model.layers.0.mlp.router.weight"] = np.ones((3, 5), np.float32)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        quantize(model, "int4", tmp_path / "base")
    message = str(caught.value)
    assert "model.norm.weight is missing; [72] was expected" in message
    assert "up_proj.weight has shape [3, 5]; [88, 72] was expected" in message
    assert "router.weight [3, 5] has no place in a llama" in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_tensor_that_is_not_finite_is_refused_and_leaves_nothing(tmp_path: Path, name: str, value: float) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))
    tensors = load_file(model / "model.safetensors")
    tensors[name].flat[17] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{re.escape(name)} holds NaN or infinity"):
        quantize(model, "int4", tmp_path / "base", dense_embeddings=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama", vocab_size=262))
    write_tokenizer(model, 262)
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"</s>":2', '"</s>":700').replace('"</s>": 2', '"</s>": 700'))
    with pytest.raises(ModelError, match="embedding has 262 rows"):
        quantize(model, "int4", tmp_path / "base")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_force_deletes_nothing_that_quantize_did_not_write(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))
    base = quantize(model, "int4", tmp_path / "base")
    before = sorted(path.name for path in base.iterdir())
    (base / "notes").mkdir()
    (base / "notes" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"base holds notes, which manifest.json does not name \(2 such in all\)"):
        quantize(model, "nf4", base, force=True)
    assert (base / "notes" / "thesis.txt").read_text() == "precious"
    assert sorted(path.name for path in base.iterdir()) == sorted([*before, "notes"])
    assert read_manifest(base)["grid"] == "int4"


def test_force_replaces_and_links_are_never_followed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tiny_config("llama"))
    quantize(model, "int4", tmp_path / "base")
    assert read_manifest(quantize(model, "nf4", tmp_path / "base", force=True))["grid"] == "nf4"
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"is a link or a file"):
        quantize(model, "int4", tmp_path / "link", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "link", "model"]
