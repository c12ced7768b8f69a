"""Every encoder family computes what transformers computes: odd shapes, padding at the end, token types."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model
from tiny_encoder import encoder_hf, rows, write_encoder, write_pooling
from tiny_run import adapter_tensors, write_run

from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_any_base, open_base
from edgetune.errors import ConfigError, ModelError
from edgetune.grids import GRIDS
from edgetune.models import ENCODERS, load_config
from edgetune.models.encoder import Encoder, load_encoder
from edgetune.models.encoder_config import EncoderConfig
from edgetune.models.pooling import Pooling
from edgetune.quantizer import quantize
from edgetune.schema import Reader
from edgetune.tokenizer import load_tokenizer

ROWS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ENCODERS),
    *((family, {"num_attention_heads": 1, "num_hidden_layers": 3, "type_vocab_size": 1}) for family in ENCODERS),
    ("bert", {"num_attention_heads": 11, "layer_norm_eps": None}),
    ("bert", {"hidden_size": 40, "num_attention_heads": 5, "type_vocab_size": 5, "intermediate_size": 33}),
    ("xlm-roberta", {"pad_token_id": 3, "hidden_size": 64, "num_attention_heads": 4}),
]


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


def hidden(model: torch.nn.Module, inputs: tuple[np.ndarray, ...]) -> torch.Tensor:
    """What transformers, or a PEFT model over it, calls the last hidden state."""
    ids, mask, types = tensors(*inputs)
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    return found


def oracle(folder: Path) -> torch.nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def peft(folder: Path, run: Path, **options: Any) -> torch.nn.Module:
    """The oracle with the adapter of a run that `write_run` wrote."""
    from peft import PeftModel

    path = run / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "FEATURE_EXTRACTION"}))
    return PeftModel.from_pretrained(oracle(folder), run, **options).eval()


def ours(folder: Path | Encoder, inputs: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    encoder = folder if isinstance(folder, Encoder) else load_encoder(folder)
    ids, mask, types = tensors(*inputs)
    with torch.no_grad():
        return encoder.hidden(ids, mask, types), encoder(ids, mask, types)


@pytest.mark.parametrize(("family", "overrides"), ROWS)
def test_hidden_states_equal_transformers(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    config = encoder_hf(family, **overrides)
    folder = write_encoder(tmp_path / "model", config)
    inputs = rows(config)
    expected, (found, _) = hidden(oracle(folder), inputs), ours(folder, inputs)
    at = inputs[1] == 1
    assert expected[at].abs().max() > 1
    assert (found[at] - expected[at]).abs().max() <= 1e-5


@pytest.mark.parametrize(("mode", "normalize"), [("mean_tokens", True), ("cls_token", True), ("mean_tokens", False)])
def test_embeddings_are_pooled_as_the_model_s_files_say(mode: str, normalize: bool, tmp_path: Path) -> None:
    config = encoder_hf()
    folder = write_encoder(tmp_path / "model", config, pooling=mode, normalize=normalize)
    inputs = rows(config)
    states = hidden(oracle(folder), inputs).numpy().astype(np.float64)
    for i, length in enumerate(inputs[1].sum(1)):
        wanted = states[i, 0] if mode == "cls_token" else states[i, :length].mean(0)
        if normalize:
            wanted = wanted / np.sqrt((wanted**2).sum())
        np.testing.assert_allclose(ours(folder, inputs)[1][i].numpy(), wanted, atol=1e-5, rtol=0)


def test_without_sentence_transformers_files_it_is_the_mean_as_that_has_it(tmp_path: Path) -> None:
    plain = load_config(write_encoder(tmp_path / "plain", encoder_hf(), pooling=None))
    mean = load_config(write_encoder(tmp_path / "mean", encoder_hf(), normalize=False))
    assert isinstance(plain, EncoderConfig)
    assert plain == mean
    (tmp_path / "plain" / "sentence_bert_config.json").write_text('{"max_seq_length": 9}')
    cut = load_config(tmp_path / "plain")
    assert isinstance(cut, EncoderConfig)
    assert cut.pooling == Pooling("mean", normalize=False, max_seq_length=9)


@pytest.mark.parametrize("family", ENCODERS)
def test_padding_changes_nothing(family: str, tmp_path: Path) -> None:
    config = encoder_hf(family)
    encoder = load_encoder(write_encoder(tmp_path / "model", config))
    inputs = rows(config)
    together = ours(encoder, inputs)[1]
    for i, length in enumerate(inputs[1].sum(1)):
        alone = ours(encoder, tuple(array[i : i + 1, :length] for array in inputs))[1]
        assert (alone[0] - together[i]).abs().max() <= 1e-6


@pytest.mark.parametrize("family", ENCODERS)
def test_an_adapter_computes_what_peft_computes(family: str, tmp_path: Path) -> None:
    config = encoder_hf(family)
    folder = write_encoder(tmp_path / "model", config)
    lora = LoraConfig(r=3, lora_alpha=5)
    run = write_run(tmp_path / "run", folder, lora)
    encoder = load_encoder(folder)
    resolved, values = adapter_tensors(folder, lora)
    assert resolved.target_modules == ("query", "key", "value", "dense")
    load_tensors(attach(encoder, resolved), values)
    inputs = rows(config)
    at = inputs[1] == 1
    plain, tuned = ours(folder, inputs)[0][at], ours(encoder, inputs)[0][at]
    assert (plain - tuned).abs().max() > 0.5
    assert (hidden(peft(folder, run), inputs)[at] - tuned).abs().max() <= 1e-5


def test_gradients_of_adapters_are_those_of_autograd_over_dense_weights(tmp_path: Path) -> None:
    """Blocks run over frozen weights and pass gradients, as an objective for embeddings will need."""
    config = encoder_hf()
    folder = write_encoder(tmp_path / "model", config)
    lora = LoraConfig(r=3, lora_alpha=5)
    twin = peft(folder, write_run(tmp_path / "run", folder, lora), is_trainable=True)
    encoder = load_encoder(folder)
    resolved, values = adapter_tensors(folder, lora)
    parameters = attach(encoder, resolved)
    load_tensors(parameters, values)
    ids, mask, types = tensors(*rows(config))
    states = twin(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    goal = torch.randn(4, 66, generator=torch.Generator().manual_seed(1))
    (encoder(ids, mask, types) * goal).sum().backward()
    (encoder.pool(states, mask) * goal).sum().backward()
    theirs = dict(twin.named_parameters())
    for name, value in parameters.items():
        wanted = theirs[f"base_model.model.{name}.default.weight"].grad
        assert value.grad is not None
        assert (value.grad - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


@pytest.mark.parametrize("grid", GRIDS)
def test_a_base_keeps_shape_pooling_and_tokenizer(grid: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", encoder_hf(), pooling="cls_token")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 33, "do_lower_case": false}')
    base = open_any_base(quantize(folder, grid, tmp_path / "base"))
    assert base.grid == grid
    assert base.config == load_config(folder)
    assert base.config.max_position_embeddings == 33
    assert load_tokenizer(base.folder).encode("ab c") == [2, 5, 32, 7, 3]
    for name in base.config.vectors():
        np.testing.assert_array_equal(base.vector(name), open_any_base(folder).vector(name))
    assert quantize(folder, grid, tmp_path / "base", force=True) == tmp_path / "base"
    (tmp_path / "base" / "1_Pooling" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"1_Pooling/mine\.txt"):
        quantize(folder, grid, tmp_path / "base", force=True)


@pytest.mark.parametrize("family", ENCODERS)
def test_config_survives_json_and_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = load_config(write_encoder(tmp_path / "model", encoder_hf(family)))
    assert Reader().read(EncoderConfig, json.loads(json.dumps(config.to_dict()))) == config
    rewritten = AutoConfig.for_model(**encoder_hf(family)).to_dict()
    assert ENCODERS[family].config_from_hf(rewritten) == ENCODERS[family].config_from_hf(encoder_hf(family))


def test_parameters_are_counted_without_the_pooler(tmp_path: Path) -> None:
    base = open_any_base(write_encoder(tmp_path / "model", encoder_hf()))
    kept = {name: info for name, info in base.weights.items() if not name.startswith("pooler.")}
    assert len(kept) == len(base.weights) - 2
    assert base.config.num_parameters == sum(int(np.prod(info.shape)) for info in kept.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type = 'relative_key'.*is 'absolute'"),
        ({"hidden_act": "gelu_new"}, r"hidden_act = 'gelu_new' in config.json is not supported; supported is 'gelu'"),
        ({"is_decoder": True}, r"is_decoder = True"),
        ({"add_cross_attention": True}, r"add_cross_attention = True"),
        ({"num_attention_heads": 4}, r"hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"vocab_size": "301"}, r"vocab_size = '301'; a positive integer"),
        ({"model_type": "roberta"}, r"model_type 'roberta'; supported are llama, .*, bert, xlm-roberta"),
        ({"model_type": "xlm-roberta", "pad_token_id": "1"}, r"pad_token_id = '1'; a token's id"),
        ({"model_type": "xlm-roberta", "pad_token_id": 74}, r"max_position_embeddings 75 .* no position after the 75"),
    ],
)
def test_wrong_configs_are_refused_by_value(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", encoder_hf())
    (folder / "config.json").write_text(json.dumps(encoder_hf() | change))
    with pytest.raises(ModelError, match=message):
        load_config(folder)


def _module(path: str = "1_Pooling", kind: str = "Pooling") -> list[dict[str, str]]:
    return [{"type": "x.Transformer", "path": ""}, {"type": f"x.{kind}", "path": path}]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", _module(kind="Dense"), r"has the modules Transformer, Dense; Transformer, Pooling and"),
        ("modules.json", {"type": 1}, r"modules.json is no list of modules"),
        ("modules.json", _module("../x"), r"has the path '../x', which leaves the model's folder"),
        ("modules.json", _module("/etc"), r"has the path '/etc'"),
        ("modules.json", _module("..\\x"), r"leaves the model's folder"),
        ("modules.json", _module("2_Pooling"), r"2_Pooling/config.json is missing or holds no object"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, r"sets pooling_mode_max_tokens; exactly one of"),
        ("1_Pooling/config.json", {}, r"sets no pooling_mode; exactly one of pooling_mode_mean_tokens, pooling_mode_c"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            r"sets pooling_mode_cls_token, pooling_mode_mean_tokens; exactly one",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "word_embedding_dimension": 70},
            r"word_embedding_dimension 70, config.json has hidden_size 66",
        ),
        ("sentence_bert_config.json", {"max_seq_length": 0}, r"max_seq_length = 0; a positive integer"),
        ("sentence_bert_config.json", {"do_lower_case": True}, r"sets do_lower_case, which is not supported"),
        ("sentence_bert_config.json", [1], r"sentence_bert_config.json holds no object"),
    ],
)
def test_other_poolings_are_refused_by_name(file: str, content: Any, message: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", encoder_hf(), pooling=None)
    write_pooling(folder, 66, "mean_tokens", True)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        load_config(folder)


def test_what_needs_a_decoder_refuses_an_encoder(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", encoder_hf())
    with pytest.raises(ModelError, match=r"is an encoder, .* is trained by `edgetune train --objective"):
        open_base(folder)


def test_what_needs_an_encoder_refuses_a_decoder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", tiny_config("llama"), tokenizer=False)
    with pytest.raises(ModelError, match=r"is a decoder \(llama\); an encoder such as bert was expected"):
        load_encoder(folder)


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "model", encoder_hf())
    (folder / "config.json").write_text(json.dumps(encoder_hf(num_hidden_layers=1, type_vocab_size=3)))
    with pytest.raises(ModelError, match=r"token_type_embeddings.weight has shape \[2, 66\]; \[3, 66\] was expected"):
        open_any_base(folder)
    with pytest.raises(ModelError, match=r"encoder.layer.1.attention.output.LayerNorm.bias .* no place in a bert"):
        open_any_base(folder)


def test_minilm_gives_its_golden_embedding(real: Callable[[str], Path]) -> None:
    folder = real("minilm")
    golden = json.loads((folder / "oracle.json").read_text())
    ids = load_tokenizer(folder).encode(golden["text"])
    assert ids == golden["input_ids"]
    encoder = load_encoder(folder)
    with torch.no_grad():
        (found,) = encoder(torch.tensor([ids]), torch.ones(1, len(ids)))
        assert len(found) == golden["dimension"]
        assert np.abs(found[:5].numpy() - golden["computed_first_5"]).max() < 1e-5
        assert np.abs(found[:5].numpy() - golden["expected_first_5"]).max() < golden["tolerance"]
