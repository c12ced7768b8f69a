"""The JavaScript example: its modules in Node and its page in Chromium, against a decoder written out in numpy.

Nothing is downloaded here: without the npm packages, Node or Chromium these tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_bundle import CONTEXT, EOS, SLOTS, Reference, byte_ids, random_adapter, random_reference, write_bundle

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "examples" / "web"
PROMPTS = ["Dear diary,", "so — what now?"]

pytestmark = pytest.mark.skipif(
    not (EXAMPLE / "node_modules").is_dir(),
    reason="the npm packages are not there: npm ci --ignore-scripts --prefix examples/web",
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no node command")


@pytest.fixture(scope="module")
def reference() -> Reference:
    return random_reference()


@pytest.fixture(scope="module")
def adapter() -> dict[str, np.ndarray]:
    return random_adapter()


@pytest.fixture
def bundle(tmp_path: Path, reference: Reference, adapter: dict[str, np.ndarray]) -> Path:
    return write_bundle(tmp_path / "bundle", reference, adapter)


def wanted(reference: Reference, prompt: str, adapter: dict[str, np.ndarray] | None) -> list[int]:
    """The tokens that answer a prompt in the tiny bundle's chat template."""
    ids = [*byte_ids(f"<|user|>{prompt}"), EOS, *byte_ids("<|assistant|>")]
    return reference.greedy(ids, CONTEXT - len(ids), adapter)


def run(bundle: Path, adapter: str, *prompts: str) -> subprocess.CompletedProcess[str]:
    command = ["node", str(EXAMPLE / "run.js"), str(bundle), adapter, *prompts]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "edgetune.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


@needs_node
@pytest.mark.parametrize("name", ["-", "adapter"])
def test_node_gives_the_tokens_of_a_second_implementation(
    bundle: Path, reference: Reference, adapter: dict[str, np.ndarray], name: str
) -> None:
    done = run(bundle, name, *PROMPTS)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    expected = [wanted(reference, prompt, None if name == "-" else adapter) for prompt in PROMPTS]
    assert [answer["tokenIds"] for answer in answers] == expected
    assert min(map(len, expected)) > 1, "the answers are too short to tell a cache from none"
    assert expected != [wanted(reference, prompt, adapter if name == "-" else None) for prompt in PROMPTS]


@needs_node
@pytest.mark.parametrize("words", [(), ("bundle",), ("bundle", "-")])
def test_node_says_how_it_is_used(words: tuple[str, ...]) -> None:
    done = subprocess.run(["node", str(EXAMPLE / "run.js"), *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: node run.js BUNDLE ADAPTER PROMPT") and done.stderr.count("\n") == 1


@needs_node
def test_node_tells_the_story_of_llama2_c(tmp_path: Path, real: Callable[[str], Path]) -> None:
    from edgetune.exporter import export

    folder, begin = real("stories260k"), "Once upon a time"
    oracle = json.loads((folder / "oracle.json").read_text(encoding="utf-8"))
    export(folder, out=tmp_path / "bundle", weights="fp32")
    answer = json.loads(run(tmp_path / "bundle", "-", begin).stdout)
    given = answer["promptTokens"] - 1  # tokens of the prompt after <s>
    assert answer["tokenIds"] == oracle["expected_new_token_ids"][given : given + 128]
    assert oracle["expected_text"].startswith(begin + answer["text"])


@needs_node
def test_node_refuses_what_would_answer_nonsense(bundle: Path) -> None:
    def replace_adapter(manifest: dict[str, Any]) -> None:
        """An adapter of another base, as it would lie in the folder: listed with the hash that it has."""
        path = bundle / "adapter.safetensors"
        path.write_bytes(path.read_bytes().replace(b"0" * 64, b"1" * 64))
        manifest["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()

    cases: list[tuple[Callable[[dict[str, Any]], object], str, str]] = [
        (lambda manifest: None, "notes", "AdapterError: the bundle has no adapter notes; it has adapter"),
        (lambda m: m["adapters"]["adapter"].update(probe_change=0), "adapter", "adapter adapter changes nothing"),
        (lambda m: m["slots"].pop(), "adapter", f"{SLOTS[1]}: the graph has no such slot"),
        (replace_adapter, "adapter", "was trained for base_sha256 1111"),
        (lambda m: m.update(format_version=2), "-", "BundleError: edgetune.json has format_version 2, expected 1"),
        (lambda m: m["model"].update(pooling="mean"), "-", "BundleError: this is the bundle of an encoder"),
    ]  # fmt: skip
    for change, name, message in cases:
        before = {path: path.read_bytes() for path in bundle.iterdir()}
        change_manifest(bundle, change)
        done = run(bundle, name, "hello")
        assert (done.returncode, message in done.stderr) == (1, True), (message, done.stderr)
        for path, content in before.items():
            path.write_bytes(content)


@needs_node
def test_node_refuses_a_damaged_file(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    assert "BundleError: model.onnx.data is damaged" in run(bundle, "-", "hello").stderr


@pytest.mark.debian
def test_the_page_chats_with_and_without_the_adapter(
    bundle: Path, reference: Reference, adapter: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from web_page import missing, open_browser

    from edgetune.tokenizer import load_tokenizer

    if missing():
        pytest.skip(missing())
    with open_browser({"tiny": bundle}) as browser:
        shown = browser.chat("tiny", {"adapter": PROMPTS[:1], "": PROMPTS[:1]})
        with pytest.raises(RuntimeError, match=r"edgetune\.json: 404"):
            browser.chat("none", {})
    decode = load_tokenizer(bundle).decode
    assert shown["answers"] == [decode(wanted(reference, PROMPTS[0], each)) for each in (adapter, None)]
    assert shown["memory"].endswith(" MiB") and int(shown["memory"].removesuffix(" MiB")) > 0
