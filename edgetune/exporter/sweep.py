"""How much of an adapter is merged: held-out metrics on the way from the base to the adapter as it was trained.

    W(alpha) = W + alpha * scaling * B A          alpha = 0 is the base, alpha = 1 the adapter as trained

Weights between a model and its fine-tuned self often keep what the first could do at little cost to what the second
learned (WiSE-FT, Wortsman et al., arXiv 2109.01903). Every row of the sweep is measured on a graph that is written and
rounded as the bundle would be, on the kernels that a device runs; one graph lies on the disk at a time.

With rows of what the base could do already (the retention set), the alpha with the least sum of both losses is chosen,
the new task weighing as much as the old. Without them there is nothing to weigh, and the adapter stays as it was
trained. The choice is made on the rows that it is reported on, so its figures flatter it a little.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgetune.bundle import DATA, MODEL
from edgetune.exporter import agreement, parity
from edgetune.exporter.job import Adapter, Job
from edgetune.exporter.merging import RoundedWeights
from edgetune.graphs.decoder import decoder_graph

ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def choose_alpha(job: Job, adapter: Adapter, alpha: float | None, work: Path) -> dict[str, Any]:
    """The manifest's `merge`: the adapter's config, the chosen `alpha`, what it was `chosen_by`, and the `sweep`.

    `alpha` is the user's choice; then the sweep has it and the base alone. Each row holds its alpha and, for the new
    `task` and the `retention` set, mean loss in nats, token accuracy and positions; None where there are no rows.
    """
    rows = []
    if job.rows or job.retention:
        between = ALPHAS if adapter.method.CAPABILITIES.merge_share is None else (0.0, 1.0)
        rows = [_measure(job, adapter, at, work) for at in (between if alpha is None else (0.0, alpha))]
    chosen, chosen_by = alpha, "user"
    if chosen is None and job.retention:
        chosen, chosen_by = _least_loss(rows), "least sum of task and retention loss"
    elif chosen is None:
        chosen, chosen_by = 1.0, "as trained"
    return {"adapter": asdict(adapter.config), "alpha": chosen, "chosen_by": chosen_by, "sweep": rows}


def _least_loss(rows: Sequence[dict[str, Any]]) -> float:
    """The alpha above 0 with the least sum of both losses, the largest of several."""
    merged = sorted((row for row in rows if row["alpha"]), key=lambda row: -row["alpha"])
    best = min(merged, key=lambda row: row["task"]["loss"] + row["retention"]["loss"])
    return float(best["alpha"])


def _measure(job: Job, adapter: Adapter, alpha: float, work: Path) -> dict[str, Any]:
    """One row: the graph is written, run and removed."""
    config, folder = job.decoder.config, work / "sweep"
    source = RoundedWeights(job.decoder, job.weights, adapter.weakened(alpha) if alpha else None, merge=True)
    folder.mkdir()
    builder = decoder_graph(source, data_file=DATA, context_length=job.context_length, contrib=job.contrib)
    builder.save(folder, MODEL)
    parity.check_loads(folder / MODEL)
    graph = parity.Graph(folder / MODEL, config, {}, fp32_compute=False)
    result: dict[str, Any] = {"alpha": alpha}
    for name, rows in (("task", job.rows), ("retention", job.retention)):
        _, held_out = agreement.probes(rows, config.vocab_size, job.context_length)
        result[name] = parity.task_metric(graph, held_out, folder / "logits") if held_out else None
    shutil.rmtree(folder)
    return result
