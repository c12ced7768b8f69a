"""The packaged sample: a small base model and one person's data, made by `sample/` in the repository from a seed.

The base turns an English request to a phone or a watch into one JSON action. The personal rows use words that it has
never seen: own contacts, places, devices, routines and log entries.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["BASE", "OWN_INTENTS_EVAL", "PERSONAL_EVAL", "PERSONAL_TRAIN"]

_HERE = Path(__file__).resolve().parent
BASE = _HERE / "base"  # a Llama folder as Hugging Face writes it, bf16
PERSONAL_TRAIN = _HERE / "personal_train.jsonl"
PERSONAL_EVAL = _HERE / "personal_eval.jsonl"  # no sentence template of it is in PERSONAL_TRAIN
OWN_INTENTS_EVAL = _HERE / "own_intents_eval.jsonl"  # requests that the base was trained for, in sentences it never saw
