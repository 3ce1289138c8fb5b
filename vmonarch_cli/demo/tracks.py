"""How an object moves: its track through a clip, for one motion and for those that follow it (no torch here).

Units as in `specs`: lengths in half frames, angles in turns, time in lengths of a motion.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vmonarch_cli.models.demo_vocabulary import MOTIONS

REACH = 1.22
"""Largest distance of any shape's outline from its centre, in radii."""


@dataclass(frozen=True)
class Track:
    """Position, radius and angle over time: one formula of which every motion is a special case.

    With u = eased time: x = x0 + (x1 - x0) u + orbit cos(2 pi (orbit_phase + orbit_turns t)), the same with sin for y,
    plus a rounded triangle wave (zigzag) and minus a parabola per bounce (the first begins at bounce_phase of it, 0.5
    being its top); radius r0 to r1; angle a0 + turns t.
    """

    x0: float
    y0: float
    x1: float
    y1: float
    r0: float
    r1: float
    a0: float = 0.0
    turns: float = 0.0
    ease: float = 0.0
    orbit: float = 0.0
    orbit_turns: float = 0.0
    orbit_phase: float = 0.0
    zigzag: float = 0.0
    zigzag_waves: float = 0.0
    bounce: float = 0.0
    bounces: float = 0.0
    bounce_phase: float = 0.5

    def lasting(self, beats: float) -> Track:
        """This motion for so many beats: what repeats keeps its speed, unless the motion is shorter than a beat."""
        times = max(beats, 1.0)
        return replace(
            self, turns=self.turns * times, orbit_turns=self.orbit_turns * times,
            zigzag_waves=self.zigzag_waves * times, bounces=self.bounces * times,
        )  # fmt: skip

    def end(self) -> tuple[float, float, float, float]:
        """x, y, radius and angle in its last frame."""
        orbit = 2 * math.pi * (self.orbit_phase + self.orbit_turns)
        wave = math.asin(0.97 * math.sin(2 * math.pi * self.zigzag_waves)) / math.asin(0.97)
        hop = math.fmod(self.bounces + self.bounce_phase, 1.0)
        x = self.x1 + self.orbit * math.cos(orbit)
        y = self.y1 + self.orbit * math.sin(orbit) + self.zigzag * wave - self.bounce * 4 * hop * (1 - hop)
        return x, y, self.r1, self.a0 + self.turns


def tilt(rng: random.Random) -> float:
    return rng.uniform(-0.03, 0.03)


def track_of(
    rng: random.Random, motion: str, r: float, centre: tuple[float, float], room: tuple[float, float]
) -> Track:
    """A track of constant radius that keeps the object within `room` of `centre` along x and y."""
    cx, cy = centre
    room_x, room_y = max(room[0], 0.0), max(room[1], 0.0)
    x = cx + rng.uniform(-room_x, room_x) * 0.7
    y = cy + rng.uniform(-room_y, room_y) * 0.7
    a0, ease = tilt(rng), rng.uniform(0.0, 0.6)
    near, far = rng.uniform(0.8, 1.0), rng.uniform(0.8, 1.0)
    match motion:
        case "left to right":
            return Track(cx - near * room_x, y, cx + far * room_x, y, r, r, a0, ease=ease)
        case "right to left":
            return Track(cx + near * room_x, y, cx - far * room_x, y, r, r, a0, ease=ease)
        case "rising":
            return Track(x, cy + near * room_y, x, cy - far * room_y, r, r, a0, ease=ease)
        case "falling":
            return Track(x, cy - near * room_y, x, cy + far * room_y, r, r, a0, ease=ease)
        case "bouncing":
            floor = cy + room_y
            height = rng.uniform(0.75, 1.0) * 2.0 * room_y
            return Track(x, floor, x, floor, r, r, a0, bounce=height, bounces=rng.choice((1.5, 2.0, 2.5)))
        case "circling":
            orbit = rng.uniform(0.7, 0.95) * min(room_x, room_y)
            free_x, free_y = room_x - orbit, room_y - orbit
            ox, oy = cx + rng.uniform(-free_x, free_x), cy + rng.uniform(-free_y, free_y)
            turns = rng.choice((-1.0, 1.0)) * rng.uniform(1.0, 1.4)
            return Track(ox, oy, ox, oy, r, r, a0, orbit=orbit, orbit_turns=turns, orbit_phase=rng.random())
        case "spinning":
            turns = rng.choice((-1.0, 1.0)) * rng.uniform(0.9, 1.5)
            return Track(x, y, x, y, r, r, rng.random(), turns=turns)
        case "zigzagging":
            way = rng.choice((-1.0, 1.0))
            amplitude = rng.uniform(0.28, 0.38)
            slack = max(room_y - amplitude, 0.0)
            y = cy + rng.uniform(-slack, slack)
            return Track(
                cx - way * near * room_x, y, cx + way * far * room_x, y, r, r, a0,
                zigzag=amplitude * rng.choice((-1.0, 1.0)), zigzag_waves=rng.uniform(1.75, 2.5),
            )  # fmt: skip
        case "standing still":
            return Track(x, y, x, y, r, r, a0)
    raise ValueError(f"motion: got {motion!r}, valid are {', '.join(MOTIONS)}")


_LEAST_WAY = 0.55  # of a motion along one axis, so that it can be told from none
# Motions that need much room are tried earlier, those that always have it later: all come about as often.
_RARITY = {"zigzagging": 4.0, "circling": 4.0, "growing": 2.0, "shrinking": 0.6, "standing still": 0.4}


def following(
    rng: random.Random, motion: str, track: Track, allowed: Sequence[str], beats: Sequence[float]
) -> list[tuple[str, Track]]:
    """A motion for each of `beats` after a first one, with its track from where the one before it ends.

    `track` already lasts as long as it will.
    """
    while True:
        found = [(motion, track)]
        for duration in beats:
            before, last = found[-1]
            choices = sorted((m for m in allowed if m != before), key=lambda m: rng.random() ** _RARITY.get(m, 1.0))
            tries = ((m, _onward(rng, m, last.end())) for m in choices)
            onward = next(((m, t) for m, t in tries if t is not None), None)
            if onward is None:
                break
            found.append((onward[0], onward[1].lasting(duration)))
        else:
            return found[1:]


def _onward(rng: random.Random, motion: str, state: tuple[float, float, float, float]) -> Track | None:
    """A track of this motion from x, y, radius and angle; None where there is no room for it."""
    x, y, r, a = state
    room = 0.97 - REACH * r
    still = Track(x, y, x, y, r, r, a)
    end, ease = rng.uniform(0.8, 1.0) * room, rng.uniform(0.0, 0.6)
    match motion:
        case "left to right" | "right to left":
            end = end if motion == "left to right" else -end
            right_way = (end - x if motion == "left to right" else x - end) >= _LEAST_WAY
            return replace(still, x1=end, ease=ease) if right_way else None
        case "rising" | "falling":
            end = end if motion == "falling" else -end
            right_way = (end - y if motion == "falling" else y - end) >= _LEAST_WAY
            return replace(still, y1=end, ease=ease) if right_way else None
        case "bouncing":
            bounces = rng.choice((1.5, 2.0, 2.5))
            if room - y >= _LEAST_WAY:  # it falls first
                return replace(still, y0=room, y1=room, bounce=room - y, bounces=bounces)
            height = rng.uniform(0.75, 1.0) * (y + room)
            return replace(still, bounce=height, bounces=bounces, bounce_phase=0.0) if height >= _LEAST_WAY else None
        case "circling":
            return _circle_from(rng, still, room)
        case "spinning":
            return replace(still, turns=rng.choice((-1.0, 1.0)) * rng.uniform(0.9, 1.5))
        case "growing":
            larger = r * rng.uniform(1.5, 2.0)
            return replace(still, r1=larger) if larger <= 0.52 and max(abs(x), abs(y)) + REACH * larger < 1 else None
        case "shrinking":
            smaller = r / rng.uniform(1.5, 2.0)
            return replace(still, r1=smaller) if smaller >= 0.17 else None
        case "zigzagging":
            amplitude = rng.uniform(0.28, 0.38)
            end = -math.copysign(end, x)
            if abs(y) + amplitude > room or abs(end - x) < 0.7:
                return None
            wave = amplitude * rng.choice((-1.0, 1.0))
            return replace(still, x1=end, zigzag=wave, zigzag_waves=rng.uniform(1.75, 2.5))
        case "standing still":
            return still
    raise ValueError(f"motion: got {motion!r}, valid are {', '.join(MOTIONS)}")


def _circle_from(rng: random.Random, still: Track, room: float) -> Track | None:
    """A circle within the room that begins where the object is; None if a few tries find none."""
    for _ in range(8):
        orbit, phase = rng.uniform(0.6, 0.95) * room, rng.random()
        cx = still.x0 - orbit * math.cos(2 * math.pi * phase)
        cy = still.y0 - orbit * math.sin(2 * math.pi * phase)
        if orbit >= _LEAST_WAY / 2 and max(abs(cx), abs(cy)) + orbit <= room + 0.01:
            turns = rng.choice((-1.0, 1.0)) * rng.uniform(1.0, 1.4)
            return replace(still, x0=cx, y0=cy, x1=cx, y1=cy, orbit=orbit, orbit_turns=turns, orbit_phase=phase)
    return None
