"""A bundle's graph on plain onnxruntime with its KV cache: token ids in, logits out, one sequence at a time.

An adapter is fed as ordinary graph inputs, read from its `.safetensors`. That gives the same bits as onnxruntime's own
`.onnx_adapter` mechanism, and works under IO binding, where active adapters are silently ignored (the bindings for Java
and the web refuse optional inputs: `examples/README.md`).
It also makes adapters hot-swappable, of any rank: other feeds are another adapter, and leaving them out selects the
graph's empty default, which is the base exactly.

Everything is bound (IOBinding), the adapter too. Where the graph's attention writes the cache in place, one buffer per
layer, as long as the context, is past and present at once: memory is taken as positions are written, and nothing is
copied from token to token (6.7 against 10.6 ms at 1024 past tokens of a 30-layer, 576-wide int4 decoder). Elsewhere
what one run returns as present is the past of the next.

Left out: batches, and execution providers other than the CPU's.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from edgetune.adapter_file import PROMPT_LENGTH, check_probe_change
from edgetune.bundle import LOGITS_TO_KEEP, SHARE_BUFFER, Bundle, check_continues, load_bundle
from edgetune.errors import BundleError, ConfigError
from edgetune.runtime.native import adapter_tensors, is_file, load_graph

# A longer prompt is read in pieces of this many tokens, so that logits and activations stay bounded: the logits of one
# piece are 25 MiB at a vocabulary of 49k and 78 MB at 152k.
CHUNK = 128


class Session:
    """One sequence on a loaded bundle; `open_session` makes it.

    `length` is the number of tokens in the cache and `context_length` the most it can hold; it begins with `start`
    virtual ones, the keys and values of a prefix adapter. For an adapter of some positions of the prompt, that is what
    the first `forward` takes.
    """

    def __init__(self, bundle: Bundle, native: onnxruntime.InferenceSession) -> None:
        self.bundle = bundle
        self._native = native
        self._loaded: dict[bool | str | Path, dict[str, np.ndarray]] = {}
        self._feeds: dict[str, np.ndarray] = {}
        model = bundle.model
        self.context_length = model.max_position_embeddings
        parts = [f"{i}.{kind}" for i in range(model.num_hidden_layers) for kind in ("key", "value")]
        self._past = [f"past_key_values.{part}" for part in parts]
        self._present = [f"present.{part}" for part in parts]
        self._check_graph()
        self._in_place = SHARE_BUFFER in native.get_modelmeta().custom_metadata_map
        self._takes_prompts = PROMPT_LENGTH in {i.name for i in native.get_overridable_initializers()}
        self._cuts_logits = LOGITS_TO_KEEP in {i.name for i in native.get_overridable_initializers()}
        self._ones = np.ones((1, self.context_length), np.int64)
        self.reset()

    def _check_graph(self) -> None:
        """Refuse a graph that asks for other inputs, or lacks outputs; BundleError names them."""
        wanted, found = {"input_ids", "attention_mask", *self._past}, {i.name for i in self._native.get_inputs()}
        missing = {"logits", *self._present} - {output.name for output in self._native.get_outputs()}
        if wanted != found or missing:
            raise BundleError(
                f"{self.bundle.model_path}: the graph lacks inputs {sorted(wanted - found)} and outputs "
                f"{sorted(missing)}, and asks for {sorted(found - wanted)}. "
                f"Export the bundle again with this version of edgetune"
            )

    def reset(self) -> None:
        """Forget the sequence; weights and adapter stay."""
        model = self.bundle.model
        self._binding, self._cache = self._native.io_binding(), dict[str, onnxruntime.OrtValue]()
        for name, value in self._feeds.items():
            if name not in self._past:
                self._bind(name, value)
        self.length = self.start = self._feeds[self._past[0]].shape[2] if self._past[0] in self._feeds else 0
        length = self.context_length if self._in_place else self.start
        for past, present in zip(self._past, self._present, strict=True):
            cache = _zeros((1, model.num_key_value_heads, length, model.head_dim))
            if self.start:
                cache[:, :, : self.start] = self._feeds[past]
            self._bind_cache(past, present, onnxruntime.OrtValue.ortvalue_from_numpy(cache))

    def _bind(self, name: str, value: np.ndarray) -> None:
        """Bind an input, which may be an optional one; the array has to live as long as the binding."""
        self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))

    def _bind_cache(self, past: str, present: str, value: onnxruntime.OrtValue) -> None:
        self._cache[past] = value  # a binding does not keep the memory under it
        self._binding.bind_ortvalue_input(past, value)
        if self._in_place:
            self._binding.bind_ortvalue_output(present, value)
        else:
            self._binding.bind_output(present)

    def use_adapter(self, adapter: bool | str | Path = True) -> None:
        """Switch to another adapter, given as in `open_session`; the sequence is forgotten, the weights stay loaded.

        One of the bundle's is kept when it was loaded once, so that switching back reads nothing.
        Raises AdapterError; the session then goes on with the adapter that it had.
        """
        tensors = self._loaded.get(adapter) or adapter_tensors(self.bundle, adapter)
        self._use(adapter, tensors)

    def _use(self, adapter: bool | str | Path, tensors: dict[str, np.ndarray]) -> None:
        if is_file(adapter):
            check_probe_change(self.probe_change(tensors), origin=str(adapter))
        else:
            self._loaded[adapter] = tensors
        self._feeds = tensors
        self.reset()

    def probe_change(self, tensors: dict[str, np.ndarray]) -> float:
        """How far adapter tensors move the base's logits on the bundle's probe rows: the largest change of one by the
        largest logit. Forgets the sequence.
        """
        before, change, largest = self._feeds, 0.0, 0.0
        for row in self.bundle.probe_rows:
            logits = []
            for feeds in ({}, tensors):
                self._feeds = feeds
                self.reset()
                logits.append(np.concatenate(list(self.logits(row))))
            base, tuned = logits
            with np.errstate(invalid="ignore"):  # infinite logits: the change is no number, which the caller refuses
                change, largest = np.maximum((change, largest), (np.abs(tuned - base).max(), np.abs(base).max()))
        self._feeds = before
        self.reset()
        return float(change / largest)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is in use."""
        return bool(self._feeds)

    def forward(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Append tokens to the sequence; the fp32 logits [vocab_size] that follow the last of them.

        Raises ConfigError where there is no token, one is outside of the vocabulary, or the context would overflow.
        """
        logits: np.ndarray = np.empty(0, np.float32)
        for tokens in self._chunks(ids):
            logits = self._run(tokens, logits_to_keep=1)[-1]
        return logits

    def logits(self, ids: Sequence[int] | np.ndarray, prompt_length: int | None = None) -> Iterator[np.ndarray]:
        """Append tokens and yield their fp32 logits [n, vocab_size], n <= 128 tokens at a time. Raises as `forward`.

        So many of the first tokens of a sequence are its prompt; None: all that it begins with.
        """
        for tokens in self._chunks(ids, prompt_length):
            yield self._run(tokens, logits_to_keep=0)

    def _chunks(self, ids: Sequence[int] | np.ndarray, prompt_length: int | None = None) -> Iterator[np.ndarray]:
        tokens = np.asarray(ids, np.int64).reshape(1, -1)
        self._check_tokens(tokens)
        if self._takes_prompts and self.length == self.start:
            self._bind(PROMPT_LENGTH, np.array([prompt_length or tokens.shape[1]], np.int64))
        for start in range(0, tokens.shape[1], CHUNK):
            yield np.ascontiguousarray(tokens[:, start : start + CHUNK])

    def _check_tokens(self, tokens: np.ndarray) -> None:
        vocab_size, total = self.bundle.model.vocab_size, self.length + tokens.size
        if not tokens.size:
            raise ConfigError("there is no token to run: the text encodes to nothing. Give at least one character")
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
            raise ConfigError(
                f"token id {wrong} is not one of the {vocab_size} of the model; use the bundle's own tokenizer"
            )
        if total > self.context_length:
            raise ConfigError(
                f"{total} tokens do not fit the context of {self.context_length} tokens of {self.bundle.folder}; "
                f"shorten the prompt by {total - self.context_length}"
            )

    def _run(self, tokens: np.ndarray, logits_to_keep: int) -> np.ndarray:
        """One call of the graph on tokens [1, n]; logits [n, vocab_size], or of the last ones alone where it can."""
        binding, count = self._binding, tokens.shape[1]
        total, keep = self.length + count, np.array([logits_to_keep], np.int64)
        self._bind("input_ids", tokens)
        self._bind("attention_mask", self._ones[:, :total])
        if self._cuts_logits:
            self._bind(LOGITS_TO_KEEP, keep)
            count = logits_to_keep or count
        logits = np.empty((1, count, self.bundle.model.num_logits), np.float32)
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        self._native.run_with_iobinding(binding)
        if not self._in_place:
            # Outputs come in the order in which they were bound: the cache at the reset, then the logits.
            for past, present, value in zip(self._past, self._present, binding.get_outputs(), strict=False):
                self._bind_cache(past, present, value)
        self.length = total
        result: np.ndarray = logits[0]
        return result


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """float32 zeros that take memory page by page, as they are written.

    numpy's do not: it asks for huge pages, and glibc clears blocks by hand once it has kept large ones.
    """
    if not math.prod(shape):
        return np.zeros(shape, np.float32)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    memory = mmap.mmap(-1, 4 * math.prod(shape), **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


def open_session(
    bundle: Bundle | str | Path,
    *,
    threads: int | None = None,
    fp32_compute: bool = False,
    adapter: bool | str | Path = True,
    prepacked: str | Path | None = None,
) -> Session:
    """Load a bundle for inference.

    `adapter`: True is the bundle's default where it has one, False is the base, a name is one of the bundle's, a path
    (with its suffix) is a file such as `adapter add` writes. It is checked against the manifest before onnxruntime
    opens anything; a file is then refused if it changes nothing on the probe rows. `use_adapter` switches later.
    `threads` defaults to the cores that this process may use. `fp32_compute` makes 4-bit kernels of accuracy level 4
    compute in fp32 instead of on int8 activations: slower, and what parity is measured with. `prepacked` is a folder of
    this bundle's own, the app's cache: the first call writes packed weights there, later ones map them, which takes a
    fraction of the memory and more than twice the bundle's storage (`runtime.prepacked`).
    Raises BundleError, also where a trained head says something else than the next token, AdapterError, ConfigError.
    """
    if isinstance(bundle, Bundle):
        check_continues(bundle)
    else:
        bundle = load_bundle(bundle)
    return open_any_session(bundle, threads, fp32_compute, adapter, prepacked)


def open_any_session(
    bundle: Bundle, threads: int | None = None, fp32_compute: bool = False, adapter: bool | str | Path = True,
    prepacked: str | Path | None = None,
) -> Session:  # fmt: skip
    """The same of a decoder whose logits may be a trained head's."""
    tensors = adapter_tensors(bundle, adapter)
    session = Session(bundle, load_graph(bundle, threads, fp32_compute=fp32_compute, prepacked=prepacked))
    session._use(adapter, tensors)
    return session
