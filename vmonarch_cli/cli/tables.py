"""The two shapes that all tables have, and the cells that several of them share; nothing prints here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich import box
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

Value = TypeVar("Value")
ABSENT = "·"
"""What stands where nothing was measured."""


def table(*titles: str, **extra: Any) -> Table:
    """A table with a line under its head; `extra` goes to rich's Table."""
    shape: dict[str, Any] = {"box": box.SIMPLE_HEAD, "header_style": "bold", "caption_justify": "left"}
    made = Table(**{**shape, "pad_edge": False, **extra})
    for title in titles:
        made.add_column(title)
    return made


@dataclass(frozen=True)
class Column:
    """A column of figures, all of whose cells are known."""

    title: str
    cells: Sequence[str | Text]
    footer: str = ""
    style: str = ""
    rank: int = 0
    """0: stays. Of the others, the highest goes first where there is no room."""

    @property
    def width(self) -> int:
        """Columns of the terminal that it takes, with a space on each side."""
        parts = [part if isinstance(part, str) else part.plain for part in (self.title, self.footer, *self.cells)]
        return 2 + max((cell_len(line) for part in parts for line in part.splitlines()), default=0)


def fitted(columns: Sequence[Column], width: int, **extra: Any) -> Table:
    """A table of figures that fits the width: whole columns go, never parts of numbers, and a line names them."""
    kept = list(columns)
    while _whole_width(kept) > width and any(column.rank for column in kept):
        kept.remove(max(kept, key=lambda column: column.rank))
    made = table(pad_edge=True, **extra)
    for column in kept:
        made.add_column(column.title, footer=column.footer, style=column.style, justify="right", no_wrap=True)
    for cells in zip(*(column.cells for column in kept), strict=True):
        made.add_row(*cells)
    left_out = [column.title.split("\n")[0] or column.title.strip() for column in columns if column not in kept]
    if left_out:
        made.caption = f"no room for {', '.join(left_out)}: a terminal of {_whole_width(columns)} columns shows all"
        made.caption_style = "dim"
    return made


def _whole_width(columns: Sequence[Column]) -> int:
    """With the box, which has a space on both sides of each column."""
    return 1 + sum(column.width + 1 for column in columns)


def facts(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    """Two columns: a dim label, and a value that wraps."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim", no_wrap=True, min_width=10)
    made.add_column(overflow="fold")
    for label, value in rows:
        made.add_row(label, Text(value) if isinstance(value, str) else value)
    return made


def times(value: float | None) -> Text:
    """'1.94x', green from 1 up; '·' where there is none."""
    if value is None:
        return Text(ABSENT)
    return Text(f"{value:.2f}x" if value < 100 else f"{value:.0f}x", style="green" if value >= 1 else "yellow")


def maybe(value: Value | None, shown: Callable[[Value], str | Text]) -> str | Text:
    """The value as `shown` says it; '·' where there is none."""
    return ABSENT if value is None else shown(value)
