"""What a run measured: plain dataclasses, no torch, so that reports and records can read them.

All times are seconds, all sizes bytes. A value that was not measured is None, never 0.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STANDS_OUT = 1.7
"""A first step stands out when its error is more than this many times those of all later steps together.

Measured on the demo model with a red star (49 frames): the star was lost at 4.2 and 4.0 (128x128, 6 steps, presets fast
and paper) and 2.1 (balanced), where dense attention and `dense_steps = 1` kept it; it was there at 1.4 (64x64), 1.0
(96x96, fast and paper), 0.7 and 0.4 (128x128, 12 and 20 steps).
"""
LOST_SUBJECT = (
    "the first step differs far more from dense attention than all others, so the clip may lack its subject: try "
    "--dense-steps 1, or more --steps"
)


class Pace:
    """How long work of a known amount will go on, when it goes on as it went so far."""

    def __init__(self, total: float, done: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        """The work begins now; `done` of `total`, in any unit, was done before. `now`: a clock in seconds."""
        self.total = total
        self._done = done
        self._now = now
        self._began = now()

    def left(self, done: float) -> float | None:
        """Seconds that the rest takes once `done` of the total is done; None before anything is."""
        if done <= self._done:
            return None
        return (self._now() - self._began) / (done - self._done) * max(0.0, self.total - done)


@dataclass(frozen=True)
class StepAttention:
    """One denoising step: every forward of every transformer between two scheduler steps.

    ``step_s`` and ``attention_s`` contain neither the sampling of dense attention nor the first call
    that compiles kernels; both are work that a run without measuring, or a second run, does not do.
    """

    index: int
    """0-based step of the clip."""
    total: int | None
    """Steps of the clip, None when the caller did not say."""
    sigma: float | None
    """Noise level at the start of the step (the scheduler's sigma)."""
    step_s: float
    attention_s: float
    """All self-attention calls of the step, structured and dense."""
    calls: int
    """Self-attention calls (layers x forwards)."""
    structured_calls: int
    """Of these, the ones that ran structured."""
    dense_call_s: float | None = None
    """One dense call on tensors of this step."""
    dense_call_by: str | None = None
    """The dense attention of that call: the fastest of those that were compared on these tensors."""
    dense_s: float | None = None
    """What all calls of the step would take dense: the sample per structured call, plus the calls that ran dense."""
    sampled_attention_s: float | None = None
    """The structured call on the very tensors that dense_call_s was measured on."""
    error: float | None = None
    """Relative L2 error of that structured call's output against the dense one's."""
    first_call_s: float | None = None
    """First call of each kernel variant in this step (compilation included), outside the other times."""

    @property
    def speedup(self) -> float | None:
        """Dense attention time over this step's attention time."""
        return None if self.dense_s is None or self.attention_s <= 0 else self.dense_s / self.attention_s

    @property
    def dense_step_s(self) -> float | None:
        """The step's time with its attention replaced by dense attention (an estimate, not a run)."""
        return None if self.dense_s is None else self.step_s - self.attention_s + self.dense_s

    @property
    def attention_share(self) -> float:
        """Part of the step spent in self-attention, 0 to 1."""
        return self.attention_s / self.step_s if self.step_s > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup, "attention_share": self.attention_share}


@dataclass(frozen=True)
class Coverage:
    """How the self-attention calls of a clip ran."""

    structured: int = 0
    dense: dict[str, int] = field(default_factory=dict)
    """Reason -> number of calls that ran dense for it."""

    @property
    def calls(self) -> int:
        return self.structured + sum(self.dense.values())

    def to_json(self) -> dict[str, Any]:
        return {"calls": self.calls, "structured": self.structured, "dense": dict(self.dense)}


@dataclass(frozen=True)
class ClipTiming:
    """Where a clip's time went."""

    steps: list[StepAttention]
    text_encode_s: float
    denoise_s: float
    """The whole denoising loop less ``excluded_s``."""
    decode_s: float
    write_s: float
    total_s: float
    """Wall clock from the first to the last of it, sampling and compilation included; loading is not."""
    excluded_s: float = 0.0
    """Sampling of dense attention and first calls, in total_s but in no other figure."""
    first_call_s: float | None = None
    """Sum of the steps' first_call_s; None when no kernel was compiled."""
    peak_memory_bytes: int | None = None
    peak_memory_kind: str = ""
    """What the peak counts: "device" memory allocated by torch, or the "process" resident size (never falls)."""
    warm_state_bytes: int = 0
    """Memory that the warm start kept between steps, at its largest."""
    preview_s: float = 0.0
    """Pictures of the steps, with the fit of their colours; in no time of a step or of denoising."""
    load_s: float | None = None
    """Loading the model, of the first clip of a run alone; in no other figure."""
    hidden_write_s: float = 0.0
    """Encoding and hashing that went on beside decoding, in no other figure."""

    hidden_compile_s: float = 0.0
    """Compilation of kernels beside the loading of the model, of the first clip of a run; in no other figure."""

    @property
    def parts(self) -> dict[str, float]:
        """Where all seconds of the clip went, loading included: name -> seconds, in the order of time.

        "attention" and "rest" are denoising, "compile" the first calls of kernels, "samples" dense attention that was
        run to compare with. Parts that took no time are left out.
        """
        compile_s = self.first_call_s or 0.0
        parts = {
            "load": self.load_s or 0.0,
            "text": self.text_encode_s,
            "compile": compile_s,
            "samples": max(0.0, self.excluded_s - compile_s),
            "attention": self.attention_s,
            "rest": max(0.0, self.denoise_s - self.attention_s),
            "previews": self.preview_s,
            "decode": self.decode_s,
            "write": self.write_s,
        }
        return {name: value for name, value in parts.items() if value > 0}

    @property
    def attention_s(self) -> float:
        return sum(step.attention_s for step in self.steps)

    @property
    def dense_attention_s(self) -> float | None:
        """Self-attention of the whole clip if every call were dense; None where no structured call was sampled.

        A sum over all steps: of a sampled step and of a dense one what was measured, of the others the calls times
        the mean of the sampled dense calls.
        """
        return _dense_attention_s(self.steps)

    @property
    def attention_speedup(self) -> float | None:
        """Dense attention of the whole clip over attention as measured: dense steps and recomputed frames included."""
        return attention_speedup(self.steps)

    @property
    def estimated_dense_denoise_s(self) -> float | None:
        """Denoising time if every call were dense. An estimate; `vmonarch profile` runs both."""
        dense = self.dense_attention_s
        return None if dense is None else self.denoise_s - self.attention_s + dense

    @property
    def end_to_end_speedup(self) -> float | None:
        """Text, denoising, decoding and writing: all dense (estimated) over as measured."""
        dense = self.estimated_dense_denoise_s
        rest = self.text_encode_s + self.decode_s + self.write_s
        return None if dense is None or rest + self.denoise_s <= 0 else (rest + dense) / (rest + self.denoise_s)

    @property
    def error(self) -> float | None:
        """Median relative L2 error of the sampled structured calls against dense attention."""
        return _median([s.error for s in self.steps])

    @property
    def worst_step(self) -> StepAttention | None:
        """The sampled step with the largest error."""
        return max((s for s in self.steps if s.error is not None), key=lambda s: s.error or 0.0, default=None)

    @property
    def first_step_stands_out(self) -> bool:
        """Whether the first step's error is so far above the others' that the clip may have lost its subject.

        The first step places everything. Where the later steps are few and change little, they do not mend it. Steps
        without a sample count as the mean of those with one.
        """
        later = [s for s in self.steps[1:] if s.structured_calls]
        errors = [s.error for s in later if s.error is not None]
        if not errors or self.steps[0].error is None:
            return False
        return self.steps[0].error > STANDS_OUT * len(later) * statistics.fmean(errors)

    def to_json(self) -> dict[str, Any]:
        worst = self.worst_step
        return {
            **{
                key: value
                for key, value in self.__dict__.items()
                if key != "steps" and (key, value) != ("preview_s", 0.0)
            },
            "parts": {f"{name}_s": value for name, value in self.parts.items()},
            "attention_s": self.attention_s,
            "attention_speedup": self.attention_speedup,
            "end_to_end_speedup": self.end_to_end_speedup,
            "estimated_dense_denoise_s": self.estimated_dense_denoise_s,
            "dense_attention_s": self.dense_attention_s,
            "error": self.error,
            "largest_error": worst and {"step": worst.index, "error": worst.error},
            "first_step_stands_out": self.first_step_stands_out,
            "steps": [step.to_json() for step in self.steps],
        }


@dataclass(frozen=True)
class ClipResult:
    """A clip that was written."""

    index: int
    """0-based number of the clip within the plan."""
    path: Path
    record_path: Path
    seed: int
    impl: str
    """Attention implementation that ran: "reference", "torch" or "triton", or "dense" for a dense preset."""
    grid: tuple[int, int, int]
    """Latent frames, token rows, token columns."""
    coverage: Coverage
    timing: ClipTiming
    record: dict[str, Any]


def attention_speedup(steps: Sequence[StepAttention]) -> float | None:
    """Dense attention of these steps over their attention as measured; None where no structured call was sampled."""
    dense, measured = _dense_attention_s(steps), sum(step.attention_s for step in steps)
    return None if dense is None or measured <= 0 else dense / measured


def _dense_attention_s(steps: Sequence[StepAttention]) -> float | None:
    sampled = [step.dense_call_s for step in steps if step.dense_call_s is not None]
    if not sampled or not any(step.structured_calls for step in steps):
        return None
    per_call = statistics.fmean(sampled)
    return sum(per_call * step.calls if step.dense_s is None else step.dense_s for step in steps)


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
