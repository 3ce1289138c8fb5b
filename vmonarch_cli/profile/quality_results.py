"""What `profile quality` measured, as `results` has the other two: plain dataclasses, no torch."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from vmonarch_cli.profile.results import EXACT


@dataclass(frozen=True)
class QualityRow:
    """One variant over all prompts, against dense attention with the same seeds."""

    name: str
    group: str
    """What is varied: "preset", "iterations", "band", ..."""
    is_preset: bool
    flops: int | None = None
    """Self-attention operations of one clip."""
    flops_share: float | None = None
    """The same over dense attention's."""
    latent_errors: list[float] = field(default_factory=list)
    psnrs: list[float] = field(default_factory=list)
    ssims: list[float] = field(default_factory=list)
    attention_s: float | None = None
    """Per clip, all self-attention calls of all steps; None where the variant has no fast implementation."""
    paper_psnr: float | None = None
    """What the paper reports for its own model (Wan2.1-1.3B, untuned); for the order only."""
    failure: str | None = None

    @property
    def latent_error(self) -> float | None:
        return statistics.fmean(self.latent_errors) if self.latent_errors else None

    @property
    def psnr(self) -> float | None:
        """Mean over the clips; equal clips count as 100 dB."""
        return statistics.fmean(min(100.0, value) for value in self.psnrs) if self.psnrs else None

    @property
    def ssim(self) -> float | None:
        return statistics.fmean(self.ssims) if self.ssims else None

    def to_json(self) -> dict[str, Any]:
        clips = {**asdict(self), "psnrs": [min(100.0, value) for value in self.psnrs]}
        return {**clips, "latent_error": self.latent_error, "psnr": self.psnr, "ssim": self.ssim}


@dataclass
class QualityProfile:
    """Everything that `profile quality` measured; filled while it runs."""

    model: str
    sweep: str
    size: tuple[int, int, int]
    grid: tuple[int, int, int]
    steps: int
    guidance_scale: float
    prompts: list[str]
    rows: list[QualityRow] = field(default_factory=list)
    dense_attention_s: float | None = None
    dense_flops: int | None = None
    notes: list[str] = field(default_factory=list)

    def frontier(self) -> list[QualityRow]:
        """Rows that no other row beats in both operations and latent error, cheapest first; without `exact`."""
        measured = [
            r for r in self.rows if r.latent_error is not None and r.flops_share is not None and r.name != EXACT
        ]
        measured.sort(key=lambda r: (r.flops_share or 0, r.latent_error or 0))
        best, found = math.inf, []
        for row in measured:
            if row.latent_error is not None and row.latent_error < best:
                best = row.latent_error
                found.append(row)
        return found

    def to_json(self) -> dict[str, Any]:
        frontier = {row.name for row in self.frontier()}
        rows = [{**row.to_json(), "frontier": row.name in frontier} for row in self.rows]
        return {**{key: value for key, value in self.__dict__.items() if key != "rows"}, "rows": rows}
