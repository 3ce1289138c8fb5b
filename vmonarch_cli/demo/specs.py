"""What a clip shows, as plain data, and how it is drawn at random (no torch here).

Units: lengths in half frames (the frame spans [-1, 1], x to the right, y downwards), angles in turns, time in lengths
of a motion (0 is its first frame, 1 its last).

A clip of 49 frames (3 s, one beat) shows one motion of every object. In longer clips, motions that repeat (bouncing,
circling, spinning, zigzagging) keep their speed and repeat more often, the others take their time, and one object may
move in several ways, one after the other, each for at least a beat. Shorter clips show the whole motion faster.

Held-out clips differ from training clips in two ways: their random seeds come from another name space, and at least
one of their (shape, colour, motion) triples is never drawn for training.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

from vmonarch_cli.demo.tracks import REACH, Track, following, tilt, track_of
from vmonarch_cli.models.demo_vocabulary import BACKGROUNDS, COLOURS, KINDS, MOTIONS, RGB, SHAPES

Split = Literal["train", "heldout"]

SIZE_RADII: dict[str, tuple[float, float]] = {"small": (0.25, 0.28), "medium": (0.33, 0.37), "large": (0.44, 0.50)}
BEAT_FRAMES = 48
"""Frames from the first to the last of a clip of 49: how long one motion takes at its normal speed."""
MAX_MOTIONS = 3
_MANY_MOTIONS_SHARE: dict[Split, float] = {"train": 0.8, "heldout": 0.65}
"""How many clips of one object that are long enough for two motions show several, which take longest to learn."""

PAIR_SHARE: dict[Split, float] = {"train": 0.3, "heldout": 0.15}
"""How many clips show two objects; training sees more of them because they take longest to learn."""
_LONG_PAIR_SHARE = 0.4  # of training's clips that are longer than a beat, where they take longer still
_FAST = frozenset({"bouncing", "circling", "spinning", "zigzagging"})
_SLOW_KEPT = 0.5  # of training's clips without a fast motion: those are learned long before the others
_ROUND_SHAPES = frozenset({"circle", "ring"})
# Motions of two objects that share the frame: they never leave their own half.
_SIDE_BY_SIDE = ("rising", "falling", "bouncing", "spinning", "growing", "shrinking", "standing still")
_STACKED = ("left to right", "right to left", "spinning", "growing", "shrinking", "standing still")


@dataclass(frozen=True)
class ObjectSpec:
    """One shape: names from `vocabulary`, the size word (None while it grows or shrinks), the place word of a pair.

    Its motions follow one another, each with its track and all equally long.
    """

    shape: str
    colour: str
    motions: tuple[str, ...]
    size: str | None
    tracks: tuple[Track, ...]
    place: str | None = None

    @property
    def triples(self) -> tuple[tuple[str, str, str], ...]:
        """(shape, colour, motion) of every motion."""
        return tuple((self.shape, self.colour, motion) for motion in self.motions)


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

    @property
    def motions(self) -> int:
        """How many motions follow one another; two objects have one each."""
        return max(len(item.motions) for item in self.objects)


def is_held_out(shape: str, colour: str, motion: str) -> bool:
    """Whether training never shows this triple (one in eleven, spread evenly over shapes, colours and motions)."""
    s, c, m = list(SHAPES).index(shape), list(COLOURS).index(colour), list(MOTIONS).index(motion)
    return (3 * s + 5 * c + 7 * m) % 11 == 4


def motions_of(shape: str) -> tuple[str, ...]:
    """Motions that can be seen on this shape: nothing round visibly spins."""
    return tuple(m for m in MOTIONS if not (m == "spinning" and shape in _ROUND_SHAPES))


def sample_spec(split: Split, seed: int, index: int, frames: int = BEAT_FRAMES + 1) -> ClipSpec:
    """The clip number `index` of a split, for clips of so many frames; the same arguments give the same clip."""
    beats = (frames - 1) / BEAT_FRAMES
    name = f"{split}/{seed}/{index}" + ("" if beats == 1 else f"/{frames}")
    rng = random.Random(name)
    # Decided once: a pair has two chances to be held out, so redrawing it too would fill the held-out split with pairs.
    share = _LONG_PAIR_SHARE if split == "train" and beats > 1 else PAIR_SHARE[split]
    pair = rng.random() < share
    while True:
        spec = _draw(rng, split, name, beats, pair=pair)
        fast = any(_FAST & set(o.motions) for o in spec.objects)
        if split == "train" and not fast and rng.random() > _SLOW_KEPT:
            continue
        held_out = [is_held_out(*triple) for o in spec.objects for triple in o.triples]
        if any(held_out) == (split == "heldout"):
            return spec


def _draw(rng: random.Random, split: Split, name: str, beats: float, *, pair: bool) -> ClipSpec:
    background = rng.choice(list(BACKGROUNDS))
    colours = [c for c in COLOURS if contrasts(c, background)]
    if pair:
        objects = tuple(_lasting(item, beats) for item in _draw_pair(rng, colours))
    else:
        shape = rng.choice(list(SHAPES))
        item = _draw_single(rng, shape, rng.choice(colours), rng.choice(motions_of(shape)))
        if beats >= 2 and rng.random() < _MANY_MOTIONS_SHARE[split]:
            count = rng.randint(2, min(int(beats), MAX_MOTIONS))
            objects = (_with_more_motions(rng, _lasting(item, beats / count), count, beats / count),)
        else:
            objects = (_lasting(item, beats),)
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
        track = Track(x, y, x, y, r0, r1, a0=tilt(rng))
        return ObjectSpec(shape, colour, (motion,), None, (track,))
    sizes = ("small", "medium") if motion in ("circling", "zigzagging", "bouncing") else tuple(SIZE_RADII)
    size = rng.choice(sizes)
    r = rng.uniform(*SIZE_RADII[size])
    room = 0.97 - REACH * r
    return ObjectSpec(shape, colour, (motion,), size, (track_of(rng, motion, r, (0.0, 0.0), (room, room)),))


def _with_more_motions(rng: random.Random, item: ObjectSpec, count: int, beats: float) -> ObjectSpec:
    """The object with `count` motions in all, each of so many beats; its size goes unsaid where it changes."""
    more = following(rng, item.motions[0], item.tracks[0], motions_of(item.shape), (beats,) * (count - 1))
    motions = (*item.motions, *(motion for motion, _ in more))
    size = None if {"growing", "shrinking"} & set(motions) else item.size
    return replace(item, motions=motions, size=size, tracks=(*item.tracks, *(track for _, track in more)))


def _lasting(item: ObjectSpec, beats: float) -> ObjectSpec:
    return replace(item, tracks=tuple(track.lasting(beats) for track in item.tracks))


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
            track = Track(x, y, x, y, r0, r1, a0=tilt(rng))
            objects.append(ObjectSpec(shape, colour, (motion,), None, (track,), place))
            continue
        size = rng.choice(("small", "medium"))
        r = rng.uniform(*SIZE_RADII[size])
        near, far = 0.48 - REACH * r, 0.97 - REACH * r
        room = (near, far) if side_by_side else (far, near)
        objects.append(ObjectSpec(shape, colour, (motion,), size, (track_of(rng, motion, r, centre, room),), place))
    return tuple(objects)


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
