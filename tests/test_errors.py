"""Every error is fired, is of its class, and says what is wrong with its value and what to do next."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config, write_model
from tiny_bundle import random_adapter, random_reference, write_bundle
from tiny_run import write_run

import edgetune as et
from edgetune import errors
from edgetune.adapters.base import load_adapter
from edgetune.benchmark import check_gates
from edgetune.bundle import load_bundle
from edgetune.checkpoint import lock_run
from edgetune.data import read_rows
from edgetune.exporter.merging import BaseWeights
from edgetune.hub import model_folder
from edgetune.models import load_config
from edgetune.quantizer import read_manifest
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer

Action = Callable[[Path], object]
WEAK = et.LoraConfig(r=3, lora_alpha=1, target_modules=("q_proj",))  # it changes less than rounding to 4 bits does
ROWS = '{"prompt": "a", "completion": "b"}\n' * 20


def model(at: Path, **overrides: object) -> Path:
    return write_model(at / "model", tiny_config("llama", **overrides))


def base(at: Path, grid: str = "int4") -> Path:
    return et.quantize(model(at), grid, at / "base")


def rows(at: Path, text: str = ROWS) -> Path:
    path = at / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    return path


def device(at: Path, text: str) -> et.DeviceProfile:
    path = at / "mine.toml"
    path.write_text(f'extends = "pixel-9"\nid = "mine"\n{text}', encoding="utf-8")
    return et.load_device(path)


def device_of_itself(at: Path) -> object:
    (at / "mine.toml").write_text('extends = "mine.toml"', encoding="utf-8")
    return et.load_device(at / "mine.toml")


def cut_weights(at: Path) -> object:
    path = model(at) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return et.quantize(path.parent, "int4", at / "base")


def failed_gate(at: Path) -> object:
    return check_gates(et.bench(bundle(at), "host", new_tokens=2, runs=1, fail_if=["load_ms>0"]))


def bundle(at: Path) -> Path:
    return write_bundle(at / "bundle", random_reference(), random_adapter())


def edited(path: Path, **values: object) -> Path:
    """The JSON object in a file with some of its values replaced; returns its folder."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values), encoding="utf-8")
    return path.parent


def train(at: Path, *, enforce: str = "governor", **changes: object) -> et.Run:
    folder = base(at)
    plan = et.plan(folder, "host", data=rows(at), config=et.TrainConfig(max_steps=1))
    plan = dataclasses.replace(plan, **changes)
    return et.train(plan, folder, data=at / "rows.jsonl", out=at / "run", enforce=enforce)


def train_in_use(at: Path) -> object:
    (at / "run").mkdir()
    with lock_run(at / "run"):
        return train(at)


def adapter_of_another_model(at: Path) -> object:
    run = write_run(at / "run", base(at))
    other = load_config(write_model(at / "other", tiny_config("llama", hidden_size=64)))
    return load_adapter(run, other)


def damaged_bundle(at: Path) -> object:
    folder = bundle(at)
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes() + b" ")
    return load_bundle(folder)


def unequal_graph(at: Path) -> object:
    """An export whose graph was changed behind its back: a norm's weight is not what torch has."""
    run = write_run(at / "run", base(at))
    honest = BaseWeights.vector

    def wrong(self: BaseWeights, name: str) -> np.ndarray:
        return honest(self, name) * np.float32(1.5 if name == "model.norm.weight" else 1)

    BaseWeights.vector = wrong  # type: ignore[method-assign]
    try:
        return et.export(run, out=at / "bundle")
    finally:
        BaseWeights.vector = honest  # type: ignore[method-assign]


def without(module: str, action: Action) -> Action:
    """The action where a module is not installed."""

    def act(at: Path) -> object:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == module}
        sys.modules[module] = None  # type: ignore[assignment]
        try:
            return action(at)
        finally:
            del sys.modules[module]
            sys.modules.update(hidden)

    return act


# What is done, the error that it raises, and what its message says: the value, what was expected, the next step.
CASES: dict[str, tuple[Action, type[errors.EdgetuneError], str]] = {
    "unknown device": (
        lambda at: et.load_device("pixl-9"),
        et.DeviceError,
        "no device 'pixl-9'.*pixel-9.*edgetune devices",
    ),
    "device file is missing": (lambda at: et.load_device(at / "no.toml"), et.DeviceError, "no.toml.*No such file"),
    "device key is misspelt": (
        lambda at: device(at, "[memory]\nbudgt_mib = 1\n"),
        et.DeviceError,
        "memory.budgt_mib: unknown key.*budget_mib",
    ),
    "device has more budget than memory": (
        lambda at: device(at, "[memory]\ntotal_mib = 100\n"),
        et.DeviceError,
        "memory.budget_mib: 3686.*total_mib, 100",
    ),
    "device extends itself": (device_of_itself, et.DeviceError, "cannot extend itself.*mine.toml extends mine.toml"),
    "no such model": (
        lambda at: model_folder(at / "SmolLM2"),
        et.ModelError,
        "SmolLM2 does not exist.*Hub id is org/name",
    ),
    "model is a file": (lambda at: model_folder(rows(at)), et.ModelError, "rows.jsonl is a file; a model is a folder"),
    "model of another family": (
        lambda at: et.quantize(edited(model(at) / "config.json", model_type="gpt2"), "int4", at / "b"),
        et.ModelError,
        "model_type 'gpt2'; supported are llama, qwen2, qwen3, smollm3, gemma3_text",
    ),
    "weights do not fit the config": (
        lambda at: et.quantize(
            edited(model(at) / "config.json", hidden_size=54, num_attention_heads=6), "int4", at / "b"
        ),
        et.ModelError,
        r"model.embed_tokens.weight has shape \[301, \d+\]; \[301, 54\] was expected",
    ),
    "weights are cut": (cut_weights, et.ModelError, "model.safetensors"),
    "quantized twice": (lambda at: et.quantize(base(at), "int4", at / "b"), et.ModelError, "on the int4 grid already"),
    "no base folder": (lambda at: read_manifest(model(at)), et.ModelError, "no base folder.*edgetune quantize"),
    "base of a newer edgetune": (
        lambda at: read_manifest(edited(base(at) / "manifest.json", format_version=99)),
        et.ModelError,
        "99.*newer edgetune",
    ),
    "no tokenizer": (lambda at: load_tokenizer(at), et.ModelError, "tokenizer.json"),
    "unknown grid": (
        lambda at: et.quantize(model(at), "int3", at / "b"),
        et.ConfigError,
        "'int3'; choose from nf4, int4",
    ),
    "double quantization of int4": (
        lambda at: et.quantize(model(at), "int4", at / "b", double_quant=True),
        et.ConfigError,
        "double_quant needs grid 'nf4'",
    ),
    "output exists": (
        lambda at: (base(at), et.quantize(at / "model", "int4", at / "base")),
        et.ConfigError,
        "not empty.*--force",
    ),
    "rank of zero": (
        lambda at: et.plan(model(at), "host", adapter=et.LoraConfig(r=0)),
        et.ConfigError,
        "r = 0; an integer from 1 to",
    ),
    "unknown target": (
        lambda at: et.plan(model(at), "host", adapter=et.LoraConfig(target_modules=("qproj",))),
        et.ConfigError,
        "qproj.*choose from q_proj",
    ),
    "batch of zero": (
        lambda at: et.plan(model(at), "host", config=et.TrainConfig(batch_size=0)),
        et.ConfigError,
        "batch_size: found 0; expected.*1 to",
    ),
    "unknown budget": (lambda at: et.plan(model(at), "host", budget="most"), et.ConfigError, "'most'.*foreground"),
    "plan of a newer edgetune": (
        lambda at: et.Plan.from_dict({"format_version": 99}),
        et.ConfigError,
        "99.*Upgrade edgetune",
    ),
    "unknown enforcement": (
        lambda at: train(at, enforce="hope"),
        et.ConfigError,
        "'hope'; choose from none, governor",
    ),
    "base on another grid than the plan": (
        lambda at: train(at, grid="nf4"),
        et.ConfigError,
        "is on the int4 grid; the plan is for nf4",
    ),
    "nothing fits": (
        lambda at: et.plan(model(at), "host", budget=20),
        et.BudgetError,
        r"needs \d+ MiB to train; host allows 20.0 MiB.*--budget \d+",
    ),
    "a setting stands in the way": (
        lambda at: et.plan(
            model(at, vocab_size=20011), "host", budget=200, config=et.TrainConfig(batch_size=64, max_seq_length=256)
        ),
        et.BudgetError,
        "batch_size|--batch-size",
    ),
    "rows are not JSON": (
        lambda at: read_rows(rows(at, ROWS + "{oops\n"), load_tokenizer(model(at)), 64),
        et.DataError,
        "line 21",
    ),
    "rows have no completion": (
        lambda at: read_rows(rows(at, '{"prompt": "a"}\n'), load_tokenizer(model(at)), 64),
        et.DataError,
        "line 1.*completion",
    ),
    "run folder in use": (train_in_use, et.CheckpointError, r"run.*in use|another process"),
    "nothing to resume": (
        lambda at: et.train(
            et.plan(base(at), "host", data=rows(at)), at / "base", data=at / "rows.jsonl", out=at / "no", resume=True
        ),
        et.CheckpointError,
        "nothing to resume.*without --resume",
    ),
    "adapter of another model": (
        adapter_of_another_model,
        et.AdapterError,
        r"does not fit.*has shape \[3, \d+\]; \[3, 64\]",
    ),
    "no adapter folder": (lambda at: load_adapter(at, load_config(model(at))), et.AdapterError, "no adapter folder"),
    "adapter on a merged bundle": (
        lambda at: open_session(edited(bundle(at) / "edgetune.json", slots=[])),
        et.AdapterError,
        "takes no adapter.*--merge",
    ),
    "merge without an adapter": (
        lambda at: et.export(base(at), out=at / "bundle", merge=True),
        et.ExportError,
        "no adapter to merge",
    ),
    "another grid under an adapter": (
        lambda at: et.export(write_run(at / "run", base(at), WEAK), out=at / "bundle", weights="nf4"),
        et.ExportError,
        "Rounding int4 weights to nf4 loses the adapter.*--accept-loss",
    ),
    "the graph computes something else": (unequal_graph, et.ParityError, "logit"),
    "a gate failed": (failed_gate, et.GateError, r"load_ms is [\d.]+, and `load_ms>0` was to fail"),
    "no bundle": (lambda at: load_bundle(at), et.BundleError, "no edgetune.json.*edgetune export"),
    "bundle is damaged": (damaged_bundle, et.BundleError, r"tokenizer.json has \d+ bytes.*Copy the bundle again"),
    "bundle of a newer edgetune": (
        lambda at: load_bundle(edited(bundle(at) / "edgetune.json", format_version=99)),
        et.BundleError,
        "99 is newer.*upgrade",
    ),
    "prompt is longer than the context": (
        lambda at: et.generate(bundle(at), "x" * 100),
        et.ConfigError,
        "100 tokens.*Shorten the prompt by at least 53",
    ),
    "temperature below zero": (
        lambda at: et.generate(bundle(at), "x", temperature=-1),
        et.ConfigError,
        "temperature is -1, expected a number from 0",
    ),
    "bitsandbytes is not installed": (
        without("bitsandbytes", lambda at: base(at, "nf4")),
        et.MissingExtraError,
        r"bitsandbytes.*pip install 'edgetune\[train\]'",
    ),
    "huggingface_hub is not installed": (
        without("huggingface_hub", lambda at: model_folder("no-such-org/no-such-model")),
        et.MissingExtraError,
        r"huggingface_hub.*pip install 'edgetune\[hub\]'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_error(name: str, tmp_path: Path) -> None:
    action, kind, message = CASES[name]
    with pytest.raises(errors.EdgetuneError) as raised:
        action(tmp_path)
    assert type(raised.value) is kind, repr(raised.value)
    assert re.search(message, str(raised.value), re.DOTALL), str(raised.value)


def test_every_class_is_fired() -> None:
    kinds = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EdgetuneError)
    }
    assert kinds - {errors.EdgetuneError} == {kind for _, kind, _ in CASES.values()}


def test_every_class_is_in_the_tree_that_the_docstring_draws() -> None:
    drawn = re.findall(r"^ +(?:[│ ]*[├└]── )?(\w+Error) ", errors.__doc__ or "", re.MULTILINE)
    assert drawn == [name for name in vars(errors) if name.endswith("Error")]


def test_a_failed_quantization_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(et.ModelError):
        CASES["weights are cut"][0](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_parity_gate_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(et.ParityError):
        unequal_graph(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model", "run"]
