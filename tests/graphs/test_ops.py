"""Each rule of `graphs` on its own against numpy, on odd shapes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import tiny_config

from edgetune.errors import ExportError
from edgetune.exporter.merging import round_to
from edgetune.graphs import FORMATS, int8, int8_dynamic, ops, standard
from edgetune.graphs.builder import Builder
from edgetune.models import FAMILIES
from edgetune.models.rope import rope_tables


def build(folder: Path, make: Callable[[Builder], Any]) -> Builder:
    """A graph with the one output that `make` returns."""
    b = Builder("test", "test.data")
    b.output(make(b), "y", "float32", ["a", "b", "c"])
    b.save(folder, "test.onnx")
    return b


def run(folder: Path, make: Callable[[Builder], Any], feeds: dict[str, np.ndarray]) -> np.ndarray:
    build(folder, make)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("mlas.qnbit.force_fp32", "1")
    session = onnxruntime.InferenceSession(folder / "test.onnx", options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(["y"], feeds)[0]
    return result


def normal(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filling(codes: Mapping[str, np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    """What writes the codes of a weight into the file."""

    def fill(arrays: dict[str, np.ndarray]) -> None:
        for key, array in arrays.items():
            np.copyto(array, codes[key])

    return fill


SHAPES = [(37, 72), (40, 88), (9, 32), (301, 64), (6, 10)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [name for name in FORMATS if name not in ("int8", "int8-dynamic")])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_computes_with_the_dequantized_weight(
    tmp_path: Path, weights: str, shape: tuple[int, int], with_bias: bool
) -> None:
    x, codes, bias = normal(2, 5, shape[1]), round_to(weights, normal(*shape, seed=2)), normal(shape[0], seed=3)

    def make(b: Builder) -> Any:
        value = b.input("x", "float32", ["a", "b", shape[1]])
        added = b.constant("bias", bias) if with_bias else None
        return FORMATS[weights].emit_linear(b, "/l", value, "w", shape, filling(codes), bias=added)

    expected = x @ FORMATS[weights].dequantize(codes, shape).T + (bias if with_bias else 0)
    np.testing.assert_allclose(run(tmp_path, make, {"x": x}), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", FORMATS)
def test_embedding_gathers_the_dequantized_rows(tmp_path: Path, weights: str, shape: tuple[int, int]) -> None:
    ids = np.random.default_rng(4).integers(0, shape[0], (2, 7))
    ids[0, 0], ids[0, 1] = 0, shape[0] - 1
    codes = round_to(weights, normal(*shape, seed=5))

    def make(b: Builder) -> Any:
        value = b.input("ids", "int64", ["a", "b"])
        return FORMATS[weights].emit_embedding(b, "/e", value, "w", shape, filling(codes))

    expected = FORMATS[weights].dequantize(codes, shape)[ids]
    assert np.array_equal(run(tmp_path, make, {"ids": ids}), expected), "a look-up is exact"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_dynamic_rounds_activations_to_one_scale(tmp_path: Path, shape: tuple[int, int], with_bias: bool) -> None:
    """ONNX's DynamicQuantizeLinear as a formula; extreme codes and inputs would saturate a 16-bit sum of products."""
    x, weight, bias = normal(2, 5, shape[1]), normal(*shape, seed=2), normal(shape[0], seed=3)
    x[0, 0], weight[0] = 2.5, 1.5
    codes = int8_dynamic.quantize(weight)

    def make(b: Builder) -> Any:
        value = b.input("x", "float32", ["a", "b", shape[1]])
        added = b.constant("bias", bias) if with_bias else None
        return int8_dynamic.emit_linear(b, "/l", value, "w", shape, filling(codes), bias=added)

    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / np.float32(255)
    zero = np.rint(-low / step)
    rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    expected = rounded @ int8_dynamic.dequantize(codes, shape).T + (bias if with_bias else 0)
    np.testing.assert_allclose(run(tmp_path, make, {"x": x}), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 33), (1, 1), (2000, 600)])
@pytest.mark.parametrize("weights", FORMATS)
def test_a_format_reads_ranges_and_indices_as_the_whole(weights: str, shape: tuple[int, int]) -> None:
    codes = round_to(weights, normal(*shape))
    whole = FORMATS[weights].dequantize(codes, shape)
    assert (whole.shape, whole.dtype) == (shape, np.float32)
    for rows in (slice(0, 1), slice(shape[0] // 3, shape[0]), np.array([shape[0] - 1, 0, shape[0] - 1])):
        np.testing.assert_array_equal(FORMATS[weights].dequantize(codes, shape, rows), whole[rows])


@pytest.mark.parametrize("shape", [*SHAPES, (5, 33), (64, 7), (128, 40)])
@pytest.mark.parametrize("weights", FORMATS)
def test_a_format_is_written_in_ranges_of_rows(weights: str, shape: tuple[int, int]) -> None:
    matrix, unit = normal(*shape), FORMATS[weights].row_unit(shape)
    whole = round_to(weights, matrix)
    written = {key: np.zeros_like(array) for key, array in whole.items()}
    starts = range(0, shape[0], max(1, shape[0] // 3 // unit) * unit)
    for start in starts:
        rows = slice(start, min(start + starts.step, shape[0]))
        part = round_to(weights, matrix[rows])
        for key, view in FORMATS[weights].rows_of(written, shape, rows).items():
            view[...] = part[key].reshape(view.shape)
    assert len(starts) >= 3 or unit > 1
    for key, array in whole.items():
        np.testing.assert_array_equal(written[key], array)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 33), (1, 1)])
def test_standard_is_int4_transposed_bit_for_bit(shape: tuple[int, int]) -> None:
    codes = round_to("int4", normal(*shape))
    same = standard.from_int4(codes, shape)
    assert same["codes"].nbytes == -(-shape[0] * shape[1] // 2)
    np.testing.assert_array_equal(standard.dequantize(same, shape), FORMATS["int4"].dequantize(codes, shape))


@pytest.mark.parametrize("weights", ["int8", "int8-dynamic"])
def test_8_bits_round_to_the_nearest_level(weights: str) -> None:
    weight = normal(7, 50)
    weight[2] = 0
    codes = FORMATS[weights].quantize(weight)
    scales = codes["scales"].repeat(32, 1)[:, :50] if weights == "int8" else codes["scales"][:, None]
    assert (np.abs(FORMATS[weights].dequantize(codes, weight.shape) - weight) <= scales / 2 * 1.001 + 1e-7).all()
    assert codes["codes"].min() >= 1, "127 levels on either side of zero"


def test_a_graph_of_standard_operators_takes_no_other() -> None:
    b = Builder("test", "test.data", contrib=False)
    with pytest.raises(AssertionError, match=r"/x: com\.microsoft in a graph of standard operators"):
        b.op("/x", "FusedMatMul", [b.input("x", "float32", [1, 2])] * 2, domain="com.microsoft")


def test_int8_linear_is_near_its_weight(tmp_path: Path) -> None:
    x, weight = normal(3, 4, 88), normal(40, 88, seed=2)
    codes = int8.quantize(weight)

    def make(b: Builder) -> Any:
        value = b.input("x", "float32", ["a", "b", 88])
        return int8.emit_linear(b, "/l", value, "w", weight.shape, filling(codes))

    got, expected = run(tmp_path, make, {"x": x}), x @ int8.dequantize(codes, weight.shape).T
    assert 0 < np.linalg.norm(got - expected) / np.linalg.norm(expected) < 0.01, "activations are rounded to int8"


def test_an_nf4_embedding_of_odd_width_is_refused() -> None:
    b = Builder("test", "test.data")
    with pytest.raises(ExportError, match="w has 7 columns; an nf4 embedding needs an even number"):
        FORMATS["nf4"].emit_embedding(b, "/e", b.input("ids", "int64", ["a", "b"]), "w", (5, 7), dict)


def test_rms_norm_and_head_norm(tmp_path: Path) -> None:
    x, weight = normal(2, 3, 24), normal(24, seed=2)

    def whole(b: Builder) -> Any:
        return ops.rms_norm(b, "/n", b.input("x", "float32", ["a", "b", 24]), "w", 24, lambda: weight, 0.01)

    def heads(b: Builder) -> Any:
        return ops.head_norm(b, "/n", b.input("x", "float32", ["a", "b", 24]), "w", 3, 8, lambda: weight[:8], 0.01)

    def norm(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return values / np.sqrt((values**2).mean(-1, keepdims=True) + 0.01) * scale

    np.testing.assert_allclose(run(tmp_path, whole, {"x": x}), norm(x, weight), atol=1e-6)
    expected = norm(x.reshape(2, 3, 3, 8), weight[:8]).reshape(2, 3, 24)
    np.testing.assert_allclose(run(tmp_path, heads, {"x": x}), expected, atol=1e-6)


def test_silu_gate(tmp_path: Path) -> None:
    gate, up = normal(1, 4, 9), normal(1, 4, 9, seed=2)

    def make(b: Builder) -> Any:
        return ops.silu_gate(b, "/g", *(b.input(name, "float32", ["a", "b", 9]) for name in ("gate", "up")))

    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(run(tmp_path, make, {"gate": gate, "up": up}), expected, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 1, 5, 16])
def test_lora_takes_every_rank_and_none(tmp_path: Path, rank: int | None) -> None:
    x, y = normal(6, 10), normal(6, 7, seed=2)

    def make(b: Builder) -> Any:
        inputs = [b.input(name, "float32", ["a", size]) for name, size in (("x", 10), ("z", 7))]
        return ops.lora(b, "/l", *inputs, "m", (7, 10))

    feeds, expected = {"x": x, "z": y}, y
    if rank is not None:
        feeds |= {"m.lora_A": normal(10, rank, seed=3), "m.lora_B": normal(rank, 7, seed=4)}
        expected = y + x @ feeds["m.lora_A"] @ feeds["m.lora_B"]
    np.testing.assert_allclose(run(tmp_path, make, feeds), expected, atol=1e-5)


def reference_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Causal attention of q [s, heads, d] at the last positions of k and v [t, kv_heads, d], all before rotation."""

    def rotate(x: np.ndarray, at: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, -1)
        c, s = cos[at][:, None], sin[at][:, None]
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    total, repeat = len(k), q.shape[1] // k.shape[1]
    positions = np.arange(total - len(q), total)
    q, k, v = rotate(q, positions), rotate(k, np.arange(total)).repeat(repeat, 1), v.repeat(repeat, 1)
    scores = np.einsum("shd,thd->hst", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.arange(total) <= positions[:, None], scores, -np.inf)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hst,thd->shd", chances / chances.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("head_dim", [6, 8, 16, 48])
def test_attention_from_an_empty_and_from_a_filled_cache(tmp_path: Path, head_dim: int) -> None:
    config = FAMILIES["llama"].config_from_hf(
        tiny_config("llama", num_attention_heads=6, num_key_value_heads=2, head_dim=head_dim)
    )
    cos, sin = rope_tables(config.attention_kinds[0], head_dim, 32)
    assert ops.has_fused_attention(config) is (head_dim in (16, 48))

    def make(b: Builder) -> Any:
        ids, mask = b.input("ids", "int64", ["b", "s"]), b.input("mask", "int64", ["b", "t"])
        qkv = [b.input(name, "float32", ["b", "s", heads * head_dim]) for name, heads in (("q", 6), ("k", 2), ("v", 2))]
        past = [b.input(f"past_{name}", "float32", ["b", 2, "p", head_dim]) for name in ("key", "value")]
        shared = ops.attention_inputs(b, ids, mask, config, 32)
        output, key, value = ops.attention(b, "/a", qkv, past, shared, config, 0)
        for present, name in ((key, "key"), (value, "value")):
            b.output(present, name, "float32", ["b", 2, "t", head_dim])
        return output

    build(tmp_path, make)
    session = onnxruntime.InferenceSession(tmp_path / "test.onnx", providers=["CPUExecutionProvider"])
    q, k, v = normal(1, 13, 6 * head_dim), normal(1, 13, 2 * head_dim, seed=2), normal(1, 13, 2 * head_dim, seed=3)
    cache = {f"past_{name}": np.zeros((1, 2, 0, head_dim), np.float32) for name in ("key", "value")}
    parts = []
    for start, stop in ((0, 4), (4, 5), (5, 13)):
        feeds = {name: value[:, start:stop] for name, value in (("q", q), ("k", k), ("v", v))}
        feeds |= {"ids": np.zeros((1, stop - start), np.int64), "mask": np.ones((1, stop), np.int64)}
        names = [item.name for item in session.get_inputs()]
        output, key, value = session.run(
            ["y", "key", "value"], {n: a for n, a in (feeds | cache).items() if n in names}
        )
        cache = {"past_key": key, "past_value": value}
        parts.append(output)
    expected = reference_attention(
        q[0].reshape(13, 6, -1), k[0].reshape(13, 2, -1), v[0].reshape(13, 2, -1), cos, sin
    ).reshape(1, 13, -1)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=1e-5)


def test_weights_are_produced_once_in_order_and_lie_where_they_should(tmp_path: Path) -> None:
    arrays = {"small": normal(5), "large": normal(130, 130), "codes": np.arange(77, dtype=np.uint8), "last": normal(3)}
    produced = []

    def produce(name: str) -> Callable[[], np.ndarray]:
        def give() -> np.ndarray:
            produced.append(name)
            return arrays[name]

        return give

    def make(b: Builder) -> Any:
        values = {name: b.weight(name, str(a.dtype), a.shape, produce(name)) for name, a in arrays.items()}
        assert b.weight("small", "float32", (5,), produce("small")) is values["small"]
        half = b.view("half", "large", "float32", (65, 130), start_byte=65 * 130 * 4)
        assert b.view("half", "large", "float32", (65, 130), start_byte=65 * 130 * 4) is half
        with pytest.raises(AssertionError, match="beyond reads past the end of codes"):
            b.view("beyond", "codes", "uint8", (70,), start_byte=8)
        return b.op("/sum", "Add", [half, half])

    b = build(tmp_path, make)
    assert produced == list(arrays)
    data = (tmp_path / "test.data").read_bytes()
    for name, array in arrays.items():
        offset, nbytes = b.placed[name]
        assert data[offset : offset + nbytes] == array.tobytes()
        assert b.sha256[name] == hashlib.sha256(array.tobytes()).hexdigest()
        assert offset % (16384 if name == "large" else 64) == 0
    assert len(data) == sum(b.placed["last"])
    session = onnxruntime.InferenceSession(tmp_path / "test.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["y"], {})[0], arrays["large"][65:] * 2)
    onnx.checker.check_model(str(tmp_path / "test.onnx"))


def test_weights_beyond_two_gib(tmp_path: Path) -> None:
    """Offsets past 2 GiB, where a 32-bit one would wrap, in a file of that size with nothing in front of them."""
    array = normal(70, 33)

    def make(b: Builder) -> Any:
        b._end = 1 << 31
        weight = b.weight("after", "float32", array.shape, lambda: array)
        half = b.view("half", "after", "float32", (35, 33), start_byte=35 * 33 * 4)
        return b.op("/sum", "Add", [half, b.op("/first", "Slice", [weight, *limits(b)])])

    def limits(b: Builder) -> list[Any]:
        return [b.constant(key, np.array([value], np.int64)) for key, value in (("start", 0), ("end", 35))]

    b = build(tmp_path, make)
    assert b.placed["after"].offset == 1 << 31
    assert (tmp_path / "test.data").stat().st_size == (1 << 31) + array.nbytes
    onnx.checker.check_model(str(tmp_path / "test.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "test.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(["y"], {})[0], array[:35] + array[35:])


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ExportError, match=r"cannot take 10\.0 MiB of weights: No space left on device\. Free some"):
        build(tmp_path, lambda b: b.weight("w", "float32", (10, 1 << 18), lambda: 1 / 0))
    assert not (tmp_path / "test.onnx").exists()


def test_what_is_produced_has_the_announced_shape(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"w: \(1, 5\) produced for \(4, 5\)"):
        build(tmp_path, lambda b: b.weight("w", "float32", (4, 5), lambda: normal(1, 5)))
