"""What a profile measured: plain dataclasses, no torch, so that tables, plots and records can read them.

All times are seconds, all sizes bytes. A value that was not measured is None, never 0.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Repeats of one measurement: median and quartiles."""

    median: float
    low: float
    high: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of one value or more; with fewer than three the quartiles are the extremes."""
        if len(values) < 3:
            return Spread(statistics.median(values), min(values), max(values), len(values))
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(middle, low, high, len(values))

    @staticmethod
    def over(values: Sequence[float], period: int) -> Spread:
        """Of calls of `period` kinds in turn: the mean over the kinds, each with a spread of its own.

        With fewer than three of each kind the quartiles are the extremes of all.
        """
        kinds = [Spread.of(values[first::period]) for first in range(min(period, len(values)))]
        mean = statistics.fmean(kind.median for kind in kinds)
        if period > 1 and len(values) < 3 * period:
            return Spread(mean, min(values), max(values), len(values))
        low, high = (statistics.fmean(ends) for ends in zip(*((kind.low, kind.high) for kind in kinds), strict=True))
        return Spread(mean, low, high, len(values))

    @property
    def width(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high - self.low) / self.median if self.median > 0 else 0.0


@dataclass(frozen=True)
class OutputCheck:
    """Whether an output is right: its relative error, what was allowed, and what it was compared with."""

    error: float
    budget: float
    against: str

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.budget

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


# Attention alone


@dataclass(frozen=True)
class KernelRow:
    """One way to compute attention at one shape."""

    name: str
    kind: str
    """"dense", "structured", or "peer": sparse attention of another package."""
    note: str = ""
    """"cold", "warm" (from the L of an earlier call) or "exact" of a structured row; what is special of a dense one;
    package and version of a peer."""
    impl: str | None = None
    flops: int | None = None
    floor_s: float | None = None
    """The least time that the chip's measured peaks allow for these operations and bytes."""
    time: Spread | None = None
    first_call_s: float | None = None
    """The first call, compilation included; in no other figure."""
    error: float | None = None
    """Relative L2 error against float32 dense attention on the same tensors."""
    check: OutputCheck | None = None
    peak_bytes: int | None = None
    """Memory that one call adds at its peak, its output included (CUDA only)."""
    failure: str | None = None
    """Why there are no figures."""

    @property
    def flops_per_s(self) -> float | None:
        return None if self.time is None or self.flops is None else self.flops / self.time.median

    @property
    def floor_share(self) -> float | None:
        """Floor over time: 1 is what the chip allows."""
        return None if self.time is None or self.floor_s is None else self.floor_s / self.time.median

    @property
    def passed(self) -> bool:
        """A structured row must have run and passed; any other may be missing, but what ran must be right."""
        if self.check is not None:
            return self.check.passed
        return self.kind != "structured"

    def to_json(self) -> dict[str, Any]:
        derived = {"flops_per_s": self.flops_per_s, "floor_share": self.floor_share, "passed": self.passed}
        return {**asdict(self), "check": self.check.to_json() if self.check else None, **derived}


@dataclass(frozen=True)
class KernelShape:
    """All rows of one shape."""

    frames: int
    positions: int
    rows: list[KernelRow]

    @property
    def tokens(self) -> int:
        return self.frames * self.positions

    def row(self, name: str) -> KernelRow | None:
        return next((row for row in self.rows if row.name == name), None)

    @property
    def fastest_dense(self) -> KernelRow | None:
        """The fastest dense row whose output was right; quantised backends do not count, their result is another."""
        right = [r for r in self.rows if r.kind == "dense" and r.time is not None and r.passed and r.note != QUANTISED]
        return min(right, key=lambda r: r.time.median if r.time else math.inf, default=None)

    def speedup(self, row: KernelRow, over: KernelRow | None) -> float | None:
        """Time of `over` divided by the time of `row`."""
        if over is None or over.time is None or row.time is None:
            return None
        return over.time.median / row.time.median

    def to_json(self) -> dict[str, Any]:
        dense = self.fastest_dense
        flash = self.row("flash")
        rows = [
            {**row.to_json(), "over_fastest_dense": self.speedup(row, dense), "over_flash": self.speedup(row, flash)}
            for row in self.rows
        ]
        return {
            "frames": self.frames,
            "positions": self.positions,
            "tokens": self.tokens,
            "fastest_dense": dense.name if dense else None,
            "rows": rows,
        }


QUANTISED = "quantised"
FUSED = "fused"
"""Ends the name of a row whose blocks run fused in Triton, as `generate` makes clips on a GPU."""
EXACT = "exact"
"""Preset that is dense attention by way of the structured code: a check, not a competitor."""


@dataclass(frozen=True)
class ChipPeak:
    """What the chip did in this run: a large matrix product, and a device copy (bytes read and written)."""

    flops_per_s: float
    bytes_per_s: float

    def floor(self, flops: float, moved: float) -> float:
        """No call of this many operations and bytes can take less than this many seconds."""
        return max(flops / self.flops_per_s, moved / self.bytes_per_s)


# Whole steps of a model


@dataclass(frozen=True)
class StepRow:
    """Denoising steps of one model with one kind of self-attention."""

    name: str
    kind: str
    """"dense", "structured" or "skipped" (self-attention returns its values: the floor)."""
    note: str = ""
    """"cold" (first step of a clip) or "warm" of a structured row."""
    step: Spread | None = None
    attention_s: float | None = None
    """Median time in self-attention calls per step, measured around them (structured rows)."""
    first_call_s: float | None = None
    """First step: kernels, graphs and plans are made; in no other figure."""
    error: float | None = None
    """Relative L2 error of the predicted noise against the dense model on the same input."""
    peak_bytes: int | None = None
    clip_s: float | None = None
    """Denoising of a whole clip, from the measured steps."""
    failure: str | None = None
    stock: str | None = None
    """Of a row with fused blocks: the row that differs in these alone."""

    def share(self, skipped: StepRow | None) -> float | None:
        """Part of the step that self-attention takes: what is left when it is skipped, subtracted."""
        if self.step is None or skipped is None or skipped.step is None or self.kind == "skipped":
            return None
        return max(0.0, 1 - skipped.step.median / self.step.median)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class BreakEven:
    """Where structured and dense attention of this model's heads take equally long."""

    preset: str
    tokens: float | None
    """Number of tokens; None when the measured lengths show no crossing."""
    kind: str
    """"between" two measured lengths, "below" the shortest or "above" the longest (then an extrapolation or None)."""
    points: list[tuple[int, float]]
    """(tokens, speedup of the attention call over the fastest dense one) that it comes from."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ModelProfile:
    """Everything that `profile model` measured; filled while it runs."""

    model: str
    random_weights: bool
    compiled: bool
    size: tuple[int, int, int]
    """Width, height, frames."""
    grid: tuple[int, int, int]
    forwards: int
    """Forwards per step: two with guidance."""
    clip_steps: int
    rows: list[StepRow] = field(default_factory=list)
    break_even: list[BreakEven] = field(default_factory=list)
    text_encode_s: float | None = None
    decode_s: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def row(self, name: str, note: str | None = None) -> StepRow | None:
        return next((r for r in self.rows if r.name == name and note in (None, r.note)), None)

    def floor(self, row: StepRow) -> StepRow | None:
        """The row without self-attention among the same blocks, stock or fused."""
        fused = row.stock is not None
        return next((r for r in self.rows if r.kind == "skipped" and (r.stock is not None) is fused), None)

    @property
    def fastest_dense(self) -> StepRow | None:
        """The fastest dense row that ran; quantised ones do not count."""
        ran = [r for r in self.rows if r.kind == "dense" and r.step is not None and r.note != QUANTISED]
        return min(ran, key=lambda r: r.step.median if r.step else math.inf, default=None)

    def speedup(self, row: StepRow, over: StepRow | None = None) -> float | None:
        over = over or self.fastest_dense
        if over is None or over.step is None or row.step is None:
            return None
        return over.step.median / row.step.median

    def end_to_end(self, row: StepRow) -> float | None:
        """Seconds of one clip: text, all steps and decoding, as far as they are known."""
        return None if row.clip_s is None else row.clip_s + (self.text_encode_s or 0) + (self.decode_s or 0)

    def to_json(self) -> dict[str, Any]:
        flash = self.row("flash")
        rows = [
            {
                **row.to_json(),
                "attention_share": row.share(self.floor(row)),
                "over_fastest_dense": self.speedup(row),
                "over_flash": self.speedup(row, flash) if flash else None,
                "end_to_end_s": self.end_to_end(row),
            }
            for row in self.rows
        ]
        fastest = self.fastest_dense
        return {
            **{key: value for key, value in self.__dict__.items() if key not in ("rows", "break_even")},
            "tokens": self.tokens,
            "fastest_dense": fastest.name if fastest else None,
            "rows": rows,
            "break_even": [b.to_json() for b in self.break_even],
        }
