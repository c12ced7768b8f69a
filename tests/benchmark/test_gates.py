from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.benchmark.gates import GATE_KEYS, Gate, check_gates, parse_gate, parse_gates
from edgetune.errors import ConfigError, GateError

MEANING = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne
}  # fmt: skip
keys, comparisons = st.sampled_from(GATE_KEYS), st.sampled_from(sorted(MEANING))
numbers = st.floats(allow_nan=False, allow_infinity=False)
spaces = st.sampled_from(["", " ", "  \t"])


@given(keys, comparisons, numbers, st.lists(spaces, min_size=4, max_size=4))
def test_what_is_written_is_what_is_read(key: str, comparison: str, limit: float, gaps: list[str]) -> None:
    text = f"{gaps[0]}{key}{gaps[1]}{comparison}{gaps[2]}{limit!r}{gaps[3]}"
    assert parse_gate(text) == Gate(key, comparison, limit)


@given(keys, comparisons, numbers, numbers)
def test_a_gate_fails_where_it_is_true(key: str, comparison: str, limit: float, value: float) -> None:
    result: Any = value
    for name in reversed(key.split(".")):
        result = {name: result}
    assert Gate(key, comparison, limit).judge(result)["failed"] == MEANING[comparison](value, limit)


@given(st.text(max_size=40))
def test_any_other_text_is_refused_and_never_evaluated(text: str) -> None:
    try:
        gate = parse_gate(text)
    except ConfigError:
        return
    assert gate.key in GATE_KEYS and gate.comparison in MEANING


@pytest.mark.parametrize(
    "text",
    [
        "", "p99_ms", "p99_ms<", "<20", "p99_ms<20<30", "p99_ms=20", "p99_ms=<20", "p99_ms<>20", "20<p99_ms",
        "p99_ms<x", "p99_ms<nan", "p99_ms<inf", "p99_ms<1e999", "p99_ms<0x10", "p99_ms<1_000",
        "p99_ms<20 MiB", "p99_ms<١٢",
        "__import__('os').system('true')<1", "p99_ms<20;load_ms<1", "p99_ms < 2 0", "p99_ms<--1",
    ],
)  # fmt: skip
def test_no_gate(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"is no gate, expected KEY, one of < <= > >= == != , and a number".replace(" ,", ",")
    ):
        parse_gate(text)


def test_an_unknown_key_lists_the_keys_and_the_one_meant() -> None:
    with pytest.raises(ConfigError) as found:
        parse_gate("generation_token_per_second<20")
    assert "there is no figure 'generation_token_per_second' to gate" in str(found.value)
    assert "Did you mean generation_tokens_per_second" in str(found.value)
    assert all(key in str(found.value) for key in GATE_KEYS)


@pytest.mark.parametrize("part", ["soak", "compare"])
def test_a_gate_on_what_is_not_run_is_refused_before_anything_is_measured(part: str) -> None:
    key = next(key for key in GATE_KEYS if key.startswith(f"{part}."))
    asked = {"soak": False, "compare": False}
    with pytest.raises(ConfigError, match=rf"{key}<1 needs a figure of --{part}"):
        parse_gates([f"{key}<1"], **asked)
    assert len(parse_gates([f"{key}<1"], **asked | {part: True})) == 1


def test_every_failing_gate_has_its_sentence() -> None:
    result: dict[str, Any] = {"bundle": "b/", "p99_ms": 12.5, "load_ms": 3, "adapter_overhead_percent": None}
    gates = parse_gates(["p99_ms>=12.5", "load_ms>3", "adapter_overhead_percent>16"], soak=False, compare=False)
    result["gates"] = [gate.judge(result) for gate in gates]
    with pytest.raises(GateError) as found:
        check_gates(result)
    assert str(found.value).splitlines() == [
        "2 of 3 gates of b/ failed:",
        "  p99_ms is 12.5, and `p99_ms>=12.5` was to fail",
        "  adapter_overhead_percent is unknown here, so `adapter_overhead_percent>16` cannot be ruled out",
    ]
    check_gates(result | {"gates": result["gates"][1:2]})
    with pytest.raises(GateError, match=r"^1 of 1 gates of b/ failed"):
        check_gates(result | {"gates": result["gates"][:1]})
