"""What a method says that it can do is what the README says, and every refusal names what to do instead."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest

from edgetune.adapters import METHODS
from edgetune.adapters.capabilities import Capabilities, table
from edgetune.errors import ExportError

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readme_has_the_table() -> None:
    assert table(METHODS) in README.read_text(encoding="utf-8"), f"README.md should have:\n\n{table(METHODS)}"


@pytest.mark.parametrize("method", METHODS)
def test_a_refusal_is_a_sentence(method: str) -> None:
    for reason in astuple(METHODS[method].CAPABILITIES):
        assert reason is None or (reason.endswith(".") and len(reason) > 40), reason


def test_what_a_method_lacks_is_refused_by_its_reason() -> None:
    lacks = Capabilities(merge="Its vectors fold into nothing. Export it without --merge.")
    lacks.require("as_lora", ExportError)
    with pytest.raises(ExportError, match=r"fold into nothing\. Export it without"):
        lacks.require("merge", ExportError)
