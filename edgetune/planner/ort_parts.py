"""What a step of the `ort` engine costs: every byte of its peak by part.

The parts have the names of the torch engine's (`costs`) where they are the same thing. What graphs allocate lies in one
arena that never shrinks in a run, so the peak is reached in the first step; `ort_walk` gives the arena's size, and what
of it is in use where it grows for the last time. Those are the parts `block_inputs`, `gradients`, `dequantized`,
`block_workspace`, `logits` and `context`; the rest of it is `arena`: held, in pieces, and not in use then.

    reading    before the sessions are made: the tokenizer is loaded, and the rows are made
    comparing  the adapter that the bundle uses is evaluated on the held-out rows, before the first step
    backward   a step
    adopting   what was trained is put into the bundle, probed on short rows with fresh graphs

The base is mapped and fed as it lies there: it counts as `file_backed_bytes`. All arrays are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

from edgetune.adapters.lora import LoraConfig
from edgetune.adapters.slot import Slot
from edgetune.memory import MIB
from edgetune.models.config import DecoderConfig
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner.arena import Piece
from edgetune.planner.costs import (
    FLOAT_BYTES,
    LEFT_BYTES_PER_BYTE,
    TOKENIZER_BYTES_PER_BYTE,
    Job,
    row_bytes,
)
from edgetune.planner.ort_walk import HEAD_TILE_WEIGHTS, PARTS, Ranks, Walk

# Sessions of the graphs and their first calls; a block's weights as arrays, with their names. Measured.
SESSION_BYTES, BLOCK_OBJECT_BYTES = int(2.5 * MIB), 100_000
# A tensor of the adapter with gradient and moments, as arrays with their names, rounded to pages. Measured.
TENSOR_OBJECT_BYTES = 4_500
# Rows of a bundle's probe are this long; its logits are computed for one range of the head, with and without adapter,
# each beside what decoding leaves. Of three copies of the adapter so much is held at once, with fewer sessions. All
# measured.
PROBE_TOKENS, PROBE_TILES, ADOPTED_SHARE, ADOPTING_SESSION_BYTES = 64, 3, 0.87, int(1.5 * MIB)
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # linears that a bundle holds as one


def peak_parts(job: Job, floor_bytes: int) -> tuple[str, dict[str, int]]:
    """The moment of the peak, and its bytes by part; they add up to the peak."""
    tensors = job.tensor_sizes
    adapter = FLOAT_BYTES * sum(tensors) + TENSOR_OBJECT_BYTES * len(tensors)
    rows = row_bytes(job) + int(LEFT_BYTES_PER_BYTE * job.tokenizer_file_bytes)
    shared = {
        "floor": floor_bytes, "sessions": SESSION_BYTES, "base": BLOCK_OBJECT_BYTES * job.model.num_hidden_layers,
        "adapter": adapter, "optimizer": OPTIMIZERS[job.optimizer].state_bytes(tensors),
        "data": rows + batch_bytes(job),
    }  # fmt: skip
    moments = {
        "reading": {"floor": floor_bytes, "data": row_bytes(job) + TOKENIZER_BYTES_PER_BYTE * job.tokenizer_file_bytes},
        "comparing": shared | {"active_adapter": job.active_adapter_bytes} | _arena_parts(job, trains=False),
        "backward": shared | _arena_parts(job, trains=True),
        "adopting": shared
        | {"adapter": int(ADOPTED_SHARE * (2 * FLOAT_BYTES * sum(tensors) + stacked_bytes(job))), "optimizer": 0}
        | {"data": rows, "sessions": ADOPTING_SESSION_BYTES}
        | _arena_parts(
            replace(job, batch_size=1, max_seq_length=PROBE_TOKENS, supervised_per_window=1), trains=False, losses=False
        )
        | {"logits": PROBE_TILES * FLOAT_BYTES * min(HEAD_TILE_WEIGHTS, job.model.vocab_size * job.model.hidden_size)},
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


def batch_bytes(job: Job) -> int:
    """A step's windows as four int64 arrays, and the first sums of a loss: of its hidden states, and three numbers."""
    sums = FLOAT_BYTES * job.supervised * (job.model.hidden_size + 3)
    return 4 * 8 * job.tokens * job.gradient_accumulation_steps + sums


def _arena_parts(job: Job, *, trains: bool, losses: bool = True) -> dict[str, int]:
    """What of the arena is in use by part where it grows last, and the rest of it; after an evaluation, or a step."""
    ranks = tuple(
        tuple((slot.place.split(".", 3)[3], _rank(job)) for slot in job.slots if slot.place.startswith(block))
        for block in (f"{job.model.block(index)}." for index in range(job.model.num_hidden_layers))
    )
    micro_batches = min(2, job.gradient_accumulation_steps) if trains else 0
    held, live = _arena(
        job.model,
        job.batch_size,
        job.max_seq_length,
        job.supervised if losses else 0,
        ranks,
        job.first_block,
        micro_batches,
    )
    # A step's first sums of the loss lie beside the arena, and what numpy rounds to pages.
    beside = FLOAT_BYTES * job.tokens * job.model.hidden_size if trains else 0
    return {part: live.get(part, 0) for part in PARTS} | {"arena": held + beside - sum(live.values())}


@lru_cache(maxsize=256)
def _arena(
    model: DecoderConfig, batch: int, length: int, supervised: int, ranks: tuple[tuple[tuple[str, int], ...], ...],
    first_block: int, micro_batches: int,
) -> tuple[int, Mapping[str, int]]:  # fmt: skip
    """Bytes that the arena holds, and those in use by part when it grew last."""
    by_block: list[Ranks] = [dict(block) for block in ranks]
    walks = [Walk(model, batch, length, supervised, by_block, first_block) for _ in range(2)]
    walks[0].evaluation()  # the other begins with a step: pieces lie otherwise then, and a run may come out as either
    for walk in walks:
        gradients: dict[int, list[Piece]] = {}
        for _ in range(micro_batches):
            walk.training(gradients)
    largest = max((walk.arena for walk in walks), key=lambda arena: arena.total_bytes)
    return largest.total_bytes, largest.at_growth
