"""What a step of the `ort` engine takes: operations, traffic and calls, for the roofline of `work.StepWork`.

A step multiplies with each weight forward, and on the gradient's path once more for the gradient of the block's input,
and where the block runs again for its activations; the product that ends a block is not computed again. Nothing stays
dequantized, and attention has no tiles: all keys are multiplied, those that are masked too. What moves is what
`ort_walk` lists: each value is written once and read once, and of a weight its codes are read besides.
"""

from __future__ import annotations

from edgetune.adapters.lora import LoraConfig
from edgetune.grids import row_tiles
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner.job import FLOAT_BYTES, Job
from edgetune.planner.ort_walk import HEAD_TILE_WEIGHTS, Walk
from edgetune.planner.work import ATTENTION_BACKWARD, BLOCK_CYCLES, TENSOR_CYCLES, StepWork

CODE_BYTES = 0.625  # of a weight: its 4 bits, and a float32 scale for 32 of them
PASSES = 2  # of a value: written by its operator, and read by another


def step_work(job: Job) -> StepWork:
    """One optimizer step: all its micro-batches, and the update."""
    model, layers, path, again = job.model, job.model.num_hidden_layers, job.path_layers, job.recompute_layers
    sizes = {name: rows * columns for name, (rows, columns) in model.linear_shapes.items()}
    weights, last = sum(sizes.values()), sizes["mlp.down_proj"]
    visited = weights * (layers + path) + (weights - last) * again
    attention = 4.0 * job.max_seq_length * model.num_attention_heads * model.head_dim
    head = model.vocab_size * model.hidden_size
    # An adapter: two products forward, again, and two for each of its gradients and that of its input.
    adapter = sum(job.tensor_sizes) * (1 + again / path + 2)
    flops = job.tokens * 2.0 * (visited + adapter)
    flops += job.tokens * attention * (layers + path * (1 + ATTENTION_BACKWARD))
    flops += 4.0 * head * job.supervised  # the logits, and the weighted sum of the head's rows
    traffic = PASSES * _values_bytes(job) + CODE_BYTES * (visited + head)
    cycles = BLOCK_CYCLES * (layers + 2 * path)
    times = job.gradient_accumulation_steps
    # An update reads and writes parameters and moments, by way of a buffer, and reads gradients.
    update = 5 * FLOAT_BYTES * sum(job.tensor_sizes) + 4 * OPTIMIZERS[job.optimizer].state_bytes(job.tensor_sizes)
    cycles = cycles * times + TENSOR_CYCLES * len(job.tensor_sizes)
    return StepWork(flops * times, traffic * times + update, cycles, fast_flops=flops * times)


def _values_bytes(job: Job) -> int:
    """What all graphs of a micro-batch allocate, one after the other."""
    model = job.decoder
    walk = Walk(model, job.batch_size, job.max_seq_length, job.supervised)
    tiles = len(list(row_tiles((model.vocab_size, model.hidden_size), HEAD_TILE_WEIGHTS)))
    assert isinstance(job.adapter, LoraConfig), "check_engine refuses the others"
    ranks = dict.fromkeys((slot.place.split(".", 3)[3] for slot in job.slots), job.adapter.rank)
    calls = {
        walk.start(): 1, walk.forward({}): job.first_block, walk.forward(ranks): job.path_layers,
        walk.tile(gradient=True): tiles, walk.head_end(): 1, walk.backward(ranks): job.path_layers,
    }  # fmt: skip
    return sum(times * arena.taken_bytes for arena, times in calls.items())
