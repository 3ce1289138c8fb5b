"""The two shapes that all tables have, and the cells that several of them share; nothing prints here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rich import box
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
