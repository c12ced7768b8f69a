"""Bundles in a browser: onnxruntime-web in headless Chromium, against edgetune on plain onnxruntime.

Three parts. `tokens`: greedy answers of a bundle of the packaged sample for every kind of weights, base and with an
adapter of a short training, the same in the browser as here? Counted are the tokens of each before the first that
differs. WebAssembly multiplies 4- and 8-bit weights in fp32, onnxruntime here by int8 activations: `equal` can fall
short where `equal_fp32_compute` does not. That option does not reach 8 bits, so `pass` leaves them out. `speed`:
the same kinds on a larger shape with random weights. `page`: a chat typed into the page of examples/web, and pictures.

Run: npm ci --ignore-scripts --prefix examples/web && python benchmarks/web.py
     (--num-hidden-layers 2 --rows 4 is a quick look)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from bundle_bench import write_run
from machine import REPOSITORY, about
from shapes import SHAPES, write_shape
from web_page import EXAMPLE, Browser, missing, open_browser

from edgetune import sample
from edgetune.bundle import ADAPTER, DATA
from edgetune.demo import DEVICE, TRAINING
from edgetune.device import WEIGHTS
from edgetune.errors import EdgetuneWarning
from edgetune.exporter import export
from edgetune.quantizer import quantize
from edgetune.runtime.generate import Sampling, complete
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer

FOUR_BITS = ("int4", "standard")  # kinds that MatMulNBits can multiply in fp32 here, too
EIGHT_BITS = ("int8", "int8-dynamic")
MAX_NEW_TOKENS = 48
PROMPT_TOKENS, SPEED_TOKENS = 64, 16
Tokens = list[list[int]]

# Runs in a page of the example's server: the module that the page itself uses, without the page around it.
_ANSWERS = """(async (folder, adapters, prompts, maxNewTokens) => {
  const { fromUrl, openBundle } = await import("/bundle.js");
  const bundle = await openBundle(fromUrl(folder));
  const tokens = {};
  for (const adapter of adapters) {
    await bundle.useAdapter(adapter || null);
    tokens[adapter] = [];
    for (const content of prompts) {
      tokens[adapter].push((await bundle.answer([{ role: "user", content }], { maxNewTokens })).tokenIds);
    }
  }
  return tokens;
})"""
_SPEED = """(async (folder, promptTokens, count) => {
  const { memoryBytes } = await import("/memory.js");
  const { ort } = await import("/libraries.js");
  const { fromUrl, openBundle } = await import("/bundle.js");
  const start = performance.now();
  const bundle = await openBundle(fromUrl(folder));
  const loaded = performance.now();
  const ids = Array.from({ length: promptTokens }, (_, i) => (i * 7919) % bundle.manifest.model.vocab_size);
  const times = [];
  const began = performance.now();
  for await (const _ of bundle.generate(ids, { maxNewTokens: count })) times.push(performance.now());
  return {
    load_ms: loaded - start,
    time_to_first_token_ms: times[0] - began,
    generation_tokens_per_second: (1e3 * (times.length - 1)) / (times.at(-1) - times[0]),
    memory_bytes: memoryBytes(),
    threads: ort.env.wasm.numThreads,
  };
})"""


def sample_bundles(folder: Path, max_steps: int) -> dict[str, Path]:
    """A bundle of the packaged sample with an adapter, for each kind of weights."""
    base = quantize(sample.BASE, grid="int4", out=folder / "base")
    settings = {"device": DEVICE, "data": sample.PERSONAL_TRAIN, "max-steps": max_steps, "out": folder / "run"}
    settings |= TRAINING
    flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "edgetune", "train", str(base), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return _export_all(folder / "run", folder)


def shape_bundles(folder: Path, shape: str, num_hidden_layers: int | None) -> dict[str, Path]:
    """A bundle of a shape with random weights and a random LoRA of rank 8, for each kind of weights."""
    model = write_shape(shape, folder / "model", num_hidden_layers=num_hidden_layers)
    base = quantize(model, grid="int4", out=folder / "base")
    return _export_all(write_run(base, folder / "run", r=8), folder)


def _export_all(run: Path, folder: Path) -> dict[str, Path]:
    bundles = {kind: folder / kind for kind in WEIGHTS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EdgetuneWarning)  # that some are slow on the device is not the question here
        for kind, out in bundles.items():
            export(run, out=out, weights=kind, accept_loss=True)
    return bundles


def answers(bundle: Path, adapter: str, prompts: list[str], *, fp32_compute: bool = False) -> Tokens:
    """Greedy answers on plain onnxruntime; the adapter "" is the base."""
    session = open_session(bundle, adapter=adapter or False, fp32_compute=fp32_compute)
    tokenizer = load_tokenizer(bundle)
    tokens = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens.append(list(complete(session, tokenizer, ids, Sampling(MAX_NEW_TOKENS)).token_ids))
    return tokens


def equal_tokens(ours: Tokens, theirs: Tokens) -> int:
    """Tokens of all answers before the first that differs."""
    return sum(
        next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), min(len(a), len(b)))
        for a, b in zip(ours, theirs, strict=True)
    )


def compare(browser: Browser, kind: str, bundle: Path, prompts: list[str]) -> dict[str, Any]:
    """For the base and the adapter: tokens of the answers here, and how many of them the browser gives too."""
    result = {}
    theirs: dict[str, Tokens] = browser.run(_ANSWERS, kind, ["", ADAPTER], prompts, MAX_NEW_TOKENS)
    for adapter, got in theirs.items():
        ours = answers(bundle, adapter, prompts)
        figures = {"tokens": sum(map(len, ours)), "equal": equal_tokens(ours, got), "same": ours == got}
        if kind in FOUR_BITS:
            exact = answers(bundle, adapter, prompts, fp32_compute=True)
            same = {"tokens": sum(map(len, exact)), "equal": equal_tokens(exact, got), "same": exact == got}
            figures |= {f"{key}_fp32_compute": value for key, value in same.items()}
        result[adapter or "base"] = figures
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=40, help="prompts that are answered")
    parser.add_argument("--max-steps", type=int, default=300, help="steps of the adapter's training")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--num-hidden-layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--pictures", type=Path, default=REPOSITORY / "build" / "web")
    flags = parser.parse_args()
    if missing():
        sys.exit(missing())
    rows = sample.PERSONAL_EVAL.read_text(encoding="utf-8").splitlines()[: flags.rows]
    prompts = [json.loads(row)["messages"][0]["content"] for row in rows]
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "sample", Path(temporary) / "shape"
        bundles = sample_bundles(small, flags.max_steps)
        with open_browser(bundles) as browser:
            tokens = {kind: compare(browser, kind, bundle, prompts) for kind, bundle in bundles.items()}
            page = browser.chat("standard", {"": prompts[:1], ADAPTER: prompts[:2]})
            browser.take_pictures(flags.pictures)
            versions = {"chromium": browser.chromium.version}
        bundles = shape_bundles(large, flags.shape, flags.num_hidden_layers)
        with open_browser(bundles) as browser:
            speed = {
                kind: browser.run(_SPEED, kind, PROMPT_TOKENS, SPEED_TOKENS)
                | {"data_bytes": (bundle / DATA).stat().st_size}
                for kind, bundle in bundles.items()
            }
    machine = about()
    npm = json.loads((EXAMPLE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    machine["versions"] |= npm | versions
    shape = {"shape": flags.shape, "num_hidden_layers": flags.num_hidden_layers, "seed": 0}
    comparable = [each for kind in tokens if kind not in EIGHT_BITS for each in tokens[kind].values()]
    passed = all(each.get("same_fp32_compute", each["same"]) for each in comparable)
    result = {"pass": passed, "tokens": tokens, "speed": shape | speed, "page": page}
    print(json.dumps(result | machine, indent=1))


if __name__ == "__main__":
    main()
