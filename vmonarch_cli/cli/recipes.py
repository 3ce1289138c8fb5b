"""`vmonarch recipes`: list and show the settings for distilled models that --recipe knows."""

from __future__ import annotations

from typing import Annotated

import typer

from vmonarch_cli import __version__
from vmonarch_cli.cli.options import AsJson
from vmonarch_cli.cli.output import Output

recipes_app = typer.Typer(help="List and show recipes for distilled models.", invoke_without_command=True)


@recipes_app.callback()
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes that come with vmonarch; `show NAME` tells every number of one and where it is from."""
    if context.invoked_subcommand is None:
        from vmonarch_cli.cli.recipe_tables import recipes_table
        from vmonarch_cli.plan.recipes import load_recipe, shipped_recipes

        found = [load_recipe(name) for name in shipped_recipes()]
        out = Output(as_json=as_json)
        if as_json:
            out.json({"version": __version__, "recipes": [recipe.model_dump() for recipe in found]})
        out.show(recipes_table(found))


@recipes_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of a recipe, or a .toml file.")], as_json: AsJson = False
) -> None:
    """Show what a recipe sets, for which models, and the sources of its numbers."""
    from vmonarch_cli.cli.recipe_tables import recipe_table
    from vmonarch_cli.plan.recipes import load_recipe

    recipe = load_recipe(name)
    out = Output(as_json=as_json)
    if as_json:
        out.json({"version": __version__, **recipe.model_dump()})
    out.show(recipe_table(recipe))
