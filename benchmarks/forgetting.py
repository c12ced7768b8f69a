"""What stories260k forgets of its stories while it learns tinyshakespeare, and what helps against that.

    plain       LoRA r=8 on all linears, int4 base
    patience    the same with --early-stopping-patience 2
    mixed       --retention-data, of another part of the stories than the judged ones: a quarter of every step
    kl          --kl-data, the same stories as texts that nobody labelled, at each of some --kl-weight
    few         plain on FEW rows of the play, which it soon knows by heart; with and without that patience
    alpha       plain's adapter at a part of its strength, as `export --merge --alpha` folds it in

For each the loss on held-out pieces of Shakespeare (the last tenth of the text) and on stories (retention), in nats per
token with 95 % intervals, and by how much each changed against the base: new-task gain and retention loss.

Run: python benchmarks/forgetting.py [--steps 200]          (EDGETUNE_REAL names the folder of models and texts)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import about, real

import edgetune as et
from edgetune.adapters.attach import attach, load_tensors
from edgetune.adapters.base import load_adapter
from edgetune.data import Row, read_rows
from edgetune.evaluation.metrics import Answers, difference, summarize
from edgetune.evaluation.scoring import Scorer
from edgetune.models.decoder import load_decoder
from edgetune.tokenizer import load_tokenizer

PIECE, CONTEXT, POSITIONS = 480, 256, 8 * 256
TRAINING, HELD_OUT = slice(0, 1_000_000), slice(1_000_000, 1_100_000)
REHEARSED, RETAINED = slice(0, 1_000_000), slice(1_500_000, 1_600_000)  # of the stories
ALPHAS = (0.25, 0.5, 0.75)
KL_WEIGHTS = (0.3, 1.0, 3.0)
FEW = 64


def pieces(text: str, part: slice, step: int = PIECE) -> list[str]:
    return [text[at : at + PIECE] for at in range(part.start, min(part.stop, len(text) - PIECE), step)]


def write_rows(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def losses(base: Path, rows: Sequence[Row], run: et.Run | None = None, alpha: float = 1.0) -> Answers:
    decoder = load_decoder(base)
    if run is not None:
        config, tensors = load_adapter(run.folder, decoder.config)
        assert isinstance(config, et.LoraConfig) and config.lora_alpha is not None
        load_tensors(attach(decoder, replace(config, lora_alpha=alpha * config.lora_alpha)), tensors)
    nll, _ = Scorer(decoder, POSITIONS).tokens(rows)
    return Answers(nll, np.array([row.num_supervised for row in rows]), None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    play = (real("tinyshakespeare") / "input.txt").read_text(encoding="utf-8")
    stories = (real("tinystories") / "tinystories.txt").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = et.quantize(real("stories260k"), "int4", folder / "base")
        learned = pieces(play, TRAINING)
        data = write_rows(folder / "data.jsonl", learned)
        few = write_rows(folder / "few.jsonl", learned[:: len(learned) // FEW][:FEW])
        old = write_rows(folder / "rehearsed.jsonl", pieces(stories, REHEARSED)[: len(learned) // 3])
        judged = {
            "new": write_rows(folder / "new.jsonl", pieces(play, HELD_OUT, 2 * PIECE)),
            "retention": write_rows(folder / "old.jsonl", pieces(stories, RETAINED, 2 * PIECE)),
        }
        tokenizer = load_tokenizer(base)
        rows = {key: list(read_rows(path, tokenizer, CONTEXT)) for key, path in judged.items()}
        wishes = et.TrainConfig(
            batch_size=8, gradient_accumulation_steps=1, max_seq_length=CONTEXT, max_steps=steps, learning_rate=1e-2
        )
        settings: dict[str, tuple[dict[str, Any], dict[str, Path]]] = {
            "plain": ({}, {}),
            "patience": ({"early_stopping_patience": 2}, {}),
            "few": ({}, {"data": few}),
            "few patience": ({"early_stopping_patience": 2}, {"data": few}),
            "mixed": ({"retention_share": 0.25}, {"retention_data": old}),
            **{f"kl {weight}": ({"kl_weight": weight}, {"kl_data": old}) for weight in KL_WEIGHTS},
        }
        runs = {}
        for key, (changes, files) in settings.items():
            read = {"data": data, "eval_data": judged["new"], **files}
            plan = et.plan(base, "host", adapter=et.LoraConfig(r=8), config=replace(wishes, **changes), **read)
            runs[key] = et.train(plan, base, out=folder / key, enforce="none", **read)
        ways: dict[str, tuple[et.Run, float]] = {key: (run, 1.0) for key, run in runs.items()}
        ways |= {f"alpha {alpha}": (runs["plain"], alpha) for alpha in ALPHAS}
        before = {key: losses(base, some) for key, some in rows.items()}
        found: dict[str, Any] = {
            "base": {key: summarize(answers, None, None, 0)["loss"] for key, answers in before.items()}
        }
        for key, (run, alpha) in ways.items():
            after = {part: losses(base, some, run, alpha) for part, some in rows.items()}
            found[key] = {part: summarize(answers, None, None, 0)["loss"] for part, answers in after.items()} | {
                "new_task_gain": difference("loss", after["new"], before["new"], None),
                "retention_loss": difference("loss", before["retention"], after["retention"], None),
                "steps": run.summary["steps"],
                "stopped": run.stopped,
            }
    print(json.dumps({"steps": steps, "losses": found} | about(), indent=1))


if __name__ == "__main__":
    main()
