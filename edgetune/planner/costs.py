"""What a training step costs in memory: every byte of its peak by part.

Whatever a step needs lies in named buffers that exist from the first step on (`training.blocks`); `buffers` lists them
with their sizes, and a test holds that list against the trainer's own. The peak is at one of two moments:

    reading    before the model is loaded: the tokenizer is, and the rows are made
    backward   beside the buffers the gradients of the adapter, and masks where there is dropout
    forward    in its place where the step rule is mezo: a second copy of the adapter, and neither gradients nor moments

The larger one is the peak, and the parts are those of that moment, so they add up. Mapped codes are file-backed: they
count as `file_backed_bytes`, not here. All arrays are float32 unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from edgetune.adapters.slot import FACTOR_COLUMNS
from edgetune.base import AnyBase
from edgetune.grids import GRIDS, LOOKUP_ROWS, PIECE_CODES, tile_rows
from edgetune.models import ModelConfig
from edgetune.models.config import DecoderConfig
from edgetune.models.encoder_config import EncoderConfig
from edgetune.objectives import distill, kl, sft
from edgetune.optimizers import OPTIMIZERS
from edgetune.planner.job import FLOAT_BYTES, INDEX_BYTES, TILE_QUERIES, Job
from edgetune.products import CODE_BYTES

# Python and torch objects of a frozen linear with its mapped arrays, and of an adapted one; measured on 210 of each.
LINEAR_OBJECT_BYTES = 4400
SLOT_OBJECT_BYTES = 5200
# MKL packs a panel of each weight before it multiplies: so many of its inner dimension, half a panel for each of two
# threads, and a little beside it. Measured on AVX-512 with 32 to 1,820 rows of 576 to 8,192 columns.
PANEL, PACK_BYTES = 384, 1 << 17
# These set the gradient of their input, others add to it.
FIRST_BACKWARD = ("q_proj", "o_proj", "gate_proj", "down_proj")
# A row of data as Python and numpy objects, beyond its tokens; measured.
ROW_OBJECT_BYTES = 700
# A window whose features are cached: its name and its place in a file, as Python objects; 520 measured.
FEATURE_OBJECT_BYTES = 600
TEACHER_OBJECT_BYTES = 350  # a row's views of what a teacher recorded; measured
SEQUENCE_BYTES = 17  # two int64 and a boolean
FREE_SHARE = 0.5  # of free storage that the cache may take: base, checkpoints and bundle lie there too
# A tokenizer in memory per byte of its tokenizer.json: 11 in a fresh heap, 15 where the plan was made in this process
# and had loaded it before. What reading rows leaves behind even so (memory.give_back): 3 MiB, and 0.7 per byte of the
# file. Measured with byte-level BPE of 2,048, 49,152 and 151,936 tokens.
TOKENIZER_BYTES_PER_BYTE, LEFT_BYTES_PER_BYTE, LEFT_BYTES = 15, 0.7, 3 << 20


def peak_parts(job: Job, floor_bytes: int) -> tuple[str, dict[str, int]]:
    """The moment of the peak, and its bytes by part; they add up to the peak."""
    shared = _shared(job, floor_bytes)
    reading = dict.fromkeys(shared, 0) | {
        "floor": floor_bytes,
        "data": row_bytes(job) + LEFT_BYTES + TOKENIZER_BYTES_PER_BYTE * job.tokenizer_file_bytes,
    }
    moments = {"reading": reading, "backward" if job.has_gradients else "forward": _at_step(job)}
    totals = {name: sum((shared | parts).values()) for name, parts in moments.items()}
    peak = max(totals, key=totals.__getitem__)
    return peak, shared | moments[peak]


def stored_bytes(base: AnyBase[Any], grid: str) -> int:
    """Bytes of the base on this grid: mapped, and in the page cache while it is used."""
    if base.grid == grid:
        return sum(info.nbytes for info in base.weights.values())
    matrices = base.config.matrices().values()
    return sum(int(GRIDS[grid].nbytes(shape)) for shape in matrices) + _vector_bytes(base.config)


def copied_bytes(base: AnyBase[Any]) -> int:
    """Anonymous bytes that loading takes for the quantized absmax of nf4's double quantization, widened to float32."""
    nested = [name for name in base.weights if name.endswith(".nested_absmax")]
    absmax = (base.weights[name.removesuffix(".nested_absmax") + ".absmax"] for name in nested)
    return sum(FLOAT_BYTES * math.prod(info.shape) for info in absmax)


def _vector_bytes(model: ModelConfig) -> int:
    return FLOAT_BYTES * sum(math.prod(shape) for shape in model.vectors().values())


def _shared(job: Job, floor_bytes: int) -> dict[str, int]:
    """Parts that hardly change during a step."""
    trained, optimizer = job.tensor_sizes, OPTIMIZERS[job.optimizer]
    sizes = buffers(job)
    inputs, slots_, work = (
        sum(size for name, size in sizes.items() if name.partition(".")[0] in prefixes)
        for prefixes in (("input",), ("slot",), {name.partition(".")[0] for name in sizes} - {"input", "slot"})
    )
    one_slot = activation_bytes(job)
    kinds = job.model.attention_kinds if isinstance(job.model, DecoderConfig) else ()
    num_masks = len({kind.window_within(job.max_seq_length) for kind in kinds})
    num_rotary = sum(kind.rope_theta is not None for kind in kinds)
    head_dim = job.model.head_dim
    return {
        "floor": floor_bytes,
        "dequantized": FLOAT_BYTES * job.block_weights * job.dequantized_layers,
        "base": _vector_bytes(job.model) + job.base_copy_bytes + LINEAR_OBJECT_BYTES * len(job.model.matrices()),
        "adapter": _adapter_bytes(job),
        "gradients": 0,
        "optimizer": optimizer.state_bytes(trained) + optimizer.scratch_bytes(trained),
        "data": data_bytes(job),
        "kernels": pack_bytes(job) + code_bytes(job),
        # What blocks share: the attention masks, the rotary tables of every position, and where virtual tokens stand:
        # one number for each position, and two for each of theirs, which are most of them where rows are short.
        "context": FLOAT_BYTES * job.tokens * (num_masks * job.max_seq_length + num_rotary * head_dim)
        + (INDEX_BYTES * 3 * job.tokens if job.adapter.virtual_tokens else 0)
        # The prompts of the rows and three masks of positions, and the rows that are changed.
        + ((INDEX_BYTES + 3) * job.tokens + INDEX_BYTES * job.changed if job.adapter.prompt_positions else 0),
        "block_inputs": inputs,
        "kept_activations": slots_ - one_slot,
        "block_workspace": work + one_slot,
        # Their tiles lie in the workspace; left are a few numbers for each supervised position.
        "logits": FLOAT_BYTES * (8 * max(job.loss_rows, 2 * job.anchored) + job.head_floats) + sequence_bytes(job),
    }


def _adapter_bytes(job: Job) -> int:
    """What is trained, mezo's copy of that, what a method keeps beside it, and its objects.

    The model's own vectors lie in the base's bytes; where the base also runs alone, it then has others. Of matrices the
    base has none in memory.
    """
    slots = job.slots
    floats = sum(job.tensor_sizes) * (1 if job.has_gradients else 2) + sum(slot.kept_floats for slot in slots)
    if job.adapter.own and not job.anchored:
        floats -= sum(slot.num_parameters for slot in slots) - job.thawed
    return FLOAT_BYTES * floats + SLOT_OBJECT_BYTES * len(slots)


def sequence_bytes(job: Job) -> int:
    """What a loss of whole sequences makes in numpy of a micro-batch: the sequence of every position, and what is
    gathered by sequence of the supervised ones.
    """
    if isinstance(job.model, EncoderConfig) or job.objective in ("sft", "distill"):
        return 0
    return SEQUENCE_BYTES * (job.tokens + 2 * job.loss_rows)


def pack_bytes(job: Job) -> int:
    """What products with frozen weights pack and keep: a buffer is used again by whatever needs no larger one."""
    forward, backward = _panel_floats(job)
    return job.threads * (PACK_BYTES + FLOAT_BYTES * (forward + (backward if backward > forward else 0)) // 2)


def _panel_floats(job: Job) -> tuple[int, int]:
    """The largest panel of a forward product, and of a backward one."""
    tiles = [(tile_rows((n, k), job.tile_weights), k) for n, k in multiplied(job)]
    forward = max(n * min(k, PANEL) for n, k in tiles)
    if not job.goes_through_blocks:
        size = job.model.vocab_size, job.model.hidden_size
        tiles = [(tile_rows(size, job.tile_weights), size[1])] if job.has_gradients and not job.scores else []
    return forward, max((min(n, PANEL) * k for n, k in tiles), default=0)


def code_bytes(job: Job) -> int:
    """What fast products keep: code for each shape."""
    return CODE_BYTES * num_fast_products(job) if job.fast_products else 0


def spare_bytes(job: Job) -> int:
    """What products keep more where a crew comes down to fewer threads, as it does beside other programs.

    Code for each number of them once more. One thread in the place of two packs into a buffer of its own; four and
    eight, coming down to one, took no more than is counted for as many (measured).
    """
    if not job.may_come_down:
        return 0
    packed = PACK_BYTES + FLOAT_BYTES * max(_panel_floats(job)) // 2 if job.threads == 2 else 0
    return packed + code_bytes(job) * (job.threads.bit_length() - 1)


def num_fast_products(job: Job) -> int:
    """Their shapes, and the one that torch was tried with."""
    shapes: set[tuple[object, ...]] = {("tried",)}

    def add(rows: int, size: tuple[int, int], first: str, others: str) -> None:
        tile = tile_rows(size, job.tile_weights)
        for start in range(0, size[0], tile):
            shapes.add((rows, size, others if start else first, min(tile, size[0] - start)))

    for path, size in job.model.linear_shapes.items():
        add(job.tokens, size, "forward", "forward")
        if job.goes_through_blocks:
            add(job.tokens, size, "set" if path.rpartition(".")[2] in FIRST_BACKWARD else "added", "added")
    if job.scores:
        return len(shapes)
    head, rows = (job.model.vocab_size, job.model.hidden_size), min(sft.TILE_TOKENS, job.loss_rows)
    add(rows, head, "forward", "forward")
    if job.has_gradients:
        add(rows, head, "added", "added")
    return len(shapes)


def multiplied(job: Job) -> list[tuple[int, int]]:
    """Shapes of the frozen matrices that take part in products: of words only rows are read, where a trained head or
    none stands behind the blocks.
    """
    without_head = isinstance(job.model, EncoderConfig) or job.scores
    return list((job.model.linears() if without_head else job.model.matrices()).values())


def data_bytes(job: Job) -> int:
    """Rows as int32 ids and labels, the windows of a step as four int64 arrays, and what reading leaves behind."""
    step = 4 * 8 * job.tokens * job.micro_batches
    step += 12 * job.supervised * job.taught * job.gradient_accumulation_steps  # int64 ids, float32 values
    cached = FEATURE_OBJECT_BYTES * job.cached_windows
    return row_bytes(job) + step + cached + LEFT_BYTES + int(LEFT_BYTES_PER_BYTE * job.tokenizer_file_bytes)


def row_bytes(job: Job) -> int:
    views = TEACHER_OBJECT_BYTES if job.taught else 0
    return 2 * 4 * job.num_tokens + (ROW_OBJECT_BYTES + views) * job.num_rows


def buffers(job: Job) -> dict[str, int]:
    """Name -> bytes of every buffer that the trainer's workspace holds for this job."""
    if isinstance(job.model, EncoderConfig):
        return _encoder_buffers(job, job.model)
    model, positions = job.model, job.tokens
    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    queries = min(TILE_QUERIES, job.max_seq_length)
    # Scores of a tile reach back to the first position; the last tile may have fewer queries.
    scores = max(
        (min(start + queries, job.max_seq_length) - start) * min(start + queries, job.max_seq_length)
        for start in range(0, job.max_seq_length, queries)
    )
    rotates = any(model.attention_kinds[kind].rope_theta is not None for kind in model.layer_kinds[job.first_block :])
    tile_positions = max(min(sft.TILE_TOKENS, job.loss_rows), 3 * min(kl.TILE_TOKENS, job.anchored))
    logits = 0 if job.scores else tile_positions * tile_rows((model.vocab_size, hidden), job.tile_weights)
    products = multiplied(job)
    floats = {
        "weight": max(tile_rows((n, k), job.tile_weights) * k for n, k in products),
        "h": positions * hidden,
        "d_h": job.supervised * hidden,  # the supervised rows, where those are not all
        "inner": max(positions * inner, logits),
        "rotated": (positions if rotates else job.max_seq_length) * q // 2,  # else below the path, window by window
        "attention.q": queries * q,
        "attention.scores": model.num_attention_heads * scores,
    }
    if job.taught:  # the rows of the head of a few positions: their targets', and those that the teacher names
        floats["picked"] = min(distill.PIECE, job.supervised) * (job.taught + 1) * hidden
    if job.has_gradients:
        floats |= {
            "d": max(positions, job.loss_rows, job.anchored) * hidden,
            "d_h": max(job.loss_rows, job.anchored) * hidden,
        }
        if job.anchored:  # what the head gets from the base, and its mean row
            floats |= {"kl.base": job.anchored * hidden, "kl.mean": job.anchored * hidden}
    elif job.first_block:
        floats["d"] = job.max_seq_length * hidden  # the lower blocks' second buffer
    if job.goes_through_blocks:
        floats |= {
            "d_h": max(positions, job.loss_rows, job.anchored) * hidden,
            "inner": max(positions * max(inner, q), logits),
            "d_inner": positions * (max(inner, q) if model.qk_norm else inner),
            "d_q": positions * q,
            "d_k": positions * kv,
            "d_v": positions * kv,
            "attention.d_o": queries * q,
            "attention.d_scores": model.num_attention_heads * scores,
        }
    block = GRIDS[job.grid].BLOCK
    whole = [tile_rows((n, k), job.tile_weights) * k for n, k in products if k % block == 0]
    if job.scores and hidden % block == 0:  # rows of the embedding, some at a time
        whole.append(min(LOOKUP_ROWS, positions) * hidden)
    if whole:
        codes = min(PIECE_CODES, max(whole) // 2)
        floats |= {"codes": codes, "scales": 2 * codes // block}
    inputs = [slot.in_features for slot in job.slots if slot.scales_input]
    scaled = [slot for slot in job.slots if slot.scales_output] if job.has_gradients else []
    if inputs:
        floats["adapter.x"] = positions * max(inputs)
    if scaled:
        columns = (tile_rows((slot.out_features, slot.in_features), job.tile_weights) for slot in scaled)
        floats["adapter.d_y"] = positions * max(slot.out_features for slot in scaled)
        floats["adapter.y"] = positions * min(FACTOR_COLUMNS, max(columns))
    by_turns = job.activation_offloading or not job.goes_through_blocks
    floats |= {f"input.{index}": positions * hidden for index in range(2 if by_turns else job.path_layers + 1)}
    widths = {"q": q, "k": kv, "v": kv, "o": q, "x2": hidden, "gate": inner, "up": inner}
    if model.qk_norm:
        widths |= {"q_raw": q, "k_raw": kv}
    norms, places = model.block_norms, {slot.place for slot in job.slots}
    for slot in range(num_slots(job)):
        held = dict(widths)
        block = _block_of(job, slot)
        if norms.after_attention or f"{block}.attention_output" in places:
            held["attention_out"] = hidden
        if norms.after_mlp or f"{block}.mlp_output" in places:
            held["mlp_out"] = hidden
        floats |= {f"slot.{slot}.{name}": positions * width for name, width in held.items()}
    if job.adapter.side_group is not None:
        width = positions * hidden // job.adapter.side_group
        floats |= {"side.z": width, **{f"side.{index}": width for index in _adapted_blocks(job)}}
        if job.has_gradients:
            floats["side.d"] = width
    if job.adapter.prompt_positions:
        floats |= {f"before.{index}": job.changed * hidden for index in _adapted_blocks(job)}
    return {name: FLOAT_BYTES * count for name, count in floats.items()}


def _adapted_blocks(job: Job) -> list[int]:
    """Those whose output is changed, or taken."""
    places = {slot.place.rpartition(".")[0] for slot in job.slots}
    return [index for index in range(job.model.num_hidden_layers) if job.model.block(index) in places]


def _block_of(job: Job, slot: int) -> str:
    """A block that takes this set of activations; of those that run again the lowest, which has an adapter."""
    shared = 1 if job.recompute_layers else 0
    return job.model.block(job.first_block + (job.recompute_layers + slot - shared if slot else 0))


def _encoder_buffers(job: Job, model: EncoderConfig) -> dict[str, int]:
    """Those of an encoder, whose texts lie one after the other: see `training.encoder_blocks`."""
    positions, hidden, inner = job.tokens, model.hidden_size, model.intermediate_size
    longest = job.max_seq_length
    queries = min(TILE_QUERIES, longest)
    tiles = [tile_rows((n, k), job.tile_weights) * k for n, k in multiplied(job)]
    floats = {
        "weight": max(tiles),
        **dict.fromkeys(("h", "d", "d_h"), positions * hidden),
        **dict.fromkeys(("inner", "d_inner"), positions * inner),
        **dict.fromkeys(("d_k", "d_v"), longest * hidden),
        **dict.fromkeys(("attention.q", "attention.d_o"), queries * hidden),
        **dict.fromkeys(("attention.scores", "attention.d_scores"), model.num_attention_heads * queries * longest),
    }
    block = GRIDS[job.grid].BLOCK
    if hidden % block == 0 or inner % block == 0:
        whole = max(tile_rows((n, k), job.tile_weights) * k for n, k in multiplied(job) if k % block == 0)
        codes = min(PIECE_CODES, whole // 2)
        floats |= {"codes": codes, "scales": 2 * codes // block}
    floats |= {f"input.{index}": positions * hidden for index in range(job.path_layers + 1)}
    widths = dict.fromkeys(("q", "k", "v", "o", "s1", "s2"), hidden) | {"u": inner}
    for slot in range(num_slots(job)):
        floats |= {f"slot.{slot}.{name}": positions * width for name, width in widths.items()}
    return {name: FLOAT_BYTES * count for name, count in floats.items()}


def num_slots(job: Job) -> int:
    """Sets of activations: one for each block that keeps them, and one that those which run again take by turns."""
    if not job.goes_through_blocks:
        return 1
    kept = job.path_layers - job.recompute_layers
    return kept + (1 if job.recompute_layers else 0)


def activation_bytes(job: Job) -> int:
    """What one block keeps from its forward to its backward pass, its input apart."""
    return sum(size for name, size in buffers(replace(job, recompute_layers=job.path_layers)).items() if "slot" in name)


def _at_step(job: Job) -> dict[str, int]:
    parts = {"gradients": FLOAT_BYTES * sum(job.tensor_sizes) if job.has_gradients else 0}
    if job.adapter.dropout:  # random numbers, the mask, the dropped input and its gradient
        parts["dropout"] = (
            (4 if job.has_gradients else 3) * FLOAT_BYTES * job.tokens * max(slot.in_features for slot in job.slots)
        )
    return parts


def feature_bytes(job: Job, num_windows: int) -> int:
    """What so many windows take in the feature cache: the input of the lowest adapted block."""
    return FLOAT_BYTES * num_windows * job.max_seq_length * job.model.hidden_size
