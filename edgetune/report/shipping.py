"""The part of a report that a bundle gives: what it holds, whether it computes what was trained, how fast it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edgetune.benchmark.plots import plots
from edgetune.benchmark.results import results_path
from edgetune.benchmark.tables import place, tables, when
from edgetune.bundle import MANIFEST
from edgetune.charts import Line, line_chart
from edgetune.errors import BundleError
from edgetune.memory import format_mib
from edgetune.report.artifacts import BundleFiles
from edgetune.report.blocks import Block, Card, Drawing, Missing, Section, Table, Text, mib, number, shown

_NOTES = {
    "latency": "Percentiles over every generated token of all runs.",
    "memory": "The kernel's figures for the measured process, from its first line on.",
    "soak": "Gaps are intervals in which no pass ended.",
    "soak-memory": "A line that keeps rising would be a leak.",
}
# What a parity figure says: of a decoder's logits, or of an encoder's hidden states and embeddings.
_AGREEMENTS = (
    ("largest difference of a logit", "max_abs_logit", "{:.2g}"),
    ("the likeliest token is the same", "top1_agreement", "{:.2%}"),
    ("KL divergence", "kl", "{:.2g}"),
    ("largest difference of a hidden state", "max_abs_hidden", "{:.2g}"),
    ("least cosine of an embedding", "min_cosine", "{:.6f}"),
)


def bundle_cards(bundle: BundleFiles) -> list[Card]:
    """The figures of a bundle that count."""
    parity, result = bundle.manifest["parity"], bundle.benchmark
    agreement, detail = shown(number(parity, "top1_agreement"), "{:.2%}"), "same likeliest token"
    if _is_encoder(bundle):
        agreement, detail = shown(number(parity, "min_cosine"), "{:.6f}"), "least cosine"
    cards = [
        Card("Bundle", format_mib(_size(bundle)), "measured", f"{bundle.manifest['weights']} weights"),
        Card("Parity with torch", agreement, "measured", detail),
    ]
    if result is not None:
        cards += [
            Card(
                "Generation", shown(number(result, "generation_tokens_per_second"), "{:,.1f} tokens/s"), "measured",
                "on this machine",
            ),
            Card(
                "First token", shown(number(result, "time_to_first_token_ms"), "{:,.1f} ms"), "measured",
                f"after {result.get('prompt_tokens')} tokens",
            ),
            Card("Memory in use", mib(number(result, "peak_memory_bytes")), "measured", "anonymous + swap"),
        ]  # fmt: skip
    return cards


def bundle_sections(bundle: BundleFiles) -> Iterator[Section]:
    """Everything that a bundle's manifest and its benchmark hold. Raises BundleError where one is damaged."""
    yield Section("Parity and rounding", list(_parity(bundle)))
    yield from _benchmark(bundle)


def bundle_details(bundle: BundleFiles) -> Section:
    """Contents, files, versions and hashes. Raises as `bundle_sections`."""
    return Section("In the bundle", [*_contents(bundle), _versions(bundle)])


def _versions(bundle: BundleFiles) -> Table:
    rows = [("", ""), ("edgetune", bundle.manifest["edgetune_version"])]
    rows += [(name, str(value)) for name, value in bundle.manifest["versions"].items()]
    rows += [(name, str(bundle.manifest[name])) for name in ("base_sha256", "tokenizer_sha256")]
    return Table("Versions and hashes", rows, folded=True, words=True)


def _is_encoder(bundle: BundleFiles) -> bool:
    return "pooling" in bundle.manifest["model"]


def _size(bundle: BundleFiles) -> float:
    return sum(number(file, "bytes") or 0 for file in bundle.manifest["files"].values())


def _parity(bundle: BundleFiles) -> Iterator[Block]:
    parity, rounding, merge = (bundle.manifest[key] for key in ("parity", "rounding", "merge"))
    compared = {"fp32 compute": parity, "as it runs, int8 activations": parity.get("fast"), "rounding": rounding}
    found = {name: values for name, values in compared.items() if isinstance(values, dict)}
    rows = [("against torch on held-out rows", *found)]
    for name, key, pattern in _AGREEMENTS:
        figures = [number(values, key) for values in found.values()]
        if figures[0] is not None:
            rows.append((name, *(shown(figure, pattern) for figure in figures)))
    if len(rows) > 1:
        yield Table("", rows)
    else:
        yield Missing("The manifest has no parity.", "edgetune export run/ --out bundle/")
    if isinstance(rounding, dict) and number(rounding, "max_error_over_delta") is not None:
        ratio = rounding["max_error_over_delta"]
        yield Text(
            f"Rounding moved {rounding.get('worst_layer')} {ratio:.2f} times as far as training did, the most of any.",
            "bad" if ratio > 1 else "good",
        )
    if isinstance(merge, dict):
        yield from _sweep(merge)


def _sweep(merge: dict[str, Any]) -> Iterator[Block]:
    """The shares of the adapter that a merge measured."""
    rows = [row for row in merge.get("sweep") or [] if isinstance(row, dict)]
    sets = [name for name in ("task", "retention") if any(isinstance(row.get(name), dict) for row in rows)]
    alphas = [number(row, "alpha") or 0.0 for row in rows]
    lines = [Line(f"{name} loss", alphas, [number(row.get(name), "loss") for row in rows], dots=True) for name in sets]
    chart = line_chart(
        "Loss by how much of the adapter is merged", lines, x_name="alpha: 0 is the base, 1 as trained", from_zero=False
    )
    if chart is not None:
        yield Drawing(chart, f"{merge.get('alpha')} was merged ({merge.get('chosen_by')}).")


def _contents(bundle: BundleFiles) -> Iterator[Block]:
    manifest = bundle.manifest
    kind = "merged into the weights" if manifest["merged"] else ", ".join(manifest["adapters"]) or "none"
    model = manifest["model"]
    yield Table(
        "",
        [
            ("", ""),
            ("model", f"{model['model_type']}, {model['num_hidden_layers']} blocks of {model['hidden_size']}"),
            ("context", f"{model['max_position_embeddings']:,} tokens"),
            ("weights, grid", f"{manifest['weights']}, {manifest['grid'] or 'dense'}"),
            ("adapters", kind),
            ("default adapter", manifest["default_adapter"] or "none"),
        ],
        words=True,
    )
    files = sorted(manifest["files"].items(), key=lambda item: -(number(item[1], "bytes") or 0))
    yield Table("Files", [("file", "size"), *((name, mib(number(file, "bytes"))) for name, file in files)], folded=True)


def _benchmark(bundle: BundleFiles) -> Iterator[Section]:
    result = bundle.benchmark
    if _is_encoder(bundle):
        return  # which `bench` does not measure
    if result is None:
        yield Section(
            "Latency and memory on onnxruntime",
            [Missing("The bundle has not been benched.", f"edgetune bench {bundle.folder} --device host")],
        )
        return
    blocks: list[Block] = [Text(f"Measured on {place(result)}, {when(result)}.")]
    if bundle.stale:
        blocks.append(Missing("The bundle has changed since.", f"edgetune bench {bundle.folder} --device host"))
    blocks += [Drawing(chart, _NOTES[name]) for name, chart in plots(result).items()]
    blocks += [Table(name, rows) for name, rows in tables(result).items()]
    blocks += [Text(f"Note: {notice}.") for notice in result["notices"]]
    if result["soak"] is None:
        command = f"edgetune bench {bundle.folder} --device {result['device']} --soak 600"
        blocks.append(Missing("Whether the speed holds for minutes was not measured.", command))
    yield Section("Latency and memory on onnxruntime", blocks)


def damaged(bundle: BundleFiles, error: Exception) -> BundleError:
    """The error for figures that are not where their format has them."""
    files = f"{bundle.folder / MANIFEST} or {results_path(bundle.folder)}"
    return BundleError(
        f"{files} is damaged ({type(error).__name__}: {error}). Export the bundle again, and measure it with "
        f"`edgetune bench`"
    )
