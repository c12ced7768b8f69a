"""Mapped reading and streamed writing of safetensors, against the safetensors library."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from edgetune.errors import ModelError
from edgetune.memory import read_ahead
from edgetune.weights import TensorInfo, open_tensors, open_weights, sha256_file, write_safetensors

RNG = np.random.default_rng(0)
TENSORS = {
    "a.weight": RNG.standard_normal((5, 3)).astype(np.float32),
    "b.weight": RNG.standard_normal((2, 7)).astype(np.float16),
    "c.weight": RNG.standard_normal((4, 4)).astype(ml_dtypes.bfloat16),
    "d.codes": RNG.integers(0, 255, (3, 2, 16)).astype(np.uint8),
    "empty": np.zeros((0, 4), np.float32),
}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert set(weights) == set(TENSORS)
    for name, value in TENSORS.items():
        assert weights[name].shape == value.shape
        assert weights[name].nbytes == value.nbytes
        np.testing.assert_array_equal(weights.float32(name), value.astype(np.float32))
        assert not weights.array(name).flags.owndata, "a view into the map"
        assert not weights.array(name).flags.writeable
    np.testing.assert_array_equal(weights.float32("c.weight", slice(1, 3)), TENSORS["c.weight"][1:3].astype(np.float32))


def test_unmapped_tensors_are_still_there(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    view = weights.array("a.weight")
    weights.unmap()
    np.testing.assert_array_equal(view, TENSORS["a.weight"])
    np.testing.assert_array_equal(weights.float32("b.weight"), TENSORS["b.weight"].astype(np.float32))


def cached_pages(array: np.ndarray) -> int:
    """How many pages of a mapped array are in memory (mincore)."""
    address = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    length = array.ctypes.data + array.nbytes - address
    found = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
    assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(length), found)
    return sum(page & 1 for page in found)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="pages cannot be dropped on this system")
def test_reads_on_demand_and_ahead(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": np.zeros(1024 * mmap.PAGESIZE, np.uint8)}, path)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    x = (weights := open_tensors(path)).array("x")
    weights.read_on_demand()
    if cached_pages(x) > 256:
        pytest.skip("this file system keeps its pages in memory")
    before, touched = cached_pages(x), range(300, 1000, 100)
    for page in touched:
        x[page * mmap.PAGESIZE]
    assert cached_pages(x) - before == len(touched)
    part = x[500 * mmap.PAGESIZE : 564 * mmap.PAGESIZE]
    read_ahead(part.ctypes.data, part.nbytes)
    deadline = time.monotonic() + 30
    while cached_pages(part) < 64 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cached_pages(part) >= 64
    assert cached_pages(x) - before <= len(touched) + 65


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    infos = {"x": TensorInfo("F32", (5, 3)), "y": TensorInfo("U8", (7,)), "z": TensorInfo("F16", (0, 2))}
    values = {"x": TENSORS["a.weight"], "y": np.arange(7, dtype=np.uint8), "z": np.zeros((0, 2), np.float16)}
    asked = []

    def produce(name: str) -> np.ndarray:
        asked.append(name)
        return values[name]

    write_safetensors(tmp_path / "m.safetensors", infos, produce, {"made": "here"})
    assert asked == ["x", "y", "z"]
    for name, value in load_file(tmp_path / "m.safetensors").items():
        np.testing.assert_array_equal(value, values[name])
    with safe_open(tmp_path / "m.safetensors", "np") as file:
        assert file.metadata() == {"made": "here"}


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def produce(name: str) -> np.ndarray:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_safetensors(tmp_path / "m.safetensors", {"x": TensorInfo("F32", (2,))}, produce)
    assert list(tmp_path.iterdir()) == []


def test_shards_are_one_folder(tmp_path: Path) -> None:
    names = list(TENSORS)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for shard, members in shards.items():
        save_file({name: TENSORS[name] for name in members}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    weights = open_weights(tmp_path)
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(weights.float32(name), value.astype(np.float32))
    if Path("/proc/self/smaps").exists():
        weights.read_on_demand()
        found = re.findall(r"/(model-\S+)\n(?:\w+:.*\n)*?VmFlags:(.*)", Path("/proc/self/smaps").read_text())
        flags = {name: flags.split() for name, flags in found if name in shards}
        assert flags.keys() == shards.keys() and all("rr" in each for each in flags.values()), "MADV_RANDOM, of each"
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors, one of the 2 shards"):
        open_weights(tmp_path)


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError, match=r"header claims \d+ bytes in a file of 20"):
        open_weights(tmp_path)


def write_raw(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 12, r"12 bytes of tensors"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8, r"12 bytes from 0 were expected"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8, r"no list of sizes"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8, r"dtype F99"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, b"\0" * 8, r"4 bytes from 0 were expected"),
        ({"a": {"shape": [4]}}, b"", r"damaged header"),
        ([1], b"", r"damaged header"),
    ],
)  # fmt: skip
def test_headers_that_break_the_format(header: object, data: bytes, message: str, tmp_path: Path) -> None:
    write_raw(tmp_path / "m.safetensors", header, data)
    with pytest.raises(ModelError, match=message):
        open_tensors(tmp_path / "m.safetensors")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read_within_bounds(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        save_file(TENSORS, path)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, min(500, len(raw) - 1)))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
        try:
            weights = open_tensors(path)
        except ModelError:
            return
        for name in weights:
            weights.float32(name)


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
