"""Text from a bundle: greedy or sampled, streamed, with stop tokens, stop strings and the tokenizer's chat template.

The order of the filters is the usual one (temperature, then top-k, then top-p), and a seed fixes the draw. Prompt and
answer together never exceed the model's context: the answer ends there with the reason "length".

Left out: beams, repetition penalties and several sequences at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.bundle import Bundle
from edgetune.errors import ConfigError
from edgetune.runtime.session import Session, open_session
from edgetune.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop. Raises ConfigError for a value out of its range."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    "0 takes the most likely token; 1 samples from the model's own distribution"
    top_k: int = 0
    "sample among this many most likely tokens; 0 among all"
    top_p: float = 1.0
    "sample among the fewest most likely tokens that together have this probability"
    seed: int = 0
    stop: tuple[str, ...] = ()
    "strings that end the text and are not part of it"

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "a number from 0; 0 is greedy"),
            "top_k": (self.top_k >= 0, "at least 0; 0 keeps every token"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and up to 1; 1 keeps every token"),
            "seed": (self.seed >= 0, "at least 0"),
            "stop": (all(self.stop), "strings that are not empty"),
        }
        wrong = [name for name, (good, _) in checks.items() if not good]
        if wrong:
            raise ConfigError(
                "; ".join(f"{name} is {getattr(self, name)!r}, expected {checks[name][1]}" for name in wrong)
            )


@dataclass(frozen=True)
class Generation:
    """A finished answer; `str()` of it is the text."""

    text: str
    token_ids: tuple[int, ...]
    "every token drawn, less a closing stop token"
    prompt_tokens: int
    stop_reason: str
    "stop_token, stop_string, length, or context where that was full before max_new_tokens"
    time_to_first_token_ms: float
    "from the first prompt token in to the first token out; loading is not part of it"
    generation_tokens_per_second: float | None
    "tokens after the first over the time they took; None where there is only one"

    def __str__(self) -> str:
        return self.text


def generate(
    bundle: Bundle | str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    adapter: bool | str | Path = True,
    on_text: Callable[[str], None] | None = None,
    threads: int | None = None,
    prepacked: str | Path | None = None,
) -> Generation:
    """Load a bundle and continue `prompt`, or with `chat` answer it as a user's message through the chat template.

    `on_text` gets the text piece by piece as it is decided; the pieces add up to `Generation.text`. `system` is the
    first message of a chat. `adapter`, `threads` and `prepacked` are those of `open_session`.
    Raises ConfigError (a setting out of range, a prompt that leaves no room in the context), BundleError, AdapterError,
    ModelError (a tokenizer that is missing or has no chat template).
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, stops)
    if system is not None and not chat:
        raise ConfigError("system is set and chat is not: only a chat has a system message. Set chat, or leave it out")
    session = open_session(bundle, threads=threads, adapter=adapter, prepacked=prepacked)
    tokenizer = load_tokenizer(session.bundle.folder)
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    # A template writes the special tokens itself.
    ids = tokenizer.encode(prompt, add_special_tokens=not chat)
    return complete(session, tokenizer, ids, sampling, on_text)


def complete(
    session: Session,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue prompt tokens on a loaded session, from an empty cache."""
    session.reset()
    stop_ids = {*session.bundle.model.eos_token_ids, *tokenizer.eos_token_ids}
    stream, text = tokenizer.stream(), _StopFilter(sampling.stop, on_text)
    tokens: list[int] = []
    times = [time.perf_counter()]
    reason = "length" if session.length + len(ids) + sampling.max_new_tokens <= session.context_length else "context"
    for token in _draw_tokens(session, ids, sampling):
        times.append(time.perf_counter())
        if token in stop_ids:
            reason = "stop_token"
            break
        tokens.append(token)
        if text.push(stream.push(token)):
            reason = "stop_string"
            break
    if reason != "stop_string" and text.push(stream.finish()):
        reason = "stop_string"
    rest = times[-1] - times[1]
    return Generation(
        text=text.finish(),
        token_ids=tuple(tokens),
        prompt_tokens=len(ids),
        stop_reason=reason,
        time_to_first_token_ms=1e3 * (times[1] - times[0]),
        generation_tokens_per_second=(len(times) - 2) / rest if rest > 0 else None,
    )


def _draw_tokens(session: Session, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
    """The tokens that follow `ids`, stop tokens included, until max_new_tokens or the end of the context."""
    room = session.context_length - session.length - len(ids)
    virtual = f" after {session.start} virtual ones" if session.start else ""
    if room < 1:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens{virtual} and the context of {session.bundle.folder} is "
            f"{session.context_length}: there is no room for an answer. Shorten the prompt by at least {1 - room}"
        )
    rng = np.random.default_rng(sampling.seed)
    pending = ids
    for _ in range(min(sampling.max_new_tokens, room)):
        token = choose_token(session.forward(pending), sampling, rng)
        yield token
        pending = [token]


def choose_token(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """One token id from logits [vocab_size]: the most likely at temperature 0, else a draw."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(rng.choice(logits.size, p=sampling_probabilities(logits, sampling)))


def sampling_probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution [vocab_size], fp64, that a token is drawn from at a temperature above 0.

    softmax(logits / temperature) over the top_k most likely tokens, cut to the fewest most likely ones whose
    probabilities reach top_p (Holtzman et al. 2020, arXiv 1904.09751), and renormalized. Tokens that tie with the last
    of the top_k stay.
    """
    scores = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    chances = np.exp(scores)
    chances /= chances.sum()
    if sampling.top_p < 1:
        order = np.argsort(-chances, kind="stable")
        before = np.cumsum(chances[order]) - chances[order]
        chances[order[before >= sampling.top_p]] = 0.0
        chances /= chances.sum()
    result: np.ndarray = chances
    return result


class _StopFilter:
    """Passes text on and holds back its end while that may be the beginning of a stop string."""

    def __init__(self, stop: tuple[str, ...], on_text: Callable[[str], None] | None) -> None:
        self._stop, self._on_text = stop, on_text
        self._passed: list[str] = []
        self._held = ""

    def push(self, piece: str) -> bool:
        """Add a piece of text; True where a stop string is complete."""
        self._held += piece
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            return True
        lengths = [n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        end = len(self._held) - max(lengths, default=0)
        self._pass(self._held[:end])
        self._held = self._held[end:]
        return False

    def finish(self) -> str:
        """Let the held text go; the whole text."""
        self._pass(self._held)
        self._held = ""
        return "".join(self._passed)

    def _pass(self, text: str) -> None:
        if text:
            self._passed.append(text)
            if self._on_text is not None:
                self._on_text(text)
