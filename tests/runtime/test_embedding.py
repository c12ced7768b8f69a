"""Embeddings of a bundle: each text's is that of torch, whatever else is embedded with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_bundle import random_reference, write_bundle
from tiny_encoder import encoder_hf, write_encoder

import edgetune as et
from edgetune.bundle import EncoderBundle, load_any_bundle
from edgetune.cli import verbs
from edgetune.errors import BundleError, ConfigError, DataError, EdgetuneWarning
from edgetune.models.encoder import load_encoder
from edgetune.runtime import embedding
from edgetune.tokenizer import load_tokenizer

TEXTS = ["abc def", "", "a", "zebra " * 6, "Über größe?", "abc def", "q w e r t y"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("embedding") / "model", encoder_hf("xlm-roberta"), normalize=False)


@pytest.fixture(scope="module")
def bundle(model: Path) -> EncoderBundle:
    made = et.export(model, out=model.parent / "bundle", weights="fp32")
    assert isinstance(made, EncoderBundle)
    return made


def expected(model: Path, text: str) -> np.ndarray:
    """Torch's embedding of a text alone, cut as the model's positions end: 75 rows, of which 2 are skipped."""
    encoder, ids = load_encoder(model), load_tokenizer(model).encode(text)
    ids = ids[:72] + ids[-1:] if len(ids) > 73 else ids
    with torch.no_grad():
        found: np.ndarray = encoder(torch.tensor([ids]), torch.ones(1, len(ids)))[0].numpy()
    return found


@pytest.mark.parametrize("batch_tokens", [1, 20, 1024])
def test_each_text_has_its_own_embedding(
    model: Path, bundle: EncoderBundle, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "BATCH_TOKENS", batch_tokens)
    found = et.embed(bundle, TEXTS)
    assert (found.shape, found.dtype) == ((7, 66), np.float32)
    for text, vector in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(vector, expected(model, text), atol=1e-5, rtol=0)
    assert et.embed(bundle.folder, []).shape == (0, 66)


@pytest.mark.parametrize("lengths", [[], [3], [512] * 5, [5, 1, 5, 2, 1024, 4000, 9]])
def test_batches_hold_every_row_once_and_few_tokens(lengths: list[int]) -> None:
    groups = embedding._groups(lengths)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= embedding.BATCH_TOKENS


def test_a_text_that_is_too_long_is_cut_and_said(model: Path, bundle: EncoderBundle) -> None:
    long = "abc " * 40
    with pytest.warns(EdgetuneWarning, match=r"1 of 2 texts are longer than the 73 tokens that .* and were cut there"):
        found = et.embed(bundle, [long, "abc"])
    np.testing.assert_allclose(found[0], expected(model, long), atol=1e-5, rtol=0)
    np.testing.assert_allclose(found[1], expected(model, "abc"), atol=1e-5, rtol=0)
    exact = " ".join("a" * 71)
    assert len(load_tokenizer(bundle.folder).encode(exact)) == 73
    np.testing.assert_allclose(et.embed(bundle, [exact])[0], expected(model, exact), atol=1e-5, rtol=0)


def test_what_cannot_be_embedded_is_refused(bundle: EncoderBundle, tmp_path: Path) -> None:
    embedder = embedding.open_embedder(bundle)
    for wrong, message in (("abc", "texts is one string"), ([[]], "has 0 tokens; .* reads 1 to 73")):
        with pytest.raises(ConfigError, match=message):
            embedder.embed(wrong) if isinstance(wrong, str) else embedder.embed_ids(wrong)
    with pytest.raises(ConfigError, match="has 74 tokens"):
        embedder.embed_ids([[5] * 74])
    for ids in ([5, 301], [-1, 5]):
        with pytest.raises(ConfigError, match=f"token ids {ids[0]} to {ids[1]} are not all of the 301"):
            embedder.embed_ids([ids])
    with pytest.raises(DataError, match="lone surrogate U\\+D800"):
        embedder.embed(["\ud800"])
    with pytest.raises(ConfigError, match="threads is 0"):
        et.embed(bundle, ["a"], threads=0)
    decoder = write_bundle(tmp_path / "decoder", random_reference())
    with pytest.raises(BundleError, match=r"bundle of a decoder .*edgetune.generate\(\)"):
        et.embed(decoder, ["a"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": 3}, r"model: pooling is 3, expected str"),
        ({"normalize": 1}, r"model: normalize is 1, expected bool"),
        ({"hidden_size": -1}, r"hidden_size is -1, expected no negative number"),
        ({"head_dim": 8}, r"unknown keys \['head_dim'\]"),
    ],
)
def test_a_damaged_manifest_is_refused_by_key(
    bundle: EncoderBundle, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    manifest = bundle.manifest | {"model": bundle.manifest["model"] | change}
    for file in bundle.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "edgetune.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        load_any_bundle(tmp_path)


def cli(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        verbs.main([str(word) for word in words])
    captured = capsys.readouterr()
    code = ended.value.code
    return (code if isinstance(code, int) else 0), captured.out, captured.err


def test_run_prints_the_embedding(bundle: EncoderBundle, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = et.embed(bundle, ["abc def"])[0].tolist()
    code, out, _ = cli(capsys, "run", bundle.folder, "--prompt", "abc def")
    assert (code, json.loads(out)) == (0, pytest.approx(wanted, rel=1e-5))
    digits = [number.partition("e")[0].replace(".", "").lstrip("-0") for number in out.strip("[]\n").split(", ")]
    assert max(map(len, digits)) == 6
    code, out, err = cli(capsys, "run", bundle.folder, "--prompt", "abc def", "--json")
    assert json.loads(out) == {"bundle": str(bundle.folder), "hidden_size": 66, "embedding": wanted}
    code, _, err = cli(capsys, "run", bundle.folder, "--prompt", "abc " * 99, "--no-adapter", "--threads", "1")
    assert code == 0
    assert "warning: 1 of 1 texts are longer than the 73 tokens" in err


def test_run_refuses_what_only_a_decoder_can_do(bundle: EncoderBundle, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ((), "it needs --prompt TEXT"),
        (("--prompt", "a", "--top-k", "3", "--chat"), "does not take --chat, --top-k"),
    ):
        code, out, err = cli(capsys, "run", bundle.folder, *words)
        assert (code, out) == (2, "")
        assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_planning_and_training_say_what_is_possible(
    model: Path, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one two three"}\n' * 20)
    words = ("--data", rows, "--out", tmp_path / "run") if verb == "train" else ()
    code, _, err = cli(capsys, verb, model, "--device", "host", *words)
    assert code == 1
    assert "ConfigError" in err
    assert "an encoder has classification (label rows)" in err
    assert not (tmp_path / "run").exists()
