"""What a step of the `ort` engine costs: every byte of its peak by part.

The parts have the names of the torch engine's (`costs`) where they are the same thing. What outlives a call of a graph
lies in `personalizer.graphs.Buffers`, whose sizes follow from the shapes: `block_inputs`, `gradients`, `context` (masks
and rotary tables), and in `data` the sums of a loss. What a call allocates lies in one arena that never shrinks and is
empty between calls, so its size is that of the largest graph; `ort_walk` gives it, and what of it is in use where it
grows for the last time: `dequantized`, `block_workspace` and `logits`. The rest of it is `arena`, held and not in use.
The peak is reached in the first step.

    reading    before the sessions are made: the tokenizer is loaded, and the rows are made
    comparing  the adapter that the bundle uses is evaluated on the held-out rows, before the first step
    backward   a step
    adopting   what was trained is put into the bundle, probed on short rows with fresh graphs

The base is mapped and fed as it lies there: it counts as `file_backed_bytes`. All arrays are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.slot import Slot
from edgetune.memory import MIB
from edgetune.models.config import DecoderConfig
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner.arena import HANDLE_SHARE
from edgetune.planner.costs import LEFT_BYTES_PER_BYTE, TOKENIZER_BYTES_PER_BYTE, row_bytes
from edgetune.planner.job import FLOAT_BYTES, Job
from edgetune.planner.ort_walk import INT64_BYTES, PARTS, Walk

# The arena's range beyond what is predicted, so that it stays one, and its end the largest free piece: were that no
# larger than a piece further down, it would be taken first (4.7 MiB of 81 for Qwen's shape with 5 %).
SPARE_SHARE, SPARE_BYTES = 0.25, MIB
# Sessions of the graphs and their first calls; a block's weights as arrays, with their names. Measured.
SESSION_BYTES, BLOCK_OBJECT_BYTES = int(2.5 * MIB), 100_000
KEPT_SESSION_BYTES = 2 * MIB  # the same of the two graphs for blocks that keep their activations. Measured.
# A tensor of the adapter with gradient and moments, as arrays with their names, rounded to pages. Measured.
TENSOR_OBJECT_BYTES = 4_500
# Of three copies of the adapter so much is held at once when it is adopted, and this for the ranges of the head that
# the logits of probe rows are computed from. Measured.
ADOPTED_SHARE, PROBE_BYTES = 0.87, 4 * MIB
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that a bundle holds as one


def peak_parts(job: Job, floor_bytes: int) -> tuple[str, dict[str, int]]:
    """The moment of the peak, and its bytes by part; they add up to the peak."""
    tensors = job.tensor_sizes
    adapter = FLOAT_BYTES * sum(tensors) + TENSOR_OBJECT_BYTES * len(tensors)
    rows = row_bytes(job) + int(LEFT_BYTES_PER_BYTE * job.tokenizer_file_bytes)
    sessions = SESSION_BYTES + (KEPT_SESSION_BYTES if kept_bytes(job) else 0)
    shared = {
        "floor": floor_bytes, "sessions": sessions, "base": BLOCK_OBJECT_BYTES * job.model.num_hidden_layers,
        "adapter": adapter, "optimizer": OPTIMIZERS[job.optimizer].state_bytes(tensors), "context": context_bytes(job),
    }  # fmt: skip
    training = {
        "optimizer": shared["optimizer"] + update_bytes(job), "block_inputs": input_bytes(job, trains=True),
        "kept_activations": kept_bytes(job),
        "gradients": gradient_bytes(job), "data": rows + batch_bytes(job, trains=True), **arena_parts(job, trains=True),
    }  # fmt: skip
    comparing = {
        "active_adapter": job.active_adapter_bytes, "block_inputs": input_bytes(job, trains=False),
        "data": rows + batch_bytes(job, trains=False), **arena_parts(job, trains=False),
    }  # fmt: skip
    adopted = int(ADOPTED_SHARE * (2 * FLOAT_BYTES * sum(tensors) + stacked_bytes(job)))
    adopting = {"adapter": adopted, "optimizer": 0, "context": 0, "data": rows + PROBE_BYTES}
    moments = {
        "reading": {"floor": floor_bytes, "data": row_bytes(job) + TOKENIZER_BYTES_PER_BYTE * job.tokenizer_file_bytes},
        "comparing": shared | comparing,
        "backward": shared | training,
        "adopting": shared | adopting | arena_parts(job, trains=True),
    }
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    names = dict.fromkeys(name for moment in moments.values() for name in moment)
    return peak, {name: moments[peak].get(name, 0) for name in names}


def stacked_bytes(job: Job) -> int:
    """The adapter as a bundle holds it: A of linears that are one side by side, their B along the diagonal."""
    total, r = 0, _rank(job)
    for slots in _by_group(job.slots).values():
        rank = r * len(slots)
        total += FLOAT_BYTES * rank * (slots[0].in_features + sum(slot.out_features for slot in slots))
    return total


def _by_group(slots: Iterable[Slot]) -> dict[str, list[Slot]]:
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        module, _, linear = slot.place.rpartition(".")
        group = next((names[0] for names in GROUPS if linear in names), linear)
        found.setdefault(f"{module}.{group}", []).append(slot)
    return found


def _rank(job: Job) -> int:
    """Of the adapter's LoRA form: the one that training graphs know."""
    assert isinstance(job.adapter, LoraConfig), "check_engine refuses the others"
    return job.adapter.rank


def batch_bytes(job: Job, *, trains: bool) -> int:
    """A step's windows as four int64 arrays, and of the labelled rows the hidden states and the sums of their loss.

    Sums are written by turns into two places; with gradients there is a sum of rows of the head among them.
    """
    rows = job.model.hidden_size * (3 if trains else 1)
    sums = job.supervised * (INT64_BYTES + FLOAT_BYTES * (2 * 3 + rows))
    return 4 * INT64_BYTES * job.tokens * (job.gradient_accumulation_steps if trains else 1) + sums


def context_bytes(job: Job) -> int:
    """Masks and rotary tables of each kind of attention."""
    per_kind = job.max_seq_length + 2 * (job.model.head_dim // 2)
    return FLOAT_BYTES * job.tokens * per_kind * len(job.decoder.attention_kinds)


def input_bytes(job: Job, *, trains: bool) -> int:
    """Of blocks on the gradient's path all inputs, the last output and a gradient; two by turns below the path."""
    path = job.path_layers + 1 if trains else 0
    count = path + 1 + min(2, job.model.num_hidden_layers - job.path_layers if trains else 2)
    return FLOAT_BYTES * job.tokens * job.model.hidden_size * count


def kept_bytes(job: Job) -> int:
    """What blocks that do not run again keep for their backward."""
    width = sum(job.decoder.kept_widths.values())
    return FLOAT_BYTES * job.tokens * width * (job.path_layers - job.recompute_layers)


def gradient_bytes(job: Job) -> int:
    """One for each tensor; where they are summed over micro-batches, those of one block more."""
    blocks = {slot.place.split(".", 3)[2] for slot in job.slots}  # all alike
    gradients = FLOAT_BYTES * sum(job.tensor_sizes)
    return gradients + (gradients // len(blocks) if job.gradient_accumulation_steps > 1 else 0)


def update_bytes(job: Job) -> int:
    """What the optimizer's graph makes of the largest tensor and its moments, before that takes their place."""
    return FLOAT_BYTES * max(job.tensor_sizes) * (1 + len(OPTIMIZERS[job.optimizer].rule.MOMENTS))


def arena_parts(job: Job, *, trains: bool) -> dict[str, int]:
    """What of the arena is in use by part where it grows last, and the rest of it; in an evaluation, or in a step."""
    touched, live = _touched(job, trains=trains)
    return {part: live.get(part, 0) for part in PARTS} | {
        "arena": touched - sum(live.values()) + reserved_bytes(touched) // HANDLE_SHARE
    }


def arena_bytes(job: Job) -> int:
    """The range that the arena takes: what a step is expected to touch, and more."""
    return reserved_bytes(_touched(job, trains=True)[0])


def _touched(job: Job, *, trains: bool) -> tuple[int, Mapping[str, int]]:
    """See `_arena`."""
    blocks = {
        tuple((slot.place.split(".", 3)[3], _rank(job)) for slot in job.slots if slot.place.startswith(block))
        for block in (f"{job.model.block(index)}." for index in range(job.model.num_hidden_layers))
    }
    return _arena(job.model, job.batch_size, job.max_seq_length, job.supervised, tuple(sorted(blocks)), trains)


def reserved_bytes(touched_bytes: int) -> int:
    """The range of which so much is expected to be touched."""
    return int((1 + SPARE_SHARE) * touched_bytes) + SPARE_BYTES


@lru_cache(maxsize=256)
def _arena(
    model: DecoderConfig, batch: int, length: int, supervised: int, blocks: tuple[tuple[tuple[str, int], ...], ...],
    trains: bool,
) -> tuple[int, Mapping[str, int]]:  # fmt: skip
    """Bytes of the arena that are touched, and those in use by part when that grew last."""
    walk = Walk(model, batch, length, supervised)
    calls = [walk.start(), walk.head_start(), walk.tile(gradient=trains)]
    calls += [walk.forward(dict(ranks)) for ranks in blocks]
    if trains:
        calls += [walk.head_end(), *(walk.backward(dict(ranks)) for ranks in blocks)]
    largest = max(calls, key=lambda arena: arena.touched_bytes)
    return largest.touched_bytes, largest.at_growth
