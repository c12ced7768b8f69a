"""The flags of the command line: those that several verbs share, and one for each field of TrainConfig and of the
adapter methods' configs.

A verb marked with `takes_settings` declares `**settings` and gets the latter; `read_settings` turns what was typed into
the two configs. A flag that was not typed stays unset, so each default has one home, the dataclass, and the plan knows
what it may concede.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from edgetune.adapters import METHODS
from edgetune.adapters.config import AdapterConfig
from edgetune.errors import ConfigError
from edgetune.planner.plans import TrainConfig
from edgetune.planner.wishes import ORT_HAS, ORT_OPTIMIZERS

_Made = TypeVar("_Made")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, a base/ folder, or a Hub id such as HuggingFaceTB/SmolLM2-135M.",
        show_default=False,
    ),
]
Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle/ folder.", show_default=False)]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="ID", help="A profile's id, such as pixel-9, or your own TOML file.", show_default=False
    ),
]
Rows = Annotated[
    Path | None,
    typer.Option(
        "--data", metavar="FILE", show_default=False,
        help='Rows as JSON Lines: {"text"}, {"prompt","completion"}, {"messages"} or {"instruction","input","output"}; '
        'for dpo, orpo and reward {"prompt","chosen","rejected"}, for kto {"prompt","completion","label"}, for '
        'classification and regression {"text","label"}.',
    ),
]  # fmt: skip
EvalRows = Annotated[
    Path | None,
    typer.Option("--eval-data", metavar="FILE", help="Held-out rows. (default: a share of --data)", show_default=False),
]
RetentionRows = Annotated[
    Path | None,
    typer.Option(
        "--retention-data", metavar="FILE", show_default=False,
        help="Against forgetting, with rows of what the model should stay good at: they are --retention-share of the "
        "windows of each step. (default: none)",
    ),
]  # fmt: skip
AnchorTexts = Annotated[
    Path | None,
    typer.Option(
        "--kl-data", metavar="FILE", show_default=False,
        help="Against forgetting, with texts alone: what the model makes of them is held to what its base does, by "
        "--kl-weight. (default: none)",
    ),
]  # fmt: skip
Grid = Annotated[
    str | None,
    typer.Option("--grid", help="int4 or nf4. (default: what the device's profile names)", show_default=False),
]
Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="What trains: torch, or ort, which `edgetune personalize` is. (default: torch where it fits, else ort)",
        show_default=False,
    ),
]
Method = Annotated[str, typer.Option("--adapter", help=f"The adapter's method: {', '.join(METHODS)}.")]
Budget = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Memory to stay inside: foreground, background, a number of MiB, or min, the least that can be.",
    ),
]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Cores to use. (default: all that this process may use)", show_default=False),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out, up to 1 % of them.")]
Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object; all else goes to stderr.")]

# PEFT's name is the field's; nobody wants to type it.
_SHORTER = {"layers_to_transform": "layers"}


def _names(text: str) -> tuple[str, ...]:
    """`q_proj,v_proj`."""
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise typer.BadParameter(f"{text!r} is not a list of names; write q_proj,v_proj")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    """`0,2,5-8` is 0, 2, 5, 6, 7, 8."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(part) > 12:
            raise typer.BadParameter(f"{text!r} is not a list of blocks; write 0,2,5-8")
        numbers.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(numbers))


def _bytes(text: str) -> int:
    """`2MiB`, `300KiB` or `5000`, in bytes."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(KiB|MiB|GiB|B|)", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no number of bytes; write 2MiB, 300KiB or 5000")
    return int(float(found[1]) * 1024 ** ["B", "KiB", "MiB", "GiB"].index(found[2] or "B"))


_PARSERS: dict[str, Callable[[str], Any]] = {
    "target_modules": _names,
    "feedforward_modules": _names,
    "layers_to_transform": _numbers,
    "adapter_budget": _bytes,
}


def _flag(field: str) -> str:
    return "--" + _SHORTER.get(field, field).replace("_", "-")


def _parameter(field: str, kind: Any, help: str, panel: str) -> inspect.Parameter:
    parser = _PARSERS.get(field)
    flag = _flag(field)
    if kind == bool | None:
        flag += flag.replace("--", "/--no-")
    option = typer.Option(None, flag, help=help, rich_help_panel=panel, parser=parser, show_default=False)
    kind = str | None if parser else kind
    return inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


def _adapter_settings(engine: str | None = None) -> dict[str, tuple[Any, list[str]]]:
    """Field of an adapter's config -> its annotation, and which methods have it, of those that this engine trains."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for method in _methods(engine):
        module = METHODS[method]
        hints = get_type_hints(module.Config, include_extras=True)
        for field in dataclasses.fields(module.Config):
            if get_origin(hints[field.name]) is Annotated:  # others follow from the model
                found.setdefault(field.name, (hints[field.name], []))[1].append(method)
    return found


def _methods(engine: str | None) -> list[str]:
    """Those that this engine trains; without one, all."""
    return [
        name
        for name, module in METHODS.items()
        if engine is None or getattr(module.CAPABILITIES, f"train_{engine}") is None
    ]


def _parameters(engine: str | None) -> list[inspect.Parameter]:
    found = []
    for name, (hint, methods) in _adapter_settings(engine).items():
        kind, key = get_args(hint)[:2]
        of = "" if len(methods) == len(_methods(engine)) else f" Of {', '.join(methods)}."
        found.append(_parameter(name, kind, key.doc + of, "Adapter"))
    hints = get_type_hints(TrainConfig, include_extras=True)
    for field in dataclasses.fields(TrainConfig):
        kind, key = get_args(hints[field.name])[:2]
        doc = f"one of {', '.join(ORT_OPTIMIZERS)}" if (engine, field.name) == ("ort", "optimizer") else key.doc
        default = "the plan's choice" if field.default is None else field.default
        help = f"{doc[0].upper()}{doc[1:]}. (default: {default})"
        found.append(_parameter(field.name, kind | None, help, "Training"))
    return [parameter for parameter in found if engine != "ort" or parameter.name not in ORT_HAS]


def takes_settings(verb: Callable[..., None], engine: str | None = None) -> Callable[..., None]:
    """Replace the verb's `**settings` by the flags of this module, as typer reads them from a signature.

    A verb that has one engine alone gets those that this engine does not always refuse.
    """
    own = inspect.signature(verb, eval_str=True)
    parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    parameters += _parameters(engine)

    @functools.wraps(verb)
    def with_flags(**typed: Any) -> None:
        verb(**typed)

    with_flags.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_flags


def takes_settings_of(engine: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`takes_settings` for a verb of that engine."""
    return functools.partial(takes_settings, engine=engine)


def read_settings(method: str, settings: dict[str, Any]) -> tuple[AdapterConfig, TrainConfig]:
    """The adapter's and the training's config with what was typed; the rest is left to their defaults.

    Raises:
        ConfigError: there is no such adapter method, or it has no setting that was typed.
    """
    if method not in METHODS:
        raise ConfigError(f"adapter = {method!r}; choose from {', '.join(METHODS)}.")
    typed = {name: value for name, value in settings.items() if value is not None}
    for name, (_, methods) in _adapter_settings().items():
        if name in typed and method not in methods:
            own = ", ".join(_flag(other) for other, (_, found) in _adapter_settings().items() if method in found)
            raise ConfigError(f"{_flag(name)} is no setting of {method}; it has {own or 'none'}. Leave it out.")
    return _config(METHODS[method].Config, typed), _config(TrainConfig, typed)


def _config(made: type[_Made], typed: dict[str, Any]) -> _Made:
    names = {field.name for field in dataclasses.fields(made)}  # type: ignore[arg-type]
    return made(**{name: value for name, value in typed.items() if name in names})


def read_budget(text: str) -> str | int:
    """A budget's name, or its number of MiB."""
    return int(text) if text.isdecimal() else text


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether the parameter of the running command stands on its command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_other_flags(context: typer.Context, *allowed: str) -> None:
    """What `--resume` would ignore is refused: everything typed that is not `allowed`.

    Raises:
        typer.BadParameter: with the flags that do not go together.
    """
    others = [
        parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
        for parameter in context.command.params
        if parameter.name and parameter.name not in allowed and was_typed(context, parameter.name)
    ]
    if others:
        raise typer.BadParameter(
            f"--resume goes on with the run as it was planned and cannot take {', '.join(others)}. Leave that out, or "
            "train anew"
        )
