"""Text to token ids and back, and chat messages to text, from the files beside a model.

The `tokenizers` library does the work, from tokenizer.json alone; tokenizer_config.json, special_tokens_map.json,
generation_config.json, config.json and chat_template.jinja add what they know of special tokens and of the chat
template. A folder with nothing but tokenizer.json is enough for plain text.

Left out: tokenizers that exist only as Python code or as a sentencepiece model, templates for anything but text, and
the clean-up of spaces that transformers offers after decoding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from edgetune.chat_template import ChatTemplate
from edgetune.errors import DataError, ModelError

__all__ = ["TextStream", "Tokenizer", "load_tokenizer"]

_MAX_BYTES = 64 * 2**20
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """What `load_tokenizer` read. `special_tokens` maps names such as "eos_token" to their text."""

    folder: Path
    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    bos_token_id: int | None
    eos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # every id that ends a text, `eos_token_id` first
    chat_template: str | None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    @property
    def files(self) -> list[Path]:
        """The files that, copied into another folder, load as this tokenizer there."""
        return [self.folder / name for name in _FILES if (self.folder / name).is_file()]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def end_tokens(self) -> tuple[str, ...]:
        """The text of every id that ends a text."""
        return tuple(token for i in self.eos_token_ids if (token := self.backend.id_to_token(i)) is not None)

    def encode(self, text: str, add_special_tokens: bool = True, max_length: int | None = None) -> list[int]:
        """Token ids of a text. A chat that a template rendered has its special tokens: pass False for it.

        With `max_length` the text is cut so that there are at most so many, special ones included.

        Raises:
            DataError: The text is no Unicode text (a lone surrogate), or the tokenizer has no token for a part of it.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"The text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
                "which is half a character. Write the whole character, or remove it."
            ) from error
        with _rust_errors(DataError, f"The tokenizer of {self.folder} cannot encode a text of {len(text)} characters"):
            encoding = self.backend.encode(text, add_special_tokens=add_special_tokens and max_length is None)
            if max_length is not None:
                added = self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
                encoding.truncate(max(max_length - added, 0))
                encoding = self.backend.post_process(encoding, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        return ids

    def encode_words(self, words: Sequence[str], max_length: int) -> tuple[list[int], list[int | None]]:
        """Token ids of a text that is cut into words already, at most so many, and the word of each; None: no word's.

        Raises:
            DataError: The tokenizer has no token for a part of it.
        """
        with _rust_errors(DataError, f"The tokenizer of {self.folder} cannot encode {len(words)} words"):
            encoding = self.backend.encode(list(words), is_pretokenized=True, add_special_tokens=False)
            encoding.truncate(max(max_length - self.backend.num_special_tokens_to_add(False), 0))
            encoding = self.backend.post_process(encoding, add_special_tokens=True)
            return encoding.ids, encoding.word_ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids that have no token (rows that pad an embedding) give nothing."""
        with _rust_errors(ModelError, f"The tokenizer of {self.folder} cannot decode {len(ids)} ids"):
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """A decoder that takes ids one at a time."""
        return TextStream(self, skip_special_tokens)

    def check_vocab(self, vocab_size: int) -> None:
        """Refuses a tokenizer with an id beyond an embedding of `vocab_size` rows. Fewer ids than rows are normal.

        Raises:
            ModelError: An id has no row.
        """
        # Counting ids below the limit avoids a dictionary of the whole vocabulary, tens of MB for a large one.
        below = sum(self.backend.id_to_token(i) is not None for i in range(min(vocab_size, 2 * self.vocab_size)))
        if below == self.vocab_size:
            return
        token, largest = max(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
        if largest >= vocab_size:
            raise ModelError(
                f"{self.folder / _FILES[0]} has token {token!r} with id {largest}, but the model's embedding has "
                f"{vocab_size} rows (ids 0 to {vocab_size - 1}). Use the tokenizer that belongs to this model."
            )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """Messages rendered to text by the model's template.

        Args:
            messages: Mappings with "role" and "content", and whatever else the template reads.
            add_generation_prompt: End with the opening of an assistant's turn.
            tools: Function descriptions, for templates that read them.
            now: What the template takes for the present; None is the clock.

        Raises:
            ModelError: There is no template, or it is damaged.
            DataError: The template refuses these messages.
        """
        if self.chat_template is None:
            raise ModelError(
                f"{self.folder} has no chat template, so chat messages cannot be rendered. Put the template of the "
                "model you started from beside tokenizer.json as chat_template.jinja, or use rows with prompt and "
                "completion."
            )
        variables: dict[str, Any] = {
            **self.special_tokens,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if now is not None:
            variables["strftime_now"] = now.strftime
        return self._template.render(variables)

    @cached_property
    def _template(self) -> ChatTemplate:
        assert self.chat_template is not None
        return ChatTemplate(self.chat_template, self.folder)


class TextStream:
    """Ids in, text out; all that `push` and `finish` return, joined, equals `Tokenizer.decode` of all ids.

    Text is held back while it may still change: at an unfinished UTF-8 character, and after a byte-fallback token,
    whose run is decoded as a whole. Only the last few ids are decoded again for each new one: those of the last piece
    given out, so that decoders which treat the first token differently do not see a first token.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._ids: list[int] = []  # the last piece given out, then what is held back
        self._given = 0  # how many of them were given out

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; often empty."""
        token = None if token_id in self._skip else self._tokenizer.backend.id_to_token(token_id)
        if token is None:
            return ""
        self._ids.append(token_id)
        text = self._pending()
        held_back = text.endswith("\ufffd") or (len(token) == 6 and token.startswith("<0x") and token.endswith(">"))
        return "" if held_back else self._give(text)

    def finish(self) -> str:
        """The rest: an unfinished character comes out as U+FFFD, as `decode` has it."""
        return self._give(self._pending())

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._given], skip_special_tokens=False)
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            del self._ids[: self._given]
            self._given = len(self._ids)
        return text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads the tokenizer of a model, base or bundle folder.

    Raises:
        ModelError: tokenizer.json is missing, larger than 64 MiB or damaged; a file beside it is damaged; a special
            token has no id; or the tokenizer needs code of its own.
    """
    folder = Path(folder)
    path = folder / _FILES[0]
    data = _read_bytes(path)
    if data is None:
        raise ModelError(
            f"{folder} has no tokenizer.json. Use a folder that holds one; a sentencepiece tokenizer.model is "
            "converted by saving it with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    with _rust_errors(ModelError, f"{path} is damaged, or not for tokenizers {tokenizers.__version__}"):
        backend = tokenizers.Tokenizer.from_buffer(data)
        # A cut or padded text would be trained on as if it were the whole text.
        backend.no_truncation()
        backend.no_padding()
    settings = _read_json(folder / "tokenizer_config.json")
    if settings.get("auto_map"):
        raise ModelError(
            f"{folder / 'tokenizer_config.json'} asks for Python code of its own (auto_map), and edgetune runs no code "
            "that comes with a model. If tokenizer.json alone is right, remove auto_map."
        )
    special = _special_tokens(_read_json(folder / "special_tokens_map.json")) | _special_tokens(settings)
    for name in ("bos_token", "eos_token"):
        if name in special and backend.token_to_id(special[name]) is None:
            raise ModelError(
                f"{folder} names {special[name]!r} as its {name}, but tokenizer.json has no such token. "
                "Use the tokenizer files of one and the same model."
            )
    # What a config names as special is special also where tokenizer.json left it an ordinary token.
    known = [token for token in dict.fromkeys(special.values()) if backend.token_to_id(token) is not None]
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in known if token not in added]
    )
    return _with_ids(folder, backend, special, settings)


def _with_ids(
    folder: Path, backend: tokenizers.Tokenizer, special: dict[str, str], settings: dict[str, Any]
) -> Tokenizer:
    """Adds the ids: the tokenizer's own names first, then generation_config.json, then config.json.

    A config's id for which the tokenizer has no token is left out: no text can end with it.
    """
    configs = [_read_json(folder / "generation_config.json"), _read_json(folder / "config.json")]
    ids = {
        name: [i for config in configs for i in _as_ids(config.get(f"{name}_id")) if backend.id_to_token(i) is not None]
        for name in ("bos_token", "eos_token")
    }
    for name, found in ids.items():
        if name in special:
            found[:0] = _as_ids(backend.token_to_id(special[name]))
        elif name in settings:
            # `"bos_token": null` says there is none, whatever the model's config has left from its ancestors.
            found.clear()
        elif found:
            special = special | {name: str(backend.id_to_token(found[0]))}
    bos, eos = (list(dict.fromkeys(found)) for found in ids.values())
    template = _read_bytes(folder / "chat_template.jinja")
    return Tokenizer(
        folder=folder,
        backend=backend,
        special_tokens=special,
        bos_token_id=bos[0] if bos else None,
        eos_token_id=eos[0] if eos else None,
        eos_token_ids=tuple(eos),
        chat_template=_default_template(settings.get("chat_template")) if template is None else _text(folder, template),
    )


def _as_ids(value: object) -> list[int]:
    """A config has one id, a list of ids, or null."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**31]


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The names of special tokens that a config sets, as text; a token is a string or an object with its content."""
    found = {}
    for name in _SPECIAL_NAMES:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            found[name] = token
    return found


def _default_template(value: object) -> str | None:
    """A template, or a list of named ones, of which the one called "default" is for chat."""
    if isinstance(value, list):
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None


def _read_bytes(path: Path) -> bytes | None:
    """The content of a small file, or None where there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. Check the path and its permissions.") from error
    if len(data) > _MAX_BYTES:
        raise ModelError(f"{path} is larger than {_MAX_BYTES // 2**20} MiB. No tokenizer needs that: check the file.")
    return data


def _text(folder: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{folder / 'chat_template.jinja'} is not UTF-8 ({error}). Save it as UTF-8.") from error


def _read_json(path: Path) -> dict[str, Any]:
    data = _read_bytes(path)
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object. Download the file again.")
    return value


@contextmanager
def _rust_errors(kind: type[DataError] | type[ModelError], what: str) -> Iterator[None]:
    """Turns what the library raises into an error of ours. Its panics (a regular expression that gives up after ten
    million steps is one) derive from BaseException and are told by their name alone.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{what}: {error}. Check the tokenizer files against the model's source.") from error
        raise
