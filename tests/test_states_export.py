"""Bundles of adapters away from linears: with inputs of their own, or of the model's own vectors, merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model

from edgetune.adapter_file import read_adapter, write_adapter
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import load_adapter, save_adapter
from edgetune.adapters.bitfit import BitfitConfig
from edgetune.adapters.bottleneck import BottleneckConfig
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.full import FullConfig
from edgetune.adapters.ln_tuning import LnTuningConfig
from edgetune.adapters.loreft import LoreftConfig
from edgetune.adapters.lst import LstConfig
from edgetune.adapters.prefix import PrefixConfig
from edgetune.adapters.prompt import PromptConfig
from edgetune.data import pack, read_rows, stack
from edgetune.errors import AdapterError, ConfigError, ExportError
from edgetune.exporter import export
from edgetune.models import load_config
from edgetune.models.decoder import load_decoder
from edgetune.personalizer.job import make_plan
from edgetune.quantizer import quantize
from edgetune.runtime.adapters import add_adapter, check_adapters, set_default_adapter
from edgetune.runtime.evaluate import mean_nll
from edgetune.runtime.generate import generate
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer
from edgetune.training.forward import evaluate
from tests.test_clients import PROMPTS, genai_greedy, greedy

CONFIGS: dict[str, AdapterConfig] = {
    "houlsby": BottleneckConfig(r=3, placement="houlsby", non_linearity="silu"),
    "parallel": BottleneckConfig(r=2, placement="parallel", non_linearity="tanh", layers_to_transform=(1,)),
    "pfeiffer": BottleneckConfig(r=3, placement="pfeiffer", non_linearity="relu"),
    "loreft": LoreftConfig(r=3, positions="f2+l3"),
    "lst": LstConfig(reduction=4),
    "lst of some": LstConfig(reduction=3, layers_to_transform=(1,)),
    "prompt": PromptConfig(num_virtual_tokens=5),
    "prefix": PrefixConfig(num_virtual_tokens=5),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    return quantize(write_model(folder / "model", tiny_config("llama", head_dim=16)), "int4", folder / "base")


def write_run(folder: Path, base: Path, config: AdapterConfig, scale: float = 0.3, **summary: Any) -> Path:
    """A run with random values, as training leaves it."""
    decoder = load_decoder(base)
    config = config.resolved(decoder.config)
    rng = np.random.default_rng(5)
    tensors = {
        name: (scale * rng.standard_normal(tuple(value.shape))).astype(np.float32)
        for name, value in attach(decoder, config).items()
    }
    folder.mkdir(parents=True)
    save_adapter(folder, config, tensors, str(base))
    (folder / "plan.json").write_text("{}", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps({"base": str(base), **summary}), encoding="utf-8")
    return folder


def torch_logits(base: Path, run: Path, ids: list[int], prompt_length: int | None = None) -> np.ndarray:
    decoder = load_decoder(base)
    config, tensors = load_adapter(run, decoder.config)
    load_tensors(attach(decoder, config.resolved(decoder.config)), tensors)
    lengths = None if prompt_length is None else torch.tensor([[prompt_length]])
    with torch.no_grad():
        logits: np.ndarray = decoder(torch.tensor([ids]), prompt_lengths=lengths)[0].numpy()
    return logits


@pytest.mark.parametrize(
    ("case", "family"),
    [
        *((case, "llama") for case in CONFIGS),
        *((case, "gemma3_text") for case in ("houlsby", "loreft", "lst", "prefix")),
    ],
)
def test_a_bundle_computes_what_was_trained(tmp_path: Path, base: Path, case: str, family: str) -> None:
    if family != "llama":  # standard attention, norms of what is added, a sliding window
        base = quantize(write_model(tmp_path / "model", tiny_config(family)), "int4", tmp_path / "base")
    run = write_run(tmp_path / "run", base, CONFIGS[case])
    bundle = export(run, out=tmp_path / "bundle")
    assert bundle.manifest["parity"]["max_abs_logit"] < 1e-3
    ids = np.random.default_rng(2).integers(0, 301, 150).tolist()  # more than the runtime reads at once
    session = open_session(bundle, fp32_compute=True)
    expected = torch_logits(base, run, ids)
    np.testing.assert_allclose(np.concatenate(list(session.logits(ids))), expected, atol=1e-3)
    session.reset()
    first = 8 if case == "loreft" else 1  # its prompt is what comes first
    expected = torch_logits(base, run, ids, first) if case == "loreft" else expected
    np.testing.assert_allclose(session.forward(ids[:first]), expected[first - 1], atol=1e-3)
    for at in range(first, first + 8):
        np.testing.assert_allclose(session.forward([ids[at]]), expected[at], atol=1e-3)
    plain = open_session(bundle, fp32_compute=True, adapter=False)
    with torch.no_grad():
        alone = load_decoder(base)(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(np.concatenate(list(plain.logits(ids))), alone, atol=1e-3)
    plain.use_adapter()
    np.testing.assert_allclose(np.concatenate(list(plain.logits(ids, first))), expected, atol=1e-3)


def test_what_the_manifest_says(tmp_path: Path, base: Path) -> None:
    bundle = export(write_run(tmp_path / "run", base, CONFIGS["parallel"]), out=tmp_path / "bundle")
    names = [f"model.layers.{i}.mlp_parallel" for i in range(2)]
    assert [(slot.name, slot.activation) for slot in bundle.slots] == [(name, "tanh") for name in names]
    binding = bundle.adapters["adapter"].binding
    assert (binding.r, binding.slots, binding.activation, binding.virtual_tokens) == (2, (names[1],), "tanh", 0)
    assert {name: value.shape for name, value in bundle.adapter_tensors().items()} == {
        f"{names[1]}.adapter_down": (72, 2), f"{names[1]}.adapter_up": (2, 72)
    }  # fmt: skip
    own = export(write_run(tmp_path / "again", base, CONFIGS["parallel"]), out=tmp_path / "own", slots="adapter")
    assert [slot.name for slot in own.slots] == names[1:]

    prefixed = export(write_run(tmp_path / "prefix", base, CONFIGS["prefix"]), out=tmp_path / "prefixed")
    binding = prefixed.adapters["adapter"].binding
    assert (binding.r, binding.slots, binding.activation, binding.virtual_tokens) == (0, (), None, 5)
    assert {value.shape for value in prefixed.adapter_tensors().values()} == {(1, 3, 5, 16)}
    assert prefixed.slots, "the graph takes LoRA as any other"


def test_virtual_tokens_take_their_part_of_the_context(tmp_path: Path, base: Path) -> None:
    bundle = export(write_run(tmp_path / "run", base, CONFIGS["prefix"]), out=tmp_path / "bundle")
    session = open_session(bundle)
    assert (session.length, session.start) == (5, 5)
    room = session.context_length - 5
    session.forward([7] * room)
    with pytest.raises(ConfigError, match=rf"{session.context_length + 1} tokens do not fit the context"):
        session.forward([7])
    made = generate(bundle, "a" * (room - 3), max_new_tokens=20)
    assert len(made.token_ids) <= 3 and made.stop_reason in ("context", "stop_token")
    with pytest.raises(ConfigError, match=rf"has {room} tokens after 5 virtual ones and the context of .* no room"):
        generate(bundle, "a" * room)


def test_bundles_take_more_of_them(tmp_path: Path, base: Path) -> None:
    bundle = export(base, out=tmp_path / "bundle")
    run = write_run(tmp_path / "run", base, CONFIGS["prefix"])
    more = add_adapter(bundle, run, name="more")
    assert more.adapters["more"].binding.virtual_tokens == 5
    assert check_adapters(more)["adapters"]["more"]["probe_change"] > 1e-3
    prompt = write_run(tmp_path / "prompt", base, CONFIGS["prompt"])
    with pytest.raises(AdapterError, match=r"is a prompt, .* computed by an export"):
        add_adapter(bundle, prompt)
    made = export(prompt, out=tmp_path / "made")
    assert "prompt" in add_adapter(bundle, made.folder / "adapter.safetensors", name="prompt").adapters
    with pytest.raises(AdapterError, match=r"adapts model\.layers\.0\.mlp_output, which is no linear"):
        add_adapter(bundle, write_run(tmp_path / "bottleneck", base, CONFIGS["pfeiffer"]))


def check_share(bundle: Any, base: Path, run: Path, alpha: float) -> None:
    """The bundle computes what torch does on the way from the base to the run's own tensors."""
    ids = np.random.default_rng(2).integers(0, 301, 40).tolist()
    decoder = load_decoder(base)
    config, tensors = load_adapter(run, decoder.config)
    for name, value in attach(decoder, config).items():
        value.data.lerp_(torch.from_numpy(tensors[name]), alpha)
    with torch.no_grad():
        expected = decoder(torch.tensor([ids]))[0].numpy()
    session = open_session(bundle, fp32_compute=True)
    np.testing.assert_allclose(np.concatenate(list(session.logits(ids))), expected, atol=1e-3)


def save_scaled(run: Path, base: Path, config: AdapterConfig, factor: float) -> None:
    """The run's tensors as the base's own, times a factor."""
    decoder = load_decoder(base)
    config = config.resolved(decoder.config)
    values = {name: factor * value.detach().numpy() for name, value in attach(decoder, config).items()}
    save_adapter(run, config, values, str(base))


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (LnTuningConfig(), "gemma3_text"),
        (LnTuningConfig(target_modules=("k_norm",)), "qwen3"),
        (BitfitConfig(), "qwen2"),
    ],
)
def test_the_models_own_vectors_are_merged_exactly(tmp_path: Path, config: AdapterConfig, family: str) -> None:
    base = quantize(write_model(tmp_path / "model", tiny_config(family)), "int4", tmp_path / "base")
    run = write_run(tmp_path / "run", base, config)
    with pytest.raises(ExportError, match=r"no LoRA stands for .*: export it with --merge"):
        export(run, out=tmp_path / "bundle")
    for alpha in (1.0, 0.25):
        bundle = export(run, out=tmp_path / f"bundle-{alpha}", merge=True, alpha=alpha)
        cost = bundle.manifest["rounding"]
        assert (bundle.manifest["weights"], cost["mean_relative_error"], cost["max_abs_logit"]) == ("int4", 0, 0)
        check_share(bundle, base, run, alpha)
    other = export(base, out=tmp_path / "other")
    with pytest.raises(AdapterError, match=r"export it with --merge, which is exact"):
        add_adapter(other, run)
    save_scaled(run, base, config, 1)
    with pytest.raises(ExportError, match=r"changes nothing\. Train it"):
        export(run, out=tmp_path / "nothing", merge=True)


def test_trained_blocks_are_merged_exactly_or_rounded(tmp_path: Path) -> None:
    base = quantize(write_model(tmp_path / "model", tiny_config("qwen2")), "int4", tmp_path / "base")
    config = FullConfig(layers_to_transform=(1,))
    run = write_run(tmp_path / "run", base, config, scale=0.1)
    with pytest.raises(ExportError, match=r"No LoRA has the rank .*: export it with --merge"):
        export(run, out=tmp_path / "bundle")
    for alpha in (1.0, 0.25):
        bundle = export(run, out=tmp_path / f"bundle-{alpha}", merge=True, alpha=alpha, weights="fp32")
        assert bundle.manifest["rounding"]["max_abs_logit"] == 0
        check_share(bundle, base, run, alpha)
    rounding = export(run, out=tmp_path / "rounded", merge=True).manifest["rounding"]
    linears = {f"model.layers.1.{path}" for path in load_config(base).linear_shapes}
    assert rounding["error_over_delta"].keys() == linears, "the others keep their codes"
    assert 0.01 < rounding["max_error_over_delta"] < 1 and rounding["max_abs_logit"] > 1e-3
    save_scaled(run, base, config, 1.001)
    message = r"moves 7 of 7 matrices further than training did.* Take --weights fp32, which"
    with pytest.raises(ExportError, match=message):
        export(run, out=tmp_path / "lost", merge=True)
    save_scaled(run, base, config, 1)
    with pytest.raises(ExportError, match=r"changes nothing\. Train it"):
        export(run, out=tmp_path / "nothing", merge=True)


def test_a_bottleneck_of_another_non_linearity_does_not_fit(tmp_path: Path, base: Path) -> None:
    bundle = export(write_run(tmp_path / "run", base, CONFIGS["pfeiffer"]), out=tmp_path / "bundle")
    other = BottleneckConfig(r=4, non_linearity="relu", layers_to_transform=(0,))
    assert len(add_adapter(bundle, write_run(tmp_path / "other", base, other), name="other").adapters) == 2
    tanh = write_run(tmp_path / "tanh", base, BottleneckConfig(r=3, non_linearity="tanh"))
    with pytest.raises(AdapterError, match=r"mlp_output: its non-linearity is tanh, that of the graph relu"):
        add_adapter(bundle, tanh)


def test_a_prefix_that_does_not_fit_is_refused(tmp_path: Path, base: Path) -> None:
    bundle = export(write_run(tmp_path / "run", base, CONFIGS["prefix"]), out=tmp_path / "bundle")
    adapter = read_adapter(bundle.folder / "adapter.safetensors")

    def refused(message: str, tensors: dict[str, np.ndarray], **binding: Any) -> None:
        (tmp_path / "other").mkdir(exist_ok=True)
        changed = replace(adapter, binding=replace(adapter.binding, **binding), tensors=tensors)
        write_adapter(tmp_path / "other", "other", changed)
        with pytest.raises(AdapterError, match=message):
            open_session(bundle, adapter=tmp_path / "other" / "other.safetensors")

    key = "past_key_values.1.key"
    shorter = {name: np.ascontiguousarray(value[:, :, :4]) for name, value in adapter.tensors.items()}
    refused(r"past_key_values\.0\.key: has shape \[1, 3, 4, 16\], expected \[1, 3, 5, 16\]", shorter)
    refused(rf"{key}: is missing", {name: value for name, value in adapter.tensors.items() if name != key})
    refused(r"is not of a slot", adapter.tensors | {"past_key_values.2.key": adapter.tensors[key]})
    long = {name: np.repeat(value, 60, axis=2) for name, value in adapter.tensors.items()}
    refused(r"with 300 virtual tokens, and the context of .* is 256", long, virtual_tokens=300)


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        ("pfeiffer", {"merge": True}, r"An activation keeps it from being folded into a weight\. Export it without"),
        ("loreft", {"merge": True}, r"changes some positions alone, and no weight does\. Export it without"),
        ("loreft", {"with_training": True}, r"know LoRA alone\. Train with --engine torch"),
        ("prefix", {"merge": True}, r"Virtual tokens change no weight\. Export it without --merge"),
        ("pfeiffer", {"with_training": True}, r"know LoRA alone\. Train with --engine torch"),
        ("prompt", {"with_training": True}, r"know LoRA alone\. Train with --engine torch"),
    ],
)
def test_what_cannot_be_exported_says_what_to_do(
    tmp_path: Path, base: Path, case: str, settings: dict[str, bool], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export(write_run(tmp_path / "run", base, CONFIGS[case]), out=tmp_path / "bundle", **settings)


def test_a_bundle_is_not_personalized_beside_a_prefix(tmp_path: Path, base: Path) -> None:
    bundle = export(base, out=tmp_path / "bundle", with_training=True)
    add_adapter(bundle, write_run(tmp_path / "run", base, CONFIGS["prefix"]), name="first")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a b c d"}\n' * 4, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"adapter first, the default of .*, is a prefix, and the training graphs"):
        make_plan(
            set_default_adapter(bundle, "first"), data=rows, eval_data=None, adapter=None, config=None, device="host",
            budget="foreground", skip_bad=False,
        )  # fmt: skip


def test_rounding_under_a_bottleneck_is_measured(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base, CONFIGS["prompt"])
    bundle = export(run, out=tmp_path / "bundle", weights="int8")
    assert bundle.manifest["rounding"]["max_error_over_delta"] is None
    assert bundle.manifest["rounding"]["kl"] < 0.05


def test_what_the_manifest_says_of_loreft(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base, LoreftConfig(r=2, positions="l4", layers_to_transform=(1,)))
    bundle = export(run, out=tmp_path / "bundle")
    names = [f"model.layers.{i}.block_output" for i in range(2)]
    assert [(slot.name, slot.activation, slot.positions) for slot in bundle.slots] == [(n, None, "l4") for n in names]
    binding = bundle.adapters["adapter"].binding
    assert (binding.r, binding.slots, binding.positions) == (2, (names[1],), "l4")
    tensors = bundle.adapter_tensors()
    assert {name.rpartition(".")[2]: value.shape for name, value in tensors.items()} == {
        "reft_down": (72, 2), "reft_bias": (2,), "reft_up": (2, 72)
    }  # fmt: skip
    rotation = tensors[f"{names[1]}.reft_up"]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(2), atol=1e-6)
    own = export(run, out=tmp_path / "own", slots="adapter")
    assert [slot.name for slot in own.slots] == names[1:]

    ranks = write_run(tmp_path / "ranks", base, LoreftConfig(r=5, positions="l4"))
    assert len(add_adapter(bundle, ranks, name="ranks").adapters) == 2
    other = write_run(tmp_path / "other", base, LoreftConfig(r=2, positions="f1"))
    with pytest.raises(AdapterError, match=r"block_output: it changes positions f1, the graph l4"):
        add_adapter(bundle, other)
    bottleneck = write_run(tmp_path / "bottleneck", base, CONFIGS["pfeiffer"])
    with pytest.raises(AdapterError, match=r"adapts model\.layers\.0\.mlp_output, which is no linear"):
        add_adapter(bundle, bottleneck)


def test_what_the_manifest_says_of_lst(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "run", base, LstConfig(reduction=3, layers_to_transform=(1,)))
    bundle = export(run, out=tmp_path / "bundle")
    names = [*(f"model.layers.{i}.side" for i in range(2)), "model.side_output"]
    assert [(slot.name, slot.in_features, slot.out_features) for slot in bundle.slots] == [
        (names[0], 24, 24), (names[1], 24, 24), (names[2], 24, 72)
    ]  # fmt: skip
    assert {(slot.reduction, slot.activation, slot.positions) for slot in bundle.slots} == {(3, None, None)}
    binding = bundle.adapters["adapter"].binding
    assert (binding.r, binding.slots, binding.reduction) == (32, tuple(names[1:]), 3)
    trained = load_adapter(run, load_config(base))[1]
    assert {name: value.shape for name, value in bundle.adapter_tensors().items()} == {
        f"{names[1]}.side_scale": (1,), f"{names[1]}.side_down": (24, 32), f"{names[1]}.side_up": (32, 24),
        f"{names[2]}.side_upsample": (24, 72),
    }  # fmt: skip
    np.testing.assert_array_equal(bundle.adapter_tensors()[f"{names[1]}.side_up"].T, trained[f"{names[1]}.side_up"])
    own = export(run, out=tmp_path / "own", slots="adapter")
    assert [slot.name for slot in own.slots] == names[1:]


def test_an_lst_of_other_blocks_joins_and_one_of_another_width_does_not(tmp_path: Path, base: Path) -> None:
    bundle = export(write_run(tmp_path / "run", base, CONFIGS["lst of some"]), out=tmp_path / "bundle")
    every = write_run(tmp_path / "every", base, LstConfig(reduction=3))
    assert len(add_adapter(bundle, every, name="every").adapters) == 2
    ids = list(range(3, 40))
    session = open_session(bundle.folder, fp32_compute=True, adapter="every")
    np.testing.assert_allclose(np.concatenate(list(session.logits(ids))), torch_logits(base, every, ids), atol=1e-3)
    wide = write_run(tmp_path / "wide", base, LstConfig(reduction=2))
    with pytest.raises(AdapterError, match=r"side: its reduction is 2, that of the graph 3"):
        add_adapter(bundle, wide)
    adapter = read_adapter(bundle.folder / "adapter.safetensors")
    output = "model.side_output.side_upsample"
    (tmp_path / "other").mkdir()

    def refused(message: str, tensors: dict[str, np.ndarray]) -> None:
        write_adapter(tmp_path / "other", "other", replace(adapter, tensors=tensors))
        with pytest.raises(AdapterError, match=message):
            open_session(bundle, adapter=tmp_path / "other" / "other.safetensors")

    refused(r"changes nothing: side_upsample of", adapter.tensors | {output: np.zeros_like(adapter.tensors[output])})
    refused(rf"{output}: is missing", {name: value for name, value in adapter.tensors.items() if name != output})
    scale = "model.layers.1.side.side_scale"
    refused(rf"{scale}: has shape \[2\], expected \[1\]", adapter.tensors | {scale: np.ones(2, np.float32)})


def test_held_out_rows_are_measured_with_their_prompts(tmp_path: Path, base: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": "a b " * n, "completion": "c" * (2 + n % 3)} for n in range(1, 12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run = write_run(tmp_path / "run", base, CONFIGS["loreft"], max_seq_length=64)
    bundle = export(run, out=tmp_path / "bundle", eval_data=rows)
    exact = bundle.manifest["parity"]["task"]["exact"]
    held_out = read_rows(rows, load_tokenizer(base), 64).rows
    decoder = load_decoder(base)
    config, tensors = load_adapter(run, decoder.config)
    load_tensors(attach(decoder, config.resolved(decoder.config)), tensors)
    loss = evaluate(decoder, [stack(pack(held_out, 64))], check=lambda: None)
    assert exact["loss"] == pytest.approx(loss, abs=1e-4)
    assert mean_nll(bundle, held_out, fp32_compute=True)["nll"] == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("case", ["loreft", "lst"])
def test_onnxruntime_genai_takes_the_first_call_as_the_prompt(tmp_path: Path, base: Path, case: str) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    bundle = export(write_run(tmp_path / "run", base, CONFIGS[case], scale=1), out=tmp_path / "bundle")
    model = og.Model(str(bundle.folder))
    adapters = og.Adapters(model)
    adapters.load(str(bundle.folder / "adapter.onnx_adapter"), "adapter")
    for prompt in PROMPTS[1:4]:
        assert genai_greedy(model, prompt, (adapters, "adapter")) == greedy(bundle, prompt, "adapter")[0]
    changed = [greedy(bundle, prompt, "adapter")[0] != greedy(bundle, prompt, False)[0] for prompt in PROMPTS[1:4]]
    assert any(changed)
