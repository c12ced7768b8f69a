"""What an adapter method can do. Each method file states it; refusals and the README's table are made from it.

A refusal is one sentence: why not, and what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import ModuleType

from edgetune.errors import EdgetuneError


@dataclass(frozen=True)
class Capabilities:
    """None where the method can; else the sentence that says why it cannot, and what to do instead."""

    train_torch: str | None = None
    train_ort: str | None = None
    peft_file: str | None = None
    as_lora: str | None = None
    merge: str | None = None
    merge_share: str | None = None
    own_inputs: str | None = None

    @property
    def only_merges(self) -> bool:
        """Whether a bundle holds it folded into the weights alone."""
        return self.merge is None and None not in (self.as_lora, self.own_inputs)

    def require(self, capability: str, error: type[EdgetuneError]) -> None:
        """Raises `error` with the method's sentence where it lacks the capability."""
        if (reason := getattr(self, capability)) is not None:
            raise error(reason)


HEADINGS = {
    "train_torch": "trains on torch",
    "train_ort": "trains on the device (ort)",
    "peft_file": "PEFT reads it",
    "as_lora": "export: LoRA inputs",
    "merge": "export: merged",
    "merge_share": "export: a share merged",
    "own_inputs": "export: own inputs",
}


def table(methods: Mapping[str, ModuleType]) -> str:
    """The README's table, in Markdown: a row for each method."""
    names = [field.name for field in fields(Capabilities)]
    head = ["method", *(HEADINGS[name] for name in names)]
    rows = [
        [f"`{method}`", *("yes" if getattr(module.CAPABILITIES, name) is None else "no" for name in names)]
        for method, module in methods.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"
