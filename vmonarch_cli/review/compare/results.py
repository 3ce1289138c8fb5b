"""What a comparison found: plain dataclasses, so that tables, pictures and the page can read them. No torch.

Clips that are equal in every pixel have an infinite PSNR, which JSON cannot say: it is None there and `identical` true.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmonarch_cli.clip.record_model import Record
from vmonarch_cli.media.sound import Sound
from vmonarch_cli.presets import LABELS

Frames = NDArray[np.uint8]
_LEAST_VARIATION = 0.03
"""Two runs of one thing are this far apart on any machine."""


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
    record: Record | None = None
    path: Path | None = None
    sound: Sound | None = None
    """As its file has it."""

    @property
    def attention_s(self) -> float | None:
        return None if self.record is None else self.record.timing.attention_s

    @property
    def end_to_end_s(self) -> float | None:
        """Text, denoising, decoding and writing."""
        return None if self.record is None else self.record.timing.end_to_end_s

    @property
    def other_work_s(self) -> float | None:
        """Everything but the attention: the same work in every clip of one shape, model and number of steps."""
        whole, attention = self.end_to_end_s, self.attention_s
        return None if whole is None or attention is None else whole - attention

    @property
    def other_step_s(self) -> float | None:
        """The part of it that is in a denoising step, on average; without the first one, which warms up, where
        there are more and their times are known.
        """
        timing = None if self.record is None else self.record.timing
        if timing is None or timing.denoise_s is None or timing.attention_s is None or not timing.steps:
            return None
        timed = [(step.step_s, step.attention_s) for step in timing.steps[1:]]
        known = [whole - attention for whole, attention in timed if whole is not None and attention is not None]
        return statistics.fmean(known) if known else (timing.denoise_s - timing.attention_s) / len(timing.steps)

    @property
    def flops(self) -> int | None:
        """Self-attention operations of the clip; None where no record says, or one of a clip that was stopped early."""
        return None if self.record is None or self.stopped_after is not None else self.record.flops.planned

    @property
    def stopped_after(self) -> int | None:
        """The denoising step after which the clip was stopped early; None of a whole one."""
        return None if self.record is None else self.record.stopped_after

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "clip": None if self.path is None else str(self.path),
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
    def clips(self) -> list[ComparedClip]:
        return [self.reference, *self.others]

    @property
    def same_shape(self) -> bool:
        return all(other.frames.shape == self.reference.frames.shape for other in self.others)

    @property
    def variation(self) -> float | None:
        """How far apart times of equal work lie between these clips, as a share of it; None where no record says.

        Equal work is what a step does beside its attention, attention with one preset under two names, and the steps of
        dense attention (of these the standard error, twice).
        """
        beside = _spread([clip.other_step_s for clip in self.clips])
        if beside is None:
            return None
        shares: list[float | None] = [_LEAST_VARIATION, beside]
        records = [clip.record for clip in self.clips if clip.record is not None]
        for preset in {_computed(record) for record in records}:
            shares.append(_spread([record.timing.attention_s for record in records if _computed(record) == preset]))
        shares += [_error_of_mean(record) for record in records if record.preset.attention == "dense"]
        return max(share for share in shares if share is not None)

    def speedup(self, other: ComparedClip, name: str) -> float | None:
        """How many times as fast as the reference a clip was; `name` is "attention_s" or "end_to_end_s".

        End to end both times hold the same other work, the median of all clips': what differs is the attention alone.
        """
        ours, theirs = other.attention_s, self.reference.attention_s
        if other is self.reference or not self.times_comparable or not ours or theirs is None:
            return None
        if name == "attention_s":
            return theirs / ours
        rests = [clip.other_work_s for clip in self.clips if clip.other_work_s is not None]
        if other.other_work_s is None or self.reference.other_work_s is None:
            return None
        rest = statistics.median(rests)
        return (rest + theirs) / (rest + ours)

    def differs(self, other: ComparedClip) -> bool:
        """Whether the times of a clip's attention and the reference's lie further apart than times of equal work."""
        ratio, variation = self.speedup(other, "attention_s"), self.variation
        return ratio is not None and variation is not None and max(ratio, 1 / ratio) > 1 + variation

    def same_work(self, other: ComparedClip) -> bool:
        """Whether a clip's attention takes as many operations as the reference's, so that no preset makes a ratio."""
        return other is not self.reference and other.flops is not None and other.flops == self.reference.flops

    def to_json(self) -> dict[str, Any]:
        others = [
            {
                **other.to_json(),
                "attention_speedup": self.speedup(other, "attention_s"),
                "end_to_end_speedup": self.speedup(other, "end_to_end_s"),
                "times_differ": self.differs(other),
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
            "times_vary": self.variation,
            "notes": self.notes,
        }


def _computed(record: Record) -> str:
    """A preset by what it computes: its labels say nothing."""
    fields = record.preset.model_dump(exclude=set(LABELS))
    return repr(sorted((name, repr(value)) for name, value in {**fields, "impl": record.impl}.items()))


def _spread(values: Sequence[float | None]) -> float | None:
    """(largest - smallest) / median; None for fewer than two, or a median of 0."""
    known = [value for value in values if value is not None]
    middle = statistics.median(known) if len(known) > 1 else 0.0
    return (max(known) - min(known)) / middle if middle > 0 else None


def _error_of_mean(record: Record) -> float | None:
    """Two standard errors of the mean attention time of a step, as a share of it; the first step warms up."""
    known = [step.attention_s for step in record.timing.steps[1:] if step.attention_s is not None]
    mean = statistics.fmean(known) if len(known) > 2 else 0.0
    return 2 * statistics.stdev(known) / len(known) ** 0.5 / mean if mean > 0 else None
