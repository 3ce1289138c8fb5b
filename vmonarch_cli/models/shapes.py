"""Which sizes and frame counts a model can make: on each axis a first value, a step and perhaps a last value."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.errors import ModelError


class Tiles(BaseModel):
    """A decoder that works in tiles of one size and leaves what the last tile does not reach blank.

    Both are (frames, height, width) in frames and pixels; tiles begin ``stride`` apart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tile: tuple[int, int, int]
    stride: tuple[int, int, int]


class Chunks(BaseModel):
    """A VAE that encodes ``frames`` at a time into ``latents``, and drops the last ``dropped`` of a clip's latents.

    Valid counts are multiples of ``frames`` plus ``latents``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: int
    latents: int
    dropped: int
    most_frames: int
    """Of a clip."""

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip of a valid count."""
        return (num_frames - self.latents) // self.frames * self.latents + self.latents - self.dropped


class PackedRows(BaseModel):
    """What is in a packed sequence beside the video that is made and the prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fps: int | None = None
    """The one frame rate at which its sound keeps in step; None where the sequence has no sound."""
    sound_per_second: int = 0
    """Rows of sound for each second of a clip, of each of its channels."""
    sound_channels: int = 0
    sound_width: int = 0
    """Numbers in the latents of such a row."""
    per_position: int
    """Rows for each position of a frame that is given: its latents, and what the text encoder makes of it."""

    def sound_rows(self, num_frames: int) -> int:
        """Rows of sound of a clip."""
        if self.fps is None:
            return 0
        return round(num_frames / self.fps * self.sound_per_second) * self.sound_channels


@dataclass(frozen=True)
class Axis:
    """Valid values of one side or of the frame count: ``first``, ``first + step`` and so on, up to ``last``."""

    first: int
    step: int
    last: int | None = None

    def holds(self, value: int) -> bool:
        """Whether a value is one of them, ``last`` apart (see ``exceeds``)."""
        return value >= self.first and (value - self.first) % self.step == 0

    def exceeds(self, value: int) -> bool:
        """Whether a value is above the last."""
        return self.last is not None and value > self.last

    @property
    def largest(self) -> int:
        """The last valid value, where there is one."""
        last = self.first if self.last is None else self.last
        return max(self.first, last - (last - self.first) % self.step)

    def around(self, value: int) -> tuple[int, int]:
        """The valid values next to one that is not valid, or to itself: below (or the first) and above."""
        below = max(self.first, value - (value - self.first) % self.step)
        above = below if below >= value else below + self.step
        if self.last is not None:
            return min(below, self.largest), min(above, self.largest)
        return below, above


def axis(multiple: int, last: int | None, tile: int | None, stride: int | None) -> Axis:
    """Multiples of ``multiple`` up to ``last``, and with a tiled decoder only those that its tiles fill.

    ModelError when its tiles fill none.
    """
    if tile is None or stride is None:
        return Axis(multiple, multiple, last)
    for count in range(multiple):
        if (tile + count * stride) % multiple == 0:
            return Axis(tile + count * stride, math.lcm(stride, multiple), last)
    raise ModelError(f"the decoder's tiles of {tile} pixels, {stride} apart, fill no multiple of {multiple}")


def nearest_sizes(width: int, height: int, widths: Axis, heights: Axis) -> str:
    """'the nearest valid sizes are WxH and WxH' (or 'size is WxH'), the closest first."""
    pairs = {(w, h) for w in widths.around(width) for h in heights.around(height)}
    close = sorted(pairs, key=lambda p: ((p[0] - width) ** 2 + (p[1] - height) ** 2, p))[:2]
    words = " and ".join(f"{w}x{h}" for w, h in close)
    return f"the nearest valid {'sizes are' if len(close) > 1 else 'size is'} {words}"
