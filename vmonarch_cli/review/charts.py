"""Curves over the frames of clips, as points in a square of 1000 that a page's template draws. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """One plot of a page."""

    title: str
    note: str
    label: str
    """The plot in words, for readers who do not see it."""
    marks: list[str]
    """Labels of the vertical axis: top, middle, bottom."""
    curves: list[tuple[str, str]]
    """(class of the line, points of an SVG polyline); a line with gaps has several."""
    last: int
    """Number of the last frame, from 0."""


def draw_chart(
    title: str, note: str, lines: Mapping[str, Sequence[float | None]], colours: Mapping[str, str]
) -> Chart | None:
    """Values per frame as a chart; None when there is nothing to draw.

    Args:
        title: what is drawn.
        note: its unit, and which way is better.
        lines: name of a clip -> value of each frame; a value that is None or not finite leaves a gap.
        colours: name of a clip -> class of its line.

    """
    finite = [v for values in lines.values() for v in values if v is not None and math.isfinite(v)]
    count = max((len(values) for values in lines.values()), default=0)
    if not finite or count < 2:
        return None
    low, high = _round_range(min(finite), max(finite))
    return Chart(
        title,
        note,
        label=f"{title}: {', '.join(lines)}",
        marks=[_short(value) for value in (high, (low + high) / 2, low)],
        curves=[
            (colours[name], points) for name, values in lines.items() for points in _pieces(values, count, low, high)
        ],
        last=count - 1,
    )


def _pieces(values: Sequence[float | None], count: int, low: float, high: float) -> list[str]:
    """Points of the stretches without gaps, in a square of 1000."""
    pieces: list[list[str]] = [[]]
    for index, value in enumerate(values):
        if value is None or not math.isfinite(value):
            pieces.append([])
        else:
            pieces[-1].append(f"{1000 * index / (count - 1):.1f},{1000 * (high - value) / (high - low):.1f}")
    return [" ".join(piece if len(piece) > 1 else piece * 2) for piece in pieces if piece]


def _round_range(low: float, high: float) -> tuple[float, float]:
    """Round bounds around the values, so that the middle is a round number as well."""
    span = high - low or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span)) / 2
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    if bottom == top:
        top += 2 * step
    return bottom, top


def _short(value: float) -> str:
    return f"{round(value, 6):.4g}"
