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
from vmonarch_cli.errors import InputError
from vmonarch_cli.plan.defaults import PROJECT_FILE, fill, read_defaults, user_file
from vmonarch_cli.plan.request import GenerateRequest, Level, flag_name
from vmonarch_cli.presets import format_value

config_app = typer.Typer(help="Show your own defaults, and where each comes from.", invoke_without_command=True)


@config_app.callback()
@takes_request()
def config(context: typer.Context, shown: Shown, debug: Debug = False) -> None:
    """Show your own defaults: what counts where no flag is given, and where each comes from.

    They are in vmonarch.toml of the current folder, in your own file (`config path` says where) and in variables as
    VMONARCH_STEPS. Keys are the names of generate's flags, as in: steps = 20.
    """
    if context.invoked_subcommand is not None:
        return
    out = shown.output()
    levels = read_defaults()
    counting = fill(GenerateRequest(defaults=levels)).levels
    if out.as_json:
        out.json({"version": __version__, "files": _files(), "settings": _settings(levels, counting)})
        return
    made = table("setting", "value", "from", "")
    for entry in _settings(levels, counting):
        value = Text(_words(entry["value"]), overflow="fold")
        beaten = "" if entry["counts"] else "beaten by what stands above"
        style = "bold" if entry["counts"] else "dim"
        made.add_row(Text(entry["setting"], style=style), value, Text(entry["source"], overflow="fold"), beaten)
    if levels:
        out.show(made)
    else:
        out.say("no defaults of your own: a line as steps = 20 in one of these files gives one")
    rows = [(name, f"{path}{'' if Path(path).exists() else ' (not there)'}") for name, path in _files().items() if path]
    out.show(facts([(name, text) for name, text in rows]))


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


def _settings(levels: tuple[Level, ...], counting: dict[str, Level]) -> list[dict[str, Any]]:
    return [
        {
            "setting": flag_name(name),
            "value": value,
            "origin": level.origin,
            "source": level.source,
            "counts": counting.get(name) is level,
        }
        for level in levels
        for name, value in level.values.items()
    ]


def _words(value: Any) -> str:
    return ", ".join(map(format_value, value)) if isinstance(value, tuple) else format_value(value)
