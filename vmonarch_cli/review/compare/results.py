"""What a comparison found: plain dataclasses, so that tables, pictures and the page can read them. No torch.

Clips that are equal in every pixel have an infinite PSNR, which JSON cannot say: it is None there and `identical` true.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Distance:
    """How far a clip is from the reference, over all frames and frame by frame."""

    identical: bool
    psnr: float
    """dB, from the mean squared error of all frames; infinite when identical."""
    ssim: float | None
    """Mean over frames; None for frames smaller than its window of 11 pixels."""
    lpips: float | None
    """Mean over frames, 0 is equal; None when the lpips package or its weights are not installed."""
    psnr_frames: list[float] = field(default_factory=list)
    ssim_frames: list[float] = field(default_factory=list)
    lpips_frames: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        finite = [value if math.isfinite(value) else None for value in self.psnr_frames]
        return {**asdict(self), "psnr": self.psnr if math.isfinite(self.psnr) else None, "psnr_frames": finite}


@dataclass(frozen=True)
class ComparedClip:
    """One clip of a comparison."""

    name: str
    frames: Frames
    change_frames: list[float]
    """Mean absolute change of a pixel from each frame to the next, in 8-bit levels: motion and flicker."""
    flicker: float | None
    """Mean change that the next frame takes back, in 8-bit levels; None below 3 frames. See `figures.flicker`."""
    distance: Distance | None = None
    """From the reference; None for the reference itself, and where the shapes differ."""
    record: dict[str, Any] | None = None
    clip: Path | None = None

    @property
    def attention_s(self) -> float | None:
        return self.timing("attention_s")

    @property
    def end_to_end_s(self) -> float | None:
        """Text, denoising, decoding and writing."""
        parts = [self.timing(name) for name in ("text_encode_s", "denoise_s", "decode_s", "write_s")]
        return None if None in parts else sum(part for part in parts if part is not None)

    @property
    def flops(self) -> int | None:
        """Self-attention operations of the clip."""
        planned = ((self.record or {}).get("flops") or {}).get("planned")
        return int(planned) if isinstance(planned, int | float) else None

    def timing(self, name: str) -> float | None:
        value = ((self.record or {}).get("timing") or {}).get(name)
        return float(value) if isinstance(value, int | float) else None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "clip": None if self.clip is None else str(self.clip),
            "flicker": self.flicker,
            "change_frames": self.change_frames,
            "distance": None if self.distance is None else self.distance.to_json(),
            "attention_s": self.attention_s,
            "end_to_end_s": self.end_to_end_s,
            "attention_flops": self.flops,
        }


@dataclass(frozen=True)
class Comparison:
    """A reference and the clips that are held against it."""

    title: str
    prompt: str | None
    fps: int
    reference: ComparedClip
    others: list[ComparedClip]
    facts: list[tuple[str, str]]
    """Settings that all clips share, as label and value."""
    differing: list[tuple[str, list[str]]] = field(default_factory=list)
    """Settings that differ: name, and the value of every clip, the reference first."""
    notes: list[str] = field(default_factory=list)
    times_comparable: bool = True
    """Whether all clips ran on one kind of device with the same shape and steps, so that a ratio of times says
    something."""

    @property
    def contenders(self) -> list[ComparedClip]:
        return [self.reference, *self.others]

    @property
    def same_shape(self) -> bool:
        return all(other.frames.shape == self.reference.frames.shape for other in self.others)

    def speedup(self, other: ComparedClip, name: str) -> float | None:
        """A time of the reference over that of another; `name` is "attention_s" or "end_to_end_s"."""
        ours, theirs = getattr(other, name), getattr(self.reference, name)
        if other is self.reference or not self.times_comparable or not ours or theirs is None:
            return None
        return float(theirs / ours)

    def to_json(self) -> dict[str, Any]:
        others = [
            {
                **other.to_json(),
                "attention_speedup": self.speedup(other, "attention_s"),
                "end_to_end_speedup": self.speedup(other, "end_to_end_s"),
            }
            for other in self.others
        ]
        return {
            "prompt": self.prompt,
            "fps": self.fps,
            "frames": dict(zip(("count", "height", "width"), self.reference.frames.shape[:3], strict=True)),
            "reference": self.reference.to_json(),
            "others": others,
            "shared": dict(self.facts),
            "differing": dict(self.differing),
            "notes": self.notes,
        }
