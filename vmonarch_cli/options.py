"""How flags are declared: grouped in the help, and read so that a wrong value is named in one sentence."""

from __future__ import annotations

from typing import Any

import typer

from vmonarch_cli.errors import InputError
from vmonarch_cli.wording import shown

MODEL, SHAPE, SAMPLING, ATTENTION, OUTPUT = "Model and prompt", "Shape", "Sampling", "Attention", "Machine and output"


def option(*names: str, panel: str, help: str, **extra: Any) -> Any:
    """A flag in a panel of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **extra)


def whole_option(*names: str, panel: str, help: str) -> Any:
    """A flag that takes a whole number; typer's own sentence would not say what came."""

    def parse(text: str | int) -> int:
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{names[0]} takes a whole number, got {shown(text)}") from None

    return option(*names, panel=panel, help=help, parser=parse, metavar="<int>")


def number_option(*names: str, panel: str, help: str) -> Any:
    """A flag that takes a number."""

    def parse(text: str | float) -> float:
        try:
            return float(text)
        except ValueError:
            raise InputError(f"{names[0]} takes a number, got {shown(text)}") from None

    return option(*names, panel=panel, help=help, parser=parse, metavar="<float>")
