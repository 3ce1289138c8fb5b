"""Where a clip's seconds went, as one bar; elsewhere than on a terminal as one line of text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from rich.console import ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

from vmonarch_cli.text import seconds

_STYLES = {
    "load": "blue",
    "text": "cyan",
    "compile": "magenta",
    "samples": "bright_black",
    "attention": "green",
    "rest": "yellow",
    "previews": "bright_cyan",
    "decode": "red",
    "write": "bright_blue",
}
_WORDS = {"compile": "compile kernels", "samples": "dense samples", "rest": "rest of denoising"}
_MAX_COLUMNS = 60


class SpentBar:
    """A bar whose pieces are as long as the parts of `ClipTiming.parts`, and what each piece is."""

    def __init__(self, parts: Mapping[str, float], note: str = "") -> None:
        """`note` ends the text, in brackets."""
        self._parts = dict(parts)
        self._note = note

        # Without colours the pieces still differ, each from its neighbours.
        self._fills = dict(zip(self._parts, cycle("█▓▒░"), strict=False))

    def __rich_console__(self, console: Any, options: ConsoleOptions) -> RenderResult:
        if not _draws(options):
            yield self._text(keyed=False)
            return
        bar = Text(no_wrap=True, overflow="crop")
        for name, columns in widths(self._parts, min(options.max_width, _MAX_COLUMNS)).items():
            bar.append(self._fills[name] * columns, _STYLES.get(name, ""))
        yield bar
        yield self._text(keyed=True)

    def __rich_measure__(self, console: Any, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._text(keyed=_draws(options)))

    def _text(self, *, keyed: bool) -> Text:
        """What each part took; `keyed`: with the sign of its piece of the bar."""
        total = sum(self._parts.values())
        text = Text()
        for name, value in self._parts.items():
            text.append(", " if text else "")
            if keyed:
                text.append(f"{self._fills[name]} ", _STYLES.get(name, ""))
            text.append(f"{_WORDS.get(name, name)} {seconds(value)} ({100 * value / total:.0f} %)")
        return text.append(f" ({self._note})" if self._note else "")


def _draws(options: ConsoleOptions) -> bool:
    return options.is_terminal and not options.ascii_only


def widths(parts: Mapping[str, float], columns: int) -> dict[str, int]:
    """Columns of each part of a bar, `columns` in all: by largest remainder, so that none is off by more than one."""
    total = sum(parts.values())
    exact = {name: columns * value / total for name, value in parts.items()}
    found = {name: int(value) for name, value in exact.items()}
    for name in sorted(parts, key=lambda name: found[name] - exact[name])[: columns - sum(found.values())]:
        found[name] += 1
    return found
