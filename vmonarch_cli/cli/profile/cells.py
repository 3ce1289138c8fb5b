"""Tables of profiles: their shape, and the cells that they share; every table names device and versions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text

from vmonarch_cli.cli.tables import table
from vmonarch_cli.profile.results import OutputCheck, Spread

WIDE = 100
"""Columns of a terminal from which on the less important figures are shown, too."""


def profile_table(title: str, caption: str) -> Table:
    """A table with a title, a caption and a column of names."""
    styles = {"title_style": "bold", "caption_style": "dim"}
    made = table(title=title, title_justify="left", caption=caption, padding=(0, 1, 0, 0), **styles)
    made.add_column("", no_wrap=True)
    return made


def add_columns(made: Table, *titles: str) -> None:
    """Columns of figures."""
    for title in titles:
        made.add_column(title, justify="right", no_wrap=True)


def squeezed(made: Table, width: int, *order: str) -> Table:
    """The table without whole columns, named by the first line of their heads, dropped in this order until it fits."""
    kept, dropped = list(made.columns), []
    for name in order:
        found = [column for column in kept if str(column.header).split("\n")[0] == name]
        if found and _whole_width(kept) > width:
            kept.remove(found[-1])
            dropped.append(name)
    if not dropped:
        return made
    fits = profile_table(str(made.title), f"{made.caption}; no room for {', '.join(dropped)}")
    for column in kept[1:]:
        add_columns(fits, str(column.header))
    for row, cells in zip(made.rows, zip(*(column.cells for column in kept), strict=True), strict=True):
        fits.add_row(*cells, style=row.style, end_section=row.end_section)
    return fits


def _whole_width(columns: Sequence[Column]) -> int:
    """With one space of padding and one of the box beside each column, and the edges."""
    widest = (max(cell_len(line) for part in (c.header, *c.cells) for line in str(part).split("\n")) for c in columns)
    return 2 + sum(2 + width for width in widest)


def time_unit(spreads: Sequence[Spread | None]) -> tuple[str, Callable[[float], str]]:
    """One unit for a column by its median value, and a formatter with three or more digits for the smaller ones."""
    known = [spread.median for spread in spreads if spread is not None]
    middle = statistics.median(known) if known else 1.0
    unit, scale = ("s", 1.0) if middle >= 2 else ("ms", 1e3)

    def shown(value: float) -> str:
        scaled = value * scale
        return f"{scaled:.{3 if scaled < 1 else 2 if scaled < 10 else 1 if scaled < 1000 else 0}f}"

    return unit, shown


def rate_unit(rates: Sequence[float | None]) -> tuple[str, Callable[[float], str]]:
    """One unit for a column of rates, and a formatter with two digits or more."""
    top = max((rate for rate in rates if rate is not None), default=0.0)
    unit, size = ("TFLOP/s", 1e12) if top >= 1e12 else ("GFLOP/s", 1e9)
    return unit, lambda rate: f"{rate / size:.0f}" if rate / size >= 10 else f"{rate / size:.1f}"


def per_second(rate: float, what: str) -> str:
    """'798 TFLOP/s', '41 GB/s'."""
    size, prefix = (1e12, "T") if rate >= 1e12 else (1e9, "G")
    return f"{rate / size:.3g} {prefix}{what}/s"


def name_cell(name: str, kind: str, note: str) -> Text:
    """The name of a row, bold where it is structured, and what is special of it."""
    return Text.assemble(
        (name, "bold" if kind == "structured" else ""), (f" {note}" if note not in ("", name) else "", "dim")
    )


def error_cell(value: float) -> str:
    """'0.125', '8e-05'."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def check_cell(check: OutputCheck) -> Text:
    """'1.2e-06 ✓'."""
    return Text(f"{check.error:.1e} ✓", style="green") if check.passed else Text(f"{check.error:.1e} ✗", style="red")
