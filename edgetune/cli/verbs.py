"""The command `edgetune`: one function for each verb, each a thin layer over the public function of that name.

Exit codes: 0 done; 1 an EdgetuneError (its class and message on stderr, no traceback); 2 a flag that does not parse;
75 stopped at the budget or at the end of a slice, with a good checkpoint; 130 and 143 stopped by SIGINT and SIGTERM
with a good checkpoint.

What a verb found goes to stdout. With --json everything for people goes to stderr, and the last line of stdout is one
JSON object, an error's too. Modules are imported by the verb that needs them, so `edgetune --help` is quick and a
device without torch has every verb that can run there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from edgetune import __version__
from edgetune.cli import adapters, benchmarking, evaluating, rows
from edgetune.cli.console import answer, fail, flat, stream_text, tell, tell_text, tensor_progress, warnings_told
from edgetune.cli.flags import (
    AnchorTexts,
    Budget,
    Bundle,
    Device,
    Engine,
    EvalRows,
    Force,
    Grid,
    Json,
    Method,
    Model,
    Out,
    RetentionRows,
    Rows,
    SkipBad,
    Threads,
    read_budget,
    read_settings,
    refuse_other_flags,
    takes_settings,
    takes_settings_of,
    was_typed,
)
from edgetune.errors import EdgetuneError
from edgetune.extras import missing_extra

app = typer.Typer(
    help="Fine-tune a language model inside the memory of a phone, a watch or a small board, and ship it as ONNX.\n\n"
    "The way through: devices, plan, quantize, train, export, run, bench, report. "
    "In minutes: [bold]edgetune demo[/bold].",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


app.add_typer(adapters.app, name="adapter")
app.add_typer(rows.app, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"edgetune {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
def devices(
    device: Annotated[
        str | None, typer.Argument(metavar="ID", help="Show this profile in full.", show_default=False)
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """List the device profiles, or show one with its sources.

    Example: edgetune devices pixel-watch-3
    """
    from edgetune.device import list_devices, load_device

    if device is not None:
        from edgetune.planner import why_untrainable

        profile = load_device(device)
        lines = [*flat(profile.to_dict()), *filter(None, (why_untrainable(profile),))]
        answer(profile.to_dict(), "\n".join(lines), as_json)
        return
    profiles = list_devices()
    lines = [f"{'ID':<20} {'KIND':<7} {'FOREGROUND':>10} {'BACKGROUND':>10}  {'GRID':<5} {'FIGURES':<9} NAME"]
    lines += [
        f"{p.id:<20} {p.kind:<7} {p.memory.budget_mib:>6,} MiB {p.memory.budget_background_mib:>6,} MiB  "
        f"{p.runtime.grid:<5} {p.provenance.confidence:<9} {p.name}"
        for p in profiles
    ]
    answer({"devices": [profile.to_dict() for profile in profiles]}, "\n".join(lines), as_json)


@app.command()
def doctor(
    *,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine instead, and write it as a device profile.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            show_default=False,
            help="The profile that --calibrate writes. (default: host-calibrated.toml)",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier calibration.")] = False,
    as_json: Json = False,
) -> None:
    """Report this machine's libraries, kernels, instruction set and memory limits, and test that training works.

    Example: edgetune doctor --calibrate --out my-host.toml, then edgetune plan MODEL --device my-host.toml
    """
    if calibrate:
        from edgetune import calibration

        tell("measuring this machine for about 20 seconds; nothing else should run meanwhile")
        measured = calibration.calibrate(out or "host-calibrated.toml", force=force)
        following = ("plan", "MODEL", "--device", measured["device"])
        answer(measured, calibration.explain(measured), as_json, following=following)
        return
    if out is not None or force:
        raise typer.BadParameter("--out and --force go with --calibrate")
    from edgetune.doctor import examine, explain

    report = examine()
    answer(report, explain(report), as_json)


@app.command()
@takes_settings
def plan(
    context: typer.Context,
    model: Model,
    *,
    device: Device,
    data: Rows = None,
    eval_data: EvalRows = None,
    retention_data: RetentionRows = None,
    kl_data: AnchorTexts = None,
    grid: Grid = None,
    engine: Engine = None,
    adapter: Method = "lora",
    budget: Budget = "foreground",
    skip_bad: SkipBad = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show each part of the peak and each concession.")] = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Say what would run on a device: where each MiB goes, what was conceded to the budget, and how long it takes.

    Example: edgetune plan SmolLM2-135M/ --device pixel-9 --data notes.jsonl --explain
    """
    from edgetune import planner
    from edgetune.cli import launch

    lora, config = read_settings(adapter, settings)
    wishes: dict[str, Any] = {
        "data": data, "eval_data": eval_data, "retention_data": retention_data, "kl_data": kl_data, "adapter": lora,
        "config": config, "grid": grid, "engine": engine, "budget": read_budget(budget), "skip_bad": skip_bad,
    }  # fmt: skip
    if launch.budgeted(lora):
        _, wishes["adapter"] = launch.ranks_for(model, device, **wishes)
    made = planner.plan(model, device, **wishes)
    answer(
        made.to_dict(),
        made.explain() if explain else f"{launch.brief(made)}\n--explain shows where each MiB goes.",
        as_json,
        following=_as_planned(context, data) if made.engine == "torch" else launch.way_to_personalize(model),
    )


def _as_planned(context: typer.Context, data: Path | None) -> list[str]:
    """`train` with all that was typed for `plan`."""
    words = [word for word in context.obj[1:] if word not in ("--explain", "--json")]
    return ["train", *words, *(() if data else ("--data", "FILE")), "--out", "run/"]


@app.command()
def quantize(
    model: Model,
    *,
    out: Out,
    grid: Annotated[
        str, typer.Option("--grid", help="int4 is what fast device kernels read, nf4 is QLoRA's.")
    ] = "int4",
    double_quant: Annotated[bool, typer.Option("--double-quant", help="nf4 only: scales in 8 bits too.")] = False,
    dense_embeddings: Annotated[
        bool, typer.Option("--dense-embeddings", help="Keep embedding and head as they are.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model's frozen weights to a base/ folder in 4 bits, one tensor at a time.

    Example: edgetune quantize SmolLM2-135M/ --grid int4 --out base/
    """
    from edgetune import quantizer
    from edgetune.base import EncoderBase, open_any_base
    from edgetune.hub import model_folder
    from edgetune.memory import format_mib

    source = model_folder(model)
    if not (source / "tokenizer.json").is_file():
        tell(f"{source} has no tokenizer.json: a base without one can be planned for, but not trained or run")
    with tensor_progress() as show:
        base = quantizer.quantize(
            source,
            grid,
            out,
            double_quant=double_quant,
            dense_embeddings=dense_embeddings,
            force=force,
            on_progress=show,
        )
    manifest = quantizer.read_manifest(base)
    size = sum(file["bytes"] for file in manifest["files"].values())
    text = f"{base}: {manifest['num_parameters']:,} weights on the {grid} grid, {format_mib(size)}"
    following: tuple[str | Path, ...] = ("train", base, "--device", "ID", "--data", "FILE", "--out", "run/")
    if isinstance(open_any_base(base), EncoderBase):
        following = (*following[:4], "--objective", "classification", *following[4:])
    answer({"base": str(base), "base_bytes": size} | manifest, text, as_json, following=following)


@app.command()
@takes_settings
def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As for plan; left out with --resume.", show_default=False)
    ] = None,
    *,
    device: Annotated[
        str | None, typer.Option("--device", metavar="ID", help="A profile's id or TOML file.", show_default=False)
    ] = None,
    data: Rows = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="The run/ folder to write.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Continue this run as it was planned; --budget may give it more.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", metavar="FOLDER", help="With --resume: where the run's base/ has moved to.", show_default=False
        ),
    ] = None,
    eval_data: EvalRows = None,
    retention_data: RetentionRows = None,
    kl_data: AnchorTexts = None,
    grid: Grid = None,
    engine: Engine = None,
    adapter: Method = "lora",
    budget: Budget = "foreground",
    enforce: Annotated[
        str, typer.Option("--enforce", help="What holds the run to its budget: none, governor, rlimit or cgroup.")
    ] = "governor",
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Take as long as the device would: slow this machine down to it.")
    ] = False,
    one_slice: Annotated[
        bool,
        typer.Option(
            "--one-slice", help="Stop when the device's system would, to go on in the next slice by --resume."
        ),
    ] = False,
    supervise: Annotated[
        bool,
        typer.Option("--supervise", help="Go on from the last checkpoint if the system kills the run; as with cgroup."),
    ] = False,
    keep_cache: Annotated[
        bool, typer.Option("--keep-cache", help="Leave the feature cache of a plan that has one in the run folder.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run in the folder.")] = False,
    skip_bad: SkipBad = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train an adapter inside a device's memory budget. Ctrl-C and SIGTERM leave a checkpoint to resume from.

    A MODEL that is not in 4 bits yet is quantized first, into FOLDER-base beside the run.

    Example: edgetune train base/ --device pixel-9 --data notes.jsonl --out run/
    """
    from edgetune.cgroup import check_cgroup
    from edgetune.checkpoint import check_run_folder
    from edgetune.cli import launch

    if enforce == "cgroup":
        check_cgroup()  # before anything is planned or quantized
    if resume is not None:
        refuse_other_flags(
            context, "resume", "base", "data", "eval_data", "retention_data", "kl_data", "budget", "enforce",
            "supervise", "emulate", "one_slice", "keep_cache", "skip_bad", "as_json",
        )  # fmt: skip
        given = read_budget(budget) if was_typed(context, "budget") else None
        job = launch.old_run(
            resume, base=base, data=data, eval_data=eval_data, retention_data=retention_data, kl_data=kl_data,
            budget=given,
        )  # fmt: skip
    else:
        if base is not None:
            raise typer.BadParameter("--base goes with --resume; a new run takes its base as MODEL")
        missing = [
            name
            for name, value in (("MODEL", model), ("--device", device), ("--data", data), ("--out", out))
            if value is None
        ]
        if model is None or device is None or data is None or out is None:
            raise typer.BadParameter(f"a new run needs {', '.join(missing)}; --resume RUN goes on with one")
        check_run_folder(out, resume=False, force=force)  # before anything is planned or quantized
        lora, config = read_settings(adapter, settings)
        job = launch.new_run(
            model, device, data=data, out=out, eval_data=eval_data, retention_data=retention_data, kl_data=kl_data,
            adapter=lora, config=config, grid=grid, engine=engine, budget=read_budget(budget), skip_bad=skip_bad,
        )  # fmt: skip
    launch.start(
        job, supervise=supervise, resume=resume is not None, force=force, enforce=enforce, emulate=emulate,
        one_slice=one_slice, keep_cache=keep_cache, skip_bad=skip_bad, as_json=as_json,
    )  # fmt: skip


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A run/; a base/ folder or model exports without an adapter.", show_default=False
        ),
    ],
    *,
    out: Out,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="ID", help="A profile's id or TOML file. (default: the run's)", show_default=False
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="int4, nf4, int8, int8-dynamic, fp16, fp32 or standard. (default: what the device's profile names)",
            show_default=False,
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapter in and round again; the cost is measured.")
    ] = False,
    slots: Annotated[
        str,
        typer.Option(
            "--slots",
            help="all: the bundle takes any adapter of the base. adapter: those of the same linears, a little faster.",
        ),
    ] = "all",
    accept_loss: Annotated[
        bool,
        typer.Option(
            "--accept-loss",
            help="Write it even if rounding moves a weight further than training did, or costs the task.",
        ),
    ] = False,
    alpha: Annotated[
        float | None,
        typer.Option(
            "--alpha",
            help="With --merge: how much of the adapter, up to 1. (default: what --retention-data chooses, else 1)",
            show_default=False,
        ),
    ] = None,
    eval_data: EvalRows = None,
    retention_data: Annotated[
        Path | None,
        typer.Option(
            "--retention-data",
            metavar="FILE",
            help="With --merge: rows of what the base could do already. (default: none)",
            show_default=False,
        ),
    ] = None,
    with_training: Annotated[
        bool, typer.Option("--with-training", help="Add the graphs that `edgetune personalize` trains with.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an ONNX bundle for stock onnxruntime, and prove on held-out rows that it computes what was trained.

    Example: edgetune export run/ --out bundle/
    """
    from edgetune import bundle, exporter

    with warnings_told():
        result = exporter.export(
            source, out=out, weights=weights, device=device, merge=merge, alpha=alpha, slots=slots,
            accept_loss=accept_loss, eval_data=eval_data, retention_data=retention_data, with_training=with_training,
            force=force,
        ).summary()  # fmt: skip
    answer(result, bundle.explain(result), as_json, following=("run", out, "--prompt", "TEXT"))


@app.command()
def run(
    context: typer.Context,
    bundle: Bundle,
    *,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help="The text to continue; - reads stdin. (default: a conversation)", show_default=False
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token, 1 samples.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Sample among so many tokens; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample among the tokens that hold this probability.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Fixes what is sampled.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End at this text; may be repeated.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            metavar="NAME",
            help="An adapter of the bundle, or a .safetensors file of one. (default: the bundle's default)",
            show_default=False,
        ),
    ] = None,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="The base alone.")] = False,
    prepacked: Annotated[
        Path | None,
        typer.Option(
            "--prepacked",
            metavar="DIR",
            help="A cache of this bundle's own: packed weights are written there once, and mapped from then on.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Generate text from a bundle with onnxruntime alone. Without --prompt it is a conversation.

    A bundle with a trained head gives the class of the prompt instead, an encoder's without one its embedding.

    Example: edgetune run bundle/ --prompt "Dear diary," --temperature 0.8
    """
    from edgetune.bundle import has_head, is_encoder
    from edgetune.runtime.generate import Sampling, generate

    if no_adapter and adapter is not None:
        raise typer.BadParameter("--adapter and --no-adapter do not go together")
    chosen = not no_adapter if adapter is None else adapter
    if is_encoder(bundle) or has_head(bundle):
        from edgetune.cli.embedding import show_embedding

        generating = ("chat", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "prepacked")
        typed = [f"--{name.replace('_', '-')}" for name in generating if was_typed(context, name)]
        if typed or prompt is None:
            raise typer.BadParameter(
                f"{bundle} is the bundle of an encoder, or has a trained head: it tells something of a text and "
                "generates none, so it needs --prompt TEXT"
                + (f" and does not take {', '.join(typed)}" if typed else "")
            )
        text = sys.stdin.read() if prompt == "-" else prompt
        show_embedding(bundle, text, adapter=chosen, threads=threads, as_json=as_json)
        return
    if prompt is None:
        if as_json or not sys.stdin.isatty():
            raise typer.BadParameter("give --prompt TEXT, or --prompt - to read stdin; a conversation needs a terminal")
        from edgetune.cli.chat import converse

        sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed, tuple(stop or ()))
        converse(bundle, sampling, threads=threads, adapter=chosen, prepacked=prepacked)
        return
    made = generate(
        bundle, sys.stdin.read() if prompt == "-" else prompt, max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed, stop=stop or (), chat=chat, adapter=chosen, threads=threads,
        prepacked=prepacked, on_text=tell_text if as_json else stream_text,
    )  # fmt: skip
    full = made.stop_reason == "context"
    answer(asdict(made), "", as_json, following=() if full else ("bench", bundle, "--device", "host"))
    if full:
        tell(f"ended after {len(made.token_ids)} tokens, not {max_new_tokens}: the model's context is full")


@app.command()
@takes_settings_of("ort")
def personalize(
    bundle: Bundle,
    *,
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Rows as for train.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The run folder to write.", show_default=False)],
    eval_data: EvalRows = None,
    device: Annotated[
        str, typer.Option("--device", metavar="ID", help="Whose budget counts: a profile's id or TOML file.")
    ] = "host",
    budget: Annotated[
        str, typer.Option("--budget", help="Memory to stay inside: foreground, background, a number of MiB, or min.")
    ] = "foreground",
    enforce: Annotated[
        str, typer.Option("--enforce", help="What holds the run to its budget: none, governor, rlimit or cgroup.")
    ] = "governor",
    one_slice: Annotated[
        bool, typer.Option("--one-slice", help="Stop when the device's system would, to go on by --resume.")
    ] = False,
    slice_s: Annotated[
        int | None,
        typer.Option(
            "--slice-s", help="As --one-slice, of so many seconds. (default: the profile's)", show_default=False
        ),
    ] = None,
    grace_s: Annotated[
        float | None,
        typer.Option(
            "--grace-s", help="Seconds from a slice's end to the kill. (default: the profile's)", show_default=False
        ),
    ] = None,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Go on from the last checkpoint if the system kills the run.")
    ] = False,
    accept_worse: Annotated[
        bool, typer.Option("--accept-worse", help="Use the adapter even if the held-out loss got worse.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, as it was planned.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier run in the folder.")] = False,
    skip_bad: SkipBad = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train an adapter on the device itself, with onnxruntime alone, and use it in the bundle if it is no worse.

    The bundle needs training graphs: edgetune export --with-training. The adapter that was used before stays in it:
    edgetune adapter default brings it back.

    Example: edgetune personalize bundle/ --data notes.jsonl --out p/
    """
    from edgetune.cgroup import check_cgroup
    from edgetune.cli.personalizing import start

    if enforce == "cgroup":
        check_cgroup()
    lora, config = read_settings("lora", settings)
    start(
        bundle, out, {"adapter": lora, "config": config, "device": device, "budget": read_budget(budget)},
        {"data": data, "eval_data": eval_data, "skip_bad": skip_bad}, supervise=supervise, enforce=enforce,
        one_slice=one_slice, slice_s=slice_s, grace_s=grace_s, accept_worse=accept_worse, resume=resume, force=force,
        as_json=as_json,
    )  # fmt: skip


app.command("eval")(evaluating.evaluate)
app.command()(benchmarking.bench)
app.command()(benchmarking.report)


@app.command()
def demo(
    *,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="ID", help="Whose budget and targets count. (default: a watch's)", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Keep the folders here.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Walk the whole way on the packaged sample, in minutes: a small assistant learns one person's shortcuts.

    It is quantized, tuned inside a watch's memory budget, exported, run on onnxruntime and judged on new phrasings.
    """
    from edgetune import demo as walk

    result = walk.demo(device or walk.DEVICE, out=out, say=tell if as_json else print)
    answer(result, "", as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with these arguments, or those of the process; always ends in SystemExit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments, prog_name="edgetune", obj=arguments)  # what was typed is context.obj
    except EdgetuneError as error:
        fail(error, "--json" in arguments)
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        fail(missing, "--json" in arguments)
    sys.exit(1)
