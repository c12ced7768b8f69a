"""Training on the device: a bundle and rows in, an adapter out, on numpy and onnxruntime alone.

The bundle brings its training graphs (`export --with-training`); a run is conducted as the torch engine's is: the same
rows and windows, the same budget, checkpoints and exact resume, the same run folder. At its end the adapter goes into
the bundle, as the one that is used, where it does not do worse on the held-out rows than what was used before; that
stays in the bundle and can be chosen again.

Left out: dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.adapter_file import by_linear, is_name
from edgetune.adapters.config import AdapterConfig
from edgetune.bundle import Bundle, load_bundle
from edgetune.memory import Meter, trim_allocator
from edgetune.personalizer.graphs import Adapter, TrainingGraphs, read_description
from edgetune.personalizer.job import make_plan, old_plan, sliced
from edgetune.personalizer.trainer import OrtTrainer
from edgetune.planner.plans import Plan, TrainConfig
from edgetune.runtime.adapters import add_adapter
from edgetune.training.conduct import conduct_run
from edgetune.training.inputs import Inputs, read_inputs
from edgetune.training.progress import Progress
from edgetune.training.run import SUMMARY, Run, write_json

__all__ = ["personalize"]


def personalize(
    bundle: Bundle | str | Path,
    *,
    data: str | Path,
    out: str | Path,
    eval_data: str | Path | None = None,
    adapter: AdapterConfig | None = None,
    config: TrainConfig | None = None,
    device: str | Path = "host",
    budget: str | int = "foreground",
    enforce: str = "governor",
    one_slice: bool = False,
    slice_seconds: int | None = None,
    grace_seconds: float | None = None,
    accept_worse: bool = False,
    resume: bool = False,
    force: bool = False,
    skip_bad: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train a new adapter for a bundle, write a run folder, and put the adapter into the bundle.

    Args:
        bundle: a bundle that was exported with training graphs, or its folder.
        data: rows to learn from, JSON Lines.
        out: the run folder.
        eval_data: rows to evaluate on; None holds back `eval_fraction` of the data.
        adapter: the adapter that is wanted.
        config: the training that is wanted. One window at a time where it does not say.
        device: the profile whose budget, threads and slice count.
        budget: "foreground", "background", or MiB as an int.
        enforce: as for `train`.
        one_slice: stop at the end of the device's longest uninterrupted run; `resume` goes on.
        slice_seconds: such a run is that long; implies `one_slice`. None is the profile's.
        grace_seconds: from its end to the kill, in which checkpoint and adapter are written. None is the profile's.
        accept_worse: use the adapter even if the held-out loss is worse than before, or was not measured.
        resume: go on where the folder's last checkpoint stands, as it was planned.
        force: replace what an earlier run left in the folder.
        skip_bad: leave bad rows out, up to 1 %.
        on_progress: called after every step.

    Returns:
        The run. `summary["adopted"]` is the adapter's name in the bundle, None where the bundle is as it was.

    Raises:
        BundleError: the bundle is damaged, cannot be written, or has no training graphs.
        ConfigError: a setting is out of range or cannot be trained by graphs, or the folder exists.
        DataError, CheckpointError: as `train` raises them.
        AdapterError: what was trained changes nothing.
    """
    trim_allocator()
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    plan = old_plan(out) if resume else make_plan(
        bundle, data=data, eval_data=eval_data, adapter=adapter, config=config, device=device, budget=budget,
        skip_bad=skip_bad,
    )  # fmt: skip
    return run_plan(
        sliced(plan, slice_seconds, grace_seconds), bundle, data=data, out=out, eval_data=eval_data, enforce=enforce,
        one_slice=one_slice or slice_seconds is not None,
        accept_worse=accept_worse, resume=resume, force=force, skip_bad=skip_bad, on_progress=on_progress,
    )  # fmt: skip


def run_plan(
    plan: Plan, bundle: Bundle | str | Path, *, data: str | Path, out: str | Path, eval_data: str | Path | None,
    enforce: str, one_slice: bool, accept_worse: bool, resume: bool, force: bool, skip_bad: bool,
    on_progress: Callable[[Progress], None] | None,
) -> Run:  # fmt: skip
    """`personalize` from its plan on: for a process that holds nothing else."""
    trim_allocator()
    bundle = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)

    def read() -> Inputs:
        rows = Path(data), None if eval_data is None else Path(eval_data)
        return read_inputs(plan, bundle.folder, bundle.manifest["base_sha256"], *rows, skip_bad)

    run = conduct_run(
        plan, Path(out), read, OrtTrainer, resume=resume, force=force, enforce=enforce, one_slice=one_slice,
        on_progress=on_progress,
    )  # fmt: skip
    if run.stopped == "done" and run.summary["adopted"] is None:
        _adopt(bundle, run, accept_worse=accept_worse)
    return run


def _adopt(bundle: Bundle, run: Run, *, accept_worse: bool) -> None:
    """Make the run's adapter the one that the bundle uses, unless the held-out loss speaks against it."""
    summary = run.summary
    before, after = summary["active_loss"], summary["eval_loss"]
    if not accept_worse and (before is None or after is None or after > before):
        return
    name = _free_name(bundle, run.folder.resolve().name.lower())
    arena = summary["arena_bytes"]  # that of the run is there still
    graphs = TrainingGraphs(read_description(bundle), summary["threads"], summary["optimizer"], arena)

    def probe_change(tensors: dict[str, np.ndarray]) -> float:
        """Without the inference graph, which packs its weights anew: it may not fit beside what trained."""
        adapter = Adapter(graphs.model, by_linear(tensors, bundle.slots), 1.0)
        found = graphs.probe_change(bundle.probe_rows, adapter)
        graphs.release()
        return found

    with Meter() as meter:
        add_adapter(bundle.folder, run, name=name, default=True, probe_change=probe_change)
    peaks = {
        "measured_peak_bytes": max(summary["measured_peak_bytes"], meter.peak_bytes),
        "measured_peak_rss_bytes": max(summary["measured_peak_rss_bytes"], meter.peak_rss_bytes),
    }
    write_json(run.folder / SUMMARY, summary | peaks | {"adopted": name})


def _free_name(bundle: Bundle, wanted: str) -> str:
    """The name, or with the first number from 2 on that is not taken."""
    stem = wanted if is_name(wanted) else "personal"
    names: Any = (stem if number == 1 else f"{stem[:58]}-{number}" for number in range(1, len(bundle.adapters) + 2))
    return str(next(name for name in names if name not in bundle.adapters))
