"""Packed weights on disk: the same bits as without, less memory, and made again when they no longer fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from conftest import tiny_config, write_model
from tiny_run import write_run

from edgetune.bundle import DATA, MODEL, Bundle
from edgetune.errors import ConfigError
from edgetune.exporter import export
from edgetune.quantizer import quantize
from edgetune.runtime.prepacked import MANIFEST
from edgetune.runtime.session import Session, open_session

IDS = np.random.default_rng(0).integers(0, 301, 9)
_LOAD = """
import sys
from edgetune.memory import anonymous_bytes
from edgetune.runtime.session import open_session
before = anonymous_bytes()
session = open_session(sys.argv[1], threads=1, prepacked=sys.argv[2] or None)
session.forward([1, 2, 3])
print(anonymous_bytes() - before)
"""


@pytest.fixture(scope="module", params=["int4", "int8", "nf4", "fp32"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp(request.param)
    model = write_model(folder / "model", tiny_config("llama", head_dim=16))
    base = quantize(model, "nf4" if request.param == "nf4" else "int4", folder / "base")
    return export(write_run(folder / "run", base), out=folder / "bundle", weights=request.param)


def logits(session: Session) -> np.ndarray:
    """Of the default adapter and of the base."""
    found = []
    for adapter in (True, False):
        session.use_adapter(adapter)
        found += [*session.logits(IDS), session.forward([5])[None]]
    return np.concatenate(found)


def test_the_same_bits_and_nothing_written_twice(bundle: Bundle, tmp_path: Path) -> None:
    expected, cache = logits(open_session(bundle)), tmp_path / "cache"
    assert not np.array_equal(expected[:9], expected[10:19]), "the adapter has to change something"
    np.testing.assert_array_equal(logits(open_session(bundle, prepacked=cache)), expected)
    assert {path.name for path in cache.iterdir()} == {MODEL, DATA, MANIFEST}
    inodes = {path.name: path.stat().st_ino for path in cache.iterdir()}
    np.testing.assert_array_equal(logits(open_session(bundle, prepacked=str(cache))), expected)
    assert {path.name: path.stat().st_ino for path in cache.iterdir()} == inodes


@pytest.mark.parametrize(
    "why", ["another runtime", "another arithmetic", "a changed byte", "no manifest", "a lost file"]
)
def test_made_again_when_it_does_not_fit(
    bundle: Bundle, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, fp32 = tmp_path / "cache", why == "another arithmetic"
    open_session(bundle, prepacked=cache)
    before = (cache / MODEL).stat().st_ino
    if why == "another runtime":
        monkeypatch.setattr(onnxruntime, "__version__", "0.0")
    elif why == "a changed byte":
        content = bytearray((cache / DATA).read_bytes())
        content[len(content) // 2] ^= 1
        (cache / DATA).write_bytes(content)
    elif why == "no manifest":
        (cache / MANIFEST).write_text('{"files": {"model.onnx": "", "model.onnx.data": ""}}')
    elif why == "a lost file":
        (cache / DATA).unlink()
    made = open_session(bundle, prepacked=cache, fp32_compute=fp32)
    assert (cache / MODEL).stat().st_ino != before
    np.testing.assert_array_equal(logits(made), logits(open_session(bundle, fp32_compute=fp32)))


def test_what_is_not_edgetune_s_is_not_replaced(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not empty and holds no prepacked\.json"):
        open_session(bundle, prepacked=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("hidden", [128, 256, 384, 576])
def test_packed_bytes_lie_where_the_kernels_find_them(tmp_path: Path, hidden: int) -> None:
    """onnxruntime writes them at any address and reads them by another: without `align` these logits are wrong."""
    config = tiny_config(
        "llama", hidden_size=hidden, intermediate_size=3 * hidden, num_attention_heads=hidden // 32,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    bundle = export(quantize(write_model(tmp_path / "model", config), "int4", tmp_path / "base"), out=tmp_path / "b")
    expected = open_session(bundle).logits(IDS)
    packed = open_session(bundle, prepacked=tmp_path / "cache")
    np.testing.assert_array_equal(np.concatenate(list(packed.logits(IDS))), np.concatenate(list(expected)))
    content = (tmp_path / "cache" / MODEL).read_bytes()
    offsets = [int(offset) for offset in re.findall(rb"MatMulNBits\+\d+\|(\d+);", content)]
    assert len(offsets) == 2 * 4 + 1 and not any(offset % 64 for offset in offsets)


def test_packed_weights_are_mapped_and_not_memory(tmp_path: Path) -> None:
    config = tiny_config(
        "llama", hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    base = quantize(write_model(tmp_path / "model", config), "int4", tmp_path / "base")
    bundle = export(base, out=tmp_path / "bundle")
    assert (bundle.folder / DATA).stat().st_size > 12 << 20

    def taken(cache: str) -> int:
        command = [sys.executable, "-c", _LOAD, str(bundle.folder), cache]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    taken(str(tmp_path / "cache"))
    assert taken(str(tmp_path / "cache")) < taken("") / 2
