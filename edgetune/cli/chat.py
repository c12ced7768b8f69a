"""A conversation with a bundle on a terminal: each line is answered with all that was said before it."""

from __future__ import annotations

from pathlib import Path

from edgetune.cli.console import fail, stream_text, tell
from edgetune.errors import EdgetuneError
from edgetune.runtime.generate import Sampling, complete
from edgetune.runtime.session import open_session
from edgetune.tokenizer import load_tokenizer


def converse(
    bundle: Path, sampling: Sampling, *, threads: int | None, adapter: bool | str | Path, prepacked: Path | None = None
) -> None:
    """Answer line after line from the terminal until its end (Ctrl-D); with a chat template as one conversation."""
    session = open_session(bundle, threads=threads, adapter=adapter, prepacked=prepacked)
    tokenizer = load_tokenizer(bundle)
    chat = tokenizer.has_chat_template
    tell(
        "One conversation; Ctrl-D ends it."
        if chat
        else "No chat template: each line is continued on its own; Ctrl-D ends."
    )
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            continue
        prompt = line
        if chat:
            messages.append({"role": "user", "content": line})
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=not chat)
        try:
            answered = complete(session, tokenizer, ids, sampling, stream_text)
        except EdgetuneError as error:  # most likely a conversation that outgrew the context
            messages.clear()
            fail(error, False)
            continue
        print()
        messages.append({"role": "assistant", "content": answered.text})
