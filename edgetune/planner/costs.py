"""What a training step costs: every byte of its peak by part, its floating point operations and its memory traffic.

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
from dataclasses import dataclass, replace
from typing import Any

from edgetune.adapters import METHODS
from edgetune.adapters.config import AdapterConfig
from edgetune.adapters.slot import FACTOR_COLUMNS, Slot
from edgetune.base import AnyBase
from edgetune.device import DeviceProfile
from edgetune.grids import GRIDS, LOOKUP_ROWS, PIECE_CODES, tile_rows
from edgetune.models import ModelConfig
from edgetune.models.config import DecoderConfig
from edgetune.models.encoder_config import EncoderConfig
from edgetune.objectives import distill, has_head, kl, sft
from edgetune.optimizers import OPTIMIZERS
from edgetune.products import CODE_BYTES, are_offered

FLOAT_BYTES, INDEX_BYTES = 4, 8
VECTOR = 16  # float32 values of the widest vectors: 512 bits
TILE_QUERIES = 64  # queries of a tile of attention
# Python and torch objects of a frozen linear with its mapped arrays, and of an adapted one; measured on 210 of each.
LINEAR_OBJECT_BYTES = 4400
SLOT_OBJECT_BYTES = 5200
# MKL packs a panel of each weight before it multiplies: so many of its inner dimension, half a panel for each of two
# threads, and a little beside it. Measured on AVX-512 with 32 to 1,820 rows of 576 to 8,192 columns.
PANEL, PACK_BYTES = 384, 1 << 17
# These set the gradient of their input, others add to it.
FIRST_BACKWARD = ("q_proj", "o_proj", "gate_proj", "down_proj")
# What the kernels of a thread hold more after many micro-batches of as many shapes: found on MiniLM, where plans
# without it were 3 to 4 % short (6.7 MiB on one thread after 48 of them). Not taken apart.
SHAPE_BYTES = 11 << 19
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

# What `step_work` counts beside the products, per unit of the name. These and the measured speeds decide how long a
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
class Job:
    """What decides the cost of a step. `adapter` is resolved; `supervised_per_window` is the most of any window."""

    model: ModelConfig
    adapter: AdapterConfig
    optimizer: str
    grid: str
    batch_size: int
    gradient_accumulation_steps: int
    max_seq_length: int
    recompute_layers: int
    tile_weights: int
    activation_offloading: bool
    dequantized_layers: int
    step_rule: str
    threads: int
    supervised_per_window: int
    anchored_per_window: int = 0  # positions of a window on which the base holds the model; 0 without such windows
    num_tokens: int = 0
    num_rows: int = 0
    tokenizer_file_bytes: int = 0
    base_copy_bytes: int = 0
    active_adapter_bytes: int = 0  # to load and split that which the bundle uses; of the ort engine
    objective: str = "sft"
    teacher_tokens: int = 0  # those that are recorded for each learned position, where the objective is distill
    cached_windows: int = 0  # those whose way through the frozen lower blocks is cached: all, or none
    fast_products: bool = False
    positions: int = 0  # of rows without padding: the most tokens of any micro-batch
    head_sizes: tuple[int, ...] = ()  # parameters of each tensor of a trained head
    head_floats: int = 0  # what pooling, head and objective compute with
    rows_per_window: int | None = None  # the most of any window; None: not known

    @property
    def decoder(self) -> DecoderConfig:
        """The model, where it is a decoder."""
        assert isinstance(self.model, DecoderConfig)
        return self.model

    @property
    def has_gradients(self) -> bool:
        """Whether a step goes backward."""
        return self.step_rule == "backprop"

    @property
    def goes_through_blocks(self) -> bool:
        """Whether that goes back through blocks, not beside them alone."""
        return self.has_gradients and self.adapter.side_group is None

    @property
    def tokens(self) -> int:
        """Positions of a micro-batch, padding included."""
        return self.positions or self.batch_size * self.max_seq_length

    @property
    def first_block(self) -> int:
        """The lowest block with an adapter: below it nothing is stored and no gradient is asked for."""
        return self.adapter.first_block

    @property
    def path_layers(self) -> int:
        """Blocks that the gradient passes through."""
        return self.model.num_hidden_layers - self.first_block

    @property
    def repeated_layers(self) -> int:
        """Blocks that run forward twice: the last one never does, its activations are still there."""
        return min(self.recompute_layers, self.path_layers - 1)

    @property
    def slots(self) -> list[Slot]:
        slots: list[Slot] = METHODS[self.adapter.method].slots(self.adapter, self.model)
        return slots

    @property
    def tensor_sizes(self) -> list[int]:
        """Parameters of each tensor of the adapter, and of a head."""
        sizes = [math.prod(shape) for slot in self.slots for shape in slot.tensors.values()]
        return [*sizes, *self.head_sizes]

    @property
    def thawed(self) -> int:
        """Weights of the model's own matrices that are trained."""
        if not self.adapter.thaws:
            return 0
        return sum(math.prod(shape) for slot in self.slots for shape in slot.tensors.values() if len(shape) == 2)

    @property
    def supervised(self) -> int:
        """Positions of a micro-batch that the loss computes, at most."""
        return min(self.supervised_per_window * self.batch_size, self.tokens)

    @property
    def anchored(self) -> int:
        """Positions where the divergence from the base is computed, at most, with what fills them up."""
        return filled(min(self.anchored_per_window * self.batch_size, self.tokens), self.threads)

    @property
    def micro_batches(self) -> int:
        """Of a step, the one that holds the model to its base included."""
        return self.gradient_accumulation_steps + (1 if self.anchored else 0)

    @property
    def changed(self) -> int:
        """Positions of a micro-batch that an adapter of some positions changes, at most."""
        counts = self.adapter.prompt_positions
        if counts is None:
            return self.tokens
        rows = self.tokens if self.rows_per_window is None else self.rows_per_window * self.batch_size * sum(counts)
        return min(rows, self.tokens)

    @property
    def taught(self) -> int:
        """Tokens of the teacher for each learned position."""
        return self.teacher_tokens if self.objective == "distill" else 0

    @property
    def scores(self) -> bool:
        """Whether a trained head stands in the place of that over the vocabulary."""
        return isinstance(self.model, DecoderConfig) and has_head(self.objective)

    @property
    def loss_rows(self) -> int:
        """The same with what fills them up; a trained head has none of that."""
        if self.scores:
            return self.supervised
        return filled(self.supervised, self.threads) if self.has_gradients else self.supervised


def row_step(threads: int) -> int:
    """The rows of a loss with its gradient are a multiple of this: whole vectors for each thread (see `training.crew`).

    1 where the number of threads never changes.
    """
    return VECTOR * threads if threads in (2, 4, 8) else 1


def keeps_bits(threads: int, positions: int, head_dim: int) -> bool:
    """Whether half as many threads, and half of those, compute the same bits in blocks of B * T `positions`.

    Measured with torch on MKL and oneDNN with AVX-512; the tests hold it for 1 to 8 threads where they run.
    """
    return row_step(threads) > 1 and positions % row_step(threads) == 0 and head_dim % (2 * VECTOR) == 0


def filled(supervised: int, threads: int) -> int:
    """The rows of a loss with its gradient: those that are supervised, and what fills them up."""
    step = row_step(threads)
    return -(-supervised // step) * step


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
        "dequantized": FLOAT_BYTES * _per_block(job)[0] * job.dequantized_layers,
        "base": _vector_bytes(job.model) + job.base_copy_bytes + LINEAR_OBJECT_BYTES * len(job.model.matrices()),
        "adapter": _adapter_bytes(job),
        "gradients": 0,
        "optimizer": optimizer.state_bytes(trained) + optimizer.scratch_bytes(trained),
        "data": data_bytes(job),
        "kernels": pack_bytes(job) + code_bytes(job) + shape_bytes(job),
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
    tiles = [(tile_rows((n, k), job.tile_weights), k) for n, k in multiplied(job)]
    forward = max(n * min(k, PANEL) for n, k in tiles)
    if not job.goes_through_blocks:
        size = job.model.vocab_size, job.model.hidden_size
        tiles = [(tile_rows(size, job.tile_weights), size[1])] if job.has_gradients and not job.scores else []
    backward = max((min(n, PANEL) * k for n, k in tiles), default=0)
    floats = forward + (backward if backward > forward else 0)
    return job.threads * (PACK_BYTES + FLOAT_BYTES * floats // 2)


def code_bytes(job: Job) -> int:
    """What fast products keep: code for each shape."""
    return CODE_BYTES * num_fast_products(job) if job.fast_products else 0


def spare_code_bytes(job: Job) -> int:
    """The same once more for each number of threads that a crew may come down to; it does so beside other programs."""
    free = job.goes_through_blocks and keeps_bits(job.threads, job.tokens, job.model.head_dim)
    # Products of as many rows as prompts give, and of a head's few.
    free = free and not (job.adapter.prompt_positions or job.scores)
    return code_bytes(job) * (job.threads.bit_length() - 1) if free else 0


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


def shape_bytes(job: Job) -> int:
    """What products keep where each micro-batch has a shape of its own."""
    return job.threads * SHAPE_BYTES if isinstance(job.model, EncoderConfig) else 0


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
        floats |= {"side.z": width, **{f"side.{index}": 2 * width for index in _adapted_blocks(job)}}
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
    weights, attention, scores = _per_block(job)
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
    weights, attention, scores = _per_block(job)
    length = job.positions / job.batch_size or job.max_seq_length
    flops = length * (2.0 * weights + attention)
    traffic = weights * DECODE_BYTES + ACTIVATION_PASSES * activation_bytes(replace(job, batch_size=1))
    traffic += length * scores
    times = job.first_block * num_windows
    fast = flops if job.fast_products and job.batch_size == 1 else 0.0
    return StepWork(flops * times, traffic * times, BLOCK_CYCLES * times, fast * times)


def reference_work(job: Job, num_windows: int) -> StepWork:
    """The whole model once forward over so many windows, in micro-batches, each of which decodes the weights."""
    weights, attention, scores = _per_block(job)
    head, layers = job.model.vocab_size * job.model.hidden_size, job.model.num_hidden_layers
    flops = job.tokens * (2.0 * weights + attention) * layers + 2.0 * head * job.supervised
    traffic = (weights * layers + head) * DECODE_BYTES
    traffic += layers * (ACTIVATION_PASSES * activation_bytes(job) + job.tokens * scores)
    times = math.ceil(num_windows / job.batch_size)
    return StepWork(flops * times, traffic * times, BLOCK_CYCLES * layers * times)


def feature_bytes(job: Job, num_windows: int) -> int:
    """What so many windows take in the feature cache: the input of the lowest adapted block."""
    return FLOAT_BYTES * num_windows * job.max_seq_length * job.model.hidden_size


def _per_block(job: Job) -> tuple[int, float, float]:
    """Weights of a block; operations of its attention per token, scores and values; and the traffic of the scores.

    Attention goes through tiles of queries, and leaves out the keys that come after the whole tile.
    """
    model = job.model
    weights = sum(n * k for n, k in model.linear_shapes.values())
    keys = (job.max_seq_length + min(TILE_QUERIES, job.max_seq_length)) / 2
    operations = 4 * keys * model.num_attention_heads * model.head_dim
    return weights, operations, SCORE_PASSES * FLOAT_BYTES * keys * model.num_attention_heads
