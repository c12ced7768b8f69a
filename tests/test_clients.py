"""Clients that know nothing of edgetune give a bundle's own greedy tokens: the Python example, and onnxruntime-genai.

What edgetune's session gives is the reference here; that the graph computes what torch does is `graphs/test_parity.py`.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, write_model
from tiny_run import write_run
from tiny_tokenizers import TEMPLATES, write_byte_level, write_sentencepiece
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from edgetune.adapters.lora import LoraConfig
from edgetune.bundle import Bundle, load_bundle
from edgetune.errors import EdgetuneWarning
from edgetune.exporter import export
from edgetune.graphs import FORMATS
from edgetune.grids import GRIDS
from edgetune.models import FAMILIES
from edgetune.quantizer import quantize
from edgetune.runtime.adapters import add_adapter
from edgetune.runtime.session import CHUNK, open_session
from edgetune.tokenizer import load_tokenizer

EXAMPLE = Path(__file__).parents[1] / "examples" / "python" / "run_bundle.py"
COUNT = 24
# One token, a few, and around the chunk of 128 tokens that a longer prompt is read in.
PROMPTS = [[7], [7, 80, 3], *(np.random.default_rng(n).integers(3, 301, n).tolist() for n in (127, 129, 200))]


def make_bundle(folder: Path, weights: str, family: str = "llama", head_dim: int = 16) -> Bundle:
    """With the adapters "adapter" and "wide", of other ranks and slots."""
    model = write_model(folder / "model", tiny_config(family, head_dim=head_dim))
    base = quantize(model, weights if weights in GRIDS else "int4", folder / "base")
    export(write_run(folder / "run", base), out=folder / "bundle", weights=weights)
    wide = write_run(folder / "wide", base, LoraConfig(r=5, lora_alpha=4, target_modules=("v_proj", "gate_proj")))
    with warnings.catch_warnings():  # where the weights are rounded, which is what some of these are about
        warnings.simplefilter("ignore", EdgetuneWarning)
        add_adapter(folder / "bundle", wide, name="wide")
    return load_bundle(folder / "bundle")


@pytest.fixture(scope="module", params=FORMATS)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp(request.param), request.param)


def greedy(bundle: Bundle, prompt: Sequence[int], adapter: bool | str) -> tuple[list[int], np.ndarray]:
    """Tokens, the closing one too, and the logits that each was taken from."""
    session = open_session(bundle, adapter=adapter)
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    while len(tokens) < COUNT and (not tokens or tokens[-1] not in bundle.model.eos_token_ids):
        rows.append(session.forward(tokens[-1:] or prompt))
        tokens.append(int(rows[-1].argmax()))
    return tokens, np.stack(rows)


def run_example(bundle: Bundle, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLE, bundle.folder, "--max-new-tokens", COUNT, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def test_the_python_example_imports_nothing_of_edgetune() -> None:
    tree = ast.walk(ast.parse(EXAMPLE.read_text(encoding="utf-8")))
    names = {node.module if isinstance(node, ast.ImportFrom) else alias.name
             for node in tree if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
    assert names - sys.stdlib_module_names == {"numpy", "onnxruntime", "tokenizers"}


@pytest.mark.parametrize("adapter", [True, False, "wide"])
def test_the_python_example_gives_the_same_tokens(bundle: Bundle, adapter: bool | str, tmp_path: Path) -> None:
    flags = {True: [], False: ["--no-adapter"], "wide": ["--adapter", "wide"]}[adapter]
    prompt = PROMPTS[3]
    done = run_example(bundle, "--logits", tmp_path / "logits.npy", *flags, "--ids", *prompt)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tokens, logits = greedy(bundle, prompt, adapter)
    assert found["tokens"] == tokens
    assert found["adapter"] == {True: "adapter", False: None}.get(adapter, adapter)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), logits, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("copied"), "int4", "qwen2", head_dim=8)


def test_the_python_example_continues_a_text(copied: Bundle) -> None:
    tokenizer = load_tokenizer(copied.folder)
    done = run_example(copied, "--prompt", "Zoë set")
    assert done.returncode == 0, done.stderr
    tokens, _ = greedy(copied, tokenizer.encode("Zoë set"), True)
    assert done.stdout == tokenizer.decode(tokens) + "\n"


@pytest.mark.parametrize(
    ("folder", "flags", "message"),
    [
        ("bundle", ["--adapter", "other"], "bundle has no adapter other; it has adapter, wide"),
        ("model", [], "model is no bundle: it has no edgetune.json"),
        ("encoder", [], "encoder is the bundle of an encoder, which embeds a text and continues none"),
    ],
)
def test_the_python_example_says_what_it_was_not_given(
    copied: Bundle, folder: str, flags: list[str], message: str
) -> None:
    place = copied.folder.parent / folder
    if folder == "encoder":
        place.mkdir()
        (place / "edgetune.json").write_text('{"format_version": 1, "model": {"pooling": "mean"}}', encoding="utf-8")
    done = run_example(replace(copied, folder=place), "--ids", 7, *flags)
    assert done.returncode == 1
    assert done.stderr.endswith(f"{message}\n") and "Traceback" not in done.stderr


def edited(bundle: Bundle, folder: Path, **changes: Any) -> Bundle:
    """A copy whose manifest says something else."""
    shutil.copytree(bundle.folder, folder)
    path = folder / "edgetune.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return Bundle(folder, {}, bundle.model, bundle.slots, bundle.adapters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format_version 2, this client reads 1"),
        ({"base_sha256": "f" * 64}, "was trained with base_sha256"),
        ({"grid": "nf4"}, "was trained with grid int4, the bundle has nf4"),
        ({"tokenizer_sha256": None}, "was trained with tokenizer_sha256"),
        ({"slots": []}, "does not have the tensors of its slots"),
    ],
)
def test_the_python_example_refuses_what_does_not_fit(
    copied: Bundle, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    broken = edited(copied, tmp_path / "bundle", **changes)
    (broken.folder / "model.onnx").unlink()  # refused before the graph is opened
    done = run_example(broken, "--ids", 1)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


NOT_RUN = [
    *(f"android/{name}" for name in ("Bundle.kt", "Training.kt", "AdapterFile.kt", "PlainInputs.kt")),
    "android/build.gradle.kts", "ios/Bundle.swift",
]  # fmt: skip


@pytest.mark.parametrize("name", NOT_RUN)
def test_an_example_that_is_not_run_says_so_in_its_first_line(name: str) -> None:
    assert (EXAMPLE.parents[1] / name).read_text(encoding="utf-8").startswith("// Not run in CI")


def genai_greedy(
    model: Any, prompt: Sequence[int], adapter: tuple[Any, str] | None = None, *, parts: int = 1, **search: Any
) -> list[int]:
    """As an app would: the prompt in so many parts, then a token at a time until the end."""
    og = pytest.importorskip("onnxruntime_genai")
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + COUNT, do_sample=False, **search)
    generator = og.Generator(model, parameters)
    if adapter:
        generator.set_active_adapter(*adapter)
    for part in np.array_split(np.array(prompt, np.int32), parts):
        generator.append_tokens(part)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def check_genai(bundle: Bundle) -> None:
    """Base and two adapters on one loaded model, for prompts of every length, at once and in parts."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(bundle.folder))
    adapters = og.Adapters(model)
    for name in bundle.adapters:
        adapters.load(str(bundle.folder / f"{name}.onnx_adapter"), name)
    # The one scale of its activations is that of a call, so another cut of the prompt gives other tokens.
    whole = bundle.manifest["weights"] == "int8-dynamic"
    prompts = [prompt for prompt in PROMPTS if len(prompt) <= CHUNK or not whole]
    answers = []
    for name in (False, *bundle.adapters):
        active = (adapters, name) if name else None
        answers.append([greedy(bundle, prompt, name)[0] for prompt in prompts])
        for prompt, tokens in zip(prompts, answers[-1], strict=True):
            assert genai_greedy(model, prompt, active) == tokens
            if not whole:
                assert genai_greedy(model, prompt, active, parts=min(3, len(prompt))) == tokens
                assert genai_greedy(model, prompt, active, chunk_size=50) == tokens
    assert all(a != b for a, b in combinations(answers, 2)), "each adapter answers in its own way"


def test_onnxruntime_genai_gives_the_same_tokens(bundle: Bundle) -> None:
    config = json.loads((bundle.folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["search"]["past_present_share_buffer"] is (bundle.manifest["weights"] != "standard")
    check_genai(bundle)


@pytest.mark.parametrize("head_dim", [8, 16])  # a cache that grows, and one shared buffer
@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_genai_runs_every_family(tmp_path: Path, family: str, head_dim: int) -> None:
    bundle = make_bundle(tmp_path, "int4", family, head_dim)
    config = json.loads((bundle.folder / "genai_config.json").read_text(encoding="utf-8"))
    assert config["search"]["past_present_share_buffer"] is (head_dim == 16)
    check_genai(bundle)


# onnxruntime-genai 0.18 ends a text at a NUL, leaves Qwen's NFC normalizer out and knows the patterns of published
# families alone: no text with a NUL or a decomposed letter is here, and no tokenizer with a pattern of its own.
TEXTS = [
    "", " ", "Once upon a time", "Lily's dog, you'RE 12345 years; don't.", "two  spaces\nline\n\n", "\r\n x  \n\n y",
    "café Zoë naïve 😀👩\u200d👩\u200d👧", "\ttab", "名前は", "русский العربية", "a</s>b<|im_end|>c", " leading",
    "trailing ", "\u00a0\u2003", "\U0010ffff", "İstanbul ǅ", "A" * 300, "<|im_start|>user\nhi<|im_end|>\n",
]  # fmt: skip
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pieces(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def smollm2() -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


BYTE_LEVEL = {"smollm2": smollm2(), "llama3": pieces(LLAMA3), "qwen2.5": pieces(LLAMA3.replace("{1,3}", ""))}


def write_pieces(folder: Path, family: str) -> None:
    """A small tokenizer that cuts a text as the family's does."""
    path = folder / "tokenizer.json"
    if family in BYTE_LEVEL:
        write_byte_level(folder, template=TEMPLATES[family], bos=family == "llama3")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.pre_tokenizer = BYTE_LEVEL[family]
    else:
        write_sentencepiece(folder)
        content = json.loads(path.read_text(encoding="utf-8"))
        # As sentencepiece trains it: a space is nowhere but at the beginning of a piece.
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "▁" not in "".join(pair)[1:]]
        tokenizer = Tokenizer.from_str(json.dumps(content))
        if family == "gemma3":
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.save(str(path))


@pytest.mark.parametrize("family", [*BYTE_LEVEL, "llama2", "gemma3"])
def test_onnxruntime_genai_reads_the_tokenizer_files(copied: Bundle, tmp_path: Path, family: str) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    write_pieces(tmp_path, family)
    shutil.copyfile(copied.folder / "genai_config.json", tmp_path / "genai_config.json")
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).symlink_to(copied.folder / name)
    ours, theirs = load_tokenizer(tmp_path), og.Tokenizer(og.Model(str(tmp_path)))
    for special in (False, True):
        theirs.update_options(add_special_tokens=str(special).lower())  # its default is False
        for text in TEXTS:
            ids = ours.encode(text, add_special_tokens=special)
            assert theirs.encode(text).tolist() == ids, text
            if ids and not special and family in BYTE_LEVEL:  # it keeps the space that sentencepiece puts first
                assert theirs.decode(ids) == ours.decode(ids)
    if family in ("smollm2", "qwen2.5"):  # llama3's asks whether there are tools, and its answer is always yes
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Zoë? 😀 <b>"}]
        rendered = theirs.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        assert rendered == ours.apply_chat_template(messages, add_generation_prompt=True)


def test_onnxruntime_genai_reads_a_real_tokenizer(copied: Bundle, tmp_path: Path, real: Callable[[str], Path]) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    bundle = export(real("stories260k"), out=tmp_path / "bundle")
    expected = json.loads((real("stories260k") / "oracle.json").read_text(encoding="utf-8"))
    tokenizer = og.Tokenizer(og.Model(str(bundle.folder)))
    tokenizer.update_options(add_special_tokens="true")
    for text, ids in expected["tokenizer_examples"].items():
        assert tokenizer.encode(text).tolist() == ids
