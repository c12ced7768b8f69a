"""stories260k writes the 200 greedy tokens that llama2.c's test suite demands: from torch, and from an fp32 bundle.

Run: python benchmarks/oracle.py          (EDGETUNE_REAL names the folder that holds stories260k)
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from machine import about, real

from edgetune.exporter import export
from edgetune.models.decoder import load_decoder
from edgetune.runtime.session import open_session


def from_torch(model: Path, prompt: list[int], count: int) -> list[int]:
    decoder, ids = load_decoder(model), list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(decoder(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def from_bundle(bundle: Path, prompt: list[int], count: int) -> list[int]:
    session, ids, step = open_session(bundle), [], list(prompt)
    for _ in range(count):
        step = [int(session.forward(step).argmax())]
        ids += step
    return ids


def main() -> None:
    model = real("stories260k")
    golden = json.loads((model / "oracle.json").read_text(encoding="utf-8"))
    prompt, wanted = golden["prompt_ids"], golden["expected_new_token_ids"]
    with tempfile.TemporaryDirectory() as folder:
        export(model, out=Path(folder) / "bundle", weights="fp32")
        found = {
            "torch": from_torch(model, prompt, len(wanted)),
            "onnxruntime": from_bundle(Path(folder) / "bundle", prompt, len(wanted)),
        }
    equal = {name: sum(a == b for a, b in zip(tokens, wanted, strict=True)) for name, tokens in found.items()}
    result = {"tokens": len(wanted), "equal": equal, "pass": all(n == len(wanted) for n in equal.values())}
    print(json.dumps(result | about(), indent=1))


if __name__ == "__main__":
    main()
