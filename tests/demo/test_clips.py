"""The renderer, and the reader that must read what was rendered."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from vmonarch_cli.demo.clips import frame_times, motions_at, occupancy, render, signed_distance
from vmonarch_cli.demo.reader import ATTRIBUTES, Agreement, agreement, read_clip
from vmonarch_cli.demo.specs import ClipSpec, ObjectSpec, sample_spec
from vmonarch_cli.demo.tracks import Track
from vmonarch_cli.models.demo_vocabulary import BACKGROUNDS, MOTIONS, SHAPES

FEW_AND_MANY = pytest.mark.parametrize("count", [8, pytest.param(24, marks=pytest.mark.slow)])


def test_rendering_is_deterministic_and_in_range() -> None:
    specs = [sample_spec("train", 0, i) for i in range(4)]
    video = render(specs, frame_times(5), size=32)
    assert video.shape == (4, 3, 5, 32, 32)
    assert video.dtype == torch.float32
    assert video.min() >= -1
    assert video.max() <= 1
    assert torch.equal(video, render(specs, frame_times(5), size=32))


def test_a_clip_does_not_depend_on_its_batch() -> None:
    specs = [sample_spec("train", 0, i) for i in range(6)]
    together = render(specs, frame_times(3), size=32)
    for i, spec in enumerate(specs):
        assert torch.allclose(together[i], render([spec], frame_times(3), size=32)[0], atol=1e-6)


def test_times_can_differ_between_clips() -> None:
    specs = [sample_spec("train", 0, i) for i in range(2)]
    video = render(specs, torch.tensor([[0.0, 0.5], [0.5, 1.0]]), size=32)
    assert torch.allclose(video[0, :, 1], render(specs[:1], torch.tensor([0.5]), size=32)[0, :, 0], atol=1e-6)
    assert torch.allclose(video[1, :, 1], render(specs[1:], torch.tensor([1.0]), size=32)[0, :, 0], atol=1e-6)


def test_one_motion_begins_where_another_ends() -> None:
    """Around every change of motion the picture changes no more than it does on the way."""
    specs = [spec for spec in (sample_spec("train", 4, i, 193) for i in range(60)) if spec.motions > 1]
    assert {spec.motions for spec in specs} == {2, 3}
    for spec in specs[:24]:
        count = spec.motions
        changes = torch.arange(1, count) / count
        times = torch.cat([changes - 2e-5, changes + 2e-5]).sort().values
        before, after = occupancy([spec], times, size=48)[0].unflatten(0, (count - 1, 2)).unbind(1)
        assert (before - after).abs().max() < 0.05, spec.objects[0].motions


def test_objects_stay_in_the_frame_through_all_their_motions() -> None:
    specs = [sample_spec("train", 4, i, 193) for i in range(24)]
    covered = occupancy(specs, frame_times(97), size=48)
    rim = torch.stack([covered[..., 0, :], covered[..., -1, :], covered[..., 0], covered[..., -1]])
    assert rim.max() < 0.3
    assert covered.flatten(2).amax(2).min() > 0.9, "an object is always there"


def test_occupancy_is_where_the_objects_are() -> None:
    specs = [sample_spec("train", 0, i) for i in range(12)]
    assert {len(spec.objects) for spec in specs} == {1, 2}
    times = torch.tensor([0.0, 0.6])
    covered = occupancy(specs, times, size=48)
    assert covered.shape == (12, 2, 48, 48)
    # Recoloured objects change the picture exactly where they are.
    repainted = [
        replace(
            spec, objects=tuple(replace(o, colour="blue" if o.colour == "yellow" else "yellow") for o in spec.objects)
        )
        for spec in specs
    ]
    one, two = (render(some, times, size=48) for some in (specs, repainted))
    differs = (one - two).abs().amax(1)
    assert torch.equal(differs > 0.02, (differs > 0.02) & (covered > 0.01))
    assert (differs[covered > 0.9] > 0.02).float().mean() > 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_signed_distances(shape: str) -> None:
    span = torch.linspace(-1.5, 1.5, 121)
    y, x = torch.meshgrid(span, span, indexing="ij")
    distance = signed_distance(shape, x, y, torch.ones(()))
    assert distance.isfinite().all()
    inside = distance < 0
    reach = torch.hypot(x, y)[inside].max()
    assert 0.9 < reach < 1.25
    # A distance never changes faster than one moves (half a step of the grid for slack at corners).
    assert distance.diff(dim=0).abs().max() < 1.5 * (span[1] - span[0])


def test_a_shape_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="shape: got 'hexagon', valid are circle"):
        signed_distance("hexagon", torch.zeros(1), torch.zeros(1), torch.ones(1))


@FEW_AND_MANY
def test_the_reader_reads_rendered_clips(count: int) -> None:
    right: Counter[str] = Counter()
    for start in range(0, count, 8):
        specs = [sample_spec("heldout", 9, i) for i in range(start, start + 8)]
        for spec, video in zip(specs, render(specs, frame_times(49), size=96), strict=True):
            found = agreement(spec, read_clip(video))
            right.update(name for name in ATTRIBUTES if getattr(found, name))
    assert all(right[name] / count >= 0.98 for name in ATTRIBUTES), right


@pytest.mark.parametrize(
    ("frames", "size", "count"),
    [(97, 96, 4), (193, 96, 4), pytest.param(97, 128, 24, marks=pytest.mark.slow),
     pytest.param(193, 128, 24, marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_reader_reads_longer_and_larger_clips(frames: int, size: int, count: int) -> None:
    right: Counter[str] = Counter()
    for spec in (sample_spec("heldout", 8, i, frames) for i in range(count)):
        video = render([spec], frame_times(frames), size=size)[0]
        found = agreement(spec, read_clip(video, spec.motions))
        right.update(name for name in ATTRIBUTES if getattr(found, name))
    assert all(right[name] / count >= 0.98 for name in ATTRIBUTES), right


@FEW_AND_MANY
def test_the_reader_sees_shapes_through_a_blur(count: int) -> None:
    """A decoder rounds corners and shortens arms; templates of sharp shapes alone read a fifth of these clips wrong."""
    specs = [spec for spec in (sample_spec("heldout", 9, i) for i in range(60)) if len(spec.objects) == 1][:count]
    right = 0
    for start in range(0, len(specs), 8):
        part = specs[start : start + 8]
        for spec, video in zip(part, render(part, frame_times(49), size=96), strict=True):
            frames = video.transpose(0, 1)
            for _ in range(2):
                frames = F.avg_pool2d(F.pad(frames, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
            right += agreement(spec, read_clip(frames.transpose(0, 1))).shape
    assert right >= len(specs) - 1


def test_the_reader_sees_a_wrong_clip() -> None:
    asked, shown = sample_spec("train", 0, 1), sample_spec("train", 0, 4)
    found = agreement(asked, read_clip(render([shown], frame_times(13))[0]))
    assert not (found.colour and found.background and found.motion and found.shape)


def test_the_reader_sees_a_wrong_order() -> None:
    spec = next(s for s in (sample_spec("train", 0, i, 97) for i in range(50)) if s.motions == 2)
    video = render([spec], frame_times(97), size=64)[0]
    assert agreement(spec, read_clip(video, 2)).motion
    assert not agreement(spec, read_clip(video.flip(1), 2)).motion


def test_the_reader_takes_no_trembling_ring_for_a_spinning_one() -> None:
    track = Track(0.0, 0.0, 0.0, 0.0, 0.4, 0.4)
    ring = ClipSpec((ObjectSpec("ring", "yellow", ("standing still",), "medium", (track,)),), "black", "plain")
    frames = render([ring], frame_times(49), size=96)[0].transpose(0, 1)
    # It is squeezed along an axis that turns: no motion that can be asked for, and the silhouette changes all the time.
    angle = torch.linspace(0, 2 * math.pi, 49)
    squeeze = torch.zeros(49, 2, 3)
    squeeze[:, 0, 0], squeeze[:, 1, 1] = 1 + 0.3 * angle.cos(), 1 - 0.3 * angle.cos()
    squeeze[:, 0, 1] = squeeze[:, 1, 0] = 0.3 * angle.sin()
    grid = F.affine_grid(squeeze, list(frames.shape), align_corners=False)
    trembling = F.grid_sample(frames, grid, padding_mode="border", align_corners=False).transpose(0, 1)
    assert agreement(ring, read_clip(trembling)) == Agreement(colour=True, background=True, motion=True, shape=True)


def test_the_reader_finds_nothing_in_an_empty_clip() -> None:
    colour = torch.tensor(BACKGROUNDS["navy"]).view(3, 1, 1, 1) * 2 - 1
    reading = read_clip(colour.expand(3, 9, 96, 96))
    assert reading.background == "navy"
    assert reading.objects == ()


def test_motions_change_when_their_turn_comes() -> None:
    spec = next(s for s in (sample_spec("train", 0, i, 193) for i in range(99)) if s.motions == 3)
    item = spec.objects[0]
    found = motions_at(spec, frame_times(193)[::4])
    assert found.shape == (49, len(MOTIONS))
    assert found.sum(1).tolist() == [1.0] * 49
    order = [list(MOTIONS)[int(row.argmax())] for row in found]
    assert (order[0], order[24], order[48]) == item.motions
    assert [a != b for a, b in pairwise(order)].count(True) == 2
    pair = next(s for s in (sample_spec("train", 0, i) for i in range(99)) if len({o.motions for o in s.objects}) == 2)
    assert motions_at(pair, frame_times()).sum(1).tolist() == [2.0] * 49
