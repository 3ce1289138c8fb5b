"""What a clip shows, as plain data, and how it is drawn at random (no torch here).

Units: lengths in half frames (the frame spans [-1, 1], x to the right, y downwards), angles in turns, time in clip
lengths (0 is the first frame, 1 the last).

Held-out clips differ from training clips in two ways: their random seeds come from another name space, and at least
one of their (shape, colour, motion) triples is never drawn for training.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from vmonarch_cli.models.demo_vocabulary import BACKGROUNDS, COLOURS, KINDS, MOTIONS, RGB, SHAPES

Split = Literal["train", "heldout"]

SIZE_RADII: dict[str, tuple[float, float]] = {"small": (0.25, 0.28), "medium": (0.33, 0.37), "large": (0.44, 0.50)}
REACH = 1.22
"""Largest distance of any shape's outline from its centre, in radii."""

PAIR_SHARE: dict[Split, float] = {"train": 0.3, "heldout": 0.15}
"""How many clips show two objects; training sees more of them because they take longest to learn."""
_FAST = frozenset({"bouncing", "circling", "spinning", "zigzagging"})
_SLOW_KEPT = 0.5  # of training's clips without a fast motion: those are learned long before the others
_ROUND_SHAPES = frozenset({"circle", "ring"})
# Motions of two objects that share the frame: they never leave their own half.
_SIDE_BY_SIDE = ("rising", "falling", "bouncing", "spinning", "growing", "shrinking", "standing still")
_STACKED = ("left to right", "right to left", "spinning", "growing", "shrinking", "standing still")


@dataclass(frozen=True)
class Track:
    """Position, radius and angle over time: one formula of which every motion is a special case.

    With u = eased time: x = x0 + (x1 - x0) u + orbit cos(2 pi (orbit_phase + orbit_turns t)), the same with sin for y,
    plus a rounded triangle wave (zigzag) and minus a parabola per bounce; radius r0 to r1; angle a0 + turns t.
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


@dataclass(frozen=True)
class ObjectSpec:
    """One shape: names from `vocabulary`, the size word (None while it grows or shrinks), the place word of a pair."""

    shape: str
    colour: str
    motion: str
    size: str | None
    track: Track
    place: str | None = None

    @property
    def triple(self) -> tuple[str, str, str]:
        """(shape, colour, motion)."""
        return self.shape, self.colour, self.motion


@dataclass(frozen=True)
class ClipSpec:
    """One clip: one or two objects before a background of a named colour and kind.

    `pattern_angle` is in turns, `pattern_period` in half frames, `pattern_phase` in periods.
    """

    objects: tuple[ObjectSpec, ...]
    background: str
    kind: str
    pattern_angle: float = 0.0
    pattern_period: float = 0.6
    pattern_phase: float = 0.0
    seed: str = field(default="", compare=False)


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether training never shows this triple (one in eleven, spread evenly over shapes, colours and motions)."""
    s, c, m = list(SHAPES).index(shape), list(COLOURS).index(colour), list(MOTIONS).index(motion)
    return (3 * s + 5 * c + 7 * m) % 11 == 4


def motions_of(shape: str) -> tuple[str, ...]:
    """Motions that can be seen on this shape: nothing round visibly spins."""
    return tuple(m for m in MOTIONS if not (m == "spinning" and shape in _ROUND_SHAPES))


def sample_spec(split: Split, seed: int, index: int) -> ClipSpec:
    """The clip number `index` of a split; the same arguments always give the same clip."""
    name = f"{split}/{seed}/{index}"
    rng = random.Random(name)
    # Decided once: a pair has two chances to be held out, so redrawing it too would fill the held-out split with pairs.
    pair = rng.random() < PAIR_SHARE[split]
    while True:
        spec = _draw(rng, name, pair=pair)
        if split == "train" and not any(o.motion in _FAST for o in spec.objects) and rng.random() > _SLOW_KEPT:
            continue
        held_out = [is_held_out(*o.triple) for o in spec.objects]
        if any(held_out) == (split == "heldout"):
            return spec


def _draw(rng: random.Random, name: str, *, pair: bool) -> ClipSpec:
    background = rng.choice(list(BACKGROUNDS))
    colours = [c for c in COLOURS if contrasts(c, background)]
    if pair:
        objects = _draw_pair(rng, colours)
    else:
        shape = rng.choice(list(SHAPES))
        objects = (_draw_single(rng, shape, rng.choice(colours), rng.choice(motions_of(shape))),)
    return ClipSpec(
        objects=objects,
        background=background,
        kind=rng.choices(list(KINDS), weights=(4, 2, 2, 2))[0],
        pattern_angle=rng.choice((0.0, 0.125, 0.25, 0.375)),
        pattern_period=rng.uniform(0.55, 0.85),
        pattern_phase=rng.random(),
        seed=name,
    )


def _draw_single(rng: random.Random, shape: str, colour: str, motion: str) -> ObjectSpec:
    if motion in ("growing", "shrinking"):
        small, large = rng.uniform(0.18, 0.22), rng.uniform(0.46, 0.54)
        r0, r1 = (small, large) if motion == "growing" else (large, small)
        x, y = rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25)
        track = Track(x, y, x, y, r0, r1, a0=_tilt(rng))
        return ObjectSpec(shape, colour, motion, None, track)
    sizes = ("small", "medium") if motion in ("circling", "zigzagging", "bouncing") else tuple(SIZE_RADII)
    size = rng.choice(sizes)
    r = rng.uniform(*SIZE_RADII[size])
    room = 0.97 - REACH * r
    return ObjectSpec(shape, colour, motion, size, _track(rng, motion, r, (0.0, 0.0), (room, room)))


def _draw_pair(rng: random.Random, colours: list[str]) -> tuple[ObjectSpec, ...]:
    side_by_side = rng.random() < 0.5
    motions = _SIDE_BY_SIDE if side_by_side else _STACKED
    places = ("left", "right") if side_by_side else ("top", "bottom")
    first, second = rng.sample(colours, 2)
    objects = []
    for colour, place, sign in zip((first, second), places, (-1.0, 1.0), strict=True):
        shape = rng.choice(list(SHAPES))
        motion = rng.choice([m for m in motions if m in motions_of(shape)])
        centre = (0.5 * sign, 0.0) if side_by_side else (0.0, 0.5 * sign)
        if motion in ("growing", "shrinking"):
            small, large = rng.uniform(0.16, 0.19), rng.uniform(0.33, 0.37)
            r0, r1 = (small, large) if motion == "growing" else (large, small)
            jitter = (0.0, rng.uniform(-0.3, 0.3)) if side_by_side else (rng.uniform(-0.3, 0.3), 0.0)
            x, y = centre[0] + jitter[0], centre[1] + jitter[1]
            objects.append(ObjectSpec(shape, colour, motion, None, Track(x, y, x, y, r0, r1, a0=_tilt(rng)), place))
            continue
        size = rng.choice(("small", "medium"))
        r = rng.uniform(*SIZE_RADII[size])
        near, far = 0.48 - REACH * r, 0.97 - REACH * r
        room = (near, far) if side_by_side else (far, near)
        objects.append(ObjectSpec(shape, colour, motion, size, _track(rng, motion, r, centre, room), place))
    return tuple(objects)


def _tilt(rng: random.Random) -> float:
    return rng.uniform(-0.03, 0.03)


def _track(rng: random.Random, motion: str, r: float, centre: tuple[float, float], room: tuple[float, float]) -> Track:
    """A track of constant radius that keeps the object within `room` of `centre` along x and y."""
    cx, cy = centre
    room_x, room_y = max(room[0], 0.0), max(room[1], 0.0)
    x = cx + rng.uniform(-room_x, room_x) * 0.7
    y = cy + rng.uniform(-room_y, room_y) * 0.7
    a0, ease = _tilt(rng), rng.uniform(0.0, 0.6)
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


@cache
def contrasts(colour: str, background: str) -> bool:
    """Whether an object of this colour stands out on this background (50 or more in CIE Lab)."""
    a, b = lab(COLOURS[colour]), lab(BACKGROUNDS[background])
    return math.dist(a, b) >= 50.0


def lab(rgb: RGB) -> tuple[float, float, float]:
    """CIE Lab (D65) of an sRGB colour in [0, 1]."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
    )
    fx, fy, fz = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)
