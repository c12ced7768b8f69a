"""Heads on decoders, the whole way: gradients, plan, training, what PEFT makes of the files, and what is refused."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config, write_model
from safetensors.torch import load_file
from torch import nn

import edgetune as et
from edgetune.adapters import METHODS
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import load_adapter
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.head import SCORE, load_with_head, score_shapes
from edgetune.adapters.loreft import LoreftConfig
from edgetune.adapters.prefix import PrefixConfig
from edgetune.adapters.prompt import PromptConfig
from edgetune.base import open_base
from edgetune.bundle import Bundle, load_bundle
from edgetune.cli.embedding import show_embedding
from edgetune.data import Row, pack, stack
from edgetune.data.labeled import with_targets
from edgetune.errors import AdapterError, BundleError, ConfigError, DataError, ExportError
from edgetune.models.decoder import load_decoder
from edgetune.models.places import Score
from edgetune.objectives import OBJECTIVES, has_head
from edgetune.objectives.score import last_positions
from edgetune.quantizer import quantize
from edgetune.runtime.predicting import predict
from edgetune.runtime.session import open_any_session
from edgetune.tokenizer import load_tokenizer
from edgetune.training.backprop import Path as Walk
from edgetune.training.backprop import loss_and_gradients
from edgetune.training.changed import prompt_lengths
from edgetune.training.forward import Batch, evaluate, start_virtual_tokens
from edgetune.training.run import Run
from tests.test_heads import text_rows, write
from tests.training.conftest import at_step, interrupt

LORA = et.LoraConfig(r=3, lora_alpha=7)
HEADS = [name for name in OBJECTIVES if has_head(name)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "classification": text_rows(30),
    "regression": [row | {"label": ("yes", "no", "oos").index(row["label"]) - 0.5} for row in text_rows(30)],
    "reward": [
        {"prompt": row["text"][:3], "chosen": "ab" * (i % 4 + 1), "rejected": "xy" * (i % 3 + 1)}
        for i, row in enumerate(text_rows(24))
    ],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_model(tmp_path_factory.mktemp("decoder") / "model", tiny_config("llama", hidden_size=144))
    return quantize(model, "int4", model.parent / "int4")


def plan_for(base: Path, objective: str, data: Path | None, /, adapter: Any = LORA, **settings: Any) -> et.Plan:
    config = et.TrainConfig(
        **({"objective": objective, "batch_size": 2, "max_steps": 30, "learning_rate": 2e-2} | settings)
    )
    return et.plan(base, "host", data=data, adapter=adapter, config=config)


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for objective, rows in ROWS.items():
        data = write(folder / f"{objective}.jsonl", rows)
        plan = plan_for(base, objective, data, eval_fraction=0.2)
        made[objective] = et.train(plan, base, data=data, out=folder / objective)
    return made


def lines(run: Run, key: str) -> list[float]:
    found = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


LENGTHS = (9, 12, 7, 5, 20, 3, 31, 2)


def batches(objective: str, virtual_tokens: int = 0) -> list[Batch]:
    rng = np.random.default_rng(3)
    targets = {"classification": [0, 3, 1, 2, 3, 0, 4, 1], "regression": rng.normal(size=8), "reward": [1, 0] * 4}
    rows = [
        Row(rng.integers(0, 301, n).astype(np.int32), np.full(n, -100, np.int32), line // 2, target=float(target))
        for line, (n, target) in enumerate(zip(LENGTHS, targets[objective], strict=True))
    ]
    windows = pack(rows, 48 + 8 * virtual_tokens, 2 if objective == "reward" else 1, virtual_tokens)
    return [stack(windows[:1]), stack(windows[1:])]


def reference(objective: str, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if objective == "classification":
        return nn.functional.cross_entropy(outputs, targets.long(), reduction="sum")
    if objective == "regression":
        return nn.functional.mse_loss(outputs[:, 0], targets.float(), reduction="sum")
    return -nn.functional.logsigmoid(outputs[::2, 0] - outputs[1::2, 0]).sum()


@pytest.mark.parametrize(
    ("objective", "adapter"),
    [
        *((name, LORA) for name in HEADS),
        ("classification", PromptConfig(num_virtual_tokens=3)),
        ("regression", LoreftConfig(r=2)),
    ],
)
def test_gradients_equal_autograd(base: Path, objective: str, adapter: AdapterConfig) -> None:
    decoder = load_decoder(base)
    config = adapter.resolved(decoder.config)
    parameters = attach(decoder, config, seed=5)
    if config.virtual_tokens:
        start_virtual_tokens(decoder, 1)
    shape = score_shapes(objective, ("a", "b", "c", "d", "e"), 144)[SCORE]
    parameters[SCORE] = nn.Parameter(torch.zeros(shape))
    decoder.score = Score(parameters[SCORE])
    generator = torch.Generator().manual_seed(6)
    for value in parameters.values():
        value.data.add_(0.1 * torch.randn(value.shape, generator=generator))
    total, units = torch.zeros(()), 0
    made = OBJECTIVES[objective].Objective()
    some = batches(objective, config.virtual_tokens)
    for batch in some:
        ids, positions, segments = (
            torch.from_numpy(batch[key]) for key in ("input_ids", "position_ids", "segment_ids")
        )
        lengths = torch.from_numpy(prompt_lengths(batch))  # the whole row
        outputs, targets = decoder(ids, positions, segments, lengths), batch["target"]
        ends = [
            outputs[window, (segments[window] == segment).nonzero()[-1, 0]]
            for window in range(len(ids))
            for segment in range(int(segments[window].max()) + 1)
        ]
        total = total + reference(objective, torch.stack(ends), torch.from_numpy(targets[np.isfinite(targets)]))
        units += made.units(batch)
    assert units == (4 if objective == "reward" else 8)
    expected = total / units
    wanted = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))
    loss = loss_and_gradients(
        decoder, some, Walk(0, 1), dropout_key=(0, 0), check=lambda: None, objective=made
    )  # fmt: skip
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in wanted.items():
        grad = parameters[name].grad
        assert grad is not None
        assert float((grad - gradient).norm()) < 2e-5 * max(1.0, float(gradient.norm())), name
    assert evaluate(decoder, some, check=lambda: None, objective=made) == pytest.approx(expected.item(), rel=1e-5)


def test_sequences_end_where_their_segments_do() -> None:
    segments = np.array([[0, 0, 1, 2, 2, -1], [0, 0, 0, 0, 1, 1], [0, -1, -1, -1, -1, -1]])
    assert last_positions(segments).tolist() == [1, 2, 4, 9, 11, 12]


def test_rewards_that_are_far_apart_do_not_overflow() -> None:
    made = OBJECTIVES["reward"].Objective().score(torch.tensor([[-9000.0], [900.0], [50.0], [-50.0]]), np.zeros(4))
    assert made.loss == pytest.approx(9900) and made.figures == {"reward_margin": -9800, "reward_accuracy": 1}
    assert made.gradient[:, 0].tolist() == pytest.approx([-1, 1, 0, 0], abs=1e-6)


@pytest.mark.parametrize("objective", HEADS)
def test_every_objective_learns_and_is_written_down(runs: dict[str, Run], objective: str) -> None:
    run = runs[objective]
    losses, summary = lines(run, "loss"), run.summary
    assert run.stopped == "done"
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3])
    if objective == "reward":
        assert losses[0] == pytest.approx(math.log(2), abs=0.3)
        assert summary["eval_reward_accuracy"] == 1 and summary["eval_reward_margin"] > 0.5
    elif objective == "classification":
        assert summary["id2label"] == {"0": "no", "1": "oos", "2": "yes"}
        assert summary["eval_accuracy"] > 0.6
    else:
        assert 0 <= summary["eval_mean_absolute_error"] < 1
    outputs = 3 if objective == "classification" else 1
    config = et.LoraConfig(r=3).resolved(run_config(run))
    assert summary["trainable_parameters"] == outputs * 144 + sum(
        slot.num_parameters for slot in METHODS["lora"].slots(config, run_config(run))
    )


def run_config(run: Run) -> Any:
    return open_base(Path(run.summary["base"])).config


def sequence_classifier(base: Path, num_labels: int) -> nn.Module:
    """Hugging Face's own model with a head, of the dequantized base."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    opened = open_base(base)
    hf = json.loads((base / "config.json").read_text(encoding="utf-8"))
    hf.pop("quantization_config", None)
    config = AutoConfig.for_model(hf.pop("model_type"), **hf, num_labels=num_labels)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name in opened.config.vectors():
            model.get_parameter(name).copy_(torch.from_numpy(opened.weights.float32(name)))
        for name in opened.config.matrices():
            if name != "lm_head":
                model.get_parameter(f"{name}.weight").copy_(torch.from_numpy(opened.dequantize(name)))
    return model


def scores(run: Run, base: Path, ids: list[int]) -> np.ndarray:
    """The outputs for one text, of a run's folder read back."""
    decoder = load_decoder(base)
    config, tensors, head = load_with_head(run.folder, decoder.config, run.summary)
    assert head is not None and head.objective == run.summary["objective"]
    load_tensors(attach(decoder, config), tensors)
    decoder.score = Score(nn.Parameter(torch.from_numpy(head.tensors[SCORE])))
    with torch.no_grad():
        found: np.ndarray = decoder(torch.tensor([ids]))[0, -1].numpy()
    return found


def peft_scores(run: Run, base: Path, ids: list[int], outputs: int) -> np.ndarray:
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")  # PEFT, of norms
        tuned = peft.PeftModel.from_pretrained(sequence_classifier(base, outputs), str(run.folder))
    with torch.no_grad():
        found: np.ndarray = tuned(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


@pytest.mark.parametrize("objective", HEADS)
def test_peft_loads_adapter_and_head(runs: dict[str, Run], base: Path, objective: str) -> None:
    run, ids = runs[objective], load_tokenizer(base).encode("abc xyz bbb")
    found = scores(run, base, ids)
    np.testing.assert_allclose(found, peft_scores(run, base, ids, len(found)), atol=1e-5, rtol=0)
    assert json.loads((run.folder / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # so PEFT says of every norm
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen3", "ia3"),
        ("gemma3_text", "dora"),
        ("llama", "prefix_tuning"),
        ("qwen2", "prompt"),
        ("qwen3", "p_tuning"),
        ("llama", "ln_tuning"),
    ],
)
def test_other_families_and_methods(tmp_path: Path, family: str, method: str) -> None:
    """An untied head over the vocabulary (qwen2) has no part in it."""
    model = write_model(tmp_path / "model", tiny_config(family))
    base = quantize(model, "nf4", tmp_path / "base")
    data = write(tmp_path / "rows.jsonl", ROWS["classification"][:12])
    adapter = {
        "ia3": et.Ia3Config(), "dora": et.DoraConfig(r=2), "prefix_tuning": PrefixConfig(num_virtual_tokens=3),
        "prompt": PromptConfig(num_virtual_tokens=3), "ln_tuning": et.LnTuningConfig(),
        "p_tuning": et.PTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    }[method]  # fmt: skip
    plan = plan_for(base, "classification", data, adapter, max_steps=3, learning_rate=0.05)
    run = et.train(plan, base, data=data, out=tmp_path / "run")
    ids = load_tokenizer(base).encode("abc xyz")
    np.testing.assert_allclose(scores(run, base, ids), peft_scores(run, base, ids, 3), atol=1e-5, rtol=0)


def test_trained_blocks_and_their_head_are_hugging_faces(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["classification"][:12])
    adapter = et.FullConfig(layers_to_transform=(1,))
    plan = plan_for(base, "classification", data, adapter, max_steps=3, learning_rate=0.005)
    run, ids = et.train(plan, base, data=data, out=tmp_path / "run"), [5, 17, 90]
    model = sequence_classifier(base, 3)
    _, unexpected = model.load_state_dict(load_file(run.folder / "adapter_model.safetensors"), strict=False)
    assert not unexpected
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(scores(run, base, ids), found, atol=1e-5, rtol=0)


def test_a_stopped_run_goes_on_to_the_bit(runs: dict[str, Run], base: Path, tmp_path: Path) -> None:
    data = Path(runs["reward"].summary["data"])
    plan = plan_for(base, "reward", data, eval_fraction=0.2)
    cut = et.train(plan, base, data=data, out=tmp_path / "cut", on_progress=at_step(17, interrupt))
    assert cut.stopped == "signal"
    cut = et.train(plan, base, data=data, out=tmp_path / "cut", resume=True)
    assert cut.summary["adapter_sha256"] == runs["reward"].summary["adapter_sha256"]


def test_how_it_is_walked_changes_no_bit(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["classification"][:20])
    plan = plan_for(base, "classification", data, et.LoraConfig(r=2, layers_to_transform=(1,)), max_steps=4)
    plans = [plan, replace(plan, recompute_layers=1), replace(plan, feature_cache_bytes=0)]
    assert plan.feature_cache_bytes
    plans.append(replace(plan, activation_offloading=True))
    shas = [
        et.train(each, base, data=data, out=tmp_path / f"run{i}").summary["adapter_sha256"]
        for i, each in enumerate(plans)
    ]
    assert len(set(shas)) == 1


def test_mezo_moves_the_head_too(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["regression"][:12])
    plan = plan_for(base, "regression", data, step_rule="mezo", max_steps=2)
    run = et.train(plan, base, data=data, out=tmp_path / "run")
    head = load_with_head(run.folder, run_config(run), run.summary)[2]
    assert head is not None and head.tensors[SCORE].std() > 0.015
    assert len(lines(run, "mean_absolute_error")) == 2


def test_the_plan_counts_the_head(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["classification"])
    with_head, without = plan_for(base, "classification", data), plan_for(base, "regression", None)
    assert with_head.classes == ("no", "oos", "yes")
    assert without.classes == ()
    for part, times in (("adapter", 1), ("gradients", 1), ("optimizer", 2)):
        assert with_head.parts[part] - without.parts[part] == pytest.approx(4 * times * 2 * 144, abs=600)
    sft = et.plan(base, "host", adapter=LORA, config=et.TrainConfig(batch_size=2))
    assert sft.parts["adapter"] == without.parts["adapter"] - 4 * 144
    assert without.predicted_step_seconds < sft.predicted_step_seconds


def test_an_unseen_label_is_an_error_with_its_line(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["classification"])
    other = write(tmp_path / "other.jsonl", [{"text": "a", "label": "yes"}, {"text": "b", "label": "maybe"}])
    config = et.TrainConfig(objective="classification", max_steps=1)
    with pytest.raises(DataError, match=r"line 2 has the label 'maybe', which no row to learn from has"):
        et.plan(base, "host", data=data, eval_data=other, config=config)
    plan = et.plan(base, "host", data=data, config=config)
    with pytest.raises(DataError, match=r"line 2 has the label 'maybe'"):
        et.train(plan, base, data=data, eval_data=other, out=tmp_path / "run")


def test_what_cannot_be_is_refused_with_the_next_step(runs: dict[str, Run], base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["classification"])
    with pytest.raises(ConfigError, match=r"'embedding' takes an encoder.*a decoder has .*classification, .*reward"):
        plan_for(base, "embedding", data)
    with pytest.raises(ConfigError, match=r"needs rows: its classes come from them\. Give --data"):
        plan_for(base, "classification", None)
    with pytest.raises(DataError, match=r"label rows since line 1, .* for --objective classification or regression"):
        plan_for(base, "sft", data)
    with pytest.raises(DataError, match=r'text rows since line 1; the objective regression .* label rows, {"text", "l'):
        plan_for(base, "regression", write(tmp_path / "text.jsonl", [{"text": "a b"}] * 30))
    with pytest.raises(DataError, match=r"learns from preference rows"):
        write(tmp_path / "text.jsonl", [{"text": "a b"}])
        plan_for(base, "reward", tmp_path / "text.jsonl")
    with pytest.raises(ConfigError, match="kl_weight cannot be set with objective reward: a trained head has neither"):
        plan_for(base, "reward", None, kl_weight=0.1)
    with pytest.raises(ExportError, match=r"has a trained head \(reward\), and training graphs predict next tokens"):
        et.export(runs["reward"], out=tmp_path / "bundle", with_training=True)
    with pytest.raises(ExportError, match=r"predicts no token of held-out rows\. .*`edgetune eval`"):
        et.export(runs["classification"], out=tmp_path / "bundle", eval_data=data)
    with pytest.raises(AdapterError, match=r"has a trained head .*score\.weight.*take an adapter without a head"):
        load_adapter(runs["reward"].folder, open_base(base).config)
    said = {"objective": "classification", "classes": ["one", "two"]}
    with pytest.raises(AdapterError, match=r"the head has .*\(3, 144\).*of .*\(2, 144\).* were expected"):
        load_with_head(runs["classification"].folder, open_base(base).config, said)


@pytest.mark.parametrize("objective", HEADS)
def test_a_bundle_says_what_the_head_does(
    runs: dict[str, Run], base: Path, tmp_path: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, texts = runs[objective], ["abc xyz bbb", "klm", "xyz yyx zzz xxy"]
    bundle = et.export(run, out=tmp_path / "bundle", weights="int4")
    assert isinstance(bundle, Bundle) and bundle.model.objective == objective
    assert bundle.manifest["parity"]["max_abs_logit"] < 1e-4
    tokenizer = load_tokenizer(base)
    ends = [tokenizer.eos_token_id] if objective == "reward" else []
    session = open_any_session(bundle, fp32_compute=True)
    said = predict(bundle, texts)
    for text, row in zip(texts, said, strict=True):
        ids = [*tokenizer.encode(text), *ends]
        expected = scores(run, base, ids)
        session.reset()
        np.testing.assert_allclose(session.forward(ids), expected, atol=1e-4, rtol=0)
        if objective == "classification":
            assert row["label"] == bundle.model.classes[int(expected.argmax())]
        else:
            assert row["value"] == pytest.approx(expected[0], rel=0.1, abs=0.2)  # on int8 activations
    assert not (bundle.folder / "genai_config.json").exists()
    for use in (lambda: et.generate(bundle, "abc"), lambda: load_bundle(bundle.folder)):
        with pytest.raises(BundleError, match=rf"has a trained head \({objective}\), so it continues no text"):
            use()
    show_embedding(bundle.folder, texts[0], adapter=True, threads=1, as_json=True)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).keys() >= said[0].keys()


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_bundles_of_other_families_and_weights(tmp_path: Path, family: str) -> None:
    """Merged, rounded and in another format; qwen2 has a head over the vocabulary that no graph needs."""
    base = quantize(write_model(tmp_path / "model", tiny_config(family)), "int4", tmp_path / "base")
    data = write(tmp_path / "rows.jsonl", ROWS["classification"][:12])
    plan = plan_for(base, "classification", data, max_steps=4)
    run = et.train(plan, base, data=data, out=tmp_path / "run")
    expected = scores(run, base, load_tokenizer(base).encode("abc xyz"))
    for index, options in enumerate(({}, {"weights": "fp32", "merge": True}, {"weights": "int8", "accept_loss": True})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", et.EdgetuneWarning)  # that fp32 is slow
            bundle = et.export(run, out=tmp_path / f"bundle{index}", **options)  # type: ignore[arg-type]
        assert isinstance(bundle, Bundle)
        (said,) = predict(bundle, ["abc xyz"])
        shares = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
        found = [said["probabilities"][name] for name in bundle.model.classes]
        np.testing.assert_allclose(found, shares, atol=0.02)


def test_targets_are_given_once(base: Path, tmp_path: Path) -> None:
    from edgetune.data import read_rows

    rows = with_targets(read_rows(write(tmp_path / "x.jsonl", ROWS["reward"]), load_tokenizer(base), 64))
    assert [row.target for row in rows][:4] == [1, 0, 1, 0]
    assert rows.num_supervised == len(rows) and (rows[0].labels == -100).all()
    assert [row.target for row in with_targets(rows)] == [row.target for row in rows]
