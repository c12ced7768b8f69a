"""Limits that fail a benchmark: `generation_tokens_per_second<20` fails where it is true.

The grammar is one line, so there is nothing to evaluate:

    gate        =  key comparison number
    key         =  a name of `GATE_KEYS`, such as p99_ms or soak.sustained_ratio
    comparison  =  "<" | "<=" | ">" | ">=" | "==" | "!="
    number      =  a decimal such as 20, -0.5 or 1e6, in the unit of the key's name

A gate whose figure is unknown fails too: what was not measured did not pass.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgetune.errors import ConfigError, GateError

COMPARISONS = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne
}  # fmt: skip
_COMPARED = (
    "time_to_first_token_ms", "prompt_tokens_per_second", "generation_tokens_per_second", "p50_ms", "load_ms",
    "load_peak_bytes", "peak_memory_bytes",
)  # fmt: skip
# Every figure that a gate may name, by its path in the JSON of `bench`.
GATE_KEYS = (
    "load_ms", "check_ms", "cold_load_ms", "load_peak_bytes", "time_to_first_token_ms", "prompt_tokens_per_second",
    "generation_tokens_per_second", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "variation_percent", "peak_memory_bytes",
    "peak_rss_bytes", "peak_file_backed_bytes", "floor_bytes", "bundle_bytes", "adapter_overhead_percent",
    "predicted.time_to_first_token_ms", "predicted.generation_tokens_per_second",
    "predicted.sustained_tokens_per_second",
    "energy.mj_per_prompt", "energy.mj_per_token", "energy.battery_percent_per_1000_tokens", "energy.tokens_per_charge",
    "soak.burst_tokens_per_second", "soak.sustained_tokens_per_second", "soak.sustained_ratio",
    *(f"compare.{name}.ratio" for name in _COMPARED),
)  # fmt: skip
_GRAMMAR = re.compile(
    r"\s*(?P<key>[A-Za-z_][A-Za-z0-9_.]*)\s*(?P<comparison><=|>=|==|!=|<|>)"
    r"\s*(?P<limit>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*",
    re.ASCII,
)


@dataclass(frozen=True)
class Gate:
    """The benchmark fails where `key comparison limit` is true."""

    key: str
    comparison: str
    limit: float

    def __str__(self) -> str:
        return f"{self.key}{self.comparison}{self.limit:.15g}"

    def judge(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """`gate`, the `value` that was found, and `failed`."""
        value: Any = result
        for name in self.key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        failed = value is None or COMPARISONS[self.comparison](value, self.limit)
        return {"gate": str(self), "value": value, "failed": failed}


def parse_gate(text: str) -> Gate:
    """A gate from its text. Raises ConfigError where it is none, or its key is unknown."""
    found = _GRAMMAR.fullmatch(text)
    if found is None or not math.isfinite(float(found["limit"])):
        raise ConfigError(
            f"{text!r:.120} is no gate, expected KEY, one of {' '.join(COMPARISONS)}, and a number, such as "
            f"'generation_tokens_per_second<20', which fails where generation is slower"
        )
    key = found["key"]
    if key not in GATE_KEYS:
        close = difflib.get_close_matches(key[:100], GATE_KEYS, n=2, cutoff=0.6)
        meant = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"there is no figure {key[:100]!r} to gate.{meant} There are: {', '.join(GATE_KEYS)}")
    return Gate(key, found["comparison"], float(found["limit"]))


def parse_gates(texts: Iterable[str], *, soak: bool, compare: bool) -> list[Gate]:
    """Gates that this benchmark can judge. Raises ConfigError for a text that is none, or asks for what is not run."""
    gates = [parse_gate(text) for text in texts]
    for part, run in (("soak", soak), ("compare", compare)):
        for gate in gates:
            if gate.key.startswith(f"{part}.") and not run:
                raise ConfigError(f"the gate {gate} needs a figure of --{part}, which was not given; give it too")
    return gates


def check_gates(result: Mapping[str, Any]) -> None:
    """Raises GateError with a sentence for each gate that failed in a result of `bench`."""
    gates: Sequence[Mapping[str, Any]] = result["gates"]
    failed = [gate for gate in gates if gate["failed"]]
    if failed:
        listed = "\n".join(f"  {_sentence(gate)}" for gate in failed)
        raise GateError(f"{len(failed)} of {len(gates)} gates of {result['bundle']} failed:\n{listed}")


def _sentence(gate: Mapping[str, Any]) -> str:
    key = re.split("[<>=!]", gate["gate"])[0]
    if gate["value"] is None:
        return f"{key} is unknown here, so `{gate['gate']}` cannot be ruled out"
    return f"{key} is {gate['value']:,.6g}, and `{gate['gate']}` was to fail"
