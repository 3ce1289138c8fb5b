"""Which frames are recomputed exactly in which call: the turns of the frame refresh. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

Turn = tuple[int, tuple[int, ...]]
"""A frame that is recomputed, and the frames beside it that get a share of its change."""
FIRST_TURNS = 1 / 3
"""Share of one forward's turns that come in the first call, where no frame has a residual yet ..."""
FIRST_FRAMES = 0.5
"""... but at most this share of all frames."""
EARLY_TURNS, EARLY_CALLS = 0.8, 0.2
"""After the first call, at most this share of the turns that are left comes in this share of a clip's calls."""
_GOLDEN = 0.6180339887498949


def first_call_turns(refresh: float, frames: int, calls: float, forwards: int, first: float | None) -> float:
    """Turns that the first call takes, not rounded, as ``turns_before`` describes them."""
    if first is None:
        # What the first call takes does not depend on the forwards: how many a step has is known when it ends.
        return min(FIRST_FRAMES * frames, FIRST_TURNS * refresh * calls)
    return min(frames, first * refresh * forwards * calls)


def turns_before(
    call: int, refresh: float, frames: int, calls: int | None, forwards: int = 1, *, first: float | None = None
) -> int:
    """How many turns come before a call (from 0): ``refresh`` for each forward on the mean, evenly unless ``calls`` is
    known.

    A residual serves every later call, so most turns come early: some in the first call, where structured attention
    is farthest from dense, then one for every frame, or most of what is left where that is fewer; the rest come evenly.
    ``first`` is the share of the turns of all forwards that the first call takes; then all others come evenly. No call
    takes more than one for every frame: what is more comes in the next.
    """
    mean = refresh * forwards
    if calls is None or call == 0 or (calls < 3 if first is None else calls < 2):
        return math.ceil(mean * call - 1e-9)
    if first is not None:
        leading = math.floor(first * mean * calls + 1e-9)
        evenly = (mean * calls - leading) * (call - 1) / (calls - 1)
        return min(call * frames, math.ceil(leading + evenly - 1e-9))
    taken = math.floor(first_call_turns(refresh, frames, calls, forwards, first) + 1e-9)
    early_calls = max(1, round(EARLY_CALLS * calls))
    left, late_calls = mean * calls - taken, calls - 1 - early_calls
    early = max(min(frames, EARLY_TURNS * left), left * early_calls / (calls - 1)) if late_calls else left
    late = (left - early) / late_calls if late_calls else 0.0
    return taken + math.ceil(early * min(1.0, (call - 1) / early_calls) + late * max(0, call - 1 - early_calls) - 1e-9)


def turns(frames: int, first_frame: bool) -> list[int]:
    """The order in which frames are recomputed: by the golden ratio, so that neighbours' turns lie far apart.

    Where frame 0, on which later frames lean, is not exact in every call (``first_frame``), it has every fourth turn.
    """
    later = sorted(range(1, frames), key=lambda frame: frame * _GOLDEN % 1)
    if first_frame:
        return later
    return [frame for i in range(0, max(1, len(later)), 3) for frame in (0, *later[i : i + 3])]


def next_turns(order: Sequence[int], place: int, count: int) -> tuple[list[int], int]:
    """The next ``count`` frames of an order, each once, from a place in it, and the place behind them."""
    count = min(count, len(set(order)))
    chosen: list[int] = []
    while len(chosen) < count:
        frame = order[place % len(order)]
        place += 1
        if frame not in chosen:
            chosen.append(frame)
    return chosen, place % len(order) if order else 0


@lru_cache(maxsize=256)
def planned_turns(frames: int, first_frame: bool, place: int, count: int) -> tuple[tuple[Turn, ...], int]:
    """The turns of a call, the next ``count`` from a place in the order of ``turns``, and the place behind them.

    Frames that have their turn in the same call get no share of one another's change.
    """
    order = turns(frames, first_frame)
    chosen, behind = next_turns(order, place, count)
    beside = set(order).difference(chosen)
    return tuple((x, tuple(y for y in (x - 1, x + 1) if y in beside)) for x in chosen), behind
