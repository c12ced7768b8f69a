"""Both engines from the same base, adapter and batch: the same loss, the same gradients, the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import tiny_config, write_model

from edgetune.adapters.attach import attach
from edgetune.adapters.lora import LoraConfig
from edgetune.models.decoder import Decoder, load_decoder
from edgetune.personalizer import graphs
from edgetune.personalizer.graphs import Adapter, Arrays, TrainingGraphs
from edgetune.personalizer.trainer import Backprop, initial, mean_loss
from edgetune.quantizer import quantize
from edgetune.training import backprop
from edgetune.training.forward import evaluate
from edgetune.training.schedule import learning_rate
from tests.personalizer.conftest import describe
from tests.tiny_run import adapter_tensors
from tests.training.conftest import make_base, make_plan, random_batch

ARENA_BYTES = 1 << 20
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text", "smollm3")


def no_check() -> None:
    pass


def torch_gradients(
    base: Path, config: LoraConfig, tensors: Arrays, batches: Sequence[dict[str, np.ndarray]]
) -> tuple[Decoder, float, Arrays]:
    decoder = load_decoder(base)
    parameters = attach(decoder, config)
    for name, value in tensors.items():
        parameters[name].data.copy_(torch.from_numpy(value))
    path = backprop.Path(first_block=config.first_block, recompute_layers=1)
    loss = backprop.loss_and_gradients(decoder, batches, path, dropout_key=(0, 0), check=no_check)
    return decoder, loss, {name: value.grad.numpy() for name, value in parameters.items() if value.grad is not None}


def ort_rule(
    base: Path, folder: Path, config: LoraConfig, tensors: Arrays, optimizer: str = "adamw", kept_layers: int = 0
) -> Backprop:
    plan = make_plan(base, adapter=config, optimizer=optimizer)
    made = TrainingGraphs(describe(base, folder), 1, optimizer, ARENA_BYTES, kept_layers)
    return Backprop(made, {name: np.ascontiguousarray(value.T) for name, value in tensors.items()}, config, plan)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_agree(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches of odd lengths with padding and several rows; a head in tiles; some linears without adapter."""
    monkeypatch.setattr(graphs, "HEAD_TILE_WEIGHTS", 72 * 100)
    base = make_base(tmp_path, family, "int4")
    wanted = LoraConfig(r=3, lora_alpha=5, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
    config, tensors = adapter_tensors(base, wanted)
    batches = [random_batch(301, 2, 19), random_batch(301, 1, 26, seed=1)]
    decoder, loss, gradients = torch_gradients(base, config, tensors, batches)
    rule = ort_rule(base, tmp_path / "graphs", config, tensors)
    assert len(rule.graphs.tiles) == 4
    found, norm = rule.gradient(batches, (0, 0), no_check)
    assert found == pytest.approx(loss, rel=1e-5)
    assert norm == pytest.approx(float(np.sqrt(sum((g**2).sum() for g in gradients.values()))), rel=1e-4)
    assert rule.gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        difference = np.abs(rule.gradients[name].T - value).max()
        assert difference <= 1e-4 * np.abs(value).max(), name
    adapter = Adapter(rule.graphs.model, rule.parameters, config.scaling)
    losses = mean_loss(rule.graphs, batches, adapter, no_check), evaluate(decoder, batches, check=no_check)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_adapters_in_upper_blocks_alone(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", "int4", num_hidden_layers=3)
    config, tensors = adapter_tensors(base, LoraConfig(r=2, lora_alpha=3, layers_to_transform=(1,), use_rslora=True))
    batches = [random_batch(301, 2, 11)]
    _, loss, gradients = torch_gradients(base, config, tensors, batches)
    rule = ort_rule(base, tmp_path / "graphs", config, tensors)
    assert rule.gradient(batches, (0, 0), no_check)[0] == pytest.approx(loss, rel=1e-5)
    assert rule.gradients.keys() == gradients.keys() and len(gradients) == 14
    for name, value in gradients.items():
        assert np.abs(rule.gradients[name].T - value).max() <= 1e-4 * np.abs(value).max(), name


@pytest.mark.parametrize("dense", [False, True])
def test_a_dense_embedding_or_base(dense: bool, tmp_path: Path) -> None:
    base = write_model(tmp_path / "model", tiny_config("llama"))
    if not dense:
        base = quantize(base, "int4", tmp_path / "base", dense_embeddings=True)
    config, tensors = adapter_tensors(base, LoraConfig(r=2))
    batches = [random_batch(301, 1, 9)]
    _, loss, gradients = torch_gradients(base, config, tensors, batches)
    rule = ort_rule(base, tmp_path / "graphs", config, tensors)
    assert rule.gradient(batches, (0, 0), no_check)[0] == pytest.approx(loss, rel=1e-5)
    for name, value in gradients.items():
        assert np.abs(rule.gradients[name].T - value).max() <= 1e-4 * np.abs(value).max(), name


def test_a_micro_batch_without_a_label_adds_nothing(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", "int4")
    config, tensors = adapter_tensors(base, LoraConfig(r=2))
    batch = random_batch(301, 1, 9)
    empty = batch | {"labels": np.full_like(batch["labels"], -100)}
    rule = ort_rule(base, tmp_path / "graphs", config, tensors)
    alone, norm = rule.gradient([batch], (0, 0), no_check)
    assert rule.gradient([empty, batch], (0, 0), no_check) == (alone, norm)
    assert rule.gradient([empty], (0, 0), no_check) == (0.0, 0.0) and not rule.gradients
    rule.update(1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_losses_agree_after_fifty_steps(optimizer: str, tmp_path: Path) -> None:
    """The whole rule of each engine: gradient, clipping, optimizer with weight decay, schedule."""
    base = make_base(tmp_path, "llama", "int4")
    config = LoraConfig(r=3, lora_alpha=5).resolved(load_decoder(base).config)
    plan = make_plan(base, adapter=config, optimizer=optimizer, weight_decay=0.1)
    decoder = load_decoder(base)
    mine = backprop.Rule(decoder, attach(decoder, config, plan.seed), plan, None)
    made = TrainingGraphs(describe(base, tmp_path / "graphs"), 1, optimizer, ARENA_BYTES)
    theirs = Backprop(made, initial(config, plan), config, plan)
    for step in range(50):
        batches = [random_batch(301, 2, 13, seed=step % 4)]
        rate = learning_rate(step, peak=0.02, warmup_steps=3, max_steps=50, schedule="cosine")
        losses = [rule.gradient(batches, (0, step), no_check)[0] for rule in (mine, theirs)]
        for rule in (mine, theirs):
            rule.update(rate)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0] < 0.9 * 6.5, "nothing was learned"


def test_a_state_goes_on_to_the_bit(tmp_path: Path) -> None:
    base = make_base(tmp_path, "llama", "int4")
    config, tensors = adapter_tensors(base, LoraConfig(r=2))
    rule, again = (ort_rule(base, tmp_path / name, config, tensors) for name in ("one", "two"))
    batches = [random_batch(301, 1, 9)]
    for _ in range(2):
        rule.gradient(batches, (0, 0), no_check)
        rule.update(1e-2)
    again.load(rule.tensors(), 2)
    for name, value in rule.parameters.items():
        again.parameters[name][...] = value
    for one in (rule, again):
        one.gradient(batches, (0, 0), no_check)
        one.update(1e-2)
    assert all(np.array_equal(value, again.parameters[name]) for name, value in rule.parameters.items())


def test_graphs_hold_no_weights_and_no_constant_nodes(tmp_path: Path) -> None:
    """A 32-bit runtime was seen to crash on constants as nodes; and the weights are in the data file alone."""
    description = describe(make_base(tmp_path, "gemma3_text", "int4"), tmp_path / "graphs")
    for file in description.files.values():
        onnx.checker.check_model(file)
        model = onnx.load(file, load_external_data=False)
        kinds = {node.op_type for node in model.graph.node}
        assert not kinds & {"Constant", "ConstantOfShape"}, file
        assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
        assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) < 2000, file


def test_a_weight_exists_while_it_is_multiplied(tmp_path: Path) -> None:
    """Onnxruntime merges none of the 7 dequantizations of a backward pass: forward's are not kept for it."""
    description = describe(make_base(tmp_path, "llama", "int4"), tmp_path / "graphs")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(description.files["backward"], options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    assert sum(node.op_type == "GatherBlockQuantized" for node in nodes) == 3 + 4
