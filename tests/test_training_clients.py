"""A client that knows nothing of edgetune trains a bundle: the same losses as edgetune's own engine, and its adapter.

That the engine's gradients are torch's is `personalizer/test_gradients.py`.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, write_model

from edgetune.adapter_file import by_slot, read_adapter
from edgetune.adapters.lora import LoraConfig
from edgetune.bundle import load_bundle
from edgetune.data import pack, read_rows, stack
from edgetune.exporter import export
from edgetune.personalizer.graphs import TrainingGraphs, read_description
from edgetune.personalizer.trainer import Backprop, initial
from edgetune.quantizer import quantize
from edgetune.runtime.adapters import add_adapter, check_adapters
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer
from edgetune.training.schedule import learning_rate
from tests.training.conftest import make_plan, random_batch, write_rows

EXAMPLES = Path(__file__).parents[1] / "examples" / "python"
STEPS, PER_STEP, PEAK, R, SEED = 12, 2, 0.02, 3, 3
# Windows of several lengths, some with padding and two rows; more than a step takes and no multiple of that.
WINDOWS = [random_batch(301, 1, length, seed=length) for length in (19, 26, 11, 33, 24)]
BASES = {"llama": "int4", "gemma3_text": "int4", "qwen2": None}  # a tied head, windows of attention, biases and fp32

# The example's own tiles are larger than a tiny head: 301 rows in four, the last one short.
IN_TILES = "import train_bundle; train_bundle.HEAD_ROWS = 100; train_bundle.main()"


@pytest.fixture(scope="module", params=BASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, its bundle with training graphs, the windows, and what the example printed and wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_model(folder / "base", tiny_config(request.param))
    if (grid := BASES[request.param]) is not None:
        base = quantize(base.rename(folder / "model"), grid, folder / "base")
    export(base, out=folder / "bundle", with_training=True)
    write_windows(folder / "windows.json", WINDOWS)
    flags = ["--steps", STEPS, "--windows-per-step", PER_STEP, "--learning-rate", PEAK, "--r", R, "--seed", SEED]
    done = run("-c", IN_TILES, folder / "bundle", folder / "windows.json", "--out", folder / "mine.safetensors", *flags)
    assert done.returncode == 0, done.stderr
    (folder / "steps.jsonl").write_text(done.stdout, encoding="utf-8")
    return folder


def write_windows(path: Path, windows: list[dict[str, np.ndarray]]) -> Path:
    lists = [{key: value[0].tolist() for key, value in window.items()} for window in windows]
    path.write_text(json.dumps(lists), encoding="utf-8")
    return path


def run(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, name if name == "-c" else EXAMPLES / name, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, cwd=EXAMPLES)


def train(bundle: Path, windows: Path, out: Path, *flags: Any) -> subprocess.CompletedProcess[str]:
    return run("train_bundle.py", bundle, windows, "--out", out, "--threads", 1, *flags)


def test_the_examples_import_nothing_of_edgetune() -> None:
    for name in ("train_bundle.py", "bundle_adapter.py"):
        tree = ast.walk(ast.parse((EXAMPLES / name).read_text(encoding="utf-8")))
        names = {node.module if isinstance(node, ast.ImportFrom) else alias.name
                 for node in tree if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}  # fmt: skip
        assert names - sys.stdlib_module_names <= {"collections.abc", "numpy", "run_bundle", "bundle_adapter"}


def test_every_loss_and_the_adapter_are_those_of_the_engine(made: Path) -> None:
    plan = make_plan(made / "base", adapter=LoraConfig(r=R, lora_alpha=2 * R), weight_decay=0.0, seed=SEED)
    bundle = load_bundle(made / "bundle")
    parameters = initial(plan.adapter, plan)
    rule = Backprop(TrainingGraphs(read_description(bundle), 1, "adamw", 1 << 20), parameters, plan.adapter, plan)
    wanted = []
    for step in range(STEPS):
        batches = [WINDOWS[(PER_STEP * step + i) % len(WINDOWS)] for i in range(PER_STEP)]
        rate = learning_rate(step, peak=PEAK, warmup_steps=0, max_steps=STEPS, schedule="cosine")
        wanted.append([*rule.gradient(batches, (0, step), lambda: None), rate])
        rule.update(rate)
    printed = [json.loads(line) for line in (made / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in printed] == list(range(1, STEPS + 1))
    found = [[line["loss"], line["grad_norm"], line["learning_rate"]] for line in printed]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert wanted[-1][0] < 0.9 * wanted[0][0], "nothing was learned"
    scaled = {n: v * np.float32(plan.adapter.scaling if n.endswith("lora_B") else 1) for n, v in parameters.items()}
    expected, adapter = by_slot(scaled, bundle.slots), read_adapter(made / "mine.safetensors")
    assert adapter.tensors.keys() == expected.keys() and adapter.binding.r == R
    for name, value in expected.items():
        np.testing.assert_allclose(adapter.tensors[name], value, atol=1e-4, err_msg=name)


def test_its_adapter_goes_into_the_bundle_and_lowers_the_loss_there(made: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(made / "bundle", tmp_path / "bundle")
    add_adapter(bundle, made / "mine.safetensors")
    assert check_adapters(bundle)["adapters"]["mine"]["probe_change"] > 0.01
    window = {key: value[0] for key, value in WINDOWS[0].items()}
    ids, labels = (window[key][window["segment_ids"] == 0] for key in ("input_ids", "labels"))
    losses = {}
    for adapter in (False, True):
        logits = np.stack(
            [open_session(bundle, adapter=adapter).forward(ids[: i + 1].tolist()) for i in range(len(ids))]
        )
        chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses[adapter] = -chances[labels >= 0, labels[labels >= 0]].mean()
    assert losses[True] < losses[False] - 0.5
    run_with = [run("run_bundle.py", bundle, "--ids", *ids, *flags).stdout for flags in ([], ["--no-adapter"])]
    tokens = [json.loads(stdout)["tokens"] for stdout in run_with]
    assert tokens[0] != tokens[1]


once = pytest.mark.parametrize("made", ["llama"], indirect=True)


@once
def test_an_adapter_goes_on_from_its_file(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.safetensors"
    done = train(made / "bundle", made / "windows.json", out, "--adapter", made / "mine.safetensors", "--steps", 1)
    first = json.loads((made / "steps.jsonl").read_text(encoding="utf-8").splitlines()[0])["loss"]
    assert json.loads(done.stdout)["loss"] < 0.9 * first
    again, before = read_adapter(out), read_adapter(made / "mine.safetensors")
    assert again.binding == before.binding
    for name, value in again.tensors.items():
        np.testing.assert_allclose(value, before.tensors[name], atol=1e-3)  # one step of 2e-4


@once
def test_what_is_no_adapter_is_not_gone_on_from(made: Path, tmp_path: Path) -> None:
    (tmp_path / "short.safetensors").write_bytes(b"\x00" * 4)
    shutil.copy(made / "base" / "model.safetensors", tmp_path / "model.safetensors")
    for name in ("missing", "short", "model"):
        out = tmp_path / "out.safetensors"
        flags = ["--adapter", tmp_path / f"{name}.safetensors", "--steps", 1]
        done = train(made / "bundle", made / "windows.json", out, *flags)
        assert done.returncode == 1 and f"{name}.safetensors is no adapter of a bundle" in done.stderr
        assert done.stderr.endswith("Go on from a file that this script wrote.\n") and not out.exists()


@once
def test_windows_are_those_of_edgetune(made: Path, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", 6), tmp_path / "windows.json"
    done = run("write_windows.py", made / "bundle", rows, "--max-seq-length", 48, "--out", out)
    assert done.returncode == 0, done.stderr
    wanted = stack(pack(read_rows(rows, load_tokenizer(made / "bundle"), 48), 48))
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {key: [window[key] for window in found] for key in wanted} == {k: v.tolist() for k, v in wanted.items()}


def without_training(folder: Path) -> None:
    shutil.rmtree(folder / "bundle" / "training")


def newer(folder: Path) -> None:
    path = folder / "bundle" / "training" / "training.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"format_version": 1', '"format_version": 2'), "utf-8")


def window(**changes: Any) -> Any:
    def write(folder: Path) -> None:
        write_windows(folder / "windows.json", [WINDOWS[2] | {k: np.array([v]) for k, v in changes.items()}])

    return write


@once
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_training, "has no training graphs. Export it again with --with-training, from an int4 base."),
        (newer, "has format_version 2. This client reads 1: take a newer one."),
        (lambda folder: (folder / "windows.json").unlink(), "No such file or directory"),
        (lambda folder: (folder / "windows.json").write_text('[{"input_ids": [1]}]'), "KeyError('position_ids')"),
        (window(input_ids=[1, 2]), "has lists of several lengths, or none. All four are equally long."),
        (window(position_ids=[256] * 11), "has a position beyond 256. Cut its rows into shorter ones."),
        (window(input_ids=[301] * 11), "has a token beyond 301. Use this bundle's tokenizer."),
        (window(labels=[-1] * 11), "has a token beyond 301."),
        (window(labels=[-100] * 11), "has a label, so there is nothing to learn."),
    ],
)
def test_what_cannot_be_trained_is_refused(made: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    spoil(folder)
    done = train(folder / "bundle", folder / "windows.json", tmp_path / "out.safetensors", "--steps", 1)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith(".") and not (tmp_path / "out.safetensors").exists()


@once
def test_an_adapter_that_is_not_finite_is_not_written(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    flags = ["--steps", 40, "--windows-per-step", len(WINDOWS), "--learning-rate", 1e38]
    done = train(made / "bundle", made / "windows.json", out, *flags)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["loss"] is None for line in lines] == [False, *[True] * 20]
    assert done.returncode == 1 and "was not written. Train with a lower --learning-rate." in done.stderr
    assert not out.exists()
