"""The command line: parse, call, print. The only place that prints, and the only mapping from errors to exit codes."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from vmonarch_cli import __version__
from vmonarch_cli.cli import batch
from vmonarch_cli.cli import review as commands
from vmonarch_cli.cli.options import OUTPUT, AsJson, Debug, Quiet, option, takes_request
from vmonarch_cli.cli.profile import profile_app
from vmonarch_cli.clip.interrupts import Interrupted, stoppable
from vmonarch_cli.errors import EXIT_BAD_INPUT, EXIT_CLIP_FAILED, InputErrors, VmonarchError
from vmonarch_cli.machine.torchrun import read_rank
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import load_preset, read_preset, shipped_names
from vmonarch_cli.text import first_line
from vmonarch_cli.timing import ClipResult

EXIT_INTERRUPTED = (130, 143)
MAX_ERRORS = 100


class OneSentenceGroup(TyperGroup):
    """Turns every error into one sentence on stderr and an exit code; `--debug` lets the traceback through."""

    def main(self, *args: Any, **extra: Any) -> Any:
        given = extra.get("args") or (args[0] if args else None)
        arguments = list(sys.argv[1:] if given is None else given)
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if "--debug" in arguments:
                raise
            sentence, code = _explain(error)
            each = error.sentences if isinstance(error, InputErrors) else (sentence,)
            _fail(sentence, code, _wants_json(arguments), each)
        if code in EXIT_INTERRUPTED:
            print("interrupted: no clip was left half-written", file=sys.stderr)
        sys.exit(code if isinstance(code, int) else 0)


def _wants_json(arguments: list[str]) -> bool:
    """Whether stdout carries JSON: `--json`, which under `profile` names a file unless it is -."""
    if arguments[:1] == ["profile"]:
        return "--json=-" in arguments or ("--json", "-") in itertools.pairwise(arguments)
    return "--json" in arguments


def _explain(error: Exception) -> tuple[str, int]:
    """The one mapping from an exception to the sentence a user reads and the exit code."""
    if isinstance(error, VmonarchError):
        return error.message, error.exit_code
    if hasattr(error, "format_message"):  # typer's and click's usage errors
        return str(error.format_message()).rstrip("."), EXIT_BAD_INPUT
    if isinstance(error, MemoryError):
        return "out of memory: choose a smaller size, fewer frames or a narrower --dtype", EXIT_CLIP_FAILED
    return (
        f"unexpected {type(error).__name__}: {first_line(error, 'no message')} (--debug shows where)",
        EXIT_CLIP_FAILED,
    )


def _fail(sentence: str, code: int, as_json: bool, each: Sequence[str]) -> None:
    """One line per sentence; a file of thousands of wrong lines is cut."""
    for line in each[:MAX_ERRORS]:
        print(f"error: {' '.join(line.split())}", file=sys.stderr)
    if len(each) > MAX_ERRORS:
        print(f"error: and {len(each) - MAX_ERRORS} more like these", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": " ".join(sentence.split()), "exit_code": code}, ensure_ascii=False))


app = typer.Typer(
    cls=OneSentenceGroup,
    help="Text-to-video diffusion with Monarch-structured attention, and an honest table of what it cost.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
presets_app = typer.Typer(help="List, show and check presets.", invoke_without_command=True)
app.add_typer(presets_app, name="presets")
models_app = typer.Typer(help="List and show the models that --model knows.", invoke_without_command=True)
app.add_typer(models_app, name="models")
app.add_typer(profile_app, name="profile")


def main() -> None:
    """Entry point of the `vmonarch` script."""
    app(prog_name="vmonarch")


def _version(value: bool) -> None:
    if value:
        print(f"vmonarch {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Print the help when no command is given."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
@takes_request()
def generate(
    request: GenerateRequest,
    as_json: AsJson = False,
    quiet: Quiet = False,
    dry_run: Annotated[
        bool, option("--dry-run", panel=OUTPUT, help="Print the resolved settings and their origins; load nothing.")
    ] = False,
    debug: Debug = False,
    prompts_file: batch.PromptsFile = None,
    prompts_format: batch.PromptsFormat = None,
    resume: batch.Resume = None,
    retry_failed: batch.RetryFailed = False,
    max_failures: batch.MaxFailures = None,
    retry_dense: batch.RetryDense = True,
) -> None:
    """Make clips from a prompt and print what the attention cost, step by step, against dense attention."""
    if prompts_file is not None:
        flags = batch.BatchFlags(
            prompts_file, prompts_format, resume, retry_failed, max_failures, retry_dense, request.overwrite
        )
        batch.run_prompts_file(request, flags, dry_run=dry_run, as_json=as_json, quiet=quiet, debug=debug)
        return
    plan = resolve(request)
    _show_notes(plan, silent=quiet or as_json)
    if dry_run:
        _show_dry_run(plan, as_json, quiet)
    else:
        _run(plan, as_json, quiet, retry_dense)


@app.command("plan")
@takes_request()
def show_plan(
    request: GenerateRequest,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
    prompts_file: batch.PromptsFile = None,
    prompts_format: batch.PromptsFormat = None,
    resume: batch.Resume = None,
    retry_failed: batch.RetryFailed = False,
) -> None:
    """Print what `generate` would do with the same flags: settings and their origins, tokens, FLOPs, memory, time.

    No weight is loaded and nothing is written.
    """
    if prompts_file is not None:
        flags = batch.BatchFlags(prompts_file, prompts_format, resume, retry_failed, overwrite=request.overwrite)
        batch.run_prompts_file(request, flags, dry_run=True, as_json=as_json, quiet=quiet, debug=debug)
        return
    plan = resolve(request)
    _show_notes(plan, silent=quiet or as_json)
    _show_dry_run(plan, as_json, quiet)


def _show_notes(plan: Plan, silent: bool) -> None:
    if not read_rank().is_main:
        return
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    for sentence in plan.notes if not silent else ():
        errors.print(f"note: {sentence}", style="dim", markup=False)
    for sentence in plan.warnings:
        errors.print(f"warning: {sentence}", style="yellow", markup=False)


def _show_dry_run(plan: Plan, as_json: bool, quiet: bool) -> None:
    from vmonarch_cli.cli.plan_tables import dry_run, estimates

    if as_json:
        print(json.dumps({"dry_run": True, **_plan_json(plan), **estimates(plan)}, ensure_ascii=False, indent=2))
    elif quiet:
        print(*plan.outputs, sep="\n")
    else:
        Console(highlight=False).print(dry_run(plan))


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "version": __version__,
        "settings": plan.settings(),
        "model_source": plan.model_source,
        "grid": list(plan.grid),
        "tokens": plan.tokens,
        "flops": plan.flops.model_dump(),
        "outputs": [str(path) for path in plan.outputs],
        "warnings": list(plan.warnings),
    }


def _run(plan: Plan, as_json: bool, quiet: bool, retry_dense: bool) -> None:
    """Run a plan: the header first, a report per clip, the paths last."""
    from vmonarch_cli.cli import report
    from vmonarch_cli.cli.progress import RunProgress
    from vmonarch_cli.pipeline.preflight import check_machine
    from vmonarch_cli.plan.history import remember

    machine = check_machine(plan)
    is_main = read_rank().is_main
    as_json, silent = as_json and is_main, as_json or quiet or not is_main
    out = Console(highlight=False)
    if not silent:
        out.print(report.header(plan, machine))

    def on_clip(result: ClipResult, load_s: float | None) -> None:
        remember(result.record)
        if not silent:
            title = f"clip {result.index + 1} of {plan.num_videos}" if plan.num_videos > 1 else ""
            out.print(report.clip_report(result, load_s, title))

    from vmonarch_cli.clip.make import generate as run_generate

    progress = RunProgress(Console(stderr=True, highlight=False), on_clip, quiet=silent)
    try:
        with stoppable() as interrupts, progress:
            results = run_generate(
                plan, machine, retry_dense=retry_dense, finishing=interrupts.finishing, on_event=progress
            )
    except BaseException as error:
        _name_saved_latents(plan)
        if isinstance(error, Interrupted):
            raise typer.Exit(error.exit_code) from None
        raise
    if as_json:
        clips = [{"path": str(result.path), **result.record} for result in results]
        print(json.dumps({**_plan_json(plan), "clips": clips}, ensure_ascii=False, indent=2))
    else:
        for result in results:  # by print, so that a long path is never wrapped
            print(result.path)


def _name_saved_latents(plan: Plan) -> None:
    """What a run that ended early has computed is not lost: say where it is."""
    from vmonarch_cli.media.paths import latents_path

    for path in map(latents_path, plan.outputs):
        if path.is_file():
            print(f"latents are saved: vmonarch decode {shlex.quote(str(path))}", file=sys.stderr)


app.command("decode")(batch.decode_latents)


@presets_app.callback()
def presets(context: typer.Context) -> None:
    """List the presets that come with vmonarch; `show NAME` and `check FILE` look at one."""
    if context.invoked_subcommand is None:
        from vmonarch_cli.cli.plan_tables import presets_table

        Console(highlight=False).print(presets_table([load_preset(name) for name in shipped_names()]))


@presets_app.command("show")
def presets_show(name: Annotated[str, typer.Argument(help="Name of a preset, or a .toml file.")]) -> None:
    """Show every field of a preset: value, unit, range and what it means."""
    from vmonarch_cli.cli.plan_tables import preset_table

    Console(highlight=False).print(preset_table(load_preset(name)))


@presets_app.command("check")
def presets_check(file: Annotated[Path, typer.Argument(help="A preset file.")]) -> None:
    """Check a preset file; exit 2 with one sentence when something in it is wrong."""
    preset = read_preset(file)
    print(f"{file} is valid: preset '{preset.name}'")


@models_app.callback()
def models(context: typer.Context) -> None:
    """List the models that --model knows by name; `show NAME` tells all about one."""
    if context.invoked_subcommand is None:
        from vmonarch_cli.cli.model_tables import models_table
        from vmonarch_cli.models.catalogue import ENTRIES

        Console(highlight=False).print(models_table(ENTRIES))


@models_app.command("show")
def models_show(
    name: Annotated[str, typer.Argument(help="Alias, hub id or local diffusers folder.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a repository.")] = None,
) -> None:
    """Show what is known about a model: its names, layout, defaults, valid shapes, cost and memory."""
    from vmonarch_cli.cli.model_tables import model_table
    from vmonarch_cli.models.registry import find_model

    Console(highlight=False).print(model_table(find_model(name, revision)[0]))


for command in (commands.compare, commands.gallery, commands.rerun, commands.doctor):
    app.command()(command)
