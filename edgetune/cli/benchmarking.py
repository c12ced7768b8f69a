"""`edgetune bench` and `edgetune report`: measure a bundle, and show what a run and a bundle came to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli.console import answer, tell
from edgetune.cli.flags import Bundle, Device, Json
from edgetune.errors import GateError


def _lengths(text: str) -> tuple[int, ...]:
    """`16,128,512`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 9 for part in parts):
        raise typer.BadParameter(f"{text!r} is not a list of lengths; write 16,128,512")
    return tuple(int(part) for part in parts)


def bench(
    bundle: Bundle,
    *,
    device: Device,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            "--prompt-tokens", metavar="LIST", show_default=False,
            help="Lengths of the prompt, cut to the context. (default: 16,128,512)",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to generate after each prompt.")] = 64,
    runs: Annotated[int, typer.Option("--runs", help="Measured runs of each length, after one to warm up.")] = 5,
    soak: Annotated[
        float, typer.Option("--soak", metavar="SECONDS", help="Then generate for so long: whether the speed holds.")
    ] = 0,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare", metavar="BUNDLE", help="Another bundle, measured in turns with this one.", show_default=False
        ),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if", metavar="GATE", show_default=False,
            help="Exit with 1 where this holds, such as 'generation_tokens_per_second<20'; may be repeated.",
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="Write the tables as Markdown.", show_default=False),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", metavar="FOLDER", help="Write the plots as SVG.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", show_default=False,
            help="Where the JSON is kept, for report. (default: BUNDLE-bench.json beside the bundle)",
        ),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a bundle on this machine and judge it against a device's targets.

    What was measured here passes or fails only for `host`; for another device it is predicted, and says so.

    Example: edgetune bench bundle/ --device pixel-watch-3 --fail-if "p99_ms>50"
    """
    from edgetune import benchmark
    from edgetune.benchmark import results, tables

    lengths = None if prompt_tokens is None else _lengths(prompt_tokens)
    result = benchmark.bench(
        bundle, device, prompt_tokens=lengths, new_tokens=new_tokens, runs=runs, soak=soak, compare=compare,
        fail_if=fail_if or (), say=tell,
    )  # fmt: skip
    results.save_results(result, out or results.results_path(bundle))
    if markdown is not None:
        results.write_text(markdown, tables.markdown(result))
    if plots is not None:
        from edgetune.benchmark.plots import save_plots

        save_plots(result, plots)
    try:
        benchmark.check_gates(result)
    except GateError as error:
        name = type(error).__name__
        answer(result | {"error": name, "message": str(error)}, benchmark.explain(result), as_json)
        tell(f"{name}: {error}")
        raise typer.Exit(1) from error
    answer(result, benchmark.explain(result), as_json, following=("report", bundle))


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER…", help="A run/, a bundle/, or a run and its bundle.", show_default=False),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", show_default=False,
            help="The page to write. (default: FOLDER-report.html beside the first folder)",
        ),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Write one HTML page on a run, its bundle and their benchmark, with plots. It asks the network for nothing.

    Example: edgetune report run/ bundle/ --out report.html
    """
    from edgetune.report import write_report

    path = write_report(*folders, out=out)
    answer({"report": str(path), "report_bytes": path.stat().st_size}, str(path), as_json)
