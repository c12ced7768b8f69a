"""One HTML page on a run, its bundle and their benchmark: `edgetune report run/ bundle/`.

    artifacts    the files, read strictly
    training     sections of a run; shipping those of a bundle
    blocks       what sections are made of; page.html.jinja draws them

The page is one file that asks the network for nothing: no script, no font, no image, charts as inline SVG, and a policy
that forbids the rest. Every figure comes from a file; what no file holds is named with the command that makes it. All
text is escaped, because names of models and folders are whatever their owner likes.
"""

from __future__ import annotations

from pathlib import Path

from edgetune import __version__
from edgetune.benchmark.results import write_text
from edgetune.charts import STYLE
from edgetune.errors import ConfigError
from edgetune.report.artifacts import Artifacts, read_artifacts
from edgetune.report.blocks import Card, Missing, Section
from edgetune.report.shipping import bundle_cards, bundle_details, bundle_sections, damaged
from edgetune.report.training import run_cards, run_details, run_sections

__all__ = ["render", "report_path", "write_report"]

MARK = "<!doctype html>\n<!-- edgetune report -->"
_TEMPLATE = "page.html.jinja"


def write_report(*folders: str | Path, out: str | Path | None = None) -> Path:
    """Write the report on a run/, a bundle/, or a run and its bundle, to `out` or beside the first of them.

    An earlier report is replaced, another file is not.

    Raises:
        ConfigError: a folder is neither, they do not belong together, or `out` is another file or cannot be written.
        CheckpointError, BundleError: a file is missing, damaged or of a newer format.
    """
    if not folders:
        raise ConfigError("there is nothing to report on: name a run/, a bundle/, or both")
    path = report_path(folders[0]) if out is None else Path(out)
    if path.is_symlink() or (path.exists() and not _is_report(path)):
        raise ConfigError(f"{path} is there and is no report of edgetune, so it is not replaced. Choose another --out")
    page = render(read_artifacts(folders))
    write_text(path, page)
    return path


def report_path(folder: str | Path) -> Path:
    """Where a report is written by default: `run-report.html` beside `run/`."""
    absolute = Path(folder).absolute()
    return absolute.with_name(f"{absolute.name}-report.html")


def render(artifacts: Artifacts) -> str:
    """The page. Raises BundleError where figures of the bundle are not where their format has them."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    cards, sections = _content(artifacts)
    run, bundle = artifacts.run, artifacts.bundle
    names = [part.folder.absolute().name for part in (run, bundle) if part is not None]
    return environment.get_template(_TEMPLATE).render(
        mark=MARK, title=" and ".join(names), cards=cards, sections=sections, chart_style=STYLE, version=__version__,
        subject=run.plan.model if run is not None else "", device=run.plan.device if run is not None else "",
    )  # fmt: skip


def _content(artifacts: Artifacts) -> tuple[list[Card], list[Section]]:
    """Cards and sections in the order of the way through: train, export, run; then what is looked up."""
    run, bundle = artifacts.run, artifacts.bundle
    cards: list[Card] = []
    sections: list[Section] = []
    details: list[Section] = []
    if run is not None:
        cards += run_cards(run)
        sections += run_sections(run)
        details.append(run_details(run))
    elif bundle is not None:
        text = "No run was named, so memory and loss of training are not here."
        sections.append(Section("Training", [Missing(text, f"edgetune report RUN {bundle.folder}")]))
    if bundle is not None:
        try:
            cards += bundle_cards(bundle)
            sections += bundle_sections(bundle)
            details.append(bundle_details(bundle))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            # Their formats are checked at the top level, not figure by figure a second time.
            raise damaged(bundle, error) from error
    elif run is not None:
        text = "No bundle was named, so parity and latency are not here."
        command = f"edgetune export {run.folder} --out bundle/ && edgetune bench bundle/ --device {run.plan.device}"
        command += f" && edgetune report {run.folder} bundle/"
        sections.append(Section("Bundle", [Missing(text, command)]))
    return cards, sections + details


def _is_report(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(len(MARK)) == MARK
    except (OSError, ValueError):
        return False
