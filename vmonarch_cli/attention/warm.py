"""What a clip's calls hand on to the next denoising step: L for the warm start, corrections for the frame refresh."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vmonarch_kernels import Residual


class CallKey(NamedTuple):
    """Which self-attention call of a denoising step."""

    transformer: int
    layer: int
    branch: int
    """Guidance branch: how many forwards of this transformer the step had before."""


class WarmState:
    """L factors, float8_e4m3fn (B, P, heads, T, T), and corrections of frames, one of each per CallKey."""

    def __init__(self) -> None:
        self._factors: dict[CallKey, tuple[tuple[int, int, int], torch.Tensor]] = {}
        self._residuals: dict[CallKey, tuple[tuple[int, int, int], Residual]] = {}
        self.peak_bytes = 0

    def get(self, key: CallKey, grid: tuple[int, int, int], q: torch.Tensor) -> torch.Tensor | None:
        """The factor to start from, or None (cold) when there is none for q's (B, N, heads, D) shape and device."""
        if key not in self._factors:
            return None
        kept_grid, factor = self._factors[key]
        fits = kept_grid == grid and factor.device == q.device
        return factor if fits and factor.shape[0] == q.shape[0] and factor.shape[2] == q.shape[2] else None

    def put(self, key: CallKey, grid: tuple[int, int, int], factor: torch.Tensor) -> None:
        self._factors[key] = (grid, factor)

    def residual(
        self, key: CallKey, grid: tuple[int, int, int], q: torch.Tensor, first_frame: bool, steps_left: int | None
    ) -> Residual:
        """The corrections of a call with q (B, N, heads, D) of that grid; fresh ones where there are none.

        ``steps_left``: denoising steps to come, this one included, if known.
        """
        kept_grid, kept = self._residuals.get(key, (None, None))
        if kept is None or kept_grid != grid or not kept.fits(q):
            kept = Residual(q, grid[0], first_frame=first_frame, calls=steps_left)
            self._residuals[key] = (grid, kept)
        return kept

    def drop(self) -> None:
        """Start cold from here on."""
        self._factors.clear()
        self._residuals.clear()

    def note_peak(self) -> None:
        """Update ``peak_bytes``; once per step is enough, a factor is replaced by one of its own size."""
        held = sum(factor.nbytes for _, factor in self._factors.values())
        held += sum(residual.nbytes for _, residual in self._residuals.values())
        self.peak_bytes = max(self.peak_bytes, held)

    def clear(self) -> None:
        self.drop()
        self.peak_bytes = 0
