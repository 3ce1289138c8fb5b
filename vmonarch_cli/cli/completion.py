"""What the shell offers after `--preset`, `--recipe` and `--model`: names, without torch."""

from __future__ import annotations

from collections.abc import Iterable

from vmonarch_cli.models.catalogue import ENTRIES
from vmonarch_cli.plan.auto import AUTO
from vmonarch_cli.plan.recipes import shipped_recipes
from vmonarch_cli.presets import shipped_names


def preset_names(incomplete: str) -> list[str]:
    """Shipped presets, and auto."""
    return _beginning([*shipped_names(), AUTO], incomplete)


def recipe_names(incomplete: str) -> list[str]:
    """Shipped recipes."""
    return _beginning(shipped_recipes(), incomplete)


def model_names(incomplete: str) -> list[str]:
    """Aliases of models."""
    return _beginning([entry.alias for entry in ENTRIES], incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
