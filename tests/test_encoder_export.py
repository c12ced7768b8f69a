"""`export` of an encoder: what it writes, what it refuses, and that its gate catches what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_encoder import encoder_hf, write_encoder
from tiny_run import adapter_tensors, write_run

import edgetune as et
from edgetune.adapter_file import BoundAdapter, read_adapter, write_adapter
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.bitfit import BitfitConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.bundle import EncoderBundle, explain, load_bundle
from edgetune.errors import AdapterError, BundleError, ConfigError, ExportError, ModelError, ParityError
from edgetune.exporter import encoder as encoder_gate
from edgetune.graphs import FORMATS
from edgetune.graphs.encoder import _Encoder
from edgetune.models.encoder import Encoder, load_encoder
from edgetune.quantizer import quantize
from edgetune.runtime.embedding import open_embedder
from edgetune.tokenizer import load_tokenizer

TEXTS = ["a cat sits outside", "kitten", "interest rates rose again and again", "zz"]
LORA = LoraConfig(r=3, lora_alpha=5, target_modules=("query", "dense"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "model", encoder_hf())


@pytest.fixture(scope="module")
def bases(model: Path) -> dict[str, Path]:
    return {grid: quantize(model, grid, model.parent / grid) for grid in ("int4", "nf4")}


def torch_embeddings(encoder: Encoder, base: Path) -> np.ndarray:
    """Each text alone, without padding."""
    tokenizer, found = load_tokenizer(base), []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            found.append(encoder(ids, torch.ones_like(ids))[0].numpy())
    return np.stack(found)


def fp32(bundle: EncoderBundle, adapter: bool | str = True) -> np.ndarray:
    return open_embedder(bundle, adapter=adapter, fp32_compute=True).embed(TEXTS)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_model_becomes_a_bundle_of_any_weights(model: Path, weights: str, tmp_path: Path) -> None:
    bundle = et.export(model, out=tmp_path / "bundle", weights=weights)
    assert isinstance(bundle, EncoderBundle)
    assert {path.name for path in bundle.folder.iterdir()} == {
        "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json", "edgetune.json"
    }  # fmt: skip
    assert bundle.manifest["model"] == {
        "model_type": "bert", "vocab_size": 301, "hidden_size": 66, "num_hidden_layers": 2,
        "max_position_embeddings": 75, "pooling": "mean", "normalize": True,
    }  # fmt: skip
    assert len(bundle.slots) == 12
    figures = bundle.summary()["parity"]
    assert figures["rows"] >= 1000
    assert 0 < figures["max_abs_hidden"] < 1e-4
    assert figures["min_cosine"] > 0.99999
    assert ("fast" in figures) == FORMATS[weights].ROUNDS_ACTIVATIONS
    assert "hidden states differ from torch's by at most" in explain(bundle.summary())
    cosines = (et.embed(bundle, TEXTS) * torch_embeddings(load_encoder(model), model)).sum(1)
    assert cosines.min() > (0.9 if weights in ("int4", "nf4", "standard", "int8-dynamic") else 0.999)


@pytest.mark.parametrize("grid", ["int4", "nf4"])
def test_an_adapter_that_peft_could_have_trained_ships_beside_its_base(
    bases: dict[str, Path], grid: str, tmp_path: Path
) -> None:
    base = bases[grid]
    bundle = et.export(write_run(tmp_path / "run", base, LORA), out=tmp_path / "bundle")
    assert isinstance(bundle, EncoderBundle)
    assert bundle.manifest["rounding"] is None
    assert bundle.manifest["parity"]["adapter"] == "run"
    encoder = load_encoder(base)
    plain = torch_embeddings(encoder, base)
    config, tensors = adapter_tensors(base, LORA)
    load_tensors(attach(encoder, config), tensors)
    tuned = torch_embeddings(encoder, base)
    np.testing.assert_allclose(fp32(bundle), tuned, atol=1e-5, rtol=0)
    np.testing.assert_allclose(fp32(bundle, adapter=False), plain, atol=1e-5, rtol=0)
    change = bundle.adapters["adapter"].probe_change
    assert 0.1 < change < 10

    second = et.add_adapter(bundle, write_run(tmp_path / "second", base, LoraConfig(r=2, lora_alpha=7)))
    assert isinstance(second, EncoderBundle)
    listed = et.list_adapters(second)["adapters"]
    assert {name: entry["r"] for name, entry in listed.items()} == {"adapter": 3, "second": 2}
    assert et.check_adapters(second)["adapters"]["second"]["probe_change"] == listed["second"]["probe_change"]
    embedder = open_embedder(second, fp32_compute=True)
    before = embedder.embed(TEXTS)
    embedder.use_adapter("second")
    assert np.abs(embedder.embed(TEXTS) - before).max() > 0.01
    embedder.use_adapter(second.folder / "adapter.safetensors")
    np.testing.assert_array_equal(embedder.embed(TEXTS), before)
    with pytest.raises(AdapterError, match=r"has no adapter 'nope'; it has adapter, second"):
        embedder.use_adapter("nope")
    trained = read_adapter(second.folder / "second.safetensors")
    nothing = {name: value * np.float32(1e-20) for name, value in trained.tensors.items()}
    write_adapter(tmp_path, "dead", BoundAdapter(trained.binding, nothing))
    with pytest.raises(AdapterError, match=r"dead\.safetensors changes nothing"):
        embedder.use_adapter(tmp_path / "dead.safetensors")
    np.testing.assert_array_equal(embedder.embed(TEXTS), before)
    assert not et.remove_adapter(et.remove_adapter(second, "second"), "adapter").adapters


def test_a_folder_that_peft_wrote_is_exported(model: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModel

    base = AutoModel.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    settings = peft.LoraConfig(r=5, lora_alpha=3, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    tuned = peft.get_peft_model(base, settings)
    for name, value in tuned.named_parameters():
        if "lora_B" in name:
            value.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    tuned.save_pretrained(tmp_path / "adapter")
    bundle = et.export(tmp_path / "adapter", out=tmp_path / "bundle")
    assert isinstance(bundle, EncoderBundle)
    tokenizer, plain = load_tokenizer(model), torch_embeddings(load_encoder(model), model)
    for text, found, before in zip(TEXTS, et.embed(bundle, TEXTS), plain, strict=True):
        with torch.no_grad():
            states = tuned(input_ids=torch.tensor([tokenizer.encode(text)])).last_hidden_state[0].numpy()
        wanted = states.mean(0) / np.linalg.norm(states.mean(0))
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
        assert np.abs(wanted - before).max() > 0.01


@pytest.mark.parametrize("config", [LORA, BitfitConfig()])
def test_an_adapter_is_merged(bases: dict[str, Path], tmp_path: Path, config: AdapterConfig) -> None:
    run = write_run(tmp_path / "run", bases["int4"], config)
    bundle = et.export(run, out=tmp_path / "bundle", merge=True, weights="fp32")
    assert isinstance(bundle, EncoderBundle)
    assert bundle.slots == ()
    encoder = load_encoder(bases["int4"])
    config, tensors = adapter_tensors(bases["int4"], config)
    load_tensors(attach(encoder, config), tensors)
    np.testing.assert_allclose(et.embed(bundle, TEXTS), torch_embeddings(encoder, bases["int4"]), atol=1e-5, rtol=0)
    rounding = bundle.summary()["rounding"]
    assert rounding["min_cosine"] > 0.99999
    assert "1 of the adapter's change" not in explain(bundle.summary())


def test_rounding_that_loses_the_adapter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    weak = LoraConfig(r=3, lora_alpha=0.05, target_modules=("query",))
    run = write_run(tmp_path / "run", bases["nf4"], weak)
    with pytest.raises(
        ExportError,
        match=r"Rounding nf4 weights to int4 loses the adapter: it moves 2 of 2 matrices .*cosine .*keep --weights nf4",
    ):
        et.export(run, out=tmp_path / "bundle", weights="int4")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(ExportError, match=r"To be exact, leave --merge out"):
        et.export(run, out=tmp_path / "bundle", merge=True)
    bundle = et.export(run, out=tmp_path / "bundle", weights="int4", accept_loss=True)
    cost = bundle.summary()["rounding"]
    assert cost["max_error_over_delta"] > 1
    assert 0.8 < cost["min_cosine"] <= cost["mean_cosine"] < 0.9999
    assert "rounding  moved weights by" in explain(bundle.summary())


@pytest.mark.parametrize("part", ["_seen", "_pooled"])
def test_the_gate_refuses_a_graph_that_computes_something_else(
    model: Path, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., object] = getattr(_Encoder, part)

    def wrong(self: _Encoder, x: object, other: object) -> object:
        if part == "_seen":  # all tokens are those of the first text
            first = self.b.constant("/zero", np.array([0], np.int64))
            return self.b.op("/first", "Gather", [whole(self, x, other), first], axis=0)
        half = self.b.constant("/half", np.array(0.5, np.float32))  # half as long: no cosine shows it
        return self.b.op("/half", "Mul", [whole(self, x, other), half])

    monkeypatch.setattr(_Encoder, part, wrong)
    with pytest.raises(ParityError, match=r"does not compute what torch does.*Nothing was written"):
        et.export(model, out=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("hidden", "embedding"), [([0.0, 2e-3], [1.0, 0.0]), ([0.0, np.nan], [1.0, 0.0]), ([0.0, 0.0], [np.nan, 0.0])]
)
def test_hidden_states_or_embeddings_alone_fail_the_gate(hidden: list[float], embedding: list[float]) -> None:
    wanted = [(np.zeros((1, 2)), np.array([[1.0, 0.0]]))]
    assert encoder_gate._check_exact(wanted, wanted)["min_cosine"] == 1
    found = [(np.array([hidden]), np.array([embedding]))]
    assert encoder_gate.cosines(wanted, found)["min_cosine"] == (0 if np.isnan(embedding[0]) else 1)
    with pytest.raises(ParityError, match="does not compute what torch does: over 1 tokens of 1 texts"):
        encoder_gate._check_exact(wanted, found)


def test_verbs_for_decoders_refuse_an_encoder_with_the_next_step(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two three"}\n' * 20)
    with pytest.raises(ModelError, match=r"is an encoder.*edgetune train --objective classification"):
        open_base(model)
    for data in (None, rows):
        with pytest.raises(ConfigError, match=r"objective = sft; an encoder has classification.*Set --objective"):
            et.plan(model, "host", data=data)
    with pytest.raises(ExportError, match=r"is an encoder: it predicts no token of held-out rows"):
        et.export(model, out=tmp_path / "bundle", eval_data=rows)
    bundle = et.export(model, out=tmp_path / "bundle")
    for source in (bundle, bundle.folder):
        for verb in (lambda source: et.generate(source, "a"), lambda source: et.bench(source, "host"), load_bundle):
            with pytest.raises(BundleError, match=r"bundle of an encoder.*edgetune run .*edgetune.embed\(\)"):
                verb(source)


def test_target_modules_are_those_of_the_encoder(model: Path) -> None:
    config = load_encoder(model).config
    with pytest.raises(ConfigError, match=r"target_modules has \['q_proj'\]; choose from query, key, value, dense"):
        LoraConfig(target_modules=("q_proj",)).resolved(config)


def test_minilm_keeps_its_golden_embedding(real: Callable[[str], Path], tmp_path: Path) -> None:
    folder = real("minilm")
    golden = json.loads((folder / "oracle.json").read_text())
    bundle = et.export(folder, out=tmp_path / "bundle")
    (found,) = et.embed(bundle, [golden["text"]])
    assert np.abs(found[:5] - golden["computed_first_5"]).max() < 1e-5
    assert np.abs(found[:5] - golden["expected_first_5"]).max() < golden["tolerance"]
    for pair in golden["cosine_examples"]:
        one, other = et.embed(bundle, [pair["a"], pair["b"]])
        assert float(one @ other) == pytest.approx(pair["cosine"], abs=1e-4)
