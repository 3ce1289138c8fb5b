"""`vmonarch config`: the user's own defaults, and where each comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from vmonarch_cli import __version__
from vmonarch_cli.cli.options import Debug, Shown, takes_request
from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.tables import facts, table
from vmonarch_cli.errors import EXIT_BAD_INPUT, InputError
from vmonarch_cli.plan.check_defaults import counting_levels, problems
from vmonarch_cli.plan.defaults import PROJECT_FILE, read_defaults, user_file
from vmonarch_cli.plan.request import Level, flag_name
from vmonarch_cli.presets import format_value

config_app = typer.Typer(help="Show your own defaults, and where each comes from.", invoke_without_command=True)


@config_app.callback()
@takes_request()
def config(context: typer.Context, shown: Shown, debug: Debug = False) -> None:
    """Show your own defaults: what counts where no flag is given, and where each comes from.

    They are in vmonarch.toml of the current folder, in your own file (`config path` says where) and in variables as
    VMONARCH_STEPS. Keys are the names of generate's flags, as in: steps = 20. generate, plan, compare, demo and
    profile clip go by them; tune, calibrate and the other profiles take flags alone.

    Exit 2 when a value is not valid, with a sentence for each.
    """
    if context.invoked_subcommand is not None:
        return
    out = shown.output()
    levels = read_defaults()
    settings = _settings(levels)
    if out.as_json:
        out.json({"version": __version__, "files": _files(), "settings": settings})
    else:
        _show(settings, out)
    wrong = [entry["problem"] for entry in settings if entry["problem"] is not None]
    out.error(*wrong)
    if wrong:
        raise typer.Exit(EXIT_BAD_INPUT)


@config_app.command("path")
def path() -> None:
    """Print where your own file is, or would be."""
    found = user_file()
    if found is None:
        raise InputError("VMONARCH_CONFIG is empty, which means no file of your own")
    Output().paths(found)


def _files() -> dict[str, str | None]:
    own = user_file()
    return {"project": str(Path(PROJECT_FILE).absolute()), "user": None if own is None else str(own)}


def _show(settings: list[dict[str, Any]], out: Output) -> None:
    made = table("setting", "value", "from", "")
    for entry in settings:
        value = Text(_words(entry["value"]), overflow="fold")
        style = "bold" if entry["counts"] else "dim"
        said = Text("" if entry["counts"] else "beaten by what stands above")
        said = said if entry["problem"] is None else Text("not valid", style="red")
        made.add_row(Text(entry["setting"], style=style), value, Text(entry["source"], overflow="fold"), said)
    if settings:
        out.show(made)
    else:
        out.say("no defaults of your own: a line as steps = 20 in one of these files gives one")
    rows = [(name, f"{path}{'' if Path(path).exists() else ' (not there)'}") for name, path in _files().items() if path]
    out.show(facts([(name, text) for name, text in rows]))


def _settings(levels: tuple[Level, ...]) -> list[dict[str, Any]]:
    """Every value of every place; of those that count, what is wrong with each."""
    counting, wrong = counting_levels(levels), problems(levels)
    return [
        {
            "setting": flag_name(name),
            "value": value,
            "origin": level.origin,
            "source": level.source,
            "counts": (counts := counting.get(name) is level),
            "problem": wrong.get(name) if counts else None,
        }
        for level in levels
        for name, value in level.values.items()
    ]


def _words(value: Any) -> str:
    return ", ".join(map(format_value, value)) if isinstance(value, tuple) else format_value(value)
