"""Tables of recipes: all of them, and one with its sources."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vmonarch_cli.cli.tables import facts, table
from vmonarch_cli.plan.recipes import SETTINGS, Recipe


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    """Name, family, steps and sentence of each recipe."""
    made = table("recipe", "family", "steps", "what it is for")
    for recipe in recipes:
        steps = recipe.steps or len(recipe.sigmas) or ""
        made.add_row(Text(recipe.name, style="bold"), recipe.family, str(steps), Text(recipe.description))
    return made


def recipe_table(recipe: Recipe) -> Group:
    """Every setting that a recipe gives, the models that it is for, and its sources."""
    models = " or ".join(recipe.pipelines) or f"any pipeline of {recipe.family}"
    if recipe.transformers is not None:
        models += f", {recipe.transformers} transformer{'s' if recipe.transformers > 1 else ''}"
    given = recipe.settings()
    rows = [(name.replace("_", " "), _words(given[name])) for name in SETTINGS if name in given and name != "loras"]
    rows += [("lora", text) for text in recipe.loras]
    return Group(
        Text.assemble((recipe.name, "bold"), f"  {recipe.description}"),
        facts([("family", recipe.family), ("models", models), *rows, *(("source", url) for url in recipe.source)]),
    )


def _words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
