"""The rules of training graphs against torch.autograd, on odd shapes, with inputs and gradients that are not zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from edgetune.graphs import backward
from edgetune.graphs.backward import Heads, Lora, Nodes
from edgetune.graphs.builder import Builder

Arrays = dict[str, np.ndarray]
B, T, HEADS, KV_HEADS, D = 2, 7, 6, 2, 10


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(folder: Path, make: Callable[[Nodes, Mapping[str, Any]], Mapping[str, Any]], feeds: Arrays) -> Arrays:
    """The values that `make` names, computed by onnxruntime."""
    b = Builder("rule", "")
    dtype = {np.dtype(np.int64): "int64", np.dtype(np.float32): "float32"}
    made = make(
        Nodes(b, "/rule"), {name: b.input(name, dtype[a.dtype], list(map(str, a.shape))) for name, a in feeds.items()}
    )
    for name, value in made.items():
        b.output(value, name, "float32", [f"{name}.{i}" for i in range(4)])
        value.shape = None
    b.save_graph(folder / "rule.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / "rule.onnx", options, providers=["CPUExecutionProvider"])
    return dict(zip(made, session.run(list(made), feeds), strict=True))


def expected(loss: Callable[..., torch.Tensor], d_y: np.ndarray, **inputs: np.ndarray) -> Arrays:
    """Autograd's gradients of what `loss` computes of the inputs, weighted by d_y."""
    tensors = {name: torch.from_numpy(value).requires_grad_() for name, value in inputs.items()}
    gradients = torch.autograd.grad((loss(**tensors) * torch.from_numpy(d_y)).sum(), list(tensors.values()))
    return {f"d_{name}": value.numpy() for name, value in zip(tensors, gradients, strict=True)}


def check(found: Arrays, wanted: Arrays) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_linear_and_its_gradient(tmp_path: Path) -> None:
    feeds = {"x": normal(5, 13, seed=1), "w": normal(9, 13, seed=2), "bias": normal(9, seed=3)}
    d_y = normal(5, 9, seed=4)

    def make(n: Nodes, v: Mapping[str, Any]) -> Mapping[str, Any]:
        y = backward.linear(n, v["x"], v["w"], v["bias"])
        return {"y": y, "d_x": backward.linear_backward(n, v["d_y"], v["w"])}

    found = run(tmp_path, make, feeds | {"d_y": d_y})
    np.testing.assert_allclose(found["y"], feeds["x"] @ feeds["w"].T + feeds["bias"], rtol=0, atol=1e-5)
    w, bias = torch.from_numpy(feeds["w"]), torch.from_numpy(feeds["bias"])
    check(found, expected(lambda x: F.linear(x, w, bias), d_y, x=feeds["x"]))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_lora_and_its_gradients(tmp_path: Path, rank: int) -> None:
    tensors = {"x": normal(5, 13, seed=1), "a": normal(13, rank, seed=2), "b": normal(rank, 9, seed=3)}
    d_y = normal(5, 9, seed=4)

    def make(n: Nodes, v: Mapping[str, Any]) -> Mapping[str, Any]:
        adapter = Lora(v["a"], v["b"], v["scaling"])
        y, z = backward.lora(n, v["x"], adapter)
        d_x, d_a, d_b = backward.lora_backward(n, v["x"], z, v["d_y"], adapter)
        return {"y": y, "d_x": d_x, "d_a": d_a, "d_b": d_b}

    found = run(tmp_path, make, tensors | {"d_y": d_y, "scaling": np.array([2.5], np.float32)})
    np.testing.assert_allclose(found["y"], 2.5 * tensors["x"] @ tensors["a"] @ tensors["b"], rtol=0, atol=1e-4)
    if rank:
        check(found, expected(lambda x, a, b: 2.5 * (x @ a @ b), d_y, **tensors))
    else:
        assert not found["d_x"].any() and (found["d_a"].shape, found["d_b"].shape) == ((13, 0), (0, 9))


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm_gradient(tmp_path: Path, epsilon: float) -> None:
    x, weight, d_y = normal(5, 13, seed=1), normal(13, seed=2), normal(5, 13, seed=3)

    def make(n: Nodes, v: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"d_x": backward.rms_norm_backward(n, v["x"], v["w"], epsilon, v["d_y"])}

    found = run(tmp_path, make, {"x": x, "w": weight, "d_y": d_y})
    check(found, expected(lambda x: F.rms_norm(x, (13,), torch.from_numpy(weight), epsilon), d_y, x=x))


@pytest.mark.parametrize(
    ("name", "activate"), [("silu", F.silu), ("gelu_pytorch_tanh", lambda x: F.gelu(x, approximate="tanh"))]
)
def test_slopes_of_activations(tmp_path: Path, name: str, activate: Callable[..., torch.Tensor]) -> None:
    x = 3 * normal(5, 13, seed=1)
    found = run(tmp_path, lambda n, v: {"d_x": backward.GATES_BACKWARD[name](n, v["x"])}, {"x": x})
    check(found, expected(lambda x: activate(x), np.ones_like(x), x=x))


def test_rotary_embedding_and_its_gradient(tmp_path: Path) -> None:
    x, d_y, angle = normal(B, HEADS, T, D, seed=1), normal(B, HEADS, T, D, seed=2), normal(B, T, D // 2, seed=3)
    cos, sin = np.cos(angle), np.sin(angle)

    def make(n: Nodes, v: Mapping[str, Any]) -> Mapping[str, Any]:
        tables = v["cos"], v["sin"]
        return {"y": backward.rotate(n, v["x"], tables), "d_x": backward.rotate(n, v["d_y"], tables, backward=True)}

    def rotated(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        c, s = torch.from_numpy(cos[:, None]), torch.from_numpy(sin[:, None])
        return torch.cat([low * c - high * s, high * c + low * s], -1)

    found = run(tmp_path, make, {"x": x, "d_y": d_y, "cos": cos, "sin": sin})
    np.testing.assert_allclose(found["y"], rotated(torch.from_numpy(x)).numpy(), rtol=0, atol=1e-5)
    check(found, expected(rotated, d_y, x=x))


def test_grouped_query_attention_and_its_gradients(tmp_path: Path) -> None:
    """With padding, rows that must not see each other, and a scale of its own."""
    q, k, v = normal(B, HEADS, T, D, seed=1), normal(B, KV_HEADS, T, D, seed=2), normal(B, KV_HEADS, T, D, seed=3)
    d_o, segments = normal(B, HEADS, T, D, seed=4), np.array([[0, 0, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, 1]])
    allowed = (segments[:, :, None] == segments[:, None]) & np.tri(T, dtype=bool)
    mask = np.where(allowed, 0, -np.inf).astype(np.float32)[:, None]

    def make(n: Nodes, values: Mapping[str, Any]) -> Mapping[str, Any]:
        heads = Heads(n.whole(B), n.whole(T))
        o, made = backward.attention(
            n, values["q"], values["k"], values["v"], values["mask"], heads, KV_HEADS, HEADS, 0.2
        )
        d_q, d_k, d_v = backward.attention_backward(n, made, values["d_o"], 0.2)
        return {"o": o, "d_q": d_q, "d_k": d_k, "d_v": d_v}

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, torch.from_numpy(mask), scale=0.2, enable_gqa=True)

    found = run(tmp_path, make, {"q": q, "k": k, "v": v, "mask": mask, "d_o": d_o})
    np.testing.assert_allclose(found["o"], attended(*map(torch.from_numpy, (q, k, v))).numpy(), rtol=0, atol=1e-5)
    check(found, expected(attended, d_o, q=q, k=k, v=v))
