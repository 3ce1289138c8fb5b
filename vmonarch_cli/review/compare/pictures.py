"""Clips side by side with their names on, and a sheet of frames with what differs: Pillow's built-in font, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vmonarch_cli.review.compare.results import ComparedClip, Comparison, Frames

GROUND, INK, DIM = (18, 19, 22), (240, 241, 243), (158, 163, 172)
_TILE = 288
_MAX_WIDTH = 3840
_GAP = 8
_SHEET_FRAMES = 6
_SHEET_TILE = 224
# Black over purple and orange to pale yellow: brighter at every step, so that it also reads in grey.
_RAMP = np.array([(0, 0, 4), (60, 15, 110), (150, 40, 120), (225, 85, 80), (252, 165, 70), (252, 253, 190)])


def side_by_side(comparison: Comparison) -> Frames:
    """All clips in a row (or rows, where one would be too wide), each below its name and figures: (F, H, W, 3).

    Small clips are enlarged by a whole factor without smoothing; a shorter clip holds its last frame.
    """
    clips = comparison.clips
    height, width = (max(c.frames.shape[axis] for c in clips) for axis in (1, 2))
    scale = max(1, -(-_TILE // width))
    tile_h, tile_w = height * scale, width * scale
    columns = max(1, min(len(clips), (_MAX_WIDTH + _GAP) // (tile_w + _GAP)))
    rows = -(-len(clips) // columns)
    head = _line(18) + _line(13) + 10
    size = _even(columns * (tile_w + _GAP) - _GAP), _even(rows * (head + tile_h + _GAP) - _GAP)
    canvas = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(canvas)
    corners = []
    for number, clip in enumerate(clips):
        x, y = number % columns * (tile_w + _GAP), number // columns * (head + tile_h + _GAP)
        _write(draw, (x + 8, y + 4), clip.name, 18, INK, tile_w - 16)
        _write(draw, (x + 8, y + 6 + _line(18)), short_figures(comparison, clip), 13, DIM, tile_w - 16)
        corners.append((x, y + head))
    background = np.asarray(canvas)
    count = max(len(clip.frames) for clip in clips)
    film = np.repeat(background[None], count, axis=0)
    for clip, (x, y) in zip(clips, corners, strict=True):
        for index in range(count):
            frame = clip.frames[min(index, len(clip.frames) - 1)]
            large = frame.repeat(scale, axis=0).repeat(scale, axis=1)
            film[index, y : y + large.shape[0], x : x + large.shape[1]] = large
    return film


def contact_sheet(comparison: Comparison) -> Image.Image:
    """Frames spread over the clip: a row per clip, and below each but the first its difference from the first.

    Differences share one scale, written beside them: the mean over colours of the absolute difference in 8-bit levels.
    """
    reference = comparison.reference
    count = min(len(c.frames) for c in comparison.clips)
    picked = np.unique(np.linspace(0, count - 1, min(_SHEET_FRAMES, count)).round().astype(int))
    height, width = reference.frames.shape[1:3]
    tile = (_SHEET_TILE, max(1, round(_SHEET_TILE * height / width)))
    differences = {
        c.name: np.stack([_difference(c.frames[i], reference.frames[i]) for i in picked])
        for c in comparison.others
        if c.distance is not None
    }
    top = max((float(np.quantile(d, 0.999)) for d in differences.values()), default=0.0)
    top = float(max(8, math.ceil(top / 8) * 8))
    rows: list[tuple[str, str, list[Image.Image]]] = []
    for clip in comparison.clips:
        lines = short_figures(comparison, clip, newline=True)
        rows.append((clip.name, lines, [Image.fromarray(clip.frames[i]) for i in picked]))
        if clip.name in differences:
            label = f"black: equal\npale: {top:g} levels or more"
            rows.append(("difference", label, [_ramped(d / top) for d in differences[clip.name]]))
    left, head = 168, _line(13) + 12
    size = (left + len(picked) * (tile[0] + _GAP) + 8, head + len(rows) * (tile[1] + _GAP) + 8)
    sheet = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(sheet)
    for column, index in enumerate(picked):
        _write(draw, (left + column * (tile[0] + _GAP), 6), f"frame {index}", 13, DIM, tile[0])
    for number, (name, label, images) in enumerate(rows):
        y = head + number * (tile[1] + _GAP)
        _write(draw, (12, y + 4), name, 16, DIM if name == "difference" else INK, left - 20)
        for line_number, line in enumerate(label.splitlines()):
            _write(draw, (12, y + 8 + _line(16) + line_number * _line(13)), line, 13, DIM, left - 20)
        for column, image in enumerate(images):
            enlarge = Image.Resampling.NEAREST if image.width < tile[0] else Image.Resampling.LANCZOS
            sheet.paste(image.resize(tile, enlarge), (left + column * (tile[0] + _GAP), y))
    return sheet


def short_figures(comparison: Comparison, clip: ComparedClip, newline: bool = False) -> str:
    """'PSNR 24.1 dB, SSIM 0.931, attention 2.4x', or what else there is to say in a label."""
    if clip is comparison.reference:
        return "reference"
    parts = []
    if clip.distance is None:
        parts.append("another shape")
    elif clip.distance.identical:
        parts.append("identical")
    else:
        parts.append(f"PSNR {clip.distance.psnr:.1f} dB")
        if clip.distance.ssim is not None:
            parts.append(f"SSIM {clip.distance.ssim:.3f}")
    gain = comparison.speedup(clip, "attention_s")
    if gain is not None and comparison.differs(clip) and not comparison.same_work(clip):
        parts.append(f"attention {gain:.2f}x")
    return ("\n" if newline else ", ").join(parts)


def _difference(frame: Frames, reference: Frames) -> Any:
    """Mean over colours of the absolute difference, (H, W) in 8-bit levels; zeros where the shapes differ."""
    return np.abs(frame.astype(np.int16) - reference).mean(axis=-1)


def _ramped(values: Any) -> Image.Image:
    """Values (H, W), 0 to 1, in the colours of the ramp."""
    places = np.clip(values, 0, 1) * (len(_RAMP) - 1)
    channels = [np.interp(places, np.arange(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], words: str, size: int, colour: Sequence[int], width: int
) -> None:
    """One line of text, cut with dots where it is wider than `width`."""
    font = _font(size)
    line = " ".join(words.split())
    if draw.textlength(line, font=font) > width:
        while line and draw.textlength(f"{line}...", font=font) > width:
            line = line[:-1]
        line = f"{line}..."
    draw.text(at, line, font=font, fill=tuple(colour))


@cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _line(size: int) -> int:
    """Height of a line of text."""
    return round(1.35 * size)


def _even(side: int) -> int:
    """H.264 as browsers play it needs even sides."""
    return side + side % 2
