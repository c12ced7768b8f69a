"""The training of the JavaScript example, in Node and in Chromium, against the loop of `personalizer`.

Both begin with the same adapter and see the same rows in the same order: what the example draws from its generator of
random numbers is drawn here a second time.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from edgetune import sample
from edgetune.adapter_file import by_slot, read_adapter
from edgetune.adapters.lora import LoraConfig, onnx_tensors, slots
from edgetune.bundle import load_bundle
from edgetune.data import Row, Window, read_rows, stack
from edgetune.exporter import export
from edgetune.personalizer.graphs import Arrays, TrainingGraphs, read_description
from edgetune.personalizer.trainer import Backprop, mean_loss
from edgetune.planner.plans import Plan
from edgetune.quantizer import quantize
from edgetune.runtime.adapters import add_adapter
from edgetune.runtime.generate import Sampling, complete
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer
from edgetune.training.schedule import learning_rate
from tests.conftest import tiny_config, write_model
from tests.training.conftest import make_base, make_plan, write_rows

REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE = REPOSITORY / "examples" / "web"

pytestmark = pytest.mark.skipif(
    not (EXAMPLE / "node_modules").is_dir(),
    reason="the npm packages are not there: npm ci --ignore-scripts --prefix examples/web",
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no node command")


def mulberry32(seed: int) -> Callable[[], float]:
    """Numbers in 0..1 that follow from a seed, as the example draws them."""
    state, whole = seed, 0xFFFFFFFF

    def draw() -> float:
        nonlocal state
        state = (state + 0x6D2B79F5) & whole
        t = (state ^ (state >> 15)) * (1 | state) & whole
        t = ((t + ((t ^ (t >> 7)) * (61 | t) & whole)) & whole) ^ t
        return (t ^ (t >> 14)) / 2**32

    return draw


def initial(config: LoraConfig, plan: Plan, draw: Callable[[], float]) -> Arrays:
    tensors: Arrays = {}
    for slot in slots(config, plan.model_config):
        bound = 1 / math.sqrt(slot.in_features)
        a = [bound * (2 * draw() - 1) for _ in range(slot.in_features * config.rank)]
        tensors[f"{slot.place}.lora_A"] = np.array(a, np.float32).reshape(slot.in_features, config.rank)
        tensors[f"{slot.place}.lora_B"] = np.zeros((config.rank, slot.out_features), np.float32)
    return tensors


def shuffled(rows: Sequence[Row], draw: Callable[[], float]) -> list[Row]:
    order = list(rows)
    for i in range(len(order) - 1, 0, -1):
        j = math.floor(draw() * (i + 1))
        order[i], order[j] = order[j], order[i]
    return order


def endless(rows: Sequence[Row], draw: Callable[[], float]) -> Iterator[Row]:
    while True:
        yield from shuffled(rows, draw)


def batch_of(rows: list[Row]) -> dict[str, np.ndarray]:
    return stack([Window((row,), max(map(len, rows))) for row in rows])


class Trained(NamedTuple):
    losses: list[float]  # of every step
    norms: list[float]  # of its gradient
    eval_losses: tuple[float, float]  # of the held-out rows, before and after
    tensors: Arrays  # as a bundle takes them


def personalize(bundle: Path, data: Path, plan: Plan) -> Trained:
    """The loop in Python, each row a window of its own."""
    opened, draw = load_bundle(bundle), mulberry32(plan.seed)
    parameters = initial(plan.adapter, plan, draw)
    graphs = TrainingGraphs(read_description(opened), 1, plan.optimizer, 1 << 20)
    rule = Backprop(graphs, parameters, plan.adapter, plan)
    rows = list(read_rows(data, load_tokenizer(bundle), plan.max_seq_length))
    order, count = shuffled(rows, draw), round(plan.eval_fraction * len(rows))
    held_out, source = [batch_of(order[:count])], endless(order[count:], draw)
    eval_losses = [mean_loss(graphs, held_out, rule.adapter, no_check)]
    steps, gradients = plan.max_steps or 0, []
    for step in range(steps):
        batches = [
            batch_of([next(source) for _ in range(plan.batch_size)]) for _ in range(plan.gradient_accumulation_steps)
        ]
        gradients.append(rule.gradient(batches, (0, step), no_check))
        warmup = round(plan.warmup_ratio * steps)
        schedule = {"warmup_steps": warmup, "max_steps": steps, "schedule": plan.lr_scheduler_type}
        rule.update(learning_rate(step, peak=plan.learning_rate, **schedule))
    eval_losses.append(mean_loss(graphs, held_out, rule.adapter, no_check))
    tensors = onnx_tensors(plan.adapter, {name: value.T for name, value in parameters.items()})
    losses, norms = map(list, zip(*gradients, strict=True))
    return Trained(losses, norms, (eval_losses[0], eval_losses[1]), by_slot(tensors, opened.slots))


def no_check() -> None:
    pass


def train(bundle: Path, rows: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    command = ["node", EXAMPLE / "train.js", bundle, rows, *flags]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)


def flags_of(plan: Plan) -> list[object]:
    """The settings of a plan that the example takes."""
    values = {"r": plan.adapter.rank, "lora_alpha": plan.adapter.lora_alpha}
    names = (
        "optimizer", "max_steps", "batch_size", "gradient_accumulation_steps", "max_seq_length", "learning_rate",
        "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm", "eval_fraction", "seed",
    )  # fmt: skip
    values |= {name: getattr(plan, name) for name in names}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases, their bundles with training graphs, and rows."""
    folder = tmp_path_factory.mktemp("tiny")
    export(make_base(folder, "gemma3_text", "int4"), out=folder / "base-bundle", with_training=True)
    dense = write_model(folder / "dense", tiny_config("qwen2"))
    export(dense, out=folder / "dense-bundle", with_training=True)
    write_rows(folder / "rows.jsonl", 17)
    return folder


@needs_node
@pytest.mark.parametrize("base", ["base", "dense"])
def test_node_trains_as_python_does(base: str, tiny: Path, tmp_path: Path) -> None:
    """AdamW on two kinds of attention and shapes that are no multiple of the grid's block; SGD on a head of its own."""
    values: dict[str, Any] = {
        "base": {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "warmup_ratio": 0.25, "learning_rate": 2e-2},
        "dense": {
            "optimizer": "sgd", "lr_scheduler_type": "linear", "batch_size": 3, "gradient_accumulation_steps": 1,
            "learning_rate": 2.0, "seed": 5,
        },
    }[base]  # fmt: skip
    bundle = tiny / f"{base}-bundle"
    plan = make_plan(tiny / base, adapter=LoraConfig(r=3, lora_alpha=5), max_steps=10, **values)
    trained = personalize(bundle, tiny / "rows.jsonl", plan)
    done = train(bundle, tiny / "rows.jsonl", *flags_of(plan), "--out", tmp_path / "web.safetensors")
    assert done.returncode == 0, done.stderr
    before, *steps, after = [json.loads(line) for line in done.stdout.splitlines()]
    assert [step["loss"] for step in steps] == pytest.approx(trained.losses, abs=1e-4)
    assert [step["gradNorm"] for step in steps] == pytest.approx(trained.norms, rel=1e-3)
    assert (before["evalLoss"], after["evalLoss"]) == pytest.approx(trained.eval_losses, abs=1e-4)
    assert not any(step["skipped"] for step in steps) and after["memoryBytes"] > 0
    assert after["evalLoss"] < before["evalLoss"] - 0.5, "nothing was learned"
    written = read_adapter(tmp_path / "web.safetensors").tensors
    assert written.keys() == trained.tensors.keys()
    for name, value in trained.tensors.items():
        np.testing.assert_allclose(written[name], value, atol=1e-3 * np.abs(value).max(), err_msg=name)
    added = add_adapter(shutil.copytree(bundle, tmp_path / "bundle"), tmp_path / "web.safetensors")
    assert added.default_adapter == "web" and added.adapters["web"].binding.lora_alpha == 5


_ROWS_JS = """
import { existsSync, readFileSync } from "node:fs";
import { readRows, stackRows } from "EXAMPLE/rows.js";
import { BundleTokenizer } from "EXAMPLE/tokenizer.js";
const [folder, length, texts] = JSON.parse(readFileSync(0, "utf8"));
const names = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"];
const there = names.filter((name) => existsSync(`${folder}/${name}`));
const tokenizer = new BundleTokenizer(new Map(there.map((name) => [name, readFileSync(`${folder}/${name}`, "utf8")])));
const made = texts.map((text) => {
  try {
    const rows = readRows(text, tokenizer, length);
    return { rows, batch: stackRows(rows) };
  } catch (error) {
    return { error: `${error.name}: ${error.message}` };
  }
});
const plain = (_, value) => (value instanceof BigInt64Array ? Array.from(value, Number) : value);
console.log(JSON.stringify(made, plain));
"""


def rows_of(folder: Path, length: int, *texts: str) -> list[dict[str, Any]]:
    """What the example's rows.js makes of files, or says of them."""
    script = _ROWS_JS.replace("EXAMPLE", EXAMPLE.as_uri())
    done = subprocess.run(
        ["node", "--input-type=module", "-e", script], input=json.dumps([str(folder), length, texts]),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made: list[dict[str, Any]] = json.loads(done.stdout)
    return made


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CHAT = [{"role": "user", "content": "Zoë?"}, {"role": "assistant", "content": "so — now\n"}]
PAIRS = [("Dear diary,", " all is well"), ("a\n", "b</s>"), ("", "so"), ("x", " y ")]
ROWS = {
    "text": jsonl(*({"text": text} for text in ("abc" * 40, "d" * 64, "é", "so — what now? </s>"))),
    "prompt": jsonl(*({"prompt": prompt, "completion": completion} for prompt, completion in PAIRS)),
    "chat": jsonl({"messages": CHAT}, {"messages": [{"role": "system", "content": "Be brief."}, *CHAT]}),
}


@needs_node
@pytest.mark.parametrize("kind", ["sample", *ROWS])
def test_rows_become_what_edgetune_makes_of_them(kind: str, tiny: Path, tmp_path: Path) -> None:
    folder, length = (sample.BASE, 256) if kind == "sample" else (tiny / "base-bundle", 64)
    text = ROWS.get(kind) or "".join(sample.PERSONAL_TRAIN.read_text(encoding="utf-8").splitlines(True)[::20])
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    (found,) = rows_of(folder, length, text)
    rows = list(read_rows(tmp_path / "rows.jsonl", load_tokenizer(folder), length))
    assert found["rows"] == [{"ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for row in rows]
    batch = {name: value.ravel().tolist() for name, value in batch_of(rows).items()}
    assert found["batch"] == batch | {"shape": [len(rows), max(map(len, rows))]}


@needs_node
def test_rows_that_cannot_be_learned_from_are_named(tiny: Path) -> None:
    good = jsonl({"text": "so"})
    cases = {
        " \n": "the file has no rows; expected one JSON object in each line",
        good + jsonl({"text": 1}): 'line 2: expected an object with a "text", with "prompt" and "completion", or with',
        good + "{\n" + good: "line 2: Expected property name or '}' in JSON",
        good + jsonl({"prompt": "so", "completion": " "}): "line 2: expected an object",
        jsonl({"prompt": "so", "completion": "a" * 62}): "line 1: has 65 tokens, expected at most 64",
        jsonl({"messages": CHAT[:1]}): "line 1: has no message of the assistant to learn",
        jsonl({"text": "</s>"}): "line 1: has a single token, so that nothing can be predicted",
    }
    found = rows_of(tiny / "base-bundle", 64, *cases)
    for made, message in zip(found, cases.values(), strict=True):
        assert made.get("error", "").startswith(f"RowError: {message}"), (made, message)


@needs_node
def test_node_stops_where_nothing_is_finite(tiny: Path) -> None:
    done = train(
        tiny / "base-bundle",
        tiny / "rows.jsonl",
        "--max-steps",
        60,
        "--batch-size",
        1,
        "--eval-fraction",
        0,
        "--learning-rate",
        1e30,
    )
    assert done.returncode == 1
    assert "RangeError: loss or gradients were not finite in 20 steps. Take a lower learning rate" in done.stderr
    _, *steps = [json.loads(line) for line in done.stdout.splitlines()]
    assert [step["skipped"] for step in steps][-20:] == [False, *[True] * 19]


@needs_node
def test_node_says_how_it_trains_and_with_what(tiny: Path, tmp_path: Path) -> None:
    done = train(tiny / "base-bundle", tiny / "rows.jsonl", "--steps", 3)
    assert done.returncode == 2 and done.stderr.startswith("usage: node train.js BUNDLE ROWS --max-steps N")
    assert "Unknown option '--steps'" in done.stderr
    export(tiny / "base", out=tmp_path / "plain")
    done = train(tmp_path / "plain", tiny / "rows.jsonl", "--max-steps", 1)
    assert "BundleError: the bundle has no training graphs. Export it with --with-training" in done.stderr
    shutil.copytree(tiny / "base-bundle", tmp_path / "bundle")
    manifest = json.loads((tmp_path / "bundle" / "edgetune.json").read_text(encoding="utf-8"))
    manifest["slots"] = manifest["slots"][1:]
    (tmp_path / "bundle" / "edgetune.json").write_text(json.dumps(manifest), encoding="utf-8")
    done = train(tmp_path / "bundle", tiny / "rows.jsonl", "--max-steps", 1)
    assert "BundleError: the bundle has no slot for self_attn.q_proj. Export it without --slots adapter" in done.stderr
    done = train(tiny / "base-bundle", tiny / "rows.jsonl", "--max-steps", 1, "--optimizer", "lion")
    assert "RangeError: optimizer is lion, expected adamw, sgd" in done.stderr


def held_out_losses(shown: dict[str, Any]) -> tuple[float, float]:
    """Before and after, as the page says them."""
    match = re.search(r"On held-out rows (\S+) before, (\S+) now\.", shown["says"])
    assert match, shown["says"]
    return float(match[1]), float(match[2])


@pytest.mark.debian
def test_the_page_personalizes_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of its curve are Python's, and what it answers then is what the adapter's file gives here."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    from web_page import missing, open_browser

    if missing():
        pytest.skip(missing())
    base, steps, prompt = quantize(sample.BASE, "int4", tmp_path / "base"), 12, "video call my mum"
    bundle = export(base, out=tmp_path / "bundle", with_training=True)
    lines = sample.PERSONAL_TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)[:120]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    with open_browser({"sample": bundle.folder}) as browser:
        browser.open("sample")
        trained = browser.personalize("".join(lines), steps, 3e-3)
        answer = browser.ask(prompt)
        worse = browser.personalize("".join(lines), 1000, 30, stop=True)
        with pytest.raises(RuntimeError, match="Not trained: line 1: "):
            browser.personalize("so", steps, 3e-3)
    plan = make_plan(
        base, adapter=LoraConfig(r=8, lora_alpha=16), max_steps=steps, batch_size=8, gradient_accumulation_steps=1,
        max_seq_length=256, learning_rate=3e-3, warmup_ratio=0.03, weight_decay=0.0, eval_fraction=0.1, seed=0,
    )  # fmt: skip
    expected = personalize(bundle.folder, tmp_path / "rows.jsonl", plan)
    assert trained["losses"] == pytest.approx(expected.losses, abs=1e-4) and len(expected.losses) == steps
    assert held_out_losses(trained) == pytest.approx(expected.eval_losses, abs=1e-3)
    assert expected.eval_losses[1] < expected.eval_losses[0] - 1, "nothing was learned"
    assert trained["says"].endswith("trained-1 is used now.") and trained["adapter"] == "trained-1"
    # The second one is held to the first, which its graphs compute linear by linear.
    before, after = held_out_losses(worse)
    assert before == pytest.approx(expected.eval_losses[1], abs=1e-3) and after > before
    assert 0 < len(worse["losses"]) < 100
    assert worse["says"].endswith("Choose trained-2 to try it all the same.") and worse["adapter"] == "trained-1"
    (tmp_path / "page.safetensors").write_bytes(trained["file"])
    tokenizer = load_tokenizer(bundle.folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    answers = []
    for adapter in (tmp_path / "page.safetensors", False):
        session = open_session(bundle, adapter=adapter, fp32_compute=True)
        answers.append(complete(session, tokenizer, ids, Sampling(64)).text)
    assert answer == answers[0] != answers[1]
