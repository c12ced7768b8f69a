"""The same bundle on aarch64: the clients of `examples/python` on emulated cores of three ages, against this machine.

Needs Debian's apt and qemu-user-static, and pip. The script unpacks Debian's arm64 Python and the aarch64 wheels of
numpy and of this machine's onnxruntime into `--work`, trains an adapter on the packaged sample for some steps, and
exports it with each kind of weights. It shows that the bundle computes the same on the instruction set, and that one
with training graphs trains there with the same losses. The speed of an emulated core says nothing about a real one, so
none is printed.

qemu-user lets /proc/cpuinfo of this machine through, and onnxruntime from 1.28 on dies on it at import (its cpuinfo
library finds no ARM core there). The unpacked system gets a cpuinfo of its own, which qemu prefers, as the core has it.

Run: python benchmarks/arm64.py --work /tmp/arm64        (once apt-get install qemu-user-static; some 250 MB of disk)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from machine import REPOSITORY, about

import edgetune as et
from edgetune import sample
from edgetune.adapter_file import read_adapter
from edgetune.data.prompts import read_examples
from edgetune.tokenizer import load_tokenizer

CLIENTS = REPOSITORY / "examples" / "python"
QEMU = "qemu-aarch64-static"
# A core of qemu, and its part number in /proc/cpuinfo. A53: neither dot products nor fp16 arithmetic (watches, small
# boards). A76: both (phones from 2019 on, Raspberry Pi 5). max: all that qemu knows, i8mm and SVE too, called an A710.
CORES = {"cortex-a53": "0xd03", "cortex-a76": "0xd0b", "max": "0xd47"}
WEIGHTS = ("int4", "int8", "int8-dynamic", "fp16", "fp32", "standard")  # what an int4 base is exported as
PACKAGES = ("python3", "libstdc++6")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")
MAX_NEW_TOKENS = 48
LOSS_TOLERANCE = 1e-3


def call(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def once(folder: Path, unpack: Callable[[Path], None]) -> None:
    """Fill a folder, unless an earlier run did."""
    if not folder.exists():
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        unpack(temporary)
        temporary.rename(folder)


def unpack_system(folder: Path) -> None:
    """Python and what it needs for arm64, by apt with a state of its own and dpkg -x: nothing is installed here."""
    state = folder / "apt"
    for part in ("lists/partial", "cache/archives/partial"):
        (state / part).mkdir(parents=True)
    (state / "status").touch()
    options = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Sandbox::User": "root",
        "Dir::State": state, "Dir::State::status": state / "status", "Dir::Cache": state / "cache",
        "Debug::NoLocking": "1",
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    call(*apt, "update")
    call(*apt, "--yes", "--no-install-recommends", "--download-only", "install", *PACKAGES)
    for package in sorted((state / "cache" / "archives").glob("*.deb")):
        call("dpkg", "-x", package, folder)
    shutil.rmtree(state)


def unpack_wheels(folder: Path, python: str) -> None:
    flags = [f"--platform={tag}" for tag in PLATFORMS]
    call(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", *flags,
        f"--python-version={python}", "--implementation=cp", "--target", folder,
        f"onnxruntime=={onnxruntime.__version__}", "numpy",
    )  # fmt: skip


class Board:
    """An emulated aarch64 machine with Python, numpy and onnxruntime, unpacked once into a folder."""

    def __init__(self, work: Path) -> None:
        self.root, self.site = work / "system", work / f"onnxruntime-{onnxruntime.__version__}"
        once(self.root, unpack_system)
        self.python = (self.root / "usr" / "bin" / "python3").resolve()
        once(self.site, lambda folder: unpack_wheels(folder, self.python.name.removeprefix("python")))

    def command(self, core: str) -> list[str | Path]:
        """Start its Python as on this core."""
        lines = {"CPU implementer": "0x41", "CPU architecture": "8", "CPU variant": "0x0", "CPU part": CORES[core]}
        text = "".join(f"{key}\t: {value}\n" for key, value in {**lines, "CPU revision": "1"}.items())
        cpuinfo = self.root / "proc" / "cpuinfo"
        cpuinfo.parent.mkdir(exist_ok=True)
        # One for each core of this machine: /sys is its own.
        entries = (f"processor\t: {i}\n{text}\n" for i in range(os.cpu_count() or 1))
        cpuinfo.write_text("".join(entries), encoding="utf-8")
        environment = ["-E", f"PYTHONHOME={self.root / 'usr'}", "-E", f"PYTHONPATH={self.site}"]
        return [QEMU, "-cpu", core, "-L", self.root, *environment, self.python]


def run_client(
    python: list[str | Path], machine: str, bundle: Path, prompts: list[list[int]], adapter: bool
) -> list[np.ndarray]:
    """For each prompt the logits [tokens, vocab_size] that the client took its tokens from."""
    file = bundle.with_name("logits.npy")
    flags = ["--max-new-tokens", str(MAX_NEW_TOKENS), "--logits", file, *([] if adapter else ["--no-adapter"])]
    logits = []
    for prompt in prompts:
        printed = json.loads(call(*python, CLIENTS / "run_bundle.py", bundle, *flags, "--ids", *map(str, prompt)))
        assert (printed["machine"], printed["onnxruntime"]) == (machine, onnxruntime.__version__)
        logits.append(np.load(file))
        assert printed["tokens"] == logits[-1].argmax(1).tolist()
    return logits


def compare(wanted: list[np.ndarray], found: list[np.ndarray]) -> dict[str, Any]:
    """Tokens that are equal up to the first that is not, over prompts, and how far their logits lie apart."""
    equal = 0
    difference = largest = 0.0
    for here, there in zip(wanted, found, strict=True):
        shorter = min(len(here), len(there))
        unequal = np.flatnonzero(here[:shorter].argmax(1) != there[:shorter].argmax(1))
        same = int(unequal[0]) if unequal.size else shorter
        equal += same
        seen = slice(0, same + 1)  # the first other token is taken from the same sequence still
        difference = max(difference, float(np.abs(here[:shorter] - there[:shorter])[seen].max()))
        largest = max(largest, float(np.abs(here).max()))
    tokens = sum(map(len, wanted))
    return {"tokens": tokens, "equal_tokens": equal, "max_abs_logit_difference": difference, "max_abs_logit": largest}


def make_bundles(work: Path, weights: list[str], steps: int) -> dict[str, Path]:
    """The sample with an adapter that was trained for some steps, in each kind of weights."""
    config = et.TrainConfig(max_steps=steps, learning_rate=3e-3)
    lora = et.LoraConfig(r=8)
    base = et.quantize(sample.BASE, grid="int4", out=work / "base", force=True)
    plan = et.plan(base, "host", data=sample.PERSONAL_TRAIN, adapter=lora, config=config)
    run = et.train(plan, base, data=sample.PERSONAL_TRAIN, out=work / "run", force=True)
    bundles = {kind: work / f"bundle-{kind}" for kind in weights}
    for kind, folder in bundles.items():
        # So short a training changes less than rounding does; what is compared here is one bundle with itself.
        et.export(run, out=folder, weights=kind, accept_loss=True, force=True)
    return bundles


def write_windows(work: Path, bundle: Path, length: int) -> Path:
    """The sample's personal rows as the client that trains takes them."""
    path = work / "windows.json"
    flags = ["--max-seq-length", str(length), "--out", path]
    call(sys.executable, CLIENTS / "write_windows.py", bundle, sample.PERSONAL_TRAIN, *flags)
    return path


def train_client(python: list[str | Path], bundle: Path, windows: Path, steps: int) -> tuple[list[float], np.ndarray]:
    """The loss of each step, and every number of the adapter that it wrote."""
    out = bundle.with_name("trained.safetensors")
    flags = ["--out", out, "--steps", str(steps), "--learning-rate", "0.003", "--threads", "1"]
    printed = call(*python, CLIENTS / "train_bundle.py", bundle, windows, *flags).splitlines()
    tensors = read_adapter(out).tensors
    return [json.loads(line)["loss"] for line in printed], np.concatenate([v.reshape(-1) for v in tensors.values()])


def compare_training(work: Path, board: Board, cores: list[str], steps: int, length: int) -> list[dict[str, Any]]:
    """A row for each core: a bundle of the sample's base, trained from the same adapter there and here."""
    bundle = et.export(work / "base", out=work / "bundle-training", with_training=True, force=True).folder
    windows = write_windows(work, bundle, length)
    here, adapter = train_client([sys.executable], bundle, windows, steps)
    rows = []
    for core in cores:
        losses, tensors = train_client(board.command(core), bundle, windows, steps)
        rows.append({
            "trained": "int4", "core": core, "steps": steps, "first_loss": here[0], "last_loss": here[-1],
            "max_abs_loss_difference": float(np.abs(np.subtract(here, losses)).max()),
            "max_abs_adapter_difference": float(np.abs(adapter - tensors).max()),
            "max_abs_adapter": float(np.abs(adapter).max()),
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def read_prompts(bundle: Path, count: int) -> list[list[int]]:
    """Held-out requests as the chat template puts them."""
    tokenizer = load_tokenizer(bundle)
    examples = read_examples(sample.PERSONAL_EVAL, tokenizer)[:: 330 // count][:count]
    return [tokenizer.encode(example.prompt, add_special_tokens=False) for example in examples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="what is unpacked there is used again")
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    parser.add_argument("--cores", nargs="+", default=list(CORES), choices=CORES)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--max-steps", type=int, default=60)
    parser.add_argument("--train-steps", type=int, default=10, help="of the client that trains on each core")
    parser.add_argument("--max-seq-length", type=int, default=96, help="tokens of its windows")
    flags = parser.parse_args()
    missing = [name for name in (QEMU, "apt-get", "dpkg") if shutil.which(name) is None]
    if missing:
        sys.exit(
            f"{', '.join(missing)} not found. This needs Debian or a child of it: apt-get install qemu-user-static"
        )
    flags.work.mkdir(parents=True, exist_ok=True)
    work = flags.work.resolve()
    board = Board(work)
    rows = []
    for kind, bundle in make_bundles(work, flags.weights, flags.max_steps).items():
        prompts = read_prompts(bundle, flags.prompts)
        for adapter in (False, True):
            here = run_client([sys.executable], platform.machine(), bundle, prompts, adapter)
            for core in flags.cores:
                there = run_client(board.command(core), "aarch64", bundle, prompts, adapter)
                rows.append({"weights": kind, "core": core, "adapter": adapter, **compare(here, there)})
                print(json.dumps(rows[-1]), file=sys.stderr)
    trained = compare_training(work, board, flags.cores, flags.train_steps, flags.max_seq_length)
    qemu = call(QEMU, "--version").partition("\n")[0]
    result = {
        "claim": "correctness on the instruction set; an emulated core has no speed", "qemu": qemu, "rows": rows,
        "training": trained,
        "pass": all(row["equal_tokens"] == row["tokens"] for row in rows)
        and all(row["max_abs_loss_difference"] <= LOSS_TOLERANCE for row in trained),
    }  # fmt: skip
    print(json.dumps(result | about(), indent=1))


if __name__ == "__main__":
    main()
