"""What a clip's calls hand on to later ones: L for the warm start, corrections for the frame refresh.

The guidance branches of a step differ in their text alone, and guidance amplifies the difference of their outputs. So
the first branch leads: the others start from the very L that it started from, which makes their errors alike, and use
its corrections where the preset shares them (kernels/README.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vmonarch_kernels import Residual

NEGATIVE = -1
"""Branch of the negative prompts in a forward of both."""


class CallKey(NamedTuple):
    """Which self-attention call of a denoising step."""

    transformer: int
    layer: int
    branch: int
    """Guidance branch: how many forwards of this transformer the step had before, or ``NEGATIVE``."""

    @property
    def leading(self) -> CallKey:
        """The same layer's call in the branch that leads."""
        return self._replace(branch=0)


class WarmState:
    """L factors, float8_e4m3fn (B, P, heads, T, T), and corrections of frames, by CallKey."""

    def __init__(self) -> None:
        self._factors: dict[CallKey, tuple[tuple[int, int, int], torch.Tensor]] = {}
        self._starts: dict[CallKey, torch.Tensor] = {}
        """What the leading calls of the step started from, where other branches follow."""
        self._residuals: dict[CallKey, tuple[tuple[int, int, int], Residual]] = {}
        self._steps_known = True
        self.peak_bytes = 0

    def factor(self, key: CallKey, grid: tuple[int, int, int], q: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
        """The factor that a call with q (B, N, heads, D) starts from, None for a cold start, and whether it keeps its
        own: not where the leading branch has one of its shape and device.
        """
        if key != key.leading and self._fitting_factor(key.leading, grid, q) is not None:
            return self._starts.get(key.leading), False
        return self._fitting_factor(key, grid, q), True

    def _fitting_factor(self, key: CallKey, grid: tuple[int, int, int], q: torch.Tensor) -> torch.Tensor | None:
        kept_grid, factor = self._factors.get(key, (None, None))
        if factor is None or kept_grid != grid or factor.device != q.device:
            return None
        return factor if factor.shape[0] == q.shape[0] and factor.shape[2] == q.shape[2] else None

    def put(
        self, key: CallKey, grid: tuple[int, int, int], factor: torch.Tensor, start: torch.Tensor | None, follow: bool
    ) -> None:
        """Keep a call's L and, if other branches ``follow`` the leading one, what it started from."""
        self._factors[key] = (grid, factor)
        self._starts.pop(key, None)
        if follow and start is not None and key == key.leading:
            self._starts[key] = start

    def residual(
        self,
        key: CallKey,
        grid: tuple[int, int, int],
        q: torch.Tensor,
        first_frame: bool,
        steps_left: int | None,
        *,
        shared: bool,
    ) -> tuple[Residual, bool]:
        """The corrections of a call with q (B, N, heads, D), and whether frames have their turns in it.

        Where they are ``shared`` all branches use those of the leading one, if their shape allows it, and frames have
        their turns there. ``steps_left``: denoising steps to come, this one included, if known.
        """
        if shared and key != key.leading:
            leading = self._fitting_residual(key.leading, grid, q)
            if leading is not None:
                return leading, False
        kept = self._fitting_residual(key, grid, q)
        if kept is None:
            kept = Residual(q, grid[0], first_frame=first_frame, calls=steps_left if self._steps_known else None)
            self._residuals[key] = (grid, kept)
        return kept, True

    def _fitting_residual(self, key: CallKey, grid: tuple[int, int, int], q: torch.Tensor) -> Residual | None:
        kept_grid, kept = self._residuals.get(key, (None, None))
        return kept if kept is not None and kept_grid == grid and kept.fits(q) else None

    def rehearsal(self) -> WarmState:
        """A copy that can be thrown away, with fresh corrections, of which frames have their turn in the first call."""
        copy = WarmState()
        copy._factors, copy._starts = dict(self._factors), dict(self._starts)
        copy._steps_known = False
        return copy

    def drop(self) -> None:
        """Start cold from here on."""
        self._factors.clear()
        self._starts.clear()
        self._residuals.clear()

    def note_peak(self) -> None:
        """Update ``peak_bytes``; once per step is enough, a factor is replaced by one of its own size."""
        held = sum(factor.nbytes for _, factor in self._factors.values())
        held += sum(factor.nbytes for factor in self._starts.values())
        held += sum(residual.nbytes for _, residual in self._residuals.values())
        self.peak_bytes = max(self.peak_bytes, held)

    def clear(self) -> None:
        self.drop()
        self.peak_bytes = 0
