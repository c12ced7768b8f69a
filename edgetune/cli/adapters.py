"""`edgetune adapter`: list, add, remove, choose and check the adapters of a bundle; merge adapters into one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune.cli.console import answer, warnings_told
from edgetune.cli.flags import Bundle, Force, Json, Out
from edgetune.memory import format_mib

app = typer.Typer(
    help="The adapters of a bundle: list, add, remove, choose the default, check; merge several into one.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

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


def _weights(text: str) -> tuple[float, ...]:
    """`0.7,0.3`."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers; write 0.7,0.3") from None


@app.command()
def merge(
    adapters: Annotated[
        list[Path],
        typer.Argument(metavar="ADAPTER...", help="Run or PEFT folders of one base.", show_default=False),
    ],
    *,
    weights: Annotated[
        Any,
        typer.Option(
            "--weights",
            metavar="W,W…",
            parser=_weights,
            show_default=False,
            help="One number for each adapter, such as 0.7,0.3; 1,-1 subtracts.",
        ),
    ],
    out: Out,
    combination_type: Annotated[
        str,
        typer.Option(
            "--combination-type",
            help="cat (exact, ranks add up), svd (the best at one rank), linear, magnitude_prune, ties, dare_linear, "
            "dare_ties; each of the last four with _svd too. As PEFT's.",
        ),
    ] = "svd",
    density: Annotated[
        float | None,
        typer.Option("--density", help="For magnitude_prune, ties and dare: share of values kept.", show_default=False),
    ] = None,
    svd_rank: Annotated[
        int | None,
        typer.Option("--svd-rank", help="For svd: rank of the result. (default: the largest)", show_default=False),
    ] = None,
    majority_sign_method: Annotated[
        str, typer.Option("--majority-sign-method", help="For ties: total (by values) or frequency (by counts).")
    ] = "total",
    seed: Annotated[int, typer.Option("--seed", help="For dare: fixes which values are left out.")] = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make one adapter of several that were trained on the same base; a weight below zero subtracts.

    Example: edgetune adapter merge run-a/ run-b/ --weights 0.7,0.3 --combination-type ties --density 0.5 --out merged/
    """
    from edgetune.arithmetic import merge_adapters, read_merge

    folder = merge_adapters(
        adapters, weights, out=out, combination_type=combination_type, density=density, svd_rank=svd_rank,
        majority_sign_method=majority_sign_method, seed=seed, force=force,
    )  # fmt: skip
    made = read_merge(folder)
    size = sum(file["bytes"] for file in made["files"].values())
    text = (
        f"{folder}: {len(adapters)} adapters by {combination_type}, rank {made['r']} on {made['linears']} linears, "
        f"{format_mib(size)}; {made['relative_distance']:.1%} away from their weighted sum"
    )
    answer({"adapter": str(folder), "adapter_bytes": size, **made}, text, as_json,
           following=("adapter", "add", "BUNDLE", folder))  # fmt: skip


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
