"""`--open`: the finished clip or page, in whatever the platform opens it with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vmonarch_cli.cli.options import OUTPUT, option
from vmonarch_cli.cli.output import Output

Open = Annotated[bool, option("--open", panel=OUTPUT, help="Open the finished clip or page; in a terminal alone.")]


def open_file(path: Path, out: Output) -> None:
    """Open a file with the platform's opener; a note where there is no terminal, a warning where that fails."""
    if not _is_terminal(out):
        out.note(f"{path} is not opened: --open works in a terminal alone")
    elif typer.launch(str(path.absolute())):
        out.warn(f"{path} could not be opened: this system has nothing that opens it")


def _is_terminal(out: Output) -> bool:
    return out.stdout.is_terminal
