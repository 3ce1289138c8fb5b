"""`vmonarch presets`: list, show and check them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from vmonarch_cli.cli.output import Output
from vmonarch_cli.errors import PresetError
from vmonarch_cli.presets import load_preset, read_preset, shipped_names
from vmonarch_cli.untrusted.files import user_path

presets_app = typer.Typer(help="List, show and check presets.", invoke_without_command=True)


@presets_app.callback()
def presets(context: typer.Context) -> None:
    """List the presets that come with vmonarch; `show NAME` and `check FILE` look at one."""
    if context.invoked_subcommand is None:
        from vmonarch_cli.cli.plan_tables import presets_table

        Output().show(presets_table([load_preset(name) for name in shipped_names()]))


@presets_app.command()
def show(name: Annotated[str, typer.Argument(help="Name of a preset, or a .toml file.")]) -> None:
    """Show every field of a preset: value, unit, range and what it means."""
    from vmonarch_cli.cli.plan_tables import preset_table

    Output().show(preset_table(load_preset(name)))


@presets_app.command()
def check(preset: Annotated[str, typer.Argument(help="A preset file, or the name of a preset.")]) -> None:
    """Check a preset file; exit 2 with one sentence when something in it is wrong."""
    path = user_path(preset, "preset file", PresetError)
    found = read_preset(path) if os.path.lexists(path) else load_preset(preset)
    Output().say(f"{preset} is valid: preset '{found.name}'")
