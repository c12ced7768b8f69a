"""What the graphs take of memory against what the planner says: the arena by graph, and what outlives a call."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.adapter_file import AdapterSlot, by_linear, split_bytes
from edgetune.adapters.lora import LoraConfig
from edgetune.errors import BundleError
from edgetune.models import load_config
from edgetune.personalizer.graphs import Buffers, Graph, TrainingGraphs
from edgetune.planner import ort_parts
from edgetune.planner.job import Job
from edgetune.planner.ort_walk import Walk
from tests.personalizer.conftest import describe
from tests.personalizer.test_gradients import no_check, ort_rule
from tests.tiny_run import adapter_tensors
from tests.training.conftest import make_base, random_batch

ROOT = Path(__file__).resolve().parents[2]
BATCH, LENGTH, RANK = 4, 160, 5
TOUCHED = f"""
import sys
from pathlib import Path
import numpy as np
from edgetune.memory import anonymous_bytes, trim_allocator
from edgetune.personalizer.graphs import Graph
trim_allocator()
graph = Graph(Path(sys.argv[1]), 1, 256 << 20)
sizes = {{"positions": {BATCH * LENGTH}, "batch_size": {BATCH}, "sequence_length": {LENGTH}}}
values = {{}}
for value in graph._native.get_inputs():
    shape = [sizes.get(n, {RANK}) if isinstance(n, str) else n for n in value.shape]
    values[value.name] = np.zeros(shape, {{"tensor(uint8)": np.uint8}}.get(value.type, np.float32))
into = {{}}
for value in graph._native.get_outputs():
    shape = [sizes.get(n, {RANK}) if isinstance(n, str) else n for n in value.shape]
    into[value.name] = np.zeros(shape, np.float32) + 1
before = anonymous_bytes()
graph(values, into)
print(anonymous_bytes() - before)
"""


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("graph", ["forward", "backward"])
def test_the_arena_of_a_graph(family: str, graph: str, tmp_path: Path) -> None:
    """By the kernel's own figure, in a process that calls it once."""
    description = describe(make_base(tmp_path, family, "int4"), tmp_path / "graphs")
    walk = Walk(description.model, BATCH, LENGTH, 1)
    ranks = dict.fromkeys(description.model.linear_shapes, RANK)
    expected = (walk.forward(ranks) if graph == "forward" else walk.backward(ranks)).touched_bytes
    child = subprocess.run(
        [sys.executable, "-c", TOUCHED, str(description.files[graph])], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    handles = (256 << 20) // 32
    assert int(child.stdout) - handles == pytest.approx(expected, rel=0.1, abs=1 << 19)


def held(buffers: Buffers, *names: str) -> int:
    return sum(value.nbytes for name, value in buffers._held.items() if name.partition(".")[0] in names)


@pytest.mark.parametrize(("layers", "accumulation"), [(None, 1), (None, 2), ((2, 3), 1), ((1, 2, 3), 2), ((0, 3), 2)])
def test_what_outlives_a_call(layers: Any, accumulation: int, tmp_path: Path) -> None:
    """Every buffer after an evaluation and a step is counted by the planner, to the byte."""
    base = make_base(tmp_path, "gemma3_text", "int4", num_hidden_layers=4)
    config, tensors = adapter_tensors(base, LoraConfig(r=3, layers_to_transform=layers))
    rule = ort_rule(base, tmp_path / "graphs", config, tensors)
    batches = [random_batch(301, 2, 19, seed=seed) for seed in range(accumulation)]
    for batch in batches:
        batch["labels"] = np.where(batch["labels"] < 0, 7, batch["labels"])  # all are supervised
    rule.graphs.loss_sum(batches[0], rule.adapter, no_check)
    evaluated = held(rule.graphs.buffers, "input")
    rule.gradient(batches, (0, 0), no_check)
    rule.update(1e-3)
    job = Job(
        model=load_config(base), adapter=config, optimizer="adamw", grid="int4", batch_size=2,
        gradient_accumulation_steps=accumulation, max_seq_length=19, recompute_layers=0, tile_weights=1,
        activation_offloading=False, dequantized_layers=0, step_rule="backprop", threads=1, supervised_per_window=19,
    )  # fmt: skip
    buffers = rule.graphs.buffers
    assert evaluated == ort_parts.input_bytes(job, trains=False)
    assert held(buffers, "input", "dx") == ort_parts.input_bytes(job, trains=True)
    assert held(buffers, "gradient", "again") == ort_parts.gradient_bytes(job)
    assert held(buffers, "mask", "cos", "sin") == ort_parts.context_bytes(job)
    assert held(buffers, "parameter", "exp_avg", "exp_avg_sq") == ort_parts.update_bytes(job)
    sums = held(buffers, "hidden", "targets", "highest", "total", "of_target", "weighted")
    assert sums + 32 * job.tokens * accumulation == ort_parts.batch_bytes(job, trains=True)
    rule.graphs.release()
    assert not buffers._held
    again, _ = rule.gradient(batches, (0, 0), no_check)
    assert np.isfinite(again)


def test_a_buffer_is_used_again() -> None:
    buffers = Buffers()
    large = buffers("a", (4, 6))
    small = buffers("a", (3, 5))
    assert small.shape == (3, 5) and np.shares_memory(small, large)
    assert not np.shares_memory(buffers("b", (4, 6)), large)
    assert not np.shares_memory(buffers("a", (5, 5)), large), "it was too small"
    assert buffers("n", (2,), np.int64).dtype == np.int64


class TestErrors:
    @pytest.fixture
    def graph(self, tmp_path: Path) -> Graph:
        description = describe(make_base(tmp_path, "llama", "int4"), tmp_path / "graphs")
        return Graph(description.files["loss_end"], 1, 1 << 20)

    def values(self) -> dict[str, np.ndarray]:
        return {name: np.ones((3, 1), np.float32) for name in ("highest", "total", "of_target")}

    def test_an_input_that_is_not_known(self, graph: Graph) -> None:
        values = self.values()
        del values["total"]
        with pytest.raises(
            BundleError, match=r"training graph .*loss_end\.onnx .* takes total, which this edgetune does"
        ):
            graph(values, {"loss_sum": np.empty((), np.float32)})

    @pytest.mark.parametrize(
        ("values", "into"),
        [
            ({}, {"loss": np.empty((), np.float32)}),
            ({}, {"loss_sum": np.empty((2,), np.float32)}),
            ({"total": np.ones((3, 1), np.float64)}, {"loss_sum": np.empty((), np.float32)}),
            ({"total": np.ones(3, np.float32)}, {"loss_sum": np.empty((), np.float32)}),
        ],
        ids=["output", "shape", "type", "rank"],
    )
    def test_a_graph_of_another_kind(self, graph: Graph, values: Any, into: Any) -> None:
        said = (
            r"loss_end\.onnx cannot be used: loss(_sum)? \[.*\] expected of it: .* again with --with-training, by the"
        )
        with pytest.raises(BundleError, match=said):
            graph(self.values() | values, into)

    def test_refused_memory_stays_what_it_is(self, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
        class Session:
            def io_binding(self) -> Any:
                return self

            def __getattr__(self, name: str) -> Any:
                return lambda *_: None

            def run_with_iobinding(self, binding: Any) -> None:
                raise RuntimeError("Failed to allocate memory for requested buffer of size 7")

        monkeypatch.setattr(graph, "_native", Session())
        with pytest.raises(RuntimeError, match="buffer of size 7"):
            graph(self.values(), {"loss_sum": np.empty((), np.float32)})


def test_the_probe_does_not_see_its_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the base and of an adapter, computed by turns over other ranges of the head, are each other's."""
    base = make_base(tmp_path, "llama", "int4")
    config, tensors = adapter_tensors(base, LoraConfig(r=3))
    rule = ort_rule(base, tmp_path / "graphs", config, tensors)
    graphs, ids = rule.graphs, np.arange(3, 14)
    assert isinstance(graphs, TrainingGraphs)
    plain = replace_tensors(rule)
    whole = [np.concatenate(list(graphs.logits(ids, adapter)), 1) for adapter in (plain, rule.adapter)]
    monkeypatch.setattr("edgetune.personalizer.graphs.PROBE_TILE_WEIGHTS", 72 * 50)
    parts = list(zip(graphs.logits(ids, plain), graphs.logits(ids, rule.adapter), strict=True))
    assert len(parts) == 7 and whole[0].shape == (11, 301)
    for index in range(2):
        np.testing.assert_allclose(np.concatenate([part[index] for part in parts], 1), whole[index], rtol=1e-4)
    change = np.abs(whole[1] - whole[0]).max() / max(np.abs(one).max() for one in whole)
    assert graphs.probe_change([ids], rule.adapter) == pytest.approx(change, rel=1e-4)


def replace_tensors(rule: Any) -> Any:
    """The adapter without tensors: the base alone."""
    return type(rule.adapter)(rule.graphs.model, {}, 1.0)


def test_an_adapter_in_use_takes_what_splitting_it_copies() -> None:
    slots = [
        AdapterSlot("block.qkv_proj", 5, 9, {"block.q_proj": 4, "block.k_proj": 2, "block.v_proj": 3}),
        AdapterSlot("block.o_proj", 4, 5, {"block.o_proj": 5}),
        AdapterSlot("other.o_proj", 4, 5, {"other.o_proj": 5}),
    ]
    tensors = {
        f"{slot.name}.{name}": np.ones(shape, np.float32)
        for slot in slots[:2]
        for name, shape in (("lora_A", (slot.in_features, 6)), ("lora_B", (6, slot.out_features)))
    }
    made = by_linear(tensors, slots).values()
    copies = [value for value in made if not any(np.shares_memory(value, given) for given in tensors.values())]
    assert split_bytes(tensors, slots) == sum(value.nbytes for value in copies) == 4 * 6 * 9


def test_a_plan_has_the_arena_wherever_its_peak_is(tmp_path: Path) -> None:
    """It never shrinks: while the adapter is put into the bundle, which is the peak of a small one, it is there too."""
    model = load_config(make_base(tmp_path, "llama", "int4"))
    job = Job(
        model=model, adapter=LoraConfig(r=RANK).resolved(model), optimizer="sgd", grid="int4", batch_size=BATCH,
        gradient_accumulation_steps=1, max_seq_length=LENGTH, recompute_layers=model.num_hidden_layers, tile_weights=1,
        activation_offloading=False, dequantized_layers=0, step_rule="backprop", threads=1, supervised_per_window=9,
    )  # fmt: skip
    walk = Walk(model, BATCH, LENGTH, job.supervised)
    touched = walk.backward(dict.fromkeys(model.linear_shapes, RANK)).touched_bytes
    moment, parts = ort_parts.peak_parts(job, 1 << 25)
    assert moment == "adopting"
    in_plan = sum(parts[name] for name in (*ort_parts.PARTS, "arena"))
    noted = 8 * ort_parts.reserved_bytes(touched) // 256  # of each piece of the range
    assert in_plan == touched + noted
    assert ort_parts.arena_bytes(job) == ort_parts.reserved_bytes(touched) >= 1.2 * touched + ort_parts.SPARE_BYTES
    large = replace(job, tokenizer_file_bytes=1 << 28)  # most is held before the arena is there
    assert ort_parts.peak_parts(large, 1 << 25)[0] == "reading"
    assert ort_parts.arena_bytes(large) == ort_parts.arena_bytes(job)
