"""The command line: composes the commands, and maps every error to one sentence and an exit code."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vmonarch_cli import __version__
from vmonarch_cli.cli import batch, signals
from vmonarch_cli.cli.calibrate import calibrate
from vmonarch_cli.cli.compare import compare
from vmonarch_cli.cli.config import config_app
from vmonarch_cli.cli.demo import demo
from vmonarch_cli.cli.doctor import doctor
from vmonarch_cli.cli.gallery import gallery
from vmonarch_cli.cli.generate import generate
from vmonarch_cli.cli.models import models_app
from vmonarch_cli.cli.output import Output, StdoutLost, steady_streams
from vmonarch_cli.cli.plan import plan
from vmonarch_cli.cli.presets import presets_app
from vmonarch_cli.cli.profile.app import profile_app
from vmonarch_cli.cli.recipes import recipes_app
from vmonarch_cli.cli.rerun import rerun
from vmonarch_cli.cli.tune import tune
from vmonarch_cli.errors import EXIT_BAD_INPUT, EXIT_CLIP_FAILED, InputErrors, VmonarchError
from vmonarch_cli.text import first_line, shown

EXIT_INTERRUPTED = (130, 143)
_STRAY = re.compile(r"Got unexpected extra argument\S* \((?P<words>.*)\)$", re.DOTALL)
"""What click, and typer's copy of it, say of words that nothing takes."""


class OneSentenceGroup(TyperGroup):
    """Turns every error into one sentence on stderr and an exit code; `--debug` lets the traceback through."""

    def main(self, *args: Any, **extra: Any) -> Any:
        given = extra.get("args") or (args[0] if args else None)
        arguments = list(sys.argv[1:] if given is None else given)
        try:
            with steady_streams():
                code = self._run(arguments, *args, **extra)
        except StdoutLost as error:
            Output().error(error.message)
            code = error.exit_code
        sys.exit(code)

    def _run(self, arguments: Sequence[str], *args: Any, **extra: Any) -> int:
        out = Output()
        try:
            code = super().main(*args, **{**extra, "standalone_mode": False})
        except Exception as error:
            if "--debug" in arguments:
                raise
            if signals.seen():
                out.insist(signals.MESSAGE)
                return signals.EXIT_CODE
            sentence, code = _explain(error)
            out.error(*(error.sentences if isinstance(error, InputErrors) else (sentence,)))
            if _wants_json(arguments):
                out.json({"error": " ".join(sentence.split()), "exit_code": code}, indent=None)
        if code in EXIT_INTERRUPTED:
            out.insist(signals.MESSAGE)
        return code if isinstance(code, int) else 0


def _wants_json(arguments: Sequence[str]) -> bool:
    """Whether stdout carries JSON: `--json`, which under `profile` names a file unless it is -."""
    if arguments[:1] == ["profile"]:
        return "--json=-" in arguments or ("--json", "-") in itertools.pairwise(arguments)
    return "--json" in arguments


def _explain(error: Exception) -> tuple[str, int]:
    """The one mapping from an exception to the sentence a user reads and the exit code."""
    if isinstance(error, VmonarchError):
        return error.message, error.exit_code
    if hasattr(error, "format_message"):  # typer's and click's usage errors
        return _usage(error), EXIT_BAD_INPUT
    if isinstance(error, MemoryError):
        return "out of memory: choose a smaller size, fewer frames or a narrower --dtype", EXIT_CLIP_FAILED
    return (
        f"unexpected {type(error).__name__}: {first_line(error, 'no message')} (--debug shows where)",
        EXIT_CLIP_FAILED,
    )


def _usage(error: Any) -> str:
    """A usage error's own words, and what is valid where they do not say it."""
    words = str(error.format_message()).rstrip(".")
    commands = getattr(getattr(error.ctx, "command", None), "commands", {})
    if words.startswith("No such command") and "Did you mean" not in words:
        return f"{words}: valid are {', '.join(commands)}"
    if stray := _STRAY.match(words):
        return _refused(stray["words"], error.ctx)
    about = getattr(getattr(error, "param", None), "help", None)
    return f"{words}: {about.rstrip('.')}" if words.startswith("Missing argument") and about else words


def _refused(words: str, context: Any) -> str:
    """Words that no flag and no argument of a command took, and where words of its kind go."""
    parameters = context.command.params
    if any("--prompt" in parameter.opts for parameter in parameters):
        return (
            f"words without a flag are not taken, got {shown(words)}: a prompt goes after --prompt, as in "
            f"--prompt {shlex.quote(words[:60])}"
        )
    taken = [str(p.metavar or p.name).upper() for p in parameters if p.param_type_name == "argument"]
    if taken:
        command = context.command_path.partition(" ")[2]  # without the program, whose name is the caller's
        return f"{shown(words)} is too much: vmonarch {command} takes {' '.join(taken)}, and flags"
    return f"words without a flag are not taken, got {shown(words)}: valid are flags, which --help lists"


app = typer.Typer(
    cls=OneSentenceGroup,
    help="Text-to-video diffusion with Monarch-structured attention, and an honest table of what it cost.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point of the `vmonarch` script."""
    app(prog_name="vmonarch")


def _version(value: bool) -> None:
    if value:
        Output().text(f"vmonarch {__version__}\n")
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
        Output().text(f"{context.get_help()}\n")


app.add_typer(presets_app, name="presets")
app.add_typer(models_app, name="models")
app.add_typer(recipes_app, name="recipes")
app.add_typer(config_app, name="config")
app.add_typer(profile_app, name="profile")
app.command()(demo)
app.command()(generate)
app.command()(plan)
app.command()(tune)
app.command()(calibrate)
app.command("decode")(batch.decode_latents)
for command in (compare, gallery, rerun, doctor):
    app.command()(command)
