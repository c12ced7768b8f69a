"""A bundle written without edgetune: a two-layer decoder from standard ONNX ops, and the same decoder in numpy.

The runtime is tested against `Reference`, which has no cache and no onnxruntime, so an error in either shows. Shapes
are odd, positions come from a table (a wrong past length changes the logits), and a LoRA of rank 3 fits `q_proj`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import write_tokenizer
from onnx import TensorProto, helper, numpy_helper

from edgetune.adapter_file import Binding, BoundAdapter, write_adapter

VOCAB, HIDDEN, LAYERS, HEADS, HEAD_DIM, CONTEXT, EOS = 259, 22, 2, 2, 5, 48, 2
BASE = "0" * 64
SLOTS = [f"model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]


def byte_ids(text: str) -> list[int]:
    """Ids of the byte-level tokenizer of conftest, from its rule: three specials, then the sorted byte alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [3 + alphabet.index(char) for piece, _ in pieces for char in piece]


@dataclass(frozen=True)
class Reference:
    """The decoder as a formula: `logits(ids)` is [len(ids), VOCAB], computed from scratch."""

    weights: dict[str, np.ndarray]

    def logits(self, ids: list[int], adapter: dict[str, np.ndarray] | None = None) -> np.ndarray:
        w, count = {name: value.astype(np.float64) for name, value in self.weights.items()}, len(ids)
        x = w["embed"][ids] + w["positions"][:count]
        for i in range(LAYERS):
            q, k, v = (x @ w[f"{i}.{name}"] for name in ("q", "k", "v"))
            if adapter:
                q = q + x @ adapter[f"{SLOTS[i]}.lora_A"] @ adapter[f"{SLOTS[i]}.lora_B"]
            heads = []
            for h in range(HEADS):
                at = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
                scores = np.where(np.tri(count, dtype=bool), q[:, at] @ k[:, at].T / np.sqrt(HEAD_DIM), -np.inf)
                chances = np.exp(scores - scores.max(1, keepdims=True))
                heads.append(chances / chances.sum(1, keepdims=True) @ v[:, at])
            x = x + np.concatenate(heads, 1) @ w[f"{i}.o"]
        return x @ w["head"]

    def greedy(self, ids: list[int], count: int, adapter: dict[str, np.ndarray] | None = None) -> list[int]:
        """The tokens that follow, without a cache; stops before EOS."""
        out: list[int] = []
        while len(out) < count:
            token = int(self.logits(ids + out, adapter)[-1].argmax())
            if token == EOS:
                break
            out.append(token)
        return out


def random_reference(seed: int = 0) -> Reference:
    """Random weights, strong enough that attention and the adapter change the argmax; logits spread over +-8."""
    rng, inner = np.random.default_rng(seed), HEADS * HEAD_DIM
    shapes = {"embed": (VOCAB, HIDDEN), "positions": (CONTEXT, HIDDEN), "head": (HIDDEN, VOCAB)}
    for i in range(LAYERS):
        shapes |= {f"{i}.{name}": (HIDDEN, inner) for name in ("q", "k", "v")} | {f"{i}.o": (inner, HIDDEN)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) * 0.6 for name, shape in shapes.items()}
    return Reference(weights | {"head": weights["head"] / 12})


def scripted_reference(ids: list[int]) -> Reference:
    """A decoder that says `ids` whatever it reads: the token at position p is followed by ids[p + 1]."""
    weights = {name: np.zeros_like(value) for name, value in random_reference().weights.items()}
    head = np.random.default_rng(1).standard_normal((HIDDEN, VOCAB)).astype(np.float32)
    weights["head"] = head / np.linalg.norm(head, axis=0)
    weights["positions"][: len(ids) - 1] = 30 * weights["head"].T[ids[1:]]
    return Reference(weights)


def random_adapter(seed: int = 5, r: int = 3) -> dict[str, np.ndarray]:
    """Adapter tensors as graph inputs: lora_A [in_features, r], lora_B [r, out_features]."""
    rng, inner = np.random.default_rng(seed), HEADS * HEAD_DIM
    shapes = {}
    for slot in SLOTS:
        shapes |= {f"{slot}.lora_A": (HIDDEN, r), f"{slot}.lora_B": (r, inner)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def bound(tensors: dict[str, np.ndarray], tokenizer_sha256: str) -> BoundAdapter:
    """Tensors with what binds them to this bundle."""
    slots = tuple(slot for slot in SLOTS if f"{slot}.lora_A" in tensors)
    r = next((value.shape[1] for name, value in tensors.items() if name.endswith("lora_A")), 1)
    return BoundAdapter(Binding(BASE, None, tokenizer_sha256, r, 5.0, slots), tensors)


def build_graph(reference: Reference) -> onnx.ModelProto:
    """The same decoder as an ONNX graph with a KV cache, one op at a time."""
    nodes: list[onnx.NodeProto] = []
    initializers = [numpy_helper.from_array(value, name) for name, value in reference.weights.items()]

    def op(kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"v{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(name: str, value: Any, dtype: type = np.int64) -> str:
        initializers.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    zero, one, last = constant("zero", 0), constant("one", 1), constant("last", [-1])
    split, joined = constant("split", [1, -1, HEADS, HEAD_DIM]), constant("joined", [1, -1, HEADS * HEAD_DIM])
    scale, hidden_score = constant("scale", HEAD_DIM**-0.5, np.float32), constant("hidden", -1e9, np.float32)
    total = op("Gather", op("Shape", "attention_mask"), one)
    past = op("Sub", total, op("Gather", op("Shape", "input_ids"), one))
    rows, columns = op("Range", past, total, one), op("Range", zero, total, one)
    visible = op("LessOrEqual", columns, op("Unsqueeze", rows, last))
    mask = op("Where", visible, constant("shown", 0, np.float32), hidden_score)
    x = op("Add", op("Gather", "embed", "input_ids"), op("Gather", "positions", rows))
    for i in range(LAYERS):
        delta = op("MatMul", op("MatMul", x, f"{SLOTS[i]}.lora_A"), f"{SLOTS[i]}.lora_B")
        q = op("Add", op("MatMul", x, f"{i}.q"), delta)
        k, v = op("MatMul", x, f"{i}.k"), op("MatMul", x, f"{i}.v")
        q, k, v = (op("Transpose", op("Reshape", value, split), perm=[0, 2, 1, 3]) for value in (q, k, v))
        k = op("Concat", f"past_key_values.{i}.key", k, out=f"present.{i}.key", axis=2)
        v = op("Concat", f"past_key_values.{i}.value", v, out=f"present.{i}.value", axis=2)
        scores = op("Mul", op("MatMul", q, op("Transpose", k, perm=[0, 1, 3, 2])), scale)
        mixed = op("MatMul", op("Softmax", op("Add", scores, mask), axis=-1), v)
        mixed = op("Reshape", op("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        x = op("Add", x, op("MatMul", mixed, f"{i}.o"))
    op("MatMul", x, "head", out="logits")
    return _model(nodes, initializers)


def _model(nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto]) -> onnx.ModelProto:
    inner, info, real, whole = HEADS * HEAD_DIM, helper.make_tensor_value_info, TensorProto.FLOAT, TensorProto.INT64
    inputs = [info("input_ids", whole, ["batch", "sequence"]), info("attention_mask", whole, ["batch", "total"])]
    outputs = [info("logits", real, ["batch", "sequence", VOCAB])]
    for i in range(LAYERS):
        for kind in ("key", "value"):
            inputs.append(info(f"past_key_values.{i}.{kind}", real, ["batch", HEADS, "past", HEAD_DIM]))
            outputs.append(info(f"present.{i}.{kind}", real, ["batch", HEADS, "total", HEAD_DIM]))
    for slot in SLOTS:
        for name, shape, default in ((".lora_A", [HIDDEN, "r"], (HIDDEN, 0)), (".lora_B", ["r", inner], (0, inner))):
            inputs.append(info(slot + name, real, shape))
            initializers.append(numpy_helper.from_array(np.zeros(default, np.float32), slot + name))
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def write_bundle(
    folder: Path,
    reference: Reference,
    adapter: dict[str, np.ndarray] | None = None,
    *,
    graph: onnx.ModelProto | None = None,
    chat_template: bool = True,
    bos: bool = False,
) -> Path:
    """A bundle folder of this decoder, or with another graph in its place; with `bos` its tokenizer puts <s> first."""
    folder.mkdir(parents=True)
    onnx.save_model(
        graph or build_graph(reference), folder / "model.onnx", save_as_external_data=True, location="model.onnx.data",
        size_threshold=256,
    )  # fmt: skip
    write_tokenizer(folder, VOCAB)
    if bos:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        known = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": [*single, single[1]], "special_tokens": known,
        }  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    if not chat_template:
        (folder / "tokenizer_config.json").unlink()
    binding = asdict(bound(adapter or {}, sha256(folder / "tokenizer.json")).binding)
    if adapter:
        write_adapter(folder, "adapter", bound(adapter, binding["tokenizer_sha256"]))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    model = {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT, "bos_token_id": 1, "eos_token_ids": [EOS],
    }  # fmt: skip
    rows = HEADS * HEAD_DIM
    slots = [{"name": name, "in_features": HIDDEN, "out_features": rows, "modules": {name: rows}} for name in SLOTS]
    content: dict[str, Any] = {
        "format_version": 1, "edgetune_version": "0", "model": model, "grid": None, "weights": "fp32", "merged": False,
        "base_sha256": BASE, "tokenizer_sha256": binding["tokenizer_sha256"], "slots": slots,
        "adapters": {"adapter": {"binding": binding, "probe_change": 0.5}} if adapter else {},
        "default_adapter": "adapter" if adapter else None, "probe_rows": [[3, 4, 5, 9], [200, 100]], "merge": None,
        "parity": {}, "rounding": None, "peak_rss_bytes": 0, "files": files, "versions": {},
    }  # fmt: skip
    (folder / "edgetune.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
