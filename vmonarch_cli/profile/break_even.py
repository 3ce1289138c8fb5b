"""At how many tokens structured attention begins to pay: attention alone at a few lengths, and a line between them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence

from vmonarch_cli.profile.results import BreakEven, KernelShape

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def break_even(preset: str, shapes: Sequence[KernelShape]) -> BreakEven | None:
    """Where the speedup of a preset's call crosses 1, on lines through the measured lengths in both logarithms.

    None with fewer than two lengths.
    """
    points = []
    for shape in sorted(shapes, key=lambda s: s.tokens):
        row = shape.row(preset)
        gain = shape.speedup(row, shape.fastest_dense) if row is not None else None
        if gain is not None and row is not None and row.note != "exact":
            points.append((shape.tokens, gain))
    if len(points) < 2:
        return None
    for (n0, g0), (n1, g1) in itertools.pairwise(points):
        if (g0 - 1) * (g1 - 1) <= 0 and g0 != g1:
            return BreakEven(preset, _crossing(n0, g0, n1, g1), "between", points)
    if points[0][1] > 1:
        return BreakEven(preset, None, "below", points)
    (n0, g0), (n1, g1) = points[-2:]
    reach = _crossing(n0, g0, n1, g1) if g1 > g0 else math.inf
    return BreakEven(preset, reach if reach < 100 * n1 else None, "above", points)


def _crossing(n0: float, g0: float, n1: float, g1: float) -> float:
    """Tokens at which the line through (log n, log gain) is zero; infinity where it is all but level."""
    slope = (math.log(g1) - math.log(g0)) / (math.log(n1) - math.log(n0))
    exponent = math.log(n0) - math.log(g0) / slope
    return math.exp(exponent) if exponent < _LARGEST_EXPONENT else math.inf
