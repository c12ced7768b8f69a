"""Plans: byte counts against torch and against numbers worked out by hand, the ladder, refusals that are right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import tiny_config, write_model

from edgetune import planner
from edgetune.adapters import METHODS, prefix, prompt
from edgetune.adapters.bitfit import BitfitConfig
from edgetune.adapters.config import BlocksConfig
from edgetune.adapters.full import FullConfig
from edgetune.adapters.ln_tuning import LnTuningConfig
from edgetune.adapters.lora import LoraConfig
from edgetune.base import open_base
from edgetune.data import Row, pack, read_rows, split_eval
from edgetune.device import Cluster, list_devices, load_device
from edgetune.errors import BudgetError, ConfigError, DataError
from edgetune.memory import MIB
from edgetune.models import FAMILIES, load_config
from edgetune.objectives import OBJECTIVES, has_head, objective_of
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner import Plan, TrainConfig, costs, ladder, ort_work, plan, work
from edgetune.planner.arena import Arena
from edgetune.planner.costs import peak_parts
from edgetune.planner.job import Job, row_step
from edgetune.planner.ladder import SETTINGS, descend
from edgetune.planner.wishes import RowFacts, Wishes
from edgetune.planner.work import BLOCK_CYCLES, SLOWER_PRODUCTS, TENSOR_CYCLES, StepWork, lower_work, step_work
from edgetune.quantizer import quantize
from edgetune.tokenizer import load_tokenizer

FLOOR = 100 * MIB
RULES = ("backprop", "mezo")


@pytest.fixture(autouse=True)
def known_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child is started, and the numbers do not depend on this machine."""
    monkeypatch.setattr(planner, "measure_floor", lambda engine, threads: FLOOR)
    monkeypatch.setattr(planner.host, "threads", lambda: 2)
    monkeypatch.setattr("edgetune.planner.ladder.SMALLEST_TILE", 4096)  # the models here are small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that its activations matter: 64 KiB a token and block."""
    config = tiny_config("llama", num_hidden_layers=8, hidden_size=96, intermediate_size=256, vocab_size=4000)
    return write_model(tmp_path_factory.mktemp("model"), config)


@pytest.fixture(autouse=True)
def _wide_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine that tests plan on has them."""
    monkeypatch.setattr("edgetune.planner.wishes.are_offered", lambda: True)


def job(model: Any, **overrides: Any) -> Job:
    values: dict[str, Any] = {
        "model": model, "adapter": LoraConfig(r=4).resolved(model), "optimizer": "adamw",
        "grid": "nf4", "batch_size": 2, "gradient_accumulation_steps": 1, "max_seq_length": 32, "recompute_layers": 2,
        "tile_weights": 88 * 48, "activation_offloading": False, "dequantized_layers": 0, "step_rule": "backprop",
        "threads": 1, "supervised_per_window": 31,
    }  # fmt: skip
    return Job(**(values | overrides))


TINY = tiny_config(
    "llama", hidden_size=48, intermediate_size=88, num_attention_heads=6, num_key_value_heads=2, head_dim=8,
    vocab_size=301, num_hidden_layers=2,
)  # fmt: skip


class TestCounts:
    """The tiny llama: hidden 48, inner 88, q 48, kv 16, 6 heads, vocabulary 301, 2 blocks; 64 tokens; rank 4."""

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Any:
        return load_config(write_model(tmp_path, TINY, tokenizer=False))

    def test_by_hand(self, tiny: Any) -> None:
        # q, k, v, the attention's output; the middle of the residual; gate and up.
        assert costs.activation_bytes(job(tiny)) == 64 * 4 * (48 + 16 + 16 + 48 + 48 + 2 * 88)
        parameters = (
            2 * 4 * sum(n + k for n, k in [(48, 48), (16, 48), (16, 48), (48, 48), (88, 48), (88, 48), (48, 88)])
        )
        parts = peak_parts(job(tiny), FLOOR)[1]
        assert parts["adapter"] == 4 * parameters + 14 * costs.SLOT_OBJECT_BYTES
        assert parts["gradients"] == 4 * parameters
        assert parts["logits"] == 8 * 4 * 62
        assert parts["optimizer"] == 8 * parameters
        assert parts["context"] == 4 * (64 * 32 + 2 * 64 * 4)  # two windows' masks, and their cosines and sines

    @pytest.mark.parametrize(
        ("hidden", "inner", "vocab", "tile", "floats"),
        [
            (640, 2048, 2000, 1 << 20, 1638 * 384 + 384 * 2048),  # tiles of 1638 and of 512 rows
            (576, 1536, 9000, 1 << 20, 1820 * 384),  # what backward needs fits into forward's
            (192, 448, 1536, 1 << 20, 1536 * 192),  # no panel is as wide as the weights
            (896, 4864, 2000, 1 << 18, 292 * 384 + 292 * 896),
        ],
    )
    def test_packed_panels(self, tiny: Any, hidden: int, inner: int, vocab: int, tile: int, floats: int) -> None:
        model = dataclasses.replace(tiny, hidden_size=hidden, intermediate_size=inner, vocab_size=vocab)
        assert costs.pack_bytes(job(model, tile_weights=tile, threads=2)) == 2 * costs.PACK_BYTES + 4 * floats
        without = costs.pack_bytes(job(model, tile_weights=tile, threads=2, step_rule="mezo"))
        assert without == 2 * costs.PACK_BYTES + 4 * max(
            min(n, tile // k) * min(k, 384) for n, k in model.matrices().values()
        )

    def test_what_is_there_beside_the_buffers(self, tiny: Any) -> None:
        wanted = {"threads": 3, "base_copy_bytes": 1000, "gradient_accumulation_steps": 5, "num_tokens": 70}
        files = {"num_rows": 9, "tokenizer_file_bytes": 1 << 12, "optimizer": "adamw_8bit"}
        parts = peak_parts(job(tiny, **wanted, **files), 1 << 40)[1]
        assert parts["base"] == 4 * 5 * 48 + 1000 + 15 * costs.LINEAR_OBJECT_BYTES  # five norms; the head is tied
        assert parts["kernels"] == 3 * (costs.PACK_BYTES + 2 * 88 * 48)  # a tile of that many weights
        steps = 5 * 4 * 8 * 64  # five micro-batches of 64 tokens in four int64 arrays
        assert parts["data"] == 2 * 4 * 70 + 9 * costs.ROW_OBJECT_BYTES + steps + costs.LEFT_BYTES + int(
            0.7 * (1 << 12)
        )
        sizes = [n * k for shape in tiny.linear_shapes.values() for n, k in ((4, shape[1]), (shape[0], 4))] * 2
        blocks = sum(2 * 260 * -(-size // 256) for size in sizes)  # codes and a float of every block, of two moments
        assert parts["optimizer"] == blocks + OPTIMIZERS["adamw_8bit"].scratch_bytes(sizes)
        assert parts["optimizer"] > blocks

    def test_moments(self, tiny: Any) -> None:
        hidden, kept = 64 * 48 * 4, costs.activation_bytes(job(tiny))
        moment, parts = peak_parts(job(tiny), FLOOR)
        assert moment == "backward"
        assert parts["block_inputs"] == 3 * hidden
        assert parts["kept_activations"] == 0
        one_block = parts["block_workspace"]
        # What all blocks share: dequantized weights; h, d, d_h; two of the MLP's width; half of q; q, k and v's
        # gradients; two tiles of queries and two of their scores.
        floats = 88 * 48 + 64 * (3 * 48 + 2 * 88 + 24 + 48 + 2 * 16) + 2 * 32 * 48 + 2 * 6 * 32 * 32
        assert one_block == kept + 4 * floats

        moment, parts = peak_parts(job(tiny, recompute_layers=0), FLOOR)
        assert (parts["kept_activations"], parts["block_workspace"]) == (kept, one_block)

        moment, parts = peak_parts(job(tiny, tokenizer_file_bytes=10 * MIB, num_tokens=5, num_rows=2), FLOOR)
        assert moment == "reading"
        data = 5 * 8 + 2 * costs.ROW_OBJECT_BYTES + costs.LEFT_BYTES + 150 * MIB
        assert parts == dict.fromkeys(parts, 0) | {"floor": FLOOR, "data": data}

    def test_adapters_in_the_upper_blocks(self, tiny: Any) -> None:
        upper = LoraConfig(r=4, layers_to_transform=(1,)).resolved(tiny)
        parts = peak_parts(job(tiny, adapter=upper, recompute_layers=1), FLOOR)[1]
        assert parts["block_inputs"] == 2 * 64 * 48 * 4
        assert 2 * parts["gradients"] == peak_parts(job(tiny), FLOOR)[1]["gradients"]

    def test_tiles_bound_weights_and_logits(self, tmp_path: Path) -> None:
        """hidden 96, inner 256, vocabulary 4000: the head's tile has 100 rows, and its logits 62 positions."""
        config = tiny_config("llama", hidden_size=96, intermediate_size=256, vocab_size=4000, head_dim=8)
        model = FAMILIES["llama"].config_from_hf(config)
        sizes = costs.buffers(job(model, tile_weights=9600))
        assert sizes["weight"] == 4 * 9600
        assert sizes["inner"] == 4 * 64 * 256
        assert costs.buffers(job(model, tile_weights=96 * 2000))["inner"] == 4 * 62 * 2000

    def test_pieces_of_codes_where_rows_are_whole_blocks(self, tmp_path: Path) -> None:
        config = tiny_config("llama", hidden_size=128, intermediate_size=88, head_dim=32)
        model = FAMILIES["llama"].config_from_hf(config)
        sizes = costs.buffers(job(model, tile_weights=5000))
        assert (sizes["codes"], sizes["scales"]) == (4 * 39 * 128 // 2, 4 * 39 * 128 // 64)
        assert "codes" not in costs.buffers(job(FAMILIES["llama"].config_from_hf(TINY)))

    def test_mezo(self, tiny: Any) -> None:
        hidden, kept = 64 * 48 * 4, costs.activation_bytes(job(tiny))
        mezo = {"step_rule": "mezo", "optimizer": "sgd"}
        moment, parts = peak_parts(job(tiny, **mezo), FLOOR)
        exact = peak_parts(job(tiny), FLOOR)[1]
        assert moment == "forward"
        assert (parts["gradients"], parts["optimizer"], parts["kept_activations"]) == (0, 0, 0)
        assert parts["adapter"] == exact["adapter"] + exact["gradients"]  # one copy
        assert parts["block_inputs"] == 2 * hidden
        # The weight; h and the supervised rows; one of the MLP's width; half of q; a tile of queries and its scores.
        floats = 88 * 48 + (64 + 62) * 48 + 64 * (88 + 24) + 32 * 48 + 6 * 32 * 32
        assert parts["block_workspace"] == kept + 4 * floats
        same = {"floor", "base", "data", "kernels", "context", "logits"}
        assert {name: parts[name] for name in same} == {name: exact[name] for name in same}
        deeper = peak_parts(job(tiny, **mezo, adapter=LoraConfig(layers_to_transform=(1,)).resolved(tiny)), 0)
        assert deeper[1]["block_workspace"] == parts["block_workspace"] + 4 * 32 * 48  # one window of the lower block
        dropped = LoraConfig(r=4, lora_dropout=0.1).resolved(tiny)
        assert peak_parts(job(tiny, adapter=dropped, **mezo), FLOOR)[1]["dropout"] == 3 * 4 * 64 * 88

    def test_dropout(self, tiny: Any) -> None:
        dropped = LoraConfig(r=4, lora_dropout=0.1).resolved(tiny)
        moment, parts = peak_parts(job(tiny, adapter=dropped), FLOOR)
        assert moment == "backward"
        assert parts["dropout"] == 4 * 4 * 64 * 88


# Those of the model as a whole, and of a prompt's positions, have tests of their own (training/test_places.py).
IN_BLOCKS = [name for name, method in METHODS.items() if issubclass(method.Config, BlocksConfig) and name != "loreft"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "layers", "recompute_layers"),
    [
        ("lora", (0, 1, 2, 3), 0), ("lora", (0, 1, 2, 3), 2), ("lora", (0, 1, 2, 3), 4), ("lora", (2, 3), 1),
        ("lora", (3,), 0), *((method, (2, 3), 1) for method in IN_BLOCKS if method != "lora"),
    ],
)  # fmt: skip
def test_buffers_are_those_of_the_trainer(
    tmp_path: Path, family: str, method: str, layers: tuple[int, ...], recompute_layers: int
) -> None:
    from edgetune.adapters.attach import attach
    from edgetune.models.decoder import load_decoder
    from edgetune.training.backprop import Path as Walk
    from edgetune.training.backprop import loss_and_gradients
    from tests.training.conftest import random_batch

    # Rows of whole blocks in some matrices and not in others.
    source = write_model(tmp_path / "model", tiny_config(family, num_hidden_layers=4, hidden_size=128), tokenizer=False)
    decoder = load_decoder(quantize(source, "nf4", tmp_path / "base"))
    decoder.workspace.tile_weights = 3000
    adapter = METHODS[method].Config(layers_to_transform=layers)
    if method == "bitfit" and family != "qwen2":
        with pytest.raises(ConfigError, match="has a bias to train"):
            adapter.resolved(decoder.config)
        return
    adapter = adapter.resolved(decoder.config)
    attach(decoder, adapter)
    for batch, length, threads in ((1, 24, 1), (1, 24, 2), (3, 150, 1), (3, 150, 2)):  # two fill up the loss's rows
        walk = Walk(min(layers), recompute_layers, row_step=row_step(threads))
        rows = random_batch(301, batch, length)
        loss_and_gradients(decoder, [rows], walk, dropout_key=(0, 0), check=lambda: None)
        counted = costs.buffers(
            job(
                decoder.config, adapter=adapter, batch_size=batch, max_seq_length=length,
                recompute_layers=recompute_layers, tile_weights=3000, threads=threads,
                supervised_per_window=-(-int((rows["labels"] != -100).sum()) // batch),
            )
        )  # fmt: skip
        assert decoder.workspace.sizes == counted


@pytest.mark.parametrize("step_rule", ["backprop", "mezo"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_buffers_of_every_objective_are_those_of_the_trainer(tmp_path: Path, objective: str, step_rule: str) -> None:
    import torch

    from edgetune.adapters.attach import attach
    from edgetune.models.decoder import load_decoder
    from edgetune.models.places import Score
    from edgetune.training.backprop import Path as Walk
    from edgetune.training.backprop import loss_and_gradients
    from edgetune.training.forward import evaluate
    from tests.training.conftest import random_batch

    source = write_model(tmp_path / "model", tiny_config("llama", hidden_size=128), tokenizer=False)
    decoder = load_decoder(quantize(source, "nf4", tmp_path / "base"))
    decoder.workspace.tile_weights = 3000
    adapter = LoraConfig(r=4).resolved(decoder.config)
    attach(decoder, adapter)
    rows = random_batch(301, 3, 150)  # of two segments each
    count = int((rows["labels"] != -100).sum())
    ids = np.tile(np.arange(5), (count, 1))
    rows |= {"reference": np.zeros((3, 2)), "desirable": np.ones((3, 2)), "teacher_ids": ids}
    rows["teacher_logps"] = np.full(ids.shape, -2.0, np.float32)
    config = TrainConfig(objective=objective).checked()
    made = objective_of(SimpleNamespace(objective=objective, **config.objective_settings))
    if has_head(objective):
        rows["target"], count = np.array([[0, 1], [1, 0], [1, 0]]), 6
        outputs = 2 if objective == "classification" else 1
        decoder.score = Score(torch.nn.Parameter(torch.ones(outputs, 128)))
    if step_rule == "mezo":
        evaluate(decoder, [rows], check=lambda: None, objective=made)
    else:
        loss_and_gradients(
            decoder, [rows], Walk(0, 2), dropout_key=(0, 0), check=lambda: None, objective=made
        )  # fmt: skip
    counted = job(
        decoder.config, adapter=adapter, batch_size=3, max_seq_length=150, tile_weights=3000, step_rule=step_rule,
        supervised_per_window=-(-count // 3), objective=objective, teacher_tokens=5,
    )  # fmt: skip
    assert decoder.workspace.sizes == costs.buffers(counted)
    if objective == "distill":
        assert counted.supervised * 5 * 12 == sum(rows[f"teacher_{name}"].nbytes for name in ("ids", "logps")) + (
            12 * 5 * (counted.supervised - count)
        )


@pytest.mark.parametrize("method", [name for name in IN_BLOCKS if hasattr(METHODS[name], "merge")])
def test_the_adapter_s_bytes_are_those_of_the_trainer(tmp_path: Path, method: str) -> None:
    import torch

    from edgetune.adapters.attach import AdaptedLinear, attach
    from edgetune.models.decoder import load_decoder

    decoder = load_decoder(write_model(tmp_path, tiny_config("llama"), tokenizer=False))
    adapter = METHODS[method].Config(layers_to_transform=(1,)).resolved(decoder.config)
    parameters = attach(decoder, adapter)
    layers = [module for module in decoder.modules() if isinstance(module, AdaptedLinear)]
    for layer in layers:
        with torch.no_grad():
            x, y = torch.ones(2, layer.slot.in_features), torch.ones(2, layer.slot.out_features)
            layer.add(x, y)
    kept = [tensor for layer in layers for tensor in (layer.frozen_squares, layer.norms, *layer.shared.values())]
    storages = sorted((x.data_ptr(), len(x.untyped_storage())) for x in kept if x is not None)
    bytes_held = sum(dict(storages).values()) + sum(value.nbytes for value in parameters.values())  # the longest views
    parts = peak_parts(job(decoder.config, adapter=adapter), FLOOR)[1]
    assert parts["adapter"] == bytes_held + costs.SLOT_OBJECT_BYTES * len(layers)
    assert parts["gradients"] == sum(value.nbytes for value in parameters.values())


@pytest.mark.parametrize("method", [name for name, module in METHODS.items() if module.Config.own])
def test_the_model_s_own_vectors_lie_in_the_base_s_bytes(tmp_path: Path, method: str) -> None:
    from edgetune.adapters.attach import attach, detached, own_vectors
    from edgetune.models.decoder import load_decoder

    decoder = load_decoder(write_model(tmp_path, tiny_config("qwen2"), tokenizer=False))
    where = {name: getattr(*place).data_ptr() for name, place in own_vectors(decoder).items()}
    adapter = METHODS[method].Config().resolved(decoder.config)
    parameters = attach(decoder, adapter)
    assert all(value.data_ptr() == where.get(name, value.data_ptr()) for name, value in parameters.items())
    trained = sum(value.nbytes for value in parameters.values())
    exact, mezo = (peak_parts(job(decoder.config, adapter=adapter, step_rule=rule), FLOOR)[1] for rule in RULES)
    held = costs.SLOT_OBJECT_BYTES * len(METHODS[method].slots(adapter, decoder.config))
    held += sum(value.nbytes for name, value in parameters.items() if name not in where)  # matrices: there are codes
    assert (exact["adapter"], exact["gradients"]) == (held, trained)
    assert (mezo["adapter"], mezo["gradients"]) == (held + trained, 0), "mezo keeps a copy"
    with detached(decoder):
        apart = sum(
            parameters[name].nbytes
            for name in where
            if name in parameters and parameters[name].data_ptr() != where[name]
        )
    beside = peak_parts(job(decoder.config, adapter=adapter, anchored_per_window=3), FLOOR)[1]
    assert beside["adapter"] == held + apart > held, "the base that holds it has vectors of its own"


@pytest.mark.parametrize("length", [7, 11, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_s_bytes_are_those_of_the_trainer(tmp_path: Path, family: str, length: int) -> None:
    from edgetune.models.decoder import load_decoder
    from edgetune.training.forward import start
    from tests.training.conftest import random_batch

    decoder = load_decoder(write_model(tmp_path, tiny_config(family, num_hidden_layers=4), tokenizer=False))
    contexts = start(decoder, random_batch(301, 3, length)).contexts
    shared = {id(x): x.nbytes for context in contexts for x in (context.mask, *(context.rotary or ())) if x is not None}
    adapter = LoraConfig(r=2).resolved(decoder.config)
    counted = peak_parts(job(decoder.config, adapter=adapter, batch_size=3, max_seq_length=length), FLOOR)[1]
    assert counted["context"] == sum(shared.values())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_s_bytes_are_those_of_the_trainer(tmp_path: Path, optimizer: str) -> None:
    from edgetune.adapters.attach import attach
    from edgetune.models.decoder import load_decoder
    from edgetune.training.optimizer import Optimizer

    decoder = load_decoder(write_model(tmp_path, tiny_config("qwen3", num_hidden_layers=4), tokenizer=False))
    adapter = LoraConfig(r=5, target_modules=("q_proj", "down_proj")).resolved(decoder.config)
    made = Optimizer(optimizer, attach(decoder, adapter), weight_decay=0.0)
    state = sum(value.nbytes for value in made.tensors().values())
    counted = peak_parts(job(decoder.config, adapter=adapter, optimizer=optimizer), FLOOR)[1]["optimizer"]
    sizes = [value.numel() for value in made.parameters.values()]
    assert counted == state + OPTIMIZERS[optimizer].scratch_bytes(sizes)
    # Codes, bounds and values of the largest tensor's blocks; then the tables of a moment with and without a sign.
    tile = 4 * 256 * -(-max(sizes) // 256)
    scratch = {"adamw_8bit": 4 * tile + 4 * 1024 + 49025 + 16257, "lion_8bit": 3 * tile + 2 * 1024 + 49025}
    assert counted - state == scratch.get(optimizer, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(0, 1, 2), (2,)])
def test_buffers_of_mezo_are_those_of_its_rule_and_of_evaluation(
    tmp_path: Path, family: str, layers: tuple[int, ...]
) -> None:
    from edgetune.adapters.attach import attach
    from edgetune.models.decoder import load_decoder
    from edgetune.training import mezo
    from edgetune.training.forward import evaluate
    from tests.training.conftest import make_plan, random_batch

    source = write_model(tmp_path / "model", tiny_config(family, num_hidden_layers=3, hidden_size=128), tokenizer=False)
    base = quantize(source, "nf4", tmp_path / "base")
    made = make_plan(base, adapter=LoraConfig(r=4, layers_to_transform=layers))
    decoder, other = load_decoder(base), load_decoder(base)
    rule = mezo.Rule(decoder, attach(decoder, made.adapter), made, None)
    decoder.workspace.tile_weights = other.workspace.tile_weights = 3000
    for batch, length in ((1, 24), (3, 150)):
        rows = random_batch(301, batch, length)
        rows["labels"] = np.tile(rows["labels"][:1], (batch, 1))
        rule.gradient([rows], (0, 0), lambda: None)
        evaluate(other, [rows], check=lambda: None, first_block=min(layers))
        counted = job(
            decoder.config, adapter=made.adapter, batch_size=batch, max_seq_length=length, tile_weights=3000,
            step_rule="mezo", supervised_per_window=int((rows["labels"][0] != -100).sum()),
        )  # fmt: skip
        assert decoder.workspace.sizes == other.workspace.sizes == costs.buffers(counted)
    assert peak_parts(counted, FLOOR)[0] == "forward"


class TestPlan:
    def test_everything_adds_up(self, model: Path) -> None:
        made = plan(model, "pixel-9")
        assert sum(made.parts.values()) == made.predicted_peak_bytes < made.budget_bytes == 3686 * MIB
        assert made.parts["floor"] == made.floor_bytes == FLOOR
        assert made.fits and made.simulated and not made.concessions
        assert (made.engine, made.grid, made.device) == ("torch", "int4", "pixel-9")
        assert (made.batch_size, made.gradient_accumulation_steps, made.max_seq_length) == (8, 1, 256)

    def test_keys_that_scripts_rely_on(self, model: Path) -> None:
        assert {
            "fits", "engine", "grid", "budget_bytes", "predicted_peak_bytes", "floor_bytes", "parts", "concessions",
            "predicted_step_seconds", "adapter",
        } <= set(plan(model, "pixel-9").to_dict())  # fmt: skip

    @pytest.mark.parametrize(("device", "simulated"), [("pixel-9", True), ("galaxy-watch-7", True), ("rpi-5", False)])
    def test_simulated(self, model: Path, device: str, simulated: bool) -> None:
        assert plan(model, device).simulated is simulated

    def test_budgets_by_name(self, model: Path) -> None:
        memory = load_device("galaxy-watch-7").memory
        for name, size in (("foreground", memory.budget_mib), ("background", memory.budget_background_mib)):
            made = plan(model, "galaxy-watch-7", budget=name)
            assert (made.budget_name, made.budget_bytes) == (name, size * MIB)
        assert plan(model, "galaxy-watch-7", budget=200).budget_bytes == 200 * MIB

    def test_min_is_the_smallest(self, model: Path) -> None:
        least = plan(model, "pixel-9", budget="min")
        assert least.predicted_peak_bytes < least.budget_bytes
        assert plan(model, "pixel-9", budget=least.budget_bytes // MIB).predicted_peak_bytes <= least.budget_bytes
        with pytest.raises(BudgetError):
            plan(model, "pixel-9", budget=least.budget_bytes // MIB - 1)

    def test_leaves_room_for_its_own_error(self, model: Path) -> None:
        for budget in range(120, 300, 9):
            made = plan(model, "pixel-9", budget=budget)
            room = made.budget_bytes - made.predicted_peak_bytes
            assert room >= 0.02 * made.predicted_peak_bytes + 0.05 * (made.predicted_peak_bytes - FLOOR)

    def test_base_folder_and_its_grid(self, model: Path, tmp_path: Path) -> None:
        base = quantize(model, "int4", tmp_path / "base")
        assert plan(base, "host").grid == "int4"
        assert plan(model, "host").grid == "nf4"
        assert plan(model, "pixel-9", grid="nf4").grid == "nf4"
        with pytest.raises(ConfigError, match="is on the int4 grid already, not on nf4"):
            plan(base, "host", grid="nf4")

    def test_file_backed_bytes_are_those_of_the_base(self, model: Path, tmp_path: Path) -> None:
        base = quantize(model, "nf4", tmp_path / "base")
        before, after = plan(model, "host").file_backed_bytes, plan(base, "host").file_backed_bytes
        assert after == sum(info.nbytes for info in open_base(base).weights.values())
        assert before == after

    def test_double_quantization_is_widened_on_the_heap(self, model: Path, tmp_path: Path) -> None:
        single = quantize(model, "nf4", tmp_path / "single")
        double = quantize(model, "nf4", tmp_path / "double", double_quant=True)
        blocks = sum(-(-n * k // 64) for n, k in load_config(model).matrices().values())
        parts = [plan(base, "host").parts["base"] for base in (single, double)]
        assert parts[1] - parts[0] == 4 * blocks

    @pytest.mark.parametrize(
        ("wishes", "said"),
        [
            ({"engine": "jax"}, "engine = 'jax'; edgetune .* has torch, ort"),
            ({"grid": "nf5"}, "grid = 'nf5'; choose from nf4, int4"),
            ({"budget": "most"}, "budget = 'most'; expected foreground"),
            ({"budget": 0}, "budget = 0; expected"),
            ({"budget": True}, "budget = True; expected"),
            ({"budget": 12289}, "budget = 12289; .* to the 12288 of pixel-9"),
            ({"config": TrainConfig(batch_size=0)}, "batch_size: found 0; expected an integer from 1"),
            ({"config": TrainConfig(learning_rate=float("nan"))}, "learning_rate: found nan"),
            ({"config": TrainConfig(optimizer="adamw8bit")}, "optimizer: found 'adamw8bit'.*did you mean 'adamw_8bit'"),
            ({"config": TrainConfig(lr_scheduler_type="cosin")}, "did you mean 'cosine'"),
            ({"config": TrainConfig(max_seq_length=257)}, "max_seq_length = 257; the model has 256 positions"),
            ({"config": TrainConfig(objective="dpoo")}, "objective: found 'dpoo'.*did you mean 'dpo'"),
            ({"config": TrainConfig(beta=0.2)}, "beta = 0.2 goes with objective dpo or orpo or kto; this one is sft"),
            ({"config": TrainConfig(objective="orpo", label_smoothing=0.2)}, "label_smoothing = 0.2 goes with .* dpo;"),
            ({"config": TrainConfig(objective="dpo", label_smoothing=0.6)}, "label_smoothing: found 0.6"),
            ({"config": TrainConfig(objective="dpo"), "engine": "ort"}, "objective cannot be set here: .*learn by sft"),
            ({"config": TrainConfig(step_rule="meso")}, "step_rule: found 'meso'.*did you mean 'mezo'"),
            ({"config": TrainConfig(recompute_layers=9)}, "recompute_layers = 9; the gradient passes 8 blocks"),
            (
                {"config": TrainConfig(recompute_layers=3), "adapter": LoraConfig(layers_to_transform=(6, 7))},
                "recompute_layers = 3; the gradient passes 2 blocks",
            ),
            ({"adapter": LoraConfig(r=0)}, "r = 0"),
        ],
    )
    def test_wrong_wishes(self, model: Path, wishes: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            plan(model, "pixel-9", **wishes)

    def test_pairs_stay_together(self, model: Path, tmp_path: Path) -> None:
        """The window holds the longest pair, whatever the budget, and the reference is in the run's time."""
        rows = tmp_path / "rows.jsonl"
        pairs = [{"prompt": "ab " * i, "chosen": "c" * (3 * i), "rejected": "d"} for i in range(1, 12)]
        rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        write_model(tmp_path / "model", tiny_config("llama", num_hidden_layers=4))
        read = read_rows(rows, load_tokenizer(tmp_path / "model"), 256)
        longest = max(len(read[i]) + len(read[i + 1]) for i in range(0, len(read), 2))
        plans = {
            name: plan(
                tmp_path / "model", "rpi-5", data=rows, config=TrainConfig(objective=name, max_steps=5), budget=budget
            )
            for name in ("dpo", "orpo")
            for budget in ("foreground", "min")
        }
        for made in plans.values():
            assert made.max_seq_length >= longest > max(map(len, read))
        assert plans["dpo"].predicted_run_seconds > 5 * plans["dpo"].predicted_step_seconds
        assert plans["orpo"].predicted_run_seconds == pytest.approx(5 * plans["orpo"].predicted_step_seconds)
        assert "objective   dpo, beta 0.1, label_smoothing 0" in plans["dpo"].explain()
        assert Plan.from_dict(json.loads(json.dumps(plans["dpo"].to_dict()))) == plans["dpo"]

    def test_every_setting_changes_the_plan(self, model: Path) -> None:
        """No field of the configs may be read and forgotten."""
        other: dict[str, Any] = {
            "batch_size": 3, "gradient_accumulation_steps": 5, "max_seq_length": 100, "recompute_layers": 2,
            "activation_offloading": True, "num_epochs": 1.5, "max_steps": 7, "optimizer": "lion",
            "learning_rate": 1e-3, "lr_scheduler_type": "linear", "warmup_ratio": 0.5, "weight_decay": 0.1,
            "max_grad_norm": 2.0, "eval_fraction": 0.2, "seed": 3, "step_rule": "mezo", "objective": "dpo",
            "beta": 0.3, "label_smoothing": 0.1, "temperature": 3.0, "distill_weight": 0.2, "fast_products": False,
            "early_stopping_patience": 2, "retention_share": 0.5, "kl_weight": 2.0,
        }  # fmt: skip
        of_objective = {"dpo": ("beta", "label_smoothing"), "distill": ("temperature", "distill_weight")}
        goes_with = {name: {"objective": key} for key, names in of_objective.items() for name in names}
        assert set(other) == {field.name for field in dataclasses.fields(TrainConfig)}
        before = plan(model, "rpi-5")
        for name, value in other.items():
            after = plan(model, "rpi-5", config=TrainConfig(**{name: value} | goes_with.get(name, {})))
            assert getattr(after, name) == value != getattr(before, name), name
        adapters: dict[str, Any] = {
            "r": 5, "lora_alpha": 3.0, "lora_dropout": 0.1, "target_modules": ("k_proj",), "use_rslora": True,
            "layers_to_transform": (1, 3), "loraplus_lr_ratio": 4.0,
        }  # fmt: skip
        adapters["init_lora_weights"] = "eva"
        elsewhere = {
            "init_from",
            "adapter_budget",
            "rank_pattern",
        }  # they go with others: test_initialization, test_allocation
        assert adapters.keys() | elsewhere == {field.name for field in dataclasses.fields(LoraConfig)}
        for name, value in adapters.items():
            after = plan(model, "rpi-5", adapter=LoraConfig(**{name: value}))
            assert getattr(after.adapter, name) == value != getattr(before.adapter, name), name


def plans_by_budget(model: Path, **wishes: Any) -> Iterator[Plan]:
    """The smallest plan, then those of budgets from there upwards."""
    smallest = plan(model, "pixel-9", budget="min", **wishes)
    yield smallest
    least = smallest.budget_bytes // MIB
    for budget in [*range(least, least + 100, 4), *range(least + 100, 1000, 60)]:
        yield plan(model, "pixel-9", budget=budget, **wishes)


class TestLadder:
    def test_order(self, model: Path) -> None:
        """A rung is stepped on only below all rungs above it; recomputation may be taken back afterwards."""
        seen = set()
        for made in plans_by_budget(model):
            conceded = [c.setting for c in made.concessions]
            assert conceded == [name for name in SETTINGS if name in conceded]
            deepest = max(map(SETTINGS.index, conceded), default=-1)
            assert set(conceded) | {"recompute_layers"} >= set(SETTINGS[: deepest + 1])
            if made.optimizer in ("lion_8bit", "sgd"):
                assert "layers_to_transform" in conceded
            seen.add(tuple(conceded))
        assert () in seen
        wishes = Wishes(load_config(model), LoraConfig(), TrainConfig(), RowFacts())
        start, *_, last = descend(wishes.start(), wishes.freedom)
        assert all(start.value(setting) != last.value(setting) for setting in SETTINGS)

    def test_a_larger_budget_never_costs_more(self, model: Path) -> None:
        def cost(made: Plan) -> tuple[Any, ...]:
            return (
                {c.setting for c in made.concessions} - {"recompute_layers"}, -made.batch_size, -made.tile_weights,
                -made.max_seq_length, -made.adapter.rank, -len(made.adapter.target_modules or ()),
                -len(made.adapter.layers_to_transform or ()),
                ["adamw", "adamw_8bit", "lion_8bit", "sgd"].index(made.optimizer),
            )  # fmt: skip

        made = [cost(p) for p in plans_by_budget(model)]
        for smaller, larger in itertools.pairwise(made):
            assert larger[0] <= smaller[0]
            assert all(b <= a for a, b in zip(smaller[1:], larger[1:], strict=True))

    def test_what_each_rung_does(self, model: Path) -> None:
        wishes = Wishes(load_config(model), LoraConfig(), TrainConfig(), RowFacts())
        start, *_, end = descend(wishes.start(), wishes.freedom)
        assert {setting: (start.value(setting), end.value(setting)) for setting in SETTINGS} == {
            "batch_size": ("8", "1"),
            "recompute_layers": ("0", "1"),
            "tile_weights": ("24576", "4096"),
            "activation_offloading": ("False", "True"),
            "fast_products": ("True", "False"),
            "optimizer": ("adamw", "sgd"),
            "max_seq_length": ("256", "64"),
            "target_modules": ("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "q_proj,v_proj"),
            "r": ("8", "2"),
            "layers_to_transform": ("0-7", "7"),
            "step_rule": ("backprop", "mezo"),
        }
        assert end.batch_size * end.gradient_accumulation_steps == 8

    def test_every_step_of_every_rung(self, model: Path) -> None:
        wishes = Wishes(load_config(model), LoraConfig(), TrainConfig(), RowFacts())
        seen: dict[str, list[str]] = {setting: [] for setting in SETTINGS}
        rungs: list[str] = []
        before = None
        for choice in descend(wishes.start(), wishes.freedom):
            values = {setting: choice.value(setting) for setting in SETTINGS}
            for setting, value in values.items():
                if value not in seen[setting]:
                    seen[setting].append(value)
            changed = [setting for setting in SETTINGS if before is not None and before[setting] != values[setting]]
            if "layers_to_transform" in changed:  # the blocks that are left out do not run again either
                changed = ["layers_to_transform"]
            rungs += [name for name in changed if rungs[-1:] != [name]]
            assert choice.batch_size * choice.gradient_accumulation_steps == 8
            before = values
        assert seen == {
            "batch_size": ["8", "4", "2", "1"],
            "recompute_layers": ["0", "1", "2", "3", "4", "5", "6", "7", "8"],
            "tile_weights": ["24576", "12288", "6144", "4096"],
            "optimizer": ["adamw", "adamw_8bit", "lion_8bit", "sgd"],
            "activation_offloading": ["False", "True"],
            "fast_products": ["True", "False"],
            "max_seq_length": ["256", "128", "64"],
            "target_modules": ["q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "q_proj,v_proj"],
            "r": ["8", "4", "2"],
            "layers_to_transform": ["0-7", "4-7", "6-7", "7"],
            "step_rule": ["backprop", "mezo"],
        }
        assert rungs == [
            "batch_size", "recompute_layers", "tile_weights", "optimizer", "activation_offloading", "fast_products",
            "max_seq_length", "target_modules", "r", "layers_to_transform", "optimizer", "step_rule",
        ]  # fmt: skip

    def test_a_window_that_halves_below_the_shortest_is_the_shortest(self, model: Path) -> None:
        wishes = Wishes(load_config(model), LoraConfig(), TrainConfig(), RowFacts((row_of(150),)))
        lengths = [choice.max_seq_length for choice in descend(wishes.start(), wishes.freedom)]
        assert list(dict.fromkeys(lengths)) == [160, 150]

    def test_min_concedes_what_its_number_of_mib_needs_and_no_more(self, model: Path) -> None:
        least = plan(model, "pixel-9", budget="min")
        given = plan(model, "pixel-9", budget=least.budget_bytes // MIB)
        assert dataclasses.replace(given, budget_name="min", concessions=least.concessions) == least
        assert [c.setting for c in given.concessions] == [c.setting for c in least.concessions]
        assert all("min takes the smallest" in c.reason for c in least.concessions)
        assert "gradient_accumulation_steps 8 keeps the effective batch" in least.concessions[0].reason

    def test_reasons_name_need_and_budget(self, model: Path) -> None:
        made = plan(model, "pixel-9", budget=180)
        assert [c.setting for c in made.concessions] == ["batch_size"]
        needed = re.match(r"8 needs (\d+) MiB with its reserve; 180 MiB are allowed", made.concessions[0].reason)
        assert needed and 180 < int(needed[1]) < 1000

    def test_a_budget_above_the_device_is_said(self, model: Path) -> None:
        inside, beyond = plan(model, "pixel-watch-3"), plan(model, "pixel-watch-3", budget=1000)
        assert not inside.exceeds_device and "MORE than" not in inside.explain()
        assert inside.device_budget_bytes == inside.budget_bytes
        assert 0.02 * inside.predicted_peak_bytes < inside.reserve_bytes < inside.budget_bytes - FLOOR
        assert inside.predicted_peak_bytes + inside.reserve_bytes <= inside.budget_bytes
        large = plan(model, "pixel-watch-3", budget=1000, config=TrainConfig(batch_size=64))
        assert large.exceeds_device and "MORE than" in large.explain()
        assert beyond.device_budget_bytes == inside.budget_bytes

    def test_trained_blocks_are_counted_weight_by_weight(self, model: Path) -> None:
        """Its float32 value and gradient and both moments; a refusal says so, by part."""
        config = load_config(model)
        one = sum(n * k for n, k in config.linear_shapes.values()) + 2 * 96
        for count in (1, 3):
            top = FullConfig(layers_to_transform=tuple(range(8 - count, 8)))
            made = plan(model, "pixel-9", adapter=top, config=TrainConfig(optimizer="adamw"))
            assert made.parts["gradients"] == 4 * count * one
            assert made.parts["optimizer"] == 2 * 4 * count * one
            assert made.parts["adapter"] == 4 * count * (one - 2 * 96) + 9 * count * costs.SLOT_OBJECT_BYTES
            assert made.dequantized_layers == 0
        every = FullConfig(layers_to_transform=tuple(range(8)))
        with pytest.raises(
            BudgetError, match=r"--layers 0-7 needs 119 MiB [\s\S]*optimizer 5\.6 MiB, adapter 3\.2 MiB"
        ):
            plan(model, "pixel-9", budget=108, adapter=every, config=TrainConfig(optimizer="adamw"))

    def test_norms_are_never_conceded(self, model: Path) -> None:
        wishes = Wishes(load_config(model), LnTuningConfig(), TrainConfig(), RowFacts((row_of(150),)))
        found = [choice.resolved for choice in descend(wishes.start(), wishes.freedom)]
        assert {config.where(wishes.model) for config in found} == {
            f"input_layernorm, post_attention_layernorm, norm in {count} of 8 blocks" for count in (8, 4, 2, 1)
        }

    def test_decay_of_what_does_not_start_at_zero_is_refused(self, model: Path) -> None:
        with pytest.raises(ConfigError, match=r"weight_decay = 0\.1; ln_tuning trains the model's own tensors"):
            plan(model, "pixel-9", adapter=LnTuningConfig(), config=TrainConfig(weight_decay=0.1))

    def test_alpha_follows_a_conceded_rank(self, model: Path) -> None:
        everywhere = LoraConfig(layers_to_transform=tuple(range(8)), target_modules=("up_proj", "down_proj"))
        ranks = {made.adapter.rank: made.adapter for made in plans_by_budget(model, adapter=everywhere)}
        assert min(ranks) < 8
        assert all((made.lora_alpha, made.scaling) == (2 * rank, 2.0) for rank, made in ranks.items())

    def test_spends_the_rest_on_dequantized_weights(self, model: Path) -> None:
        config = load_config(model)
        of_a_block = 4 * sum(n * k for n, k in config.linear_shapes.values())
        seen = set()
        for made in plans_by_budget(model, config=TrainConfig(batch_size=1)):
            assert made.parts["dequantized"] == made.dequantized_layers * of_a_block
            assert made.predicted_peak_bytes == sum(made.parts.values()) <= made.budget_bytes
            assert not (made.dequantized_layers and made.recompute_layers)
            seen.add(made.dequantized_layers)
        assert {0, config.num_hidden_layers} < seen
        assert plan(model, "pixel-9", config=TrainConfig(step_rule="mezo")).dequantized_layers == 0
        whole = plan(model, "pixel-9")
        assert f"the weights of {config.num_hidden_layers} blocks stay dequantized" in whole.explain()
        held = job(config, dequantized_layers=8, recompute_layers=0)
        less = dataclasses.replace(held, dequantized_layers=7)
        assert step_work(held).traffic_bytes < step_work(less).traffic_bytes

    def test_spends_what_is_left_on_less_recomputation(self, model: Path) -> None:
        layers = {made.recompute_layers for made in plans_by_budget(model, config=TrainConfig(batch_size=8))}
        assert len(layers) > 4

    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("batch_size", 4), ("recompute_layers", 1), ("max_seq_length", 128), ("r", 16), ("step_rule", "backprop"),
            ("recompute_layers", 0), ("activation_offloading", False),
            ("target_modules", ("o_proj", "k_proj")), ("layers_to_transform", tuple(range(8))), ("optimizer", "lion"),
            ("learning_rate", 1e-3),
        ],
    )  # fmt: skip
    def test_what_was_set_is_never_conceded(self, model: Path, setting: str, value: Any) -> None:
        of_adapter = setting in {field.name for field in dataclasses.fields(LoraConfig)}
        wishes: dict[str, Any] = (
            {"adapter": LoraConfig(**{setting: value})} if of_adapter else {"config": TrainConfig(**{setting: value})}
        )
        for made in plans_by_budget(model, **wishes):
            assert getattr(made.adapter if of_adapter else made, setting) == value
            assert setting not in {c.setting for c in made.concessions}

    def test_eight_bits_come_before_anything_that_is_learned(self, model: Path) -> None:
        large = plans_by_budget(model, adapter=LoraConfig(r=96))
        made = next(p for p in large if p.optimizer == "adamw_8bit" and p.max_seq_length == 256)
        assert made.learning_rate == plan(model, "pixel-9").learning_rate == 2e-4
        conceded = [c.setting for c in made.concessions]
        harmless = (
            "batch_size",
            "recompute_layers",
            "tile_weights",
            "optimizer",
            "activation_offloading",
            "fast_products",
        )
        assert "optimizer" in conceded and conceded == [name for name in harmless if name in conceded]

    def test_another_rule_brings_its_rate_and_says_so(self, model: Path) -> None:
        targets = plan(model, "pixel-9").adapter.target_modules
        large = LoraConfig(r=96, target_modules=targets, layers_to_transform=tuple(range(8)))
        least = plan(model, "pixel-9", budget="min", adapter=large, config=TrainConfig(step_rule="backprop"))
        assert (least.optimizer, least.learning_rate, least.parts["optimizer"]) == ("sgd", 0.1, 0)
        (conceded,) = (c for c in least.concessions if c.setting == "optimizer")
        assert re.fullmatch(r"adamw needs \d+ MiB .*; learning_rate 0\.1 is its own", conceded.reason)

    def test_a_rate_that_was_set_keeps_its_rule(self, model: Path) -> None:
        least = plan(model, "pixel-9", budget="min", config=TrainConfig(learning_rate=1e-3))
        assert (least.optimizer, least.learning_rate) == ("adamw_8bit", 1e-3)
        assert "learning_rate" not in least.concessions[3].reason
        for optimizer, last_optimizer in ((None, "adamw_8bit"), ("sgd", "sgd")):  # nothing below is even tried
            config = TrainConfig(learning_rate=1e-3, optimizer=optimizer)
            wishes = Wishes(load_config(model), LoraConfig(), config, RowFacts())
            *_, last = descend(wishes.start(), wishes.freedom)
            assert (last.optimizer, last.step_rule) == (last_optimizer, "backprop")

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_an_optimizer_that_was_set_brings_its_own_rate(self, model: Path, optimizer: str) -> None:
        config = TrainConfig(optimizer=optimizer)
        made = plan(model, "pixel-9", config=config, budget="min")
        assert (made.optimizer, made.learning_rate) == (optimizer, OPTIMIZERS[optimizer].learning_rate)
        assert f"  optimizer   {optimizer}, learning rate {made.learning_rate:g}" in made.explain().splitlines()
        assert plan(model, "pixel-9", config=dataclasses.replace(config, learning_rate=0.5)).learning_rate == 0.5

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("optimizer", ["adamw", "lion_8bit", "sgd"])
    def test_a_method_brings_its_factor(self, tmp_path: Path, method: str, optimizer: str) -> None:
        folder = write_model(tmp_path / "model", tiny_config("qwen2"))  # which has biases
        adapter, config = METHODS[method].Config(), TrainConfig(optimizer=optimizer)
        own, factor = OPTIMIZERS[optimizer].learning_rate, METHODS[method].Config.rate_factor
        made = plan(folder, "pixel-9", adapter=adapter, config=config)
        assert made.learning_rate == own * factor
        assert f"  optimizer   {optimizer}, learning rate {made.learning_rate:g}" in made.explain().splitlines()
        asked = dataclasses.replace(config, learning_rate=0.5)
        assert plan(folder, "pixel-9", adapter=adapter, config=asked).learning_rate == 0.5

    def test_the_last_rung_says_what_it_means(self, model: Path) -> None:
        targets = plan(model, "pixel-9").adapter.target_modules
        large = LoraConfig(r=96, target_modules=targets, layers_to_transform=tuple(range(8)))
        least = plan(model, "pixel-9", budget="min", adapter=large)
        assert (least.step_rule, least.optimizer) == ("mezo", "sgd")
        trained = 96 * 8 * sum(n + k for n, k in load_config(model).linear_shapes.values())
        assert least.learning_rate == pytest.approx(trained**-0.5)
        assert least.peak_moment == "forward" and "two forward passes" in least.explain()
        last, optimizer = least.concessions[-1], next(c for c in least.concessions if c.setting == "optimizer")
        assert last.setting == "step_rule"
        assert last.reason.endswith("; it learns far more slowly; learning_rate 0.00089 is its own")
        assert "learning_rate" not in optimizer.reason
        exact = plan(model, "pixel-9", budget="min", adapter=large, config=TrainConfig(step_rule="backprop"))
        assert exact.step_rule == "backprop" and least.predicted_peak_bytes < exact.predicted_peak_bytes

    def test_mezo_is_an_sgd(self, model: Path) -> None:
        """Another optimizer that was set keeps it away, sgd does not; and its state is never planned for."""
        rules = dict.fromkeys(OPTIMIZERS, "backprop") | {"sgd": "mezo"}
        for optimizer, step_rule in rules.items():
            wishes = Wishes(load_config(model), LoraConfig(), TrainConfig(optimizer=optimizer), RowFacts())
            *_, last = descend(wishes.start(), wishes.freedom)
            assert (last.optimizer, last.step_rule) == (optimizer, step_rule)
        wishes = Wishes(load_config(model), LoraConfig(), TrainConfig(step_rule="mezo"), RowFacts())
        assert {choice.optimizer for choice in descend(wishes.start(), wishes.freedom)} == {"sgd"}
        with pytest.raises(ConfigError, match=r"optimizer = 'adamw'; mezo is an SGD\. Leave one of the two out"):
            plan(model, "pixel-9", config=TrainConfig(optimizer="adamw", step_rule="mezo"))

    def test_a_learning_rate_is_one_for_gradients(self, model: Path) -> None:
        config = TrainConfig(learning_rate=1e-3)
        least = plan(model, "pixel-9", budget="min", config=config)
        assert (least.step_rule, least.learning_rate) == ("backprop", 1e-3)
        asked = plan(model, "pixel-9", budget="min", config=dataclasses.replace(config, step_rule="mezo"))
        assert (asked.step_rule, asked.learning_rate) == ("mezo", 1e-3) and "step_rule" not in {
            c.setting for c in asked.concessions
        }

    def test_accumulation_that_was_set_stays(self, model: Path) -> None:
        made = plan(model, "pixel-9", budget="min", config=TrainConfig(gradient_accumulation_steps=2))
        assert (made.batch_size, made.gradient_accumulation_steps) == (1, 2)
        assert made.concessions[0].wanted == "4"
        for steps, batch in ((3, 2), (16, 1)):
            made = plan(model, "pixel-9", config=TrainConfig(gradient_accumulation_steps=steps))
            assert (made.batch_size, made.gradient_accumulation_steps) == (batch, steps)


def wishes_from(flags: str, adapter: dict[str, Any], config: dict[str, Any]) -> tuple[LoraConfig, TrainConfig]:
    """The configs with flags as a message names them laid over."""
    for flag, value in re.findall(r"--(\S+) (\S+)", flags):
        name = {"layers": "layers_to_transform"}.get(flag, flag.replace("-", "_"))
        if name == "target_modules":
            adapter[name] = tuple(value.split(","))
        elif name == "layers_to_transform":
            first, _, last = value.partition("-")
            adapter[name] = tuple(range(int(first), int(last or first) + 1))
        else:
            (adapter if name == "r" else config)[name] = value if name in ("optimizer", "step_rule") else int(value)
    return LoraConfig(**adapter), TrainConfig(**config)


class TestRefusal:
    CASES = (
        ({}, {"max_seq_length": 256, "batch_size": 8}),
        ({"r": 8}, {"batch_size": 8}),
        ({"r": 64, "target_modules": ("q_proj", "v_proj", "down_proj")}, {"batch_size": 2, "max_seq_length": 128}),
        ({"layers_to_transform": tuple(range(8))}, {"recompute_layers": 0}),
        ({"r": 96}, {"optimizer": "adamw", "batch_size": 1, "max_seq_length": 64}),
        ({"layers_to_transform": tuple(range(8))}, {"step_rule": "backprop", "batch_size": 1}),
        ({}, {"learning_rate": 1e-3}),
        ({}, {}),
    )

    @pytest.mark.parametrize(("adapter", "config"), CASES)
    @pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
    def test_what_it_names_fits(
        self, model: Path, adapter: dict[str, Any], config: dict[str, Any], share: float
    ) -> None:
        wishes = {"adapter": LoraConfig(**adapter), "config": TrainConfig(**config)}
        least = plan(model, "pixel-9", budget="min", **wishes).budget_bytes
        budget = int((FLOOR + share * (least - FLOOR)) // MIB) - 1
        with pytest.raises(BudgetError) as error:
            plan(model, "pixel-9", budget=budget, **wishes)
        first, _, third = str(error.value).splitlines()
        assert re.search(r"to train; pixel-9 allows [\d.]+ MiB \(given\): [\d.]+ MiB are missing", first)
        ways = third.removeprefix("It fits with ").removesuffix(".").split(" or ")
        for way in ways:
            if way.startswith("--budget"):
                exactly = int(way.removeprefix("--budget "))
                assert plan(model, "pixel-9", budget=exactly, **wishes).fits
                with pytest.raises(BudgetError):
                    plan(model, "pixel-9", budget=exactly - 1, **wishes)
            else:
                lora, training = wishes_from(way, dict(adapter), dict(config))
                assert plan(model, "pixel-9", adapter=lora, config=training, budget=budget).fits

    def test_one_setting_before_several(self, model: Path) -> None:
        config = TrainConfig(batch_size=8, max_seq_length=256, step_rule="backprop")
        with pytest.raises(BudgetError, match=r"with --batch-size 8 --max-seq-length 256 --step-rule backprop needs .*\n.*\nIt fits with --batch-size 1 or --budget \d+\.$"):  # fmt: skip  # noqa: E501
            plan(model, "pixel-9", config=config, budget=125)

    def test_the_foreground_budget_where_that_is_enough(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "measure_floor", lambda engine, threads: 160 * MIB)
        with pytest.raises(
            BudgetError, match=r"allows 153 MiB \(background\)(.|\n)*It fits with --budget foreground\."
        ):
            plan(model, "galaxy-watch-7", budget="background")

    def test_nothing_at_all(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "measure_floor", lambda engine, threads: 2040 * MIB)
        with pytest.raises(BudgetError, match=r"No setting makes it fit galaxy-watch-7: choose a smaller model\.$"):
            plan(model, "galaxy-watch-7")

    def test_a_device_that_no_engine_leaves_room_on(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planner, "measure_floor", lambda engine, threads: 151 * MIB)
        monkeypatch.setitem(planner.FLOOR_BYTES, "ort", 140 * MIB)
        message = (
            r"MiB are missing\.\n.*\nIt fits with --budget \d+, more than apple-watch-10 allows\.\nNo engine trains a "
            r"model of usual size on apple-watch-10: of the 153 MiB .* the floor of ort alone takes about 140 MiB\. "
            r"Train for another device .*: edgetune export run/ --device apple-watch-10 --out bundle/$"
        )
        with pytest.raises(BudgetError, match=message):
            plan(model, "apple-watch-10")

    def test_which_devices_have_room_for_training(self) -> None:
        profiles = [profile for profile in list_devices() if profile.id != "host"]
        assert [p.id for p in profiles if planner.why_untrainable(p)] == []
        watch = load_device("apple-watch-10")
        for mib, room in ((47, False), (48, True)):  # the ort engine's floor of 32 and the least of 16
            other = dataclasses.replace(watch, memory=dataclasses.replace(watch.memory, budget_mib=mib))
            assert (planner.why_untrainable(other) is None) is room

    def test_largest_parts_in_order(self, model: Path) -> None:
        with pytest.raises(BudgetError) as error:
            plan(model, "pixel-9", config=TrainConfig(batch_size=256, max_seq_length=256), budget=150)
        sizes = [float(size) for size in re.findall(r"(\d+(?:\.\d)?) MiB", str(error.value).splitlines()[1])]
        assert len(sizes) == 3
        assert sizes == sorted(sizes, reverse=True)


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row_of(length: int, supervised: int | None = None) -> Row:
    """Token ids without a meaning, of which the last ones are learned."""
    labels = np.full(length, 7, np.int32)
    labels[: 0 if supervised is None else length - supervised] = -100
    return Row(np.arange(length, dtype=np.int32), labels, 1)


class TestFacts:
    def test_windows_are_those_of_all_rows(self) -> None:
        facts = RowFacts((row_of(50, 20), row_of(30, 4), row_of(20, 15)), (row_of(64, 60),))
        # 50 alone or with 20 beside it: what is learned of the fullest window, and the length of the held-out one.
        windows = facts.windows(64)
        assert (windows.learned, windows.held_out, windows.length) == (2, 1, 64)
        assert windows.supervised in (20, 19)
        assert (facts.longest, facts.num_tokens) == (64, 164)
        text = RowFacts((row_of(130),), is_text=True)
        assert text.windows(64)[:2] == (3, 0) and text.windows(64).length == 64

    @pytest.mark.parametrize(
        ("lengths", "is_text", "positions", "window"),
        [
            ((), True, 4096, 512), ((), True, 256, 256), ((2000,), True, 4096, 512), ((200,), True, 4096, 208),
            ((2000,), False, 4096, 2000), ((2001,), False, 4096, 2016), ((2001,), False, 2010, 2010),
            ((2000,), True, 300, 300), ((9,), False, 4096, 64),
        ],
    )  # fmt: skip
    def test_default_window(
        self, model: Path, lengths: tuple[int, ...], is_text: bool, positions: int, window: int
    ) -> None:
        config = dataclasses.replace(load_config(model), max_position_embeddings=positions)
        facts = RowFacts(tuple(map(row_of, lengths)), is_text=is_text)
        assert Wishes(config, LoraConfig(), TrainConfig(), facts).window() == window

    def test_short_rows_keep_a_window_worth_its_step(self, model: Path) -> None:
        wishes = Wishes(load_config(model), LoraConfig(), TrainConfig(), RowFacts((row_of(9),)))
        assert wishes.freedom.shortest_window == 64

    def test_a_default_batch_is_no_more_than_there_is(self, model: Path) -> None:
        config, rows = load_config(model), tuple(row_of(20) for _ in range(9))
        facts = RowFacts(rows)
        assert facts.windows(64).learned == 3
        for wanted, batch in ((None, 3), (5, 5)):
            wishes = Wishes(config, LoraConfig(), TrainConfig(batch_size=wanted, max_seq_length=64), facts)
            assert wishes.start().batch_size == batch


class TestRows:
    @pytest.fixture
    def texts(self, tmp_path: Path) -> Path:
        rng = np.random.default_rng(0)
        return write_rows(tmp_path / "text.jsonl", [{"text": "ab" * int(n)} for n in rng.integers(10, 300, 40)])

    @pytest.fixture
    def prompts(self, tmp_path: Path) -> Path:
        rng = np.random.default_rng(0)
        return write_rows(
            tmp_path / "prompt.jsonl",
            [{"prompt": "p" * int(n), "completion": "c" * 60} for n in rng.integers(10, 90, 40)],
        )

    @pytest.mark.parametrize("budget", ["foreground", "min"])
    @pytest.mark.parametrize("kind", ["texts", "prompts"])
    def test_steps_are_those_that_training_makes(
        self, model: Path, request: pytest.FixtureRequest, kind: str, budget: str
    ) -> None:
        """Counted again from the file at the planned window, as the trainer does."""
        data = request.getfixturevalue(kind)
        made = plan(model, "rpi-5", data=data, budget=budget, config=TrainConfig(num_epochs=2, seed=5))
        rows, _ = split_eval(read_rows(data, load_tokenizer(model), made.max_seq_length), 0.1, 5)
        windows = len(pack(rows, made.max_seq_length))
        assert made.max_steps == -(-2 * windows // (made.batch_size * made.gradient_accumulation_steps))
        assert made.warmup_steps == round(0.03 * made.max_steps)

    def test_a_window_never_gets_shorter_than_a_prompt_and_its_completion(self, model: Path, prompts: Path) -> None:
        longest = read_rows(prompts, load_tokenizer(model), 256).longest
        least = plan(model, "rpi-5", data=prompts, budget="min")
        assert longest <= least.max_seq_length < 256
        assert "max_seq_length" not in {c.setting for c in least.concessions} or least.max_seq_length == longest

    def test_texts_can_be_cut(self, model: Path, texts: Path) -> None:
        assert plan(model, "rpi-5", data=texts, budget="min").max_seq_length == 64

    def test_the_default_window_is_what_rows_need(
        self, model: Path, texts: Path, prompts: Path, tmp_path: Path
    ) -> None:
        assert plan(model, "rpi-5", data=texts).max_seq_length == 256  # all the positions that there are
        short = write_rows(tmp_path / "short.jsonl", [{"text": "a" * 70}] * 9)
        assert plan(model, "rpi-5", data=short).max_seq_length == 80  # 71 tokens, rounded up
        assert plan(model, "rpi-5", data=prompts).max_seq_length == 160

    def test_a_window_that_was_set_must_hold_the_rows(self, model: Path, prompts: Path) -> None:
        with pytest.raises(DataError, match="max_seq_length"):
            plan(model, "rpi-5", data=prompts, config=TrainConfig(max_seq_length=100))

    def test_no_larger_batch_than_there_are_windows(self, model: Path, tmp_path: Path) -> None:
        data = write_rows(tmp_path / "few.jsonl", [{"prompt": "p" * 150, "completion": "c" * 50}] * 4)
        assert plan(model, "rpi-5", data=data).batch_size == 3  # one of four is held out

    def test_rows_are_counted(self, model: Path, texts: Path) -> None:
        rows = read_rows(texts, load_tokenizer(model), 256)
        more = plan(model, "rpi-5", data=texts).parts["data"] - plan(model, "rpi-5").parts["data"]
        assert more == 8 * rows.num_tokens + costs.ROW_OBJECT_BYTES * len(rows)


class TestFeatureCache:
    """Adapters in the top three of eight blocks, 30 rows of which three are held out: windows of 128 tokens."""

    UPPER = LoraConfig(r=4, layers_to_transform=(5, 6, 7))

    @pytest.fixture
    def made(self, model: Path, tmp_path: Path) -> Any:
        data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "p" * 60, "completion": "c" * 67}] * 30)

        def make(device: Any = "rpi-5", *, adapter: LoraConfig = self.UPPER, rows: bool = True, **config: Any) -> Plan:
            settings = TrainConfig(**{"max_seq_length": 128, "batch_size": 2} | config)
            return plan(model, device, data=data if rows else None, adapter=adapter, config=settings)

        return make

    def test_it_holds_all_windows(self, made: Any) -> None:
        assert made().feature_cache_bytes == 30 * 128 * 96 * 4
        assert (
            "cache       the 5 lowest blocks run once over all rows; what they give takes 1.4 MiB" in made().explain()
        )

    def test_where_there_is_none(self, made: Any) -> None:
        whole = LoraConfig(r=4, layers_to_transform=(0, 7))
        assert made(adapter=whole).feature_cache_bytes == 0, "the lowest block learns"
        assert made(num_epochs=1).feature_cache_bytes == 0, "no row is seen again"
        assert made(num_epochs=1.1).feature_cache_bytes > 0
        assert made(max_steps=13).feature_cache_bytes == 0, "27 windows, two in a step"
        assert made(max_steps=14).feature_cache_bytes > 0
        assert made(rows=False, max_steps=100).feature_cache_bytes == 0
        assert "cache" not in made(num_epochs=1).explain()

    def test_it_leaves_half_of_the_storage(self, made: Any) -> None:
        device, size = load_device("rpi-5"), made().feature_cache_bytes
        for free_mib, cached in ((-(-2 * size // MIB), size), (2 * size // MIB, 0)):
            storage = dataclasses.replace(device.storage, free_mib=free_mib)
            assert made(dataclasses.replace(device, storage=storage)).feature_cache_bytes == cached

    def test_it_takes_memory_for_its_names_alone(self, made: Any) -> None:
        cached, plain = made(), made(num_epochs=1)
        assert cached.parts["data"] - plain.parts["data"] == 30 * costs.FEATURE_OBJECT_BYTES
        assert cached.parts | {"data": 0} == plain.parts | {"data": 0}

    def test_lower_blocks_run_once(self, made: Any, model: Path) -> None:
        tiny = load_config(model)
        wanted = {"adapter": self.UPPER.resolved(tiny), "batch_size": 3, "gradient_accumulation_steps": 2}
        cached, plain = (step_work(job(tiny, cached_windows=count, **wanted)) for count in (9, 0))
        weights = sum(n * k for n, k in tiny.linear_shapes.values())
        below = 5 * 6 * 32 * (2 * weights + 4 * 32 * 72)  # one tile of queries: no key is left out
        assert plain.dispatch_cycles - cached.dispatch_cycles == 5 * 6 * BLOCK_CYCLES
        both = (step_work(job(tiny, cached_windows=n, step_rule="mezo", **wanted)) for n in (0, 9))
        assert next(both).flops - next(both).flops == pytest.approx(2 * below), "for each of its two losses"
        # Three blocks forward, two of them again, all three backward, which counts twice.
        assert cached.dispatch_cycles == 2 * 11 * BLOCK_CYCLES + 3 * 7 * 2 * TENSOR_CYCLES
        assert plain.flops - cached.flops == pytest.approx(below)
        assert lower_work(job(tiny, **wanted), 6).flops == pytest.approx(below)
        one, three = (step_work(job(tiny, **wanted | {"batch_size": n})).traffic_bytes for n in (1, 3))
        above = [step_work(job(tiny, cached_windows=9, **wanted | {"batch_size": n})) for n in (1, 3)]
        assert three - above[1].traffic_bytes == pytest.approx(3 * (one - above[0].traffic_bytes))

    def test_the_run_is_filling_and_its_steps(self, made: Any) -> None:
        device, cached, plain = load_device("rpi-5"), made(), made(num_epochs=1)
        storage = device.storage
        assert cached.predicted_step_seconds < plain.predicted_step_seconds
        fill = cached.predicted_run_seconds - cached.max_steps * cached.predicted_step_seconds
        work = lower_work(
            job(cached.model_config, adapter=cached.adapter, grid=cached.grid, max_seq_length=128, tile_weights=24576),
            30,
        )
        written = cached.feature_cache_bytes / (storage.write_mb_s * 1e6)
        assert fill == pytest.approx(work.seconds(device) + written)


class TestTime:
    def test_run_energy_and_window(self, model: Path) -> None:
        watch = load_device("galaxy-watch-7")
        made = plan(model, watch, config=TrainConfig(max_steps=100))
        assert made.predicted_run_seconds == pytest.approx(100 * made.predicted_step_seconds)
        assert made.predicted_energy_mwh == pytest.approx(watch.power.max_avg_mw * made.predicted_run_seconds / 3600)
        per_slice = int(watch.duty.slice_s // made.predicted_step_seconds)
        assert made.num_slices == -(-100 // per_slice)
        assert (made.slice_seconds, made.grace_seconds) == (watch.duty.slice_s, watch.duty.grace_s)
        assert made.fits_training_window is (made.predicted_run_seconds <= watch.duty.daily_s)
        assert plan(model, watch, config=TrainConfig(max_steps=10**9)).fits_training_window is False
        assert plan(model, watch).predicted_run_seconds is None

    def test_a_step_that_is_longer_than_a_slice(self, model: Path) -> None:
        watch = load_device("galaxy-watch-7")
        slow = dataclasses.replace(watch, compute=dataclasses.replace(watch.compute, gflops_fp32_sustained=1e-5))
        made = plan(model, slow, config=TrainConfig(max_steps=100))
        assert made.predicted_step_seconds > 30 and made.num_slices is None
        assert "NO step ends inside a slice of 30 s" in made.explain()
        assert "slice" not in plan(model, slow).explain()

    def test_operations_by_hand(self, tmp_path: Path) -> None:
        tiny = load_config(write_model(tmp_path, TINY, tokenizer=False))
        weights = 2 * (48 * 48 + 16 * 48) + 3 * 88 * 48
        trained = 2 * 4 * sum(n + k for n, k in tiny.linear_shapes.values())
        attention = 4 * 32 * 48
        # Two blocks forward, the lower one again, both backward; the head for 62 positions, two products.
        flops = 64 * (2 * weights * 5 + attention * (3 + 5) + 2 * trained * 3.5) + 4 * 301 * 48 * 62
        assert step_work(job(tiny)).flops == pytest.approx(flops)
        # Two blocks forward, all of it twice.
        flops = 2 * (64 * (2 * weights * 2 + attention * 2 + 2 * trained) + 2 * 301 * 48 * 62)
        assert step_work(job(tiny, step_rule="mezo")).flops == pytest.approx(flops)
        twice, once = (step_work(job(tiny, gradient_accumulation_steps=n)).flops for n in (2, 1))
        assert twice == pytest.approx(2 * once)
        # Of five norms a product and a sum for each feature; nothing forward.
        flops = 64 * (2 * weights * 5 + attention * (3 + 5) + 2 * 5 * 48) + 4 * 301 * 48 * 62
        assert step_work(job(tiny, adapter=LnTuningConfig().resolved(tiny))).flops == pytest.approx(flops)
        biased = load_config(write_model(tmp_path / "biased", TINY | {"model_type": "qwen2"}, tokenizer=False))
        flops += 64 * 2 * ((48 + 16 + 16) - 5 * 48)  # of each bias the sum
        assert step_work(job(biased, adapter=BitfitConfig().resolved(biased))).flops == pytest.approx(flops)
        # Of each weight a product and a sum more; of both blocks' four norms as above.
        flops += 64 * 2 * 2 * (weights + 2 * 48)
        assert step_work(job(biased, adapter=FullConfig().resolved(biased))).flops == pytest.approx(flops)

    def test_traffic_by_hand(self, tmp_path: Path) -> None:
        tiny = load_config(write_model(tmp_path, TINY, tokenizer=False))
        weights, head = 2 * (48 * 48 + 16 * 48) + 3 * 88 * 48, 301 * 48
        trained = 2 * 4 * sum(n + k for n, k in tiny.linear_shapes.values())
        activations = 64 * 4 * (48 + 16 + 16 + 48 + 48 + 2 * 88)
        scores = 4 * 4 * 64 * 32 * tiny.num_attention_heads  # bytes of one forward pass over a block
        inputs, outputs = (2 * sum(pair[side] for pair in tiny.linear_shapes.values()) for side in (1, 0))
        # Three forward passes over two blocks' adapters, two backward.
        adapters = 64 * 4 * (1.5 * (inputs + 2 * outputs) + 3 * inputs + 2 * outputs)
        # Five passes over a block's weights, each a float32 written and read beside the codes; backward counts twice.
        step = (5 * weights + head) * 8.5625 + 4 * activations * (3 + 2 * 2) + scores * (3 + 5) + adapters
        found = step_work(job(tiny, gradient_accumulation_steps=3)).traffic_bytes
        assert found == pytest.approx(3 * step + 3 * 4 * trained + 2 * 8 * trained)
        step = (
            (4 * weights + 2 * head) * 8.5625 + 4 * activations * 4 + scores * 4 + 64 * 4 * 2 * (inputs + 2 * outputs)
        )
        found = step_work(job(tiny, step_rule="mezo", optimizer="sgd")).traffic_bytes
        assert found == pytest.approx(step + 16 * 4 * trained)

    def test_weights_that_stay_dequantized_are_read_and_nothing_else(self, tmp_path: Path) -> None:
        tiny = load_config(write_model(tmp_path, TINY, tokenizer=False))
        weights = 2 * (48 * 48 + 16 * 48) + 3 * 88 * 48
        none, one = (
            step_work(job(tiny, recompute_layers=0, dequantized_layers=layers)).traffic_bytes for layers in (0, 1)
        )
        assert none - one == pytest.approx(2 * weights * (8.5625 - 4)), "forward and backward"

    @pytest.mark.parametrize(("length", "keys"), [(32, 32), (64, 64), (1024, (1024 + 64) / 2)])
    def test_attention_leaves_out_keys_after_a_tile(self, model: Path, length: int, keys: float) -> None:
        config = load_config(model)
        upper = TestFeatureCache.UPPER.resolved(config)
        work = lower_work(job(config, adapter=upper, max_seq_length=length), 1)
        weights = sum(n * k for n, k in config.linear_shapes.values())
        attention = work.flops / 5 / length - 2 * weights
        assert attention == pytest.approx(4 * keys * config.num_attention_heads * config.head_dim)

    def test_calls_by_hand(self, tmp_path: Path) -> None:
        tiny = load_config(write_model(tmp_path, TINY, tokenizer=False))
        # Two blocks forward, the lower one again, both backward, which counts twice.
        tensors = 2 * 2 * 7 * TENSOR_CYCLES
        assert step_work(job(tiny)).dispatch_cycles == 7 * BLOCK_CYCLES + tensors
        found = step_work(job(tiny, gradient_accumulation_steps=3, batch_size=2)).dispatch_cycles
        assert found == 3 * 7 * BLOCK_CYCLES + tensors
        found = step_work(job(tiny, step_rule="mezo")).dispatch_cycles
        assert found == 4 * BLOCK_CYCLES + tensors

    def test_a_roofline_whose_sides_add_up(self) -> None:
        device = load_device("rpi-5")
        compute = dataclasses.replace(device.compute, gflops_fp32_sustained=2.0, gflops_fp32_burst=9.0, mem_bw_mb_s=10)
        clusters = tuple(Cluster(2, khz, khz > 1_000_000) for khz in (1_000_000, 2_000_000))
        device = dataclasses.replace(device, compute=compute, cpu=dataclasses.replace(device.cpu, cluster=clusters))
        assert StepWork(3e9, 5e6, 1e9).seconds(device) == pytest.approx(1.5 + 0.5 + 0.5)
        assert StepWork(3e9, 5e6, 1e9, 2e9).seconds(device) == pytest.approx(1.5 + 0.5 + 0.5)

    def test_products_that_are_not_fast_take_longer_on_a_host_that_was_measured_with_fast_ones(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        host, tiny = load_device("host"), load_config(model)
        rate = host.compute.gflops_fp32_sustained * 1e9
        for offered, seconds in ((True, 2 + SLOWER_PRODUCTS), (False, 3)):
            monkeypatch.setattr(work, "are_offered", lambda offered=offered: offered)
            assert StepWork(3 * rate, 0, 0, 2 * rate).seconds(host) == pytest.approx(seconds)
        fast, slow = (step_work(job(tiny, fast_products=on)) for on in (True, False))
        assert (fast.flops, slow.fast_flops) == (slow.flops, 0)
        assert 0.5 * fast.flops < fast.fast_flops < fast.flops

    def test_a_faster_device_is_faster(self, model: Path) -> None:
        seconds = [plan(model, name).predicted_step_seconds for name in ("rpi-zero-2w", "rpi-4", "rpi-5")]
        assert seconds == sorted(seconds, reverse=True)
        assert seconds[0] > 3 * seconds[-1]

    def test_recomputation_costs_time(self, model: Path) -> None:
        none, all_of_them = (
            plan(model, "rpi-5", config=TrainConfig(recompute_layers=layers)).predicted_step_seconds
            for layers in (0, 8)
        )
        assert 1.1 * none < all_of_them < 1.6 * none


class TestJson:
    @pytest.fixture
    def made(self, model: Path) -> Plan:
        return plan(model, "galaxy-watch-7", config=TrainConfig(max_steps=9), budget=130)

    def test_round_trip(self, made: Plan) -> None:
        assert made.concessions
        assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"format_version": 2}, "format_version 2, of edgetune .* reads up to 1. Upgrade"),
            ({"batch_sise": 1}, "batch_sise: unknown key; did you mean batch_size"),
            ({"batch_size": "1"}, "batch_size: found '1'; expected an integer"),
            ({"batch_size": True}, "batch_size: found True"),
            ({"adapter": {"r": 8}, "parts": []}, "parts: found a list; expected a table"),
            ({"predicted_peak_bytes": 1}, "add up to .* changed by hand"),
        ],
    )
    def test_strict(self, made: Plan, change: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            Plan.from_dict(made.to_dict() | change)

    def test_missing_key(self, made: Plan) -> None:
        values = made.to_dict()
        del values["grid"]
        with pytest.raises(ConfigError, match="grid: missing"):
            Plan.from_dict(values)

    def test_with_steps(self, made: Plan) -> None:
        open_plan = dataclasses.replace(
            made, max_steps=None, warmup_steps=None, num_epochs=2.5, batch_size=2, gradient_accumulation_steps=3,
            warmup_ratio=0.1,
        )  # fmt: skip
        filled = open_plan.with_steps(100)
        assert (filled.max_steps, filled.warmup_steps) == (42, 4)
        assert filled.with_steps(7) == filled


def test_explain(model: Path) -> None:
    made = plan(model, "galaxy-watch-7", config=TrainConfig(max_steps=9), budget=130)
    text = made.explain()
    for part, size in made.parts.items():
        assert re.search(rf"{part} +{size / MIB:,.1f}? MiB|{part} +\d+ MiB", text), part
    for concession in made.concessions:
        assert f"{concession.setting}: {concession.wanted} -> {concession.given}" in text
    assert "130 MiB (given budget)" in text
    assert "Predicted for galaxy-watch-7" in text
    assert "simulated here" in text
    assert "9 steps in" in text


def test_blocks_are_named_as_they_are_typed() -> None:
    assert ladder._ranges((8, 0, 2, 6, 5, 7)) == "0,2,5-8"


def test_methods_give_what_the_plan_needs() -> None:
    for method in METHODS.values():
        assert callable(method.slots)
        computes = not method.Config.own and method not in (prefix, prompt)
        assert method.CAPABILITIES is not None and (not computes or callable(method.add_gradients))


def test_runs_without_torch_and_onnx(model: Path) -> None:
    code = f"""
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxruntime", "bitsandbytes", "transformers", "peft"):
    sys.modules[name] = None
from edgetune import memory, planner
planner.measure_floor = lambda engine, threads: 1
print(planner.plan({str(model)!r}, "pixel-9").explain())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", "8", "--recompute-layers", "0"),
        (
            "--batch-size",
            "16",
            "--recompute-layers",
            "4",
            "--gradient-accumulation-steps",
            "2",
            "--optimizer",
            "lion_8bit",
        ),
        ("--batch-size", "24", "--step-rule", "mezo"),
    ],
    ids=["kept", "recomputed", "mezo"],
)
def test_the_peak_of_a_real_run(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """In a process of its own, where the measured peak is the run's alone."""
    config = tiny_config("llama", hidden_size=192, intermediate_size=512, num_hidden_layers=4, vocab_size=3000)
    base = quantize(write_model(tmp_path / "model", config), "int4", tmp_path / "base")
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "abc " * 300}] * 12)
    command = [
        sys.executable, "-m", "edgetune", "train", str(base), "--device", "rpi-5", "--data", str(data), "--json",
        "--out", str(tmp_path / "run"), "--max-steps", "4", "--eval-fraction", "0", *flags,
    ]  # fmt: skip
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    summary = json.loads(child.stdout.splitlines()[-1])
    predicted, measured, floor = (
        summary[key] for key in ("predicted_peak_bytes", "measured_peak_bytes", "floor_bytes")
    )
    assert measured - floor > 50 * MIB  # enough to tell a wrong count from a floor that varies
    assert predicted == pytest.approx(measured, rel=0.05)
    assert predicted - floor == pytest.approx(measured - floor, rel=0.15)


class TestOrtEngine:
    def made(self, model: Path, **wishes: Any) -> Plan:
        config = TrainConfig(**{"batch_size": 1, "max_seq_length": 64, **wishes.pop("config", {})})
        return plan(model, "pixel-9", engine="ort", config=config, **wishes)

    def test_parts_add_up_and_none_is_negative(self, model: Path) -> None:
        made = self.made(model)
        assert (made.engine, made.grid, made.simulated) == ("ort", "int4", False)
        assert sum(made.parts.values()) == made.predicted_peak_bytes
        assert min(made.parts.values()) >= 0
        assert Plan.from_dict(made.to_dict()) == made

    @pytest.mark.parametrize(
        "larger",
        [
            {"config": {"max_seq_length": 256}},
            {"config": {"batch_size": 4}},
            {"adapter": LoraConfig(r=64)},
        ],
        ids=["length", "batch", "rank"],
    )
    def test_more_takes_more(self, model: Path, larger: dict[str, Any]) -> None:
        least = self.made(model)
        assert self.made(model, **larger).predicted_peak_bytes > least.predicted_peak_bytes

    def test_min_is_what_it_says(self, model: Path) -> None:
        least = plan(model, "pixel-9", engine="ort", budget="min").budget_bytes // MIB
        assert plan(model, "pixel-9", engine="ort", budget=least).fits
        with pytest.raises(BudgetError):
            plan(model, "pixel-9", engine="ort", budget=least - 1)

    @pytest.mark.parametrize(
        ("wishes", "said"),
        [
            ({"adapter": LoraConfig(lora_dropout=0.1)}, "lora_dropout cannot be set here"),
            ({"config": TrainConfig(optimizer="adamw_8bit")}, "training graphs have adamw, sgd"),
            ({"grid": "nf4"}, "grid = 'nf4'; no standard operator dequantizes it"),
        ],
    )
    def test_what_graphs_do_not_have(self, model: Path, wishes: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            plan(model, "pixel-9", engine="ort", **wishes)

    def test_it_is_chosen_where_torch_does_not_fit(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        floors = {"torch": 150 * MIB, "ort": 32 * MIB}
        monkeypatch.setattr(planner, "measure_floor", lambda engine, threads: floors[engine])
        made = plan(model, "apple-watch-10")
        assert (made.engine, made.concessions[0].setting, made.simulated) == ("ort", "engine", False)
        assert "torch does not fit: its floor alone is 150 MiB, 153 MiB are allowed" in made.explain()
        with pytest.raises(BudgetError):
            plan(model, "apple-watch-10", engine="torch")
        assert plan(model, "galaxy-watch-7").engine == "torch"


def test_an_arena_is_touched_as_far_as_pieces_reach() -> None:
    """The smallest free piece that is large enough, what is left of it split off, free neighbours joined."""
    arena = Arena()
    first, second, third, fourth = (arena.take("a", size) for size in (1024, 600, 256, 1))
    assert [piece.address for piece in (first, second, third, fourth)] == [0, 1024, 1792, 2048]
    assert arena.touched_bytes == 2304
    arena.give(first, third)
    assert arena.take("b", 200).address == 1792, "the smaller of two"
    assert arena.take("b", 512).address == 0
    arena.give(second)
    assert arena.take("b", 1280).address == 512, "what was split off and its neighbour"
    assert arena.touched_bytes == 2304 and arena.at_growth == {"a": 1881}
    assert arena.take("c", 1).address == 2304
    assert arena.touched_bytes == 2560 and arena.at_growth == {"a": 1, "b": 1992, "c": 1}
    assert arena.taken_bytes == 1881 + 1992 + 1


class TestOrtWork:
    """Operations, traffic and calls of a step by hand, for a block whose weights differ in size."""

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Any:
        return load_config(write_model(tmp_path, TINY, tokenizer=False))

    def job(self, tiny: Any, **settings: Any) -> Job:
        return job(tiny, **{"grid": "int4", **settings})

    def test_every_product_and_its_second_run(self, tiny: Any) -> None:
        one = self.job(tiny)
        sizes = {name: rows * columns for name, (rows, columns) in tiny.linear_shapes.items()}
        block, down, layers = sum(sizes.values()), sizes["mlp.down_proj"], tiny.num_hidden_layers
        scores = one.max_seq_length * tiny.num_attention_heads * tiny.head_dim
        flops = one.tokens * 2 * (layers * (3 * block - down) + 4 * sum(one.tensor_sizes))
        flops += one.tokens * layers * scores * (2 * 4 + 10)  # two products, again, and five backward
        flops += 4 * tiny.vocab_size * tiny.hidden_size * one.supervised
        assert ort_work.step_work(one).flops == pytest.approx(flops)
        three = ort_work.step_work(self.job(tiny, gradient_accumulation_steps=3))
        assert three.flops == pytest.approx(3 * flops)
        tensors = TENSOR_CYCLES * len(one.tensor_sizes)
        assert three.dispatch_cycles == 3 * 3 * layers * BLOCK_CYCLES + tensors

    def test_blocks_below_the_path_run_once(self, tiny: Any) -> None:
        adapters = (LoraConfig(r=2, layers_to_transform=layers).resolved(tiny) for layers in (None, (1,)))
        whole, upper = (self.job(tiny, adapter=adapter) for adapter in adapters)
        found = [ort_work.step_work(one) for one in (whole, upper)]
        assert found[0].dispatch_cycles - found[1].dispatch_cycles == (
            2 * BLOCK_CYCLES + TENSOR_CYCLES * len(upper.tensor_sizes)
        )
        assert found[0].flops > found[1].flops and found[0].traffic_bytes > found[1].traffic_bytes

    def test_the_engines_differ(self, model: Path) -> None:
        config = TrainConfig(batch_size=1, max_seq_length=64, max_steps=1)
        torch, ort = (plan(model, "rpi-5", engine=name, config=config, grid="int4") for name in ("torch", "ort"))
        assert ort.predicted_step_seconds != torch.predicted_step_seconds > 0
