"""`edgetune adapter`: list, add, remove, choose and check the adapters of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli.console import answer, warnings_told
from edgetune.cli.flags import Bundle, Json
from edgetune.memory import format_mib

app = typer.Typer(
    help="The adapters of a bundle: list, add, remove, choose the default, check.", no_args_is_help=True,
    pretty_exceptions_enable=False, rich_markup_mode="rich",
)  # fmt: skip

Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter of the bundle.", show_default=False)]


@app.command("list")
def show(bundle: Bundle, *, as_json: Json = False) -> None:
    """List the adapters of a bundle; * marks the default.

    Example: edgetune adapter list bundle/
    """
    from edgetune.runtime.adapters import list_adapters

    found = list_adapters(bundle)
    answer(found, _table(found), as_json)


@app.command()
def add(
    bundle: Bundle,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A run/ or PEFT folder, or a .safetensors file of another bundle.",
            show_default=False,
        ),
    ],
    *,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What it is called in the bundle. (default: as SOURCE)", show_default=False),
    ] = None,
    default: Annotated[bool, typer.Option("--default", help="Use it where no adapter is named.")] = False,
    as_json: Json = False,
) -> None:
    """Add an adapter that was trained on the bundle's base; refused if it does not fit or changes nothing.

    Example: edgetune adapter add bundle/ run-mail/ --name mail
    """
    from edgetune.runtime.adapters import add_adapter, list_adapters

    with warnings_told():
        made = add_adapter(bundle, source, name=name, default=default)
    found, added = list_adapters(made), list(made.adapters)[-1]
    use = f"edgetune run {bundle}" + (f" --adapter {added}" if made.default_adapter != added else "")
    answer({"added": added, **found}, f"{_table(found)}\nadded {added}; use it with: {use}", as_json)


@app.command()
def remove(bundle: Bundle, name: Name, *, as_json: Json = False) -> None:
    """Take an adapter out of a bundle and delete its files. Without a default, the base is used alone.

    Example: edgetune adapter remove bundle/ mail
    """
    from edgetune.bundle import read_manifest
    from edgetune.runtime.adapters import list_adapters, remove_adapter

    was_default = read_manifest(bundle)["default_adapter"] == name
    found = list_adapters(remove_adapter(bundle, name))
    text = f"{_table(found)}\nremoved {name}"
    if was_default:
        text += ", which was the default: without --adapter the base alone is used now"
        if found["adapters"]:
            text += f". Choose another with: edgetune adapter default {bundle} {next(iter(found['adapters']))}"
    answer({"removed": name, "was_default": was_default, **found}, text, as_json)


@app.command()
def default(bundle: Bundle, name: Name, *, as_json: Json = False) -> None:
    """Choose the adapter that `run` uses where none is named.

    Example: edgetune adapter default bundle/ mail
    """
    from edgetune.runtime.adapters import list_adapters, set_default_adapter

    found = list_adapters(set_default_adapter(bundle, name))
    answer(found, _table(found), as_json)


@app.command()
def check(bundle: Bundle, *, as_json: Json = False) -> None:
    """Check every file of a bundle, and that each adapter fits and changes what the base says.

    Example: edgetune adapter check bundle/
    """
    from edgetune.runtime.adapters import check_adapters

    found = check_adapters(bundle)
    answer(found, f"{_table(found)}\nall of it is right", as_json)


def _table(found: Mapping[str, Any]) -> str:
    """`list_adapters` for people."""
    if not found["adapters"]:
        return f"{found['bundle']} has no adapter"
    lines = [f"  {'NAME':<20} {'RANK':>4} {'ALPHA':>6} {'SLOTS':>5} {'SIZE':>10}  LARGEST CHANGE OF A LOGIT"]
    lines += [
        f"{'*' if name == found['default'] else ' '} {name:<20} {a['r']:>4} {a['lora_alpha']:>6g} {a['slots']:>5} "
        f"{format_mib(a['bytes']):>10}  {a['probe_change']:.1%} of the largest"
        for name, a in found["adapters"].items()
    ]
    return "\n".join(lines)
