"""Renders clip specifications as batches of frames, from signed distances, on any torch device.

Frames are (B, 3, F, H, W) float32 in [-1, 1], the layout and range the video autoencoder takes. Outlines are blended
over about 1.5 pixels; objects are lit from the upper left and cast a soft shadow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from vmonarch_cli.demo.specs import BEAT_FRAMES, ClipSpec, ObjectSpec
from vmonarch_cli.demo.tracks import Track
from vmonarch_cli.demo.transfer import to_device
from vmonarch_cli.models.demo_vocabulary import BACKGROUNDS, COLOURS, KINDS, MOTIONS, RGB, SHAPES

NUM_FRAMES = BEAT_FRAMES + 1
SIZE = 96
FPS = 16

_EDGE_PIXELS = 2.4  # width of the smoothstep across an outline; 10 % to 90 % of it is about 1.5 pixels at 96
_TRACK_FIELDS = tuple(f.name for f in fields(Track))
_SHADOW_OFFSET = (0.035, 0.075)
_SHADOW_BLUR = 0.085
_SHADOW_STRENGTH = 0.17
_TONE = 0.075  # how far a pattern's two tones lie from the named background colour


def frame_times(num_frames: int = NUM_FRAMES) -> Tensor:
    """Times in [0, 1] of evenly spaced frames, shape (num_frames,); a single frame shows the middle."""
    return torch.linspace(0, 1, num_frames) if num_frames > 1 else torch.tensor([0.5])


def render(
    specs: Sequence[ClipSpec],
    times: Tensor | None = None,
    *,
    size: int = SIZE,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Render clips.

    Args:
        specs: B clips.
        times: frame times in [0, 1], shape (F,) or (B, F); 49 evenly spaced ones if None.
        size: height and width in pixels.
        device: where to render.

    Returns:
        (B, 3, F, size, size) float32 in [-1, 1].

    """
    times = frame_times() if times is None else times
    times = to_device(times.float(), device).expand(len(specs), times.shape[-1])
    x, y = _pixel_grid(size, device)
    image = _backgrounds(specs, x, y, size, device)[:, :, None].expand(-1, -1, times.shape[1], -1, -1)
    for slot in range(max(len(s.objects) for s in specs)):
        rows = [b for b, s in enumerate(specs) if slot < len(s.objects)]
        whole = len(rows) == len(specs)
        index = slice(None) if whole else to_device(torch.tensor(rows), device)
        painted = _paint(image[index], [specs[b].objects[slot] for b in rows], times[index], x, y, size)
        if whole:
            image = painted
        else:
            image = image.clone()
            image[index] = painted
    return image.clamp(0, 1) * 2 - 1


def occupancy(
    specs: Sequence[ClipSpec], times: Tensor, *, size: int = SIZE, device: torch.device | str = "cpu"
) -> Tensor:
    """How much of each pixel is covered by an object.

    Args:
        specs: B clips.
        times: frame times in [0, 1], shape (F,).
        size: height and width in pixels.
        device: where to compute.

    Returns:
        (B, F, size, size) float32 in [0, 1].

    """
    x, y = _pixel_grid(size, device)
    covered = torch.zeros(len(specs), times.shape[-1], size, size, device=device)
    for slot in range(max(len(s.objects) for s in specs)):
        rows = [b for b, s in enumerate(specs) if slot < len(s.objects)]
        objects = [specs[b].objects[slot] for b in rows]
        cx, cy, r, angle = _tracks([o.tracks for o in objects], to_device(times, device).expand(len(rows), -1))
        index = to_device(torch.tensor(rows), device)
        inside = _coverage(_distances(objects, x - cx, y - cy, r, angle), size)
        covered[index] = torch.maximum(covered[index], inside)
    return covered


def motions_at(spec: ClipSpec, times: Tensor) -> Tensor:
    """Which motions objects have at times (F,) in [0, 1]: (F, motions of the vocabulary) of 0 and 1."""
    names = list(MOTIONS)
    found = torch.zeros(len(times), len(names))
    for item in spec.objects:
        numbers = torch.tensor([names.index(motion) for motion in item.motions])
        found[torch.arange(len(times)), numbers[_turns(times.cpu(), len(numbers)).long()]] = 1.0
    return found


def signed_distance(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Distance to a shape's outline, negative inside, in the units of x, y and the radius r (broadcast together)."""
    corner = 0.08 * r
    match shape:
        case "circle":
            return torch.hypot(x, y) - r
        case "ring":
            return (torch.hypot(x, y) - 0.80 * r).abs() - 0.25 * r
        case "square":
            return _box(x, y, 0.86 * r - corner, 0.86 * r - corner) - corner
        case "cross":
            long, short = 1.02 * r - corner, 0.36 * r - corner
            return torch.minimum(_box(x, y, long, short), _box(x, y, short, long)) - corner
        case "triangle":
            return _triangle(x, y - 0.12 * r, r - corner) - corner
        case "star":
            return _star(x, y, 1.14 * r - corner) - corner
    raise ValueError(f"shape: got {shape!r}, valid are {', '.join(SHAPES)}")


def _pixel_grid(size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size * 2 - 1
    return centres[None, :], centres[:, None]


def _rgb(colours: Sequence[RGB], device: torch.device | str) -> Tensor:
    return to_device(torch.tensor(list(colours), dtype=torch.float32), device)[:, :, None, None]


def _smoothstep(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _coverage(distance: Tensor, size: int) -> Tensor:
    """Opacity in [0, 1] from a distance in half frames."""
    return _smoothstep(0.5 - distance * (size / 2) / (_EDGE_PIXELS * size / SIZE))


def _backgrounds(specs: Sequence[ClipSpec], x: Tensor, y: Tensor, size: int, device: torch.device | str) -> Tensor:
    """(B, 3, H, W) in [0, 1]."""
    base = _rgb([BACKGROUNDS[s.background] for s in specs], device)
    shapes = [(s.pattern_angle, s.pattern_period, s.pattern_phase) for s in specs]
    numbers = to_device(torch.tensor(shapes, dtype=torch.float32), device)[:, :, None, None]
    angle, period, phase = numbers.unbind(1)
    cos, sin = torch.cos(2 * math.pi * angle), torch.sin(2 * math.pi * angle)
    u, v = x * cos + y * sin, y * cos - x * sin
    wave_u, wave_v = _soft_square(u / period + phase), _soft_square(v / period + phase)
    kinds = list(KINDS)
    patterns = {
        "plain": torch.zeros_like(u),
        "gradient": 1.6 * u / 1.42,
        "striped": wave_u,
        "checkered": wave_u * wave_v,
    }
    stacked = torch.stack([patterns[k] for k in kinds], 1)
    which = to_device(torch.tensor([kinds.index(s.kind) for s in specs]), device)
    tone = stacked[torch.arange(len(specs), device=device), which][:, None] * _TONE
    return torch.where(tone > 0, base + (1 - base) * tone, base * (1 + 1.2 * tone))


def _soft_square(u: Tensor) -> Tensor:
    """A square wave of period 1 in [-1, 1] with soft flanks."""
    return torch.tanh(3.0 * torch.sin(2 * math.pi * u))


def _turns(times: Tensor, count: Tensor | int) -> Tensor:
    """Which of `count` motions that share the time equally has its turn at times in [0, 1], from 0, as floats."""
    return (times * count).floor().clamp(max=count - 1)


def _tracks(objects: Sequence[Sequence[Track]], times: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, y, radius and angle (radians), each (B, F, 1, 1), of objects whose tracks share the time equally."""
    most = max(len(tracks) for tracks in objects)
    rows = [[*tracks, *[tracks[-1]] * (most - len(tracks))] for tracks in objects]
    table = torch.tensor([[[getattr(t, f) for f in _TRACK_FIELDS] for t in row] for row in rows])
    count = torch.tensor([[len(tracks)] for tracks in objects])
    table, count = to_device(table, times.device), to_device(count, times.device)
    which = _turns(times, count)
    times = times * count - which
    chosen = table.gather(1, which.long()[..., None].expand(-1, -1, len(_TRACK_FIELDS)))
    p = {name: chosen[..., i] for i, name in enumerate(_TRACK_FIELDS)}
    u = times + p["ease"] * (_smoothstep(times) - times)
    orbit_angle = 2 * math.pi * (p["orbit_phase"] + p["orbit_turns"] * times)
    wave = torch.asin(0.97 * torch.sin(2 * math.pi * p["zigzag_waves"] * times)) / math.asin(0.97)
    hop = torch.frac(p["bounces"] * times + p["bounce_phase"])
    x = p["x0"] + (p["x1"] - p["x0"]) * u + p["orbit"] * torch.cos(orbit_angle)
    y = p["y0"] + (p["y1"] - p["y0"]) * u + p["orbit"] * torch.sin(orbit_angle)
    y = y + p["zigzag"] * wave - p["bounce"] * 4 * hop * (1 - hop)
    r = p["r0"] + (p["r1"] - p["r0"]) * u
    angle = 2 * math.pi * (p["a0"] + p["turns"] * times)
    return x[..., None, None], y[..., None, None], r[..., None, None], angle[..., None, None]


def _paint(image: Tensor, objects: Sequence[ObjectSpec], times: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Draw one object and its shadow on each clip of `image` (b, 3, F, H, W) in [0, 1]."""
    cx, cy, r, angle = _tracks([o.tracks for o in objects], times)
    dx, dy = x - cx, y - cy
    inside = _coverage(_distances(objects, dx, dy, r, angle), size)[:, None]
    shadow_distance = _distances(objects, dx - _SHADOW_OFFSET[0], dy - _SHADOW_OFFSET[1], r, angle)
    shadow = _smoothstep(0.5 - shadow_distance / (2 * _SHADOW_BLUR))[:, None] * _SHADOW_STRENGTH
    light = (1.0 - 0.13 * (dx + 1.4 * dy) / r).clamp(0.75, 1.25)[:, None]
    base = _rgb([COLOURS[o.colour] for o in objects], image.device)[:, :, None]
    # Brighter than the named colour means towards white, darker means towards black.
    lit = torch.where(light > 1, base + (1 - base) * (light - 1) * 1.3, base * light)
    return torch.lerp(image * (1 - shadow), lit, inside)


def _distances(objects: Sequence[ObjectSpec], dx: Tensor, dy: Tensor, r: Tensor, angle: Tensor) -> Tensor:
    """Signed distances (b, F, H, W) of one object a clip, computed shape by shape so that each is evaluated once."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = dx * cos + dy * sin, dy * cos - dx * sin
    names = [o.shape for o in objects]
    if len(set(names)) == 1:
        return signed_distance(names[0], u, v, r)
    out = torch.empty_like(u)
    for shape in set(names):
        rows = to_device(torch.tensor([b for b, name in enumerate(names) if name == shape]), u.device)
        out[rows] = signed_distance(shape, u[rows], v[rows], r[rows])
    return out


def _box(x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    dx, dy = x.abs() - half_width, y.abs() - half_height
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _triangle(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Equilateral triangle, one corner up, centred on its centroid; r reaches its corners after rounding."""
    k = math.sqrt(3.0)
    half = r * 1.10 * k / 2
    px, py = x.abs() - half, -y + half / k
    fold = (px + k * py) > 0
    px, py = torch.where(fold, (px - k * py) / 2, px), torch.where(fold, (-k * px - py) / 2, py)
    px = px - torch.minimum(torch.maximum(px, -2 * half), torch.zeros_like(px))
    return -torch.hypot(px, py) * torch.sign(py)


def _star(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Five-pointed star, one point up; the inner radius is half the outer one."""
    ratio = 0.5
    c, s = math.cos(math.pi / 5), math.sin(math.pi / 5)
    px, py = x.abs(), -y
    for kx, ky in ((c, -s), (-c, -s)):
        d = (kx * px + ky * py).clamp(min=0) * 2
        px, py = px - d * kx, py - d * ky
    px, py = px.abs(), py - r
    bx, by = ratio * s, ratio * c - 1
    h = torch.minimum(((px * bx + py * by) / (bx * bx + by * by)).clamp(min=0), r)
    return torch.hypot(px - bx * h, py - by * h) * torch.sign(py * bx - px * by)
