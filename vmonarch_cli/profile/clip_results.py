"""What `profile clip` measured, and what it advises: plain dataclasses, no torch. All times are seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vmonarch_cli.text import as_fast, seconds

Parts = Mapping[str, float]
"""`ClipTiming.parts` of one clip."""
_WORTH_IT = 1.05
_ONLY_COLD = ("load", "compile")


@dataclass(frozen=True)
class Circumstances:
    """What decides which advice can be followed."""

    on_gpu: bool = False
    offload: str = "none"
    vae_dtype: str = "float32"
    compiled: bool = False
    can_compile: bool = True
    cached: bool = False
    guided: bool = False
    steps: int = 1
    ending: str = ".mp4"


@dataclass
class ClipRow:
    """Clips of one kind of attention."""

    name: str
    cold: Parts | None = None
    """The first clip: with loading, whichever kind paid for it, and the first calls of its kernels."""
    warm: list[Parts] = field(default_factory=list)
    error: float | None = None
    """Relative L2 error of the final latents against the dense clip's."""
    peak_bytes: int | None = None

    @property
    def warm_parts(self) -> dict[str, float]:
        """Median of each part over the warm clips."""
        names = dict.fromkeys(name for parts in self.warm for name in parts)
        return {name: statistics.median(parts.get(name, 0.0) for parts in self.warm) for name in names}

    @property
    def warm_s(self) -> float | None:
        """Median of the warm clips."""
        return statistics.median(sum(parts.values()) for parts in self.warm) if self.warm else None

    @property
    def cold_s(self) -> float | None:
        return None if self.cold is None else sum(self.cold.values())

    def to_json(self) -> dict[str, Any]:
        def named(parts: Parts) -> dict[str, float]:
            return {f"{name}_s": value for name, value in parts.items()}

        return {
            "name": self.name,
            "cold_s": self.cold_s,
            "cold": None if self.cold is None else named(self.cold),
            "warm_s": self.warm_s,
            "warm": named(self.warm_parts),
            "warm_clips": len(self.warm),
            "error": self.error,
            "peak_bytes": self.peak_bytes,
        }


@dataclass
class ClipProfile:
    """Whole clips of one model, dense and structured."""

    model: str
    size: tuple[int, int, int]
    """Width, height, frames."""
    steps: int
    dense: ClipRow
    structured: ClipRow
    circumstances: Circumstances
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> Sequence[ClipRow]:
        return self.structured, self.dense

    @property
    def speedup(self) -> float | None:
        """Warm clips: dense over structured."""
        dense, structured = self.dense.warm_s, self.structured.warm_s
        return None if dense is None or not structured else dense / structured

    @property
    def attention_free(self) -> float | None:
        """How many times as fast a warm structured clip would be if its attention took no time at all."""
        whole = self.structured.warm_s
        if not whole:
            return None
        left = whole - self.structured.warm_parts.get("attention", 0.0)
        return whole / left if left > 0 else None

    @property
    def verdicts(self) -> list[str]:
        """What the figures say, one sentence each: what the attention gains, what the first clip costs, what next."""
        return [*_gain(self), *_first_clip(self), *_next(self)]

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "size": list(self.size),
            "steps": self.steps,
            "rows": [row.to_json() for row in self.rows],
            "speedup": self.speedup,
            "attention_free_speedup": self.attention_free,
            "notes": list(self.notes),
        }


def _gain(profile: ClipProfile) -> list[str]:
    gain, warm, dense = profile.speedup, profile.structured.warm_s, profile.dense.warm_s
    if gain is None or warm is None or dense is None:
        return []
    times = f"{seconds(warm)} against {seconds(dense)}"
    name = profile.structured.name
    if gain >= _WORTH_IT:
        return [f"{name}: a warm clip is {as_fast(gain)} as dense ({times})"]
    return [f"{name}: not worth it at this size, a warm clip is {as_fast(gain)} as dense ({times})"]


def _first_clip(profile: ClipProfile) -> list[str]:
    cold, warm = profile.structured.cold_s, profile.structured.warm_s
    if cold is None or warm is None or profile.structured.cold is None or cold - warm < 0.1 * warm:
        return []
    parts = {name: profile.structured.cold.get(name, 0.0) for name in _ONLY_COLD}
    named = " and ".join(
        f"{seconds(value)} for {'the model' if name == 'load' else 'kernels'}" for name, value in parts.items() if value
    )
    return [
        f"the first clip takes {seconds(cold - warm)} more ({named}): several clips of one process, as of "
        "--prompts-file or --num-videos, pay for it once"
    ]


def _next(profile: ClipProfile) -> list[str]:
    parts, whole = profile.structured.warm_parts, profile.structured.warm_s
    if not parts or not whole:
        return []
    largest = max(parts, key=lambda name: parts[name])
    words = {"rest": "denoising beside the attention", "decode": "decoding", "write": "writing", "text": "the prompt"}
    what = words.get(largest, largest)
    said = f"next: {what} is the largest part of a warm clip, {100 * parts[largest] / whole:.0f} %"
    advice = _advice(largest, profile.circumstances, dense_is_faster=(profile.speedup or 1.0) < 1.0)
    found = [f"{said}: {advice}" if advice else said]
    free = profile.attention_free
    if largest != "attention" and free is not None:
        found.append(f"attention that took no time at all would make the clip {free:.2f}x as fast, no more")
    return found


def _advice(part: str, now: Circumstances, *, dense_is_faster: bool) -> str:
    """What to change where a part is a clip's largest; "" where nothing is left to change."""
    if part == "attention":
        way = "--preset dense, or more frames" if dense_is_faster else "a lighter preset, as `vmonarch presets` shows"
        return f"try {way}, or fewer --steps" if now.steps > 1 else f"try {way}"
    if part == "rest":
        ways = []
        if now.offload != "none":
            ways.append(f"a smaller size or --quantize, which may fit without --offload {now.offload}")
        if now.on_gpu and now.can_compile and not now.compiled:
            ways.append("--compile")
        if now.guided:
            ways.append("--guidance-scale 1, which halves it, where the model can do without guidance")
        if now.steps > 4:
            ways.append("fewer --steps" if now.cached else "fewer --steps, or --cache")
        return "try " + "; ".join(ways) if ways else ""
    if part == "decode":
        if now.on_gpu and now.vae_dtype == "float32":
            return "try --vae-dtype bfloat16"
        return "it grows with pixels and frames alone: choose a smaller size or fewer frames"
    if part == "write":
        return "try .mp4" if now.ending != ".mp4" else "the disk or ffmpeg is slow: try another folder"
    if part == "text":
        return "clips of one prompt share its encoding only within one run"
    return ""
