"""The whole way on the packaged sample: quantize, plan, train, export, bench, and what it was good for.

Each verb runs as the command that it prints, in a process of its own. So the peak that is measured while training holds
what training needs and nothing that the demo needed before, and whoever reads along can type the same.

The adapter and the 4-bit base are then judged on onnxruntime by exact match of the whole JSON action: on phrasings of
the personal words that share no sentence template with the training rows, and on the base's own requests, which the
adapter must not have made worse. "base" and "tuned" are one bundle, without and with its adapter.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgetune import sample
from edgetune.bundle import explain
from edgetune.data.prompts import read_examples
from edgetune.errors import ConfigError, EdgetuneError
from edgetune.memory import format_mib
from edgetune.runtime.evaluate import exact_match
from edgetune.tokenizer import Tokenizer, load_tokenizer

__all__ = ["demo"]

DEVICE = "galaxy-watch-7"
# A rank and a rate above the usual ones: two million parameters learn by heart what larger models pick up.
TRAINING = {"r": 16, "learning-rate": 3e-3, "batch-size": 3}
MAX_STEPS = 1200
MAX_NEW_TOKENS = 80
SHOWN = 3  # requests that only the tuned model answers right

_FILES = {"personal": sample.PERSONAL_EVAL, "own_intents": sample.OWN_INTENTS_EVAL}
_FROM_TRAIN = (
    "predicted_peak_bytes", "measured_peak_bytes", "measured_peak_rss_bytes", "budget_bytes", "floor_bytes",
    "simulated", "enforcement", "stopped", "steps", "trainable_parameters", "adapter_bytes", "tokens_per_second",
)  # fmt: skip

Say = Callable[[str], None]
Miss = dict[str, str]  # prompt, wanted, got


def demo(
    device: str = DEVICE,
    *,
    out: str | Path | None = None,
    max_steps: int = MAX_STEPS,
    max_rows: int | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Run all of it and return the figures, ready for JSON.

    Args:
        device: id or TOML file of the profile whose budget and targets count.
        out: a new folder for base/, run/ and bundle/; None uses a temporary one, which is removed.
        max_steps: steps of training.
        max_rows: judge on the first so many rows of each file; None is all.
        say: takes each line for people.

    Raises:
        ConfigError: `out` exists and is not empty.
        EdgetuneError: a verb failed; the message is its own.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="edgetune-demo-") as temporary:
            return _Demo(Path(temporary), say).run(device, max_steps, max_rows)
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty. Choose another --out, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    result = _Demo(folder, say).run(device, max_steps, max_rows)
    say(f'\nYours to try: edgetune run {folder / "bundle"} --chat --prompt "put me through to my sister"')
    return result


class _Demo:
    """Stages that run one after the other in a folder; `seconds` holds how long each took."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self.say = say
        self.seconds: dict[str, float] = {}

    def run(self, device: str, max_steps: int, max_rows: int | None) -> dict[str, Any]:
        base, run, bundle = (str(self.folder / name) for name in ("base", "run", "bundle"))
        data = str(sample.PERSONAL_TRAIN)
        settings = ["--device", device, "--data", data, "--max-steps", str(max_steps)]
        settings += [word for name, value in TRAINING.items() for word in (f"--{name}", str(value))]
        start = time.perf_counter()

        plan = self._verb("plan", str(sample.BASE), *settings)
        self.say(
            f"  fits: predicted peak {format_mib(plan['predicted_peak_bytes'])} of {format_mib(plan['budget_bytes'])}, "
            f"{format_mib(plan['floor_bytes'])} of it before any model"
        )
        quantized = self._verb("quantize", str(sample.BASE), "--grid", plan["grid"], "--out", base)
        self.say(f"  {quantized['num_parameters']:,} weights in {format_mib(quantized['base_bytes'])}")
        trained = self._verb("train", base, *settings, "--out", run, show=True)
        exported = self._verb("export", run, "--out", bundle)
        self.say("  " + explain(exported))
        benched = self._verb("bench", bundle, "--device", device)
        judged = {name: self._judge(name, path, bundle, max_rows) for name, path in _FILES.items()}
        result = {
            "device": device,
            **{key: trained[key] for key in _FROM_TRAIN},
            "base_bytes": quantized["base_bytes"],
            **{key: exported[key] for key in ("bundle_bytes", "parity")},
            **{key: benched[key] for key in ("generation_tokens_per_second", "verdict")},
            **judged,
            "seconds": {**self.seconds, "all": round(time.perf_counter() - start, 1)},
        }
        self.say(summary(result))
        return result

    def _verb(self, verb: str, *words: str, show: bool = False) -> dict[str, Any]:
        """Run a verb as a child and return its JSON; `show` lets its progress through to this process's stderr."""
        self.say(f"\n$ edgetune {shlex.join([verb, *words])}")
        start = time.perf_counter()
        command = [sys.executable, "-m", "edgetune", verb, *words, "--json"]
        child = subprocess.run(command, stdout=subprocess.PIPE, stderr=None if show else subprocess.PIPE, text=True)
        self.seconds[verb] = round(time.perf_counter() - start, 1)
        lines = child.stdout.splitlines()
        result: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
        if child.returncode:
            why = result.get("message") or f"it ended with code {child.returncode}. {(child.stderr or '')[-500:]}"
            raise EdgetuneError(f"the demo stopped at `edgetune {verb}`: {why}")
        return result

    def _judge(self, name: str, path: Path, bundle: str, max_rows: int | None) -> dict[str, Any]:
        """Exact matches on the rows of a file, with the bundle's adapter and without."""
        examples = read_examples(path, load_tokenizer(bundle))[:max_rows]
        self.say(f"\nanswering {len(examples)} requests of {path.name} on onnxruntime, without the adapter and with it")
        start = time.perf_counter()
        before, after = (
            exact_match(bundle, examples, max_new_tokens=MAX_NEW_TOKENS, adapter=adapter) for adapter in (False, True)
        )
        self.seconds[f"judge_{name}"] = round(time.perf_counter() - start, 1)
        if name == "personal":
            self._show_examples(before["misses"], after["misses"], load_tokenizer(bundle))
        return {"base": before["correct"], "tuned": after["correct"], "total": len(examples), "misses": after["misses"]}

    def _show_examples(self, before: list[Miss], after: list[Miss], tokenizer: Tokenizer) -> None:
        """Some requests that the base answered wrong and the tuned model right."""
        still_wrong = {miss["prompt"] for miss in after}
        for miss in [miss for miss in before if miss["prompt"] not in still_wrong][:SHOWN]:
            request = tokenizer.decode(tokenizer.encode(miss["prompt"], add_special_tokens=False))
            self.say(f"  {request}\n    base   {miss['got']}\n    tuned  {miss['wanted']}")


def summary(result: Mapping[str, Any]) -> str:
    """The figures for people."""
    personal, own = result["personal"], result["own_intents"]

    def share(correct: int, total: int) -> str:
        return f"{correct}/{total} ({correct / total:.1%})"

    simulated = ", simulated on this machine" if result["simulated"] else ""
    return "\n".join([
        "",
        f"Exact actions on onnxruntime      {'base':>18} {'tuned':>18}",
        *(
            f"  {name:<31} {share(judged['base'], judged['total']):>18} {share(judged['tuned'], judged['total']):>18}"
            for name, judged in (("personal, new phrasings", personal), ("the base's own requests", own))
        ),
        f"Training peak     measured {format_mib(result['measured_peak_bytes'])}, "
        f"predicted {format_mib(result['predicted_peak_bytes'])}, budget {format_mib(result['budget_bytes'])} "
        f"of {result['device']}{simulated}",
        f"Bundle            {format_mib(result['bundle_bytes'])}, its adapter {format_mib(result['adapter_bytes'])}",
        f"Generation        {result['generation_tokens_per_second']:,.0f} tokens/s on this machine",
        "Seconds           " + ", ".join(f"{name} {value:g}" for name, value in result["seconds"].items()),
    ])  # fmt: skip
