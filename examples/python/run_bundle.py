"""A bundle on numpy and onnxruntime alone: all that a client does, to run on a board or to port to another language.

Run: python run_bundle.py bundle/ --prompt "Dear diary,"             (a text needs `pip install tokenizers` as well)
     python run_bundle.py bundle/ --ids 1 403 407 261 378 --adapter mail --max-new-tokens 20

In order: read `edgetune.json`, refuse an adapter of another base before the graph is loaded, open the graph by its path
(so that the weights stay in the mapped file), feed the adapter's tensors as graph inputs, and carry the KV cache from
one call to the next. Greedy, one sequence.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

# Before it is loaded: from 1.29 on onnxruntime's own packages send usage events to Microsoft unless told not to.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

CHUNK = 128  # a longer prompt is read in pieces of so many tokens, so that the logits of one call stay small


def read_manifest(bundle: Path) -> dict[str, Any]:
    path = bundle / "edgetune.json"
    if not path.is_file():
        sys.exit(f"{bundle} is no bundle: it has no {path.name}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["format_version"] != 1:
        sys.exit(f"{bundle} has format_version {manifest['format_version']}, this client reads 1")
    if "pooling" in manifest["model"]:
        sys.exit(f"{bundle} is the bundle of an encoder, which embeds a text and continues none")
    return manifest


def read_adapter(bundle: Path, manifest: dict[str, Any], name: str) -> dict[str, np.ndarray]:
    """The graph inputs of an adapter of the bundle."""
    if name not in manifest["adapters"]:
        sys.exit(f"{bundle} has no adapter {name}; it has {', '.join(manifest['adapters']) or 'none'}")
    return read_file(bundle / f"{name}.safetensors", manifest)[1]


def read_file(path: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What an adapter is bound to, and its tensors `<slot>.lora_A` [in, n] and `<slot>.lora_B` [n, out].

    Ends where it does not fit the bundle of this manifest.

    N is the rank for each adapted linear of the slot: q, k and v share one, gate and up another. A safetensors file is
    the length of its header in 8 bytes, the header as JSON, then the tensors.
    """
    raw = np.memmap(path, np.uint8, "r")
    start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header = json.loads(raw[8:start].tobytes())
    binding = json.loads(header.pop("__metadata__")["edgetune"])
    for key in ("base_sha256", "grid", "tokenizer_sha256"):
        if binding[key] != manifest[key]:
            sys.exit(f"{path} was trained with {key} {binding[key]}, the bundle has {manifest[key]}")
    sizes = {slot["name"]: (slot["in_features"], slot["out_features"]) for slot in manifest["slots"]}
    expected: dict[str, list[int | None]] = {}
    for slot in binding["slots"]:
        rows, columns = sizes.get(slot, (None, None))
        found = header.get(f"{slot}.lora_A", {"shape": []})["shape"][-1:]
        rank = found[0] if found and found[0] and found[0] % binding["r"] == 0 else binding["r"]
        expected |= {f"{slot}.lora_A": [rows, rank], f"{slot}.lora_B": [rank, columns]}
    if {key: info["shape"] for key, info in header.items()} != expected:
        sys.exit(f"{path} does not have the tensors of its slots in the bundle")
    tensors = raw[start:]
    return binding, {
        key: tensors[slice(*info["data_offsets"])].view("<f4").reshape(info["shape"]) for key, info in header.items()
    }


class Client:
    """One sequence on a bundle. Another adapter, of any rank, is other inputs of the same session."""

    def __init__(self, bundle: Path, model: dict[str, Any]) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # every optional input, which an adapter's tensor is, would be a warning
        path, providers = str(bundle / "model.onnx"), ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        parts = [f"{i}.{kind}" for i in range(model["num_hidden_layers"]) for kind in ("key", "value")]
        self.past = [f"past_key_values.{part}" for part in parts]
        self.outputs = ["logits", *(f"present.{part}" for part in parts)]
        self.empty = np.zeros((1, model["num_key_value_heads"], 0, model["head_dim"]), np.float32)
        self.start({})

    def start(self, adapter: dict[str, np.ndarray]) -> None:
        """Begin a new sequence with an adapter's tensors; none is the base."""
        self.adapter, self.cache, self.length = adapter, dict.fromkeys(self.past, self.empty), 0

    def forward(self, ids: list[int]) -> np.ndarray:
        """Append tokens to the sequence; the logits [vocab_size] that follow the last of them."""
        for at in range(0, len(ids), CHUNK):
            tokens = np.array([ids[at : at + CHUNK]], np.int64)
            self.length += tokens.shape[1]
            feeds = {"input_ids": tokens, "attention_mask": np.ones((1, self.length), np.int64)}
            logits, *present = self.session.run(self.outputs, {**feeds, **self.cache, **self.adapter})
            self.cache = dict(zip(self.past, present, strict=True))
        return logits[0, -1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", help="a text; no chat template is applied")
    prompts.add_argument("--ids", type=int, nargs="+", help="token ids in place of a text")
    adapters = parser.add_mutually_exclusive_group()
    adapters.add_argument("--adapter", metavar="NAME", help="one of the bundle's in place of its default")
    adapters.add_argument("--no-adapter", action="store_true", help="the base alone")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--logits", type=Path, metavar="FILE", help="write those of each token, [n, vocab_size], .npy")
    flags = parser.parse_args()

    manifest = read_manifest(flags.bundle)
    model = manifest["model"]
    name = None if flags.no_adapter else flags.adapter or manifest["default_adapter"]
    adapter = {} if name is None else read_adapter(flags.bundle, manifest, name)
    tokenizer, ids = None, flags.ids
    if ids is None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(flags.bundle / "tokenizer.json"))
        ids = tokenizer.encode(flags.prompt).ids

    client = Client(flags.bundle, model)
    client.start(adapter)
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    pending = ids
    for _ in range(min(flags.max_new_tokens, model["max_position_embeddings"] - len(ids))):
        rows.append(client.forward(pending))
        pending = [int(rows[-1].argmax())]
        tokens += pending
        if tokens[-1] in model["eos_token_ids"]:
            break
    if flags.logits:
        np.save(flags.logits, np.stack(rows))
    if tokenizer:
        print(tokenizer.decode(tokens))
    else:
        about = {"adapter": name, "machine": platform.machine(), "onnxruntime": onnxruntime.__version__}
        print(json.dumps({"tokens": tokens, **about}))


if __name__ == "__main__":
    main()
