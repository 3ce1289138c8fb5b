"""`vmonarch models`: list the models that --model knows, and show all about one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmonarch_cli import __version__
from vmonarch_cli.cli.options import AsJson
from vmonarch_cli.cli.output import Output

models_app = typer.Typer(help="List and show the models that --model knows.", invoke_without_command=True)


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the models that --model knows by name; `show NAME` tells all about one."""
    if context.invoked_subcommand is None:
        from vmonarch_cli.cli.model_tables import models_json, models_table
        from vmonarch_cli.models.catalogue import ENTRIES

        out = Output(as_json=as_json)
        if as_json:
            out.json({"version": __version__, "models": models_json(ENTRIES)})
        out.show(lambda width: models_table(ENTRIES))


@models_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Alias, hub id or local diffusers folder.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a repository.")] = None,
) -> None:
    """Show what is known about a model: its names, layout, defaults, valid shapes, cost and memory."""
    from vmonarch_cli.cli.model_tables import model_table
    from vmonarch_cli.models.registry import find_model
    from vmonarch_cli.plan.tuned import brought

    model, source = find_model(name, revision)
    folder = Path(source)
    Output().show(model_table(model, brought(folder) if folder.is_dir() else ()))
