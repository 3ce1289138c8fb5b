"""Reads what a clip shows: background colour, object colours, motions and shapes, from its pixels alone.

- Background: the named colour nearest to the median of the frames' rims.
- Objects: pixels far from every tone of the background, by their nearest object colour (hue weighs more than
  lightness, since objects are lit). One or two colours that cover enough are the objects.
- Motion: from centroid, area and silhouette over time, by rules.
- Shape: the rendered template (over rotations, sharp and softened) that the silhouette matches best, several frames
  voting.

The reader knows nothing of the model; it is itself checked on rendered clips before it may judge generated ones, and
on rendered clips that went through the autoencoder, which says how much of a miss is not the transformer's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vmonarch_cli.demo.clips import signed_distance
from vmonarch_cli.demo.specs import ClipSpec, motions_of
from vmonarch_cli.models.demo_vocabulary import BACKGROUNDS, COLOURS, SHAPES

_FAR_FROM_BACKGROUND = 21.0  # CIE Lab distance
_TEMPLATE = 32
_ROTATIONS = 24
_SOFTNESSES = (0.0, 0.25)  # as rendered, and as the autoencoder leaves small or fast objects
_REACH = 1.9  # half the side of the square in which templates are drawn, in units of the shape's size
_EDGE = 6.0  # how steep a softened outline is made again
_LEAST_PIXELS = 12.0
_TRAIL = 4  # pixels
_SECOND_SHARE = 0.10  # of the larger object's pixels; an object that grows is small for a while


@dataclass(frozen=True)
class ReadObject:
    """One object as seen: names from the vocabulary, and its mean centroid in half frames."""

    colour: str
    motions: tuple[str, ...]
    shape: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """What a clip shows; at most two objects, the one seen in most pixels first."""

    background: str
    objects: tuple[ReadObject, ...]


@dataclass(frozen=True)
class Agreement:
    """Which attributes of a prompt a clip shows; an attribute of a pair counts only if right for both objects."""

    colour: bool
    background: bool
    motion: bool
    shape: bool


ATTRIBUTES = ("colour", "background", "motion", "shape")


def read_clip(video: Tensor, motions: int = 1) -> Reading:
    """Read one clip (3, F, H, W) in [-1, 1], and so many motions of its objects that share the clip equally."""
    lab = rgb_to_lab((video.float() + 1) / 2)
    background = _read_background(lab)
    masks = _object_masks(lab, background)
    objects = []
    for colour, mask in masks:
        track = _Tracked.from_mask(mask)
        if track is not None:
            parts = track.parts(motions)
            objects.append(ReadObject(colour, tuple(p.motion() for p in parts), track.shape(), track.centre()))
    return Reading(background, tuple(objects))


def agreement(spec: ClipSpec, reading: Reading) -> Agreement:
    """Compare a reading with what was asked for; objects are matched by colour."""
    wanted = {o.colour: o for o in spec.objects}
    seen = {o.colour: o for o in reading.objects}
    if set(wanted) == set(seen):
        pairs = [(wanted[c], seen[c]) for c in wanted]
    else:
        # With a wrong colour, motion and shape can still be right.
        pairs = list(zip(spec.objects, reading.objects, strict=False)) if len(wanted) == len(seen) else []
    return Agreement(
        colour=set(wanted) == set(seen),
        background=spec.background == reading.background,
        motion=bool(pairs) and all(w.motions == s.motions for w, s in pairs),
        shape=bool(pairs) and all(w.shape == s.shape for w, s in pairs),
    )


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """CIE Lab (D65) of sRGB values (3, ...) in [0, 1]."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    matrix = rgb.new_tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    white = rgb.new_tensor([0.95047, 1.0, 1.08883])
    xyz = torch.einsum("ij,j...->i...", matrix, linear) / white.view(3, *[1] * (rgb.dim() - 1))
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-8) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _named_lab(colours: Sequence[tuple[float, float, float]], device: torch.device) -> Tensor:
    """(n, 3)."""
    return rgb_to_lab(torch.tensor(list(colours), device=device).T).T


def _read_background(lab: Tensor) -> str:
    rim = torch.cat([lab[:, :, :3].flatten(1), lab[:, :, -3:].flatten(1), lab[..., :3].flatten(1),
                     lab[..., -3:].flatten(1)], dim=1)  # fmt: skip
    median = rim.median(dim=1).values
    named = _named_lab(list(BACKGROUNDS.values()), lab.device)
    return list(BACKGROUNDS)[int((named - median).square().sum(1).argmin())]


def _object_masks(lab: Tensor, background: str) -> list[tuple[str, Tensor]]:
    """Masks (F, H, W) of the one or two object colours, the larger first."""
    base = torch.tensor(BACKGROUNDS[background], device=lab.device)
    # The tones of the patterns, plain and in shadow.
    tones = [base, base * 0.88, base + (1 - base) * 0.09, base * 0.78, base * 0.95]
    tones_lab = rgb_to_lab(torch.stack(tones, 1)).T
    distance = torch.stack([(lab - t.view(3, 1, 1, 1)).square().sum(0) for t in tones_lab]).amin(0).sqrt()
    rim = torch.cat([lab[:, :, :2].flatten(1), lab[:, :, -2:].flatten(1)], dim=1).median(dim=1).values
    distance = torch.minimum(distance, (lab - rim.view(3, 1, 1, 1)).square().sum(0).sqrt())
    foreground = distance > _FAR_FROM_BACKGROUND
    weights = lab.new_tensor([0.5, 1.0, 1.0])
    named = _named_lab(list(COLOURS.values()), lab.device) * weights
    flat = (lab * weights.view(3, 1, 1, 1)).flatten(1)
    nearest = torch.cdist(flat.T, named).argmin(1).view(foreground.shape)
    # Outlines mix two colours: only pixels whose neighbours are foreground as well may vote.
    inner = -F.max_pool2d(-foreground.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0.5
    votes = torch.bincount(nearest[inner], minlength=len(COLOURS)).float()
    order = votes.argsort(descending=True).tolist()
    if votes[order[0]] == 0:
        return []
    chosen = [order[0]]
    # What surrounds the first object in a mixed colour is its outline or its trail, not a second object.
    trail = _grown(inner & (nearest == order[0]), _TRAIL)
    second = inner & (nearest == order[1]) & ~trail
    frames_with_second = second.flatten(1).sum(1) > 3
    if second.sum() > _SECOND_SHARE * votes[order[0]] and frames_with_second.float().mean() > 0.8:
        chosen.append(order[1])
    which = torch.cdist(flat.T, named[chosen]).argmin(1).view(foreground.shape)
    masks = [(list(COLOURS)[c], foreground & (which == i)) for i, c in enumerate(chosen)]
    if len(chosen) == 2:
        masks = [
            (name, mask & _grown(inner & (nearest == c), 2)) for (name, mask), c in zip(masks, chosen, strict=True)
        ]
    return [(name, _more_object_than_background(lab, mask, inner, distance).float()) for name, mask in masks]


def _grown(mask: Tensor, pixels: int) -> Tensor:
    """A mask (F, H, W) and all within so many pixels of it."""
    side = 2 * pixels + 1
    return F.max_pool2d(mask.float()[:, None], side, stride=1, padding=pixels)[:, 0] > 0.5


def _more_object_than_background(lab: Tensor, mask: Tensor, inner: Tensor, from_background: Tensor) -> Tensor:
    """The pixels of an object's mask that are nearer to its own colour than to the background's."""
    core = mask & inner
    if not bool(core.any()):
        return mask
    own = lab[:, core].median(dim=1).values
    return mask & ((lab - own.view(3, 1, 1, 1)).square().sum(0).sqrt() < from_background)


@dataclass(frozen=True)
class _Tracked:
    """A silhouette over time: when in [0, 1) it was seen (F,), its mask (F, H, W); x, y in half frames and area in
    pixels, each (F,).
    """

    when: Tensor
    mask: Tensor
    x: Tensor
    y: Tensor
    area: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor) -> _Tracked | None:
        area = mask.flatten(1).sum(1)
        visible = area > _LEAST_PIXELS
        if int(visible.sum()) < max(4, mask.shape[0] // 2):
            return None
        when = torch.arange(len(mask), device=mask.device)[visible] / len(mask)
        mask, area = mask[visible], area[visible]
        height, width = mask.shape[-2:]
        columns = (torch.arange(width, device=mask.device) + 0.5) / width * 2 - 1
        rows = (torch.arange(height, device=mask.device) + 0.5) / height * 2 - 1
        x = (mask.sum(1) * columns).sum(1) / area
        y = (mask.sum(2) * rows).sum(1) / area
        return cls(when, mask, x, y, area)

    def parts(self, count: int) -> list[_Tracked]:
        """The same silhouette in so many equal parts of the clip."""
        which = (self.when * count).long()
        chosen = (which == i for i in range(count))
        return [_Tracked(self.when[i], self.mask[i], self.x[i], self.y[i], self.area[i]) for i in chosen]

    def centre(self) -> tuple[float, float]:
        return float(self.x.mean()), float(self.y.mean())

    def motion(self) -> str:
        """The motion, by rules on the centroid, then on area and silhouette if the centroid rests."""
        if len(self.area) < 4:
            return "unseen"
        x, y = _smooth(self.x), _smooth(self.y)
        range_x, range_y = float(x.max() - x.min()), float(y.max() - y.min())
        dx, dy = float(x[-3:].mean() - x[:3].mean()), float(y[-3:].mean() - y[:3].mean())
        edge = max(len(self.area) // 8, 1)
        growth = float(self.area[-edge:].mean() / self.area[:edge].mean())
        if range_x < 0.22 and range_y < 0.22:
            if growth > 1.7:
                return "growing"
            if growth < 1 / 1.7:
                return "shrinking"
            spins = self._turns() and "spinning" in motions_of(self.shape())  # an outline may tremble as well
            return "spinning" if spins else "standing still"
        if min(range_x, range_y) > 0.25 and _swept_turns(x, y) > 0.75:
            return "circling"
        turns_y = _reversals(y, 0.1)
        if range_x > 0.3 and range_y > 0.18 and turns_y >= 2 and abs(dx) > 0.6 * range_x:
            return "zigzagging"
        if range_y > 0.2 and turns_y >= 2 and range_x < 0.6 * range_y:
            return "bouncing"
        if range_x > range_y:
            return "left to right" if dx > 0 else "right to left"
        return "falling" if dy > 0 else "rising"

    def shape(self) -> str:
        """The template that fits best, summed over nine frames."""
        index = torch.linspace(0, len(self.area) - 1, 9, device=self.mask.device).round().long()
        patches = self._normalised(index)
        templates = _templates().to(patches.device)
        scores = torch.einsum("nhw,srhw->nsr", patches, templates) / (
            patches.flatten(1).norm(dim=1)[:, None, None] * templates.flatten(2).norm(dim=2)
        )
        # Large silhouettes are sharper and count more.
        weights = self.area[index].sqrt()
        best = (scores.amax(2) * weights[:, None]).sum(0).argmax()
        return list(SHAPES)[int(best)]

    def _normalised(self, index: Tensor) -> Tensor:
        """Silhouettes (n, t, t) centred on their centroid and scaled to one area."""
        height = self.mask.shape[-1]
        scale = (self.area[index] / math.pi).sqrt() / height * 2
        grid = _template_grid(self.mask.device)[None] * scale.view(-1, 1, 1, 1)
        grid = grid + torch.stack([self.x[index], self.y[index]], 1).view(-1, 1, 1, 2)
        return F.grid_sample(self.mask[index][:, None], grid, align_corners=False)[:, 0]

    def _turns(self) -> bool:
        """Whether the centred silhouette changes much over time, beyond the flicker of its outline."""
        patches = self._normalised(torch.arange(len(self.area), device=self.mask.device))
        flat = patches.flatten(1)
        flat = flat / flat.norm(dim=1, keepdim=True)
        similarity = flat @ flat.T
        neighbours = similarity.diagonal(1).mean()
        return bool(similarity.amin() < 0.955 and similarity.flatten().quantile(0.25) < neighbours - 0.012)


def _smooth(values: Tensor) -> Tensor:
    padded = torch.cat([values[:1], values, values[-1:]])
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def _reversals(values: Tensor, least: float) -> int:
    """How often a series turns round by more than `least`."""
    count, way = 0, 0
    low = high = float(values[0])
    for value in values.tolist():
        low, high = min(low, value), max(high, value)
        if way <= 0 and value - low > least:
            count += way < 0
            way, high = 1, value
        elif way >= 0 and high - value > least:
            count += way > 0
            way, low = -1, value
        if way > 0:
            low = value if value > high - 1e-9 else low
        elif way < 0:
            high = value if value < low + 1e-9 else high
    return count


def _swept_turns(x: Tensor, y: Tensor) -> float:
    """Turns that the centroid makes round the middle of its track, backward ones subtracted."""
    cx, cy = (x.max() + x.min()) / 2, (y.max() + y.min()) / 2
    angle = torch.atan2(y - cy, x - cx)
    steps = torch.remainder(angle.diff() + math.pi, 2 * math.pi) - math.pi
    return abs(float(steps.sum())) / (2 * math.pi)


def _template_grid(device: torch.device) -> Tensor:
    """(t, t, 2) points that span 2.1 radii of a disc of the same area either way."""
    span = torch.linspace(-2.1, 2.1, _TEMPLATE, device=device)
    v, u = torch.meshgrid(span, span, indexing="ij")
    return torch.stack([u, v], dim=-1)


@cache
def _templates() -> Tensor:
    """Silhouettes (shapes, softnesses x rotations, t, t) centred on their centroid and scaled to one area."""
    grid = _template_grid(torch.device("cpu"))
    rows = []
    for shape in SHAPES:
        turned = []
        for softness in _SOFTNESSES:
            outline, (cx, cy), unit = _soft_outline(shape, softness)
            for k in range(_ROTATIONS):
                angle = 2 * math.pi * k / _ROTATIONS
                c, s = math.cos(angle) * unit, math.sin(angle) * unit
                u, v = grid[..., 0] * c + grid[..., 1] * s + cx, grid[..., 1] * c - grid[..., 0] * s + cy
                points = torch.stack([u, v], dim=-1)[None] / _REACH
                turned.append(F.grid_sample(outline[None, None], points, align_corners=True)[0, 0])
        rows.append(torch.stack(turned))
    return torch.stack(rows)


def _soft_outline(shape: str, softness: float) -> tuple[Tensor, tuple[float, float], float]:
    """A shape whose outline is blurred and cut again: (0 to 1 inside, its centroid, the radius of a disc of its area).

    ``softness`` is the blur's sigma over that radius. Arms get shorter and corners round, as they do in a clip that
    was decoded from latents, which is what a plain template takes for another shape.
    """
    side = 305
    span = torch.linspace(-_REACH, _REACH, side)
    v, u = torch.meshgrid(span, span, indexing="ij")
    pixel = 2 * _REACH / (side - 1)
    distance = signed_distance(shape, u, v, torch.ones(()))
    soft = (0.5 - distance / pixel).clamp(0, 1)
    if softness:
        sigma = softness * math.sqrt(float((distance < 0).sum()) / math.pi)  # in pixels
        offsets = torch.arange(-int(3 * sigma) - 1, int(3 * sigma) + 2)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
        soft = F.conv2d(soft[None, None], kernel, padding="same")
        soft = F.conv2d(soft, kernel.mT, padding="same")[0, 0]
    filled = (soft > 0.5).float()
    area = filled.sum()
    centre = float((u * filled).sum() / area), float((v * filled).sum() / area)
    return ((soft - 0.5) * _EDGE + 0.5).clamp(0, 1), centre, pixel * math.sqrt(float(area) / math.pi)
