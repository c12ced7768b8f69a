"""What a step of the torch engine takes: operations, traffic and calls, and the roofline that makes seconds of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from edgetune.device import DeviceProfile
from edgetune.models.encoder_config import EncoderConfig
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner.costs import activation_bytes
from edgetune.planner.job import FLOAT_BYTES, TILE_QUERIES, Job
from edgetune.products import are_offered

# What is counted beside the products, per unit of the name. These and the measured speeds decide how long a
# step is predicted to take: tune them with benchmarks/step_time.py, and with the samples of `doctor --calibrate`.
DECODE_BYTES = 0.5625 + 2 * FLOAT_BYTES  # per weight and visit: codes and scales are read, a float32 written and read
ACTIVATION_PASSES = 4  # an activation is written and read by its own operator, and again by that which takes it
SCORE_PASSES = 4  # the scores of attention: written by one product, read and written by softmax, read by the other
ATTENTION_BACKWARD = 2.5  # attention's backward over its forward: five products instead of two
SLOWER_PRODUCTS = 2.2  # times as long as fast ones: 205 against 450 GFLOP/s
# Cycles that go into calling operators, whatever their size: those of a block, forward (backward it is twice as many),
# and the optimizer's for one tensor. On x86-64: steps of 64 to 256 tokens of the sample, drawn to no tokens, are 9 ms.
BLOCK_CYCLES, TENSOR_CYCLES = 1_200_000, 90_000


@dataclass(frozen=True)
class StepWork:
    """One optimizer step: floating point operations, bytes that move beside them, and cycles of calling operators."""

    flops: float
    traffic_bytes: float
    dispatch_cycles: float
    fast_flops: float = 0.0
    """Of the operations, those of fast products."""

    def seconds(self, profile: DeviceProfile) -> float:
        """A roofline whose sides do not overlap: weights are decoded between the products, not during them.

        A host that has fast products was measured with them: others take longer there.
        """
        compute = profile.compute
        flops = self.flops
        if profile.kind == "host" and are_offered():
            flops += (SLOWER_PRODUCTS - 1) * (flops - self.fast_flops)
        return (
            flops / (compute.gflops_fp32_sustained * 1e9)
            + self.traffic_bytes / (compute.mem_bw_mb_s * 1e6)
            + self.dispatch_cycles / profile.cpu.clock_hz
        )


def step_work(job: Job) -> StepWork:
    """Operations, traffic and calls of one optimizer step.

    A weight costs 2 operations per token in each visit: forward, again where the block is computed again, and for the
    gradient of the block's input. The lowest adapted block asks for that gradient only above its first adapter; it is
    counted whole. Every visit decodes the weight, where it does not stay dequantized: its codes are read, its float32
    values written and read back. Without gradients a step is two forward passes, beside the blocks it is one.
    """
    model = job.model
    if job.goes_through_blocks:
        losses, again, backward = 1, job.repeated_layers, job.path_layers
    elif job.has_gradients:
        losses, again, backward = 1, 0, 0
    else:
        losses, again, backward = 2, 0, 0
    forward = losses * job.path_layers + again
    visits = forward + backward  # passes over one block's weights
    weights, (attention, scores) = job.block_weights, _attention(job)
    attended = job.tokens * (forward + ATTENTION_BACKWARD * backward)
    flops = job.tokens * 2.0 * weights * visits + attended * attention
    head = 0 if isinstance(model, EncoderConfig) or job.scores else model.vocab_size * model.hidden_size
    flops += 4.0 * head * job.loss_rows  # of one loss and its gradient, or of two losses
    fast = job.tokens * 2.0 * weights * visits + 4.0 * head * job.loss_rows if job.fast_products else 0.0
    decoded = weights * visits + head * losses
    activations = ACTIVATION_PASSES * activation_bytes(job) * (forward + 2 * backward) + attended * scores
    # Visits that only read; such blocks never run again.
    held: float = weights * job.dequantized_layers * (losses + (1 if backward else 0))
    held += job.thawed * visits / max(1, job.path_layers)
    traffic = (decoded - held) * DECODE_BYTES + held * FLOAT_BYTES + activations
    below = lower_work(job, 0 if job.cached_windows else losses * job.batch_size)
    adapter = _adapter_work(job, forward / max(1, job.path_layers))
    flops += adapter.flops + below.flops
    traffic += adapter.traffic_bytes + below.traffic_bytes
    cycles = BLOCK_CYCLES * (forward + 2 * backward) + below.dispatch_cycles
    times = job.micro_batches
    # An update reads and writes parameters and moments, and reads gradients; that of mezo, and its two shifts, draw
    # numbers in the parameters' place and add them to the copy, which is made before and given back after.
    update = (3.0 if job.has_gradients else 16.0) * FLOAT_BYTES * sum(job.tensor_sizes)
    update += 2 * OPTIMIZERS[job.optimizer].state_bytes(job.tensor_sizes)
    fast += below.fast_flops
    cycles = cycles * times + TENSOR_CYCLES * len(job.tensor_sizes)
    anchor = _anchor_work(job)
    return StepWork(
        flops * times + anchor.flops,
        traffic * times + update + anchor.traffic_bytes,
        cycles + anchor.dispatch_cycles,
        fast * times,
    )


def _anchor_work(job: Job) -> StepWork:
    """What holding to the base takes beside a micro-batch like the others: the base's forward, both products of its
    logits, and what the head's rows of its own positions are more or fewer.
    """
    if not job.anchored:
        return StepWork(0, 0, 0)
    forward = reference_work(replace(job, supervised_per_window=0), job.batch_size)
    head = job.model.vocab_size * job.model.hidden_size
    return replace(forward, flops=forward.flops + head * (8.0 * job.anchored - 4.0 * job.loss_rows))


def _adapter_work(job: Job, forward: float) -> StepWork:
    """An adapter's products in one micro-batch, which are too thin to hide what they read and write.

    Forward, that many times, they read x and add (xA)B to y; backward they read x and the gradient of y twice, and add
    to the gradient of x.
    """
    inputs, outputs = (sum(slot.in_features for slot in job.slots), sum(slot.out_features for slot in job.slots))
    if job.adapter.own:  # the gradients alone: of vectors sums, of norms' after they are scaled by the input
        tokens = job.tokens if job.has_gradients else 0
        moved = tokens * (2 * inputs + outputs) + (2 * job.thawed if job.has_gradients else 0)
        return StepWork(tokens * (inputs + outputs + 2.0 * job.thawed), FLOAT_BYTES * moved, 0)
    multiplied = sum(slot.num_parameters for slot in job.slots if slot.in_features)  # virtual tokens are copied
    flops = 2.0 * multiplied * (forward + (2 if job.has_gradients else 0))
    if job.has_gradients:  # the frozen product again, for the gradient of its factors
        flops += 2.0 * sum(slot.in_features * slot.out_features for slot in job.slots if slot.scales_output)
    floats = forward * (inputs + 2 * outputs) + (3 * inputs + 2 * outputs if job.has_gradients else 0)
    return StepWork(job.changed * flops, job.changed * FLOAT_BYTES * floats, 0)


def lower_work(job: Job, num_windows: int) -> StepWork:
    """The blocks below the lowest adapter, forward over so many windows, one at a time: each decodes the weights."""
    weights, (attention, scores) = job.block_weights, _attention(job)
    length = job.positions / job.batch_size or job.max_seq_length
    flops = length * (2.0 * weights + attention)
    traffic = weights * DECODE_BYTES + ACTIVATION_PASSES * activation_bytes(replace(job, batch_size=1))
    traffic += length * scores
    times = job.first_block * num_windows
    fast = flops if job.fast_products and job.batch_size == 1 else 0.0
    return StepWork(flops * times, traffic * times, BLOCK_CYCLES * times, fast * times)


def reference_work(job: Job, num_windows: int) -> StepWork:
    """The whole model once forward over so many windows, in micro-batches, each of which decodes the weights."""
    weights, (attention, scores) = job.block_weights, _attention(job)
    head, layers = job.model.vocab_size * job.model.hidden_size, job.model.num_hidden_layers
    flops = job.tokens * (2.0 * weights + attention) * layers + 2.0 * head * job.supervised
    traffic = (weights * layers + head) * DECODE_BYTES
    traffic += layers * (ACTIVATION_PASSES * activation_bytes(job) + job.tokens * scores)
    times = math.ceil(num_windows / job.batch_size)
    return StepWork(flops * times, traffic * times, BLOCK_CYCLES * layers * times)


def _attention(job: Job) -> tuple[float, float]:
    """Operations of a block's attention per token, scores and values, and the traffic of the scores.

    Attention goes through tiles of queries, and leaves out the keys that come after the whole tile.
    """
    model = job.model
    keys = (job.max_seq_length + min(TILE_QUERIES, job.max_seq_length)) / 2
    operations = 4 * keys * model.num_attention_heads * model.head_dim
    return operations, SCORE_PASSES * FLOAT_BYTES * keys * model.num_attention_heads
