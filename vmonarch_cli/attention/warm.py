"""What a clip's calls keep for later ones: L for the warm start, residuals for the frame refresh.

The guidance branches of a step differ only in their text, and guidance amplifies the difference of their outputs. So
the first branch leads. The others start from the same L as it did, which makes their errors alike, and they use its
residuals where the preset shares them (kernels/README.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from vmonarch_kernels import Residual

Grid = tuple[int, int, int]


class CallKey(NamedTuple):
    """Which self-attention call of a denoising step: its transformer, its layer and its guidance branch.

    A branch is a forward, or half of one. Pipelines compare the prompts in two forwards, or in one forward of both,
    and the negative prompts' half of such a forward is a branch of its own.
    """

    transformer: int
    layer: int
    forward: int = 0
    """How many forwards of this transformer the step had before."""
    negative_half: bool = False

    @property
    def leading(self) -> CallKey:
        """The same layer's call in the branch that leads: the first forward, or its prompts' half."""
        return CallKey(self.transformer, self.layer) if self.forward or self.negative_half else self


class WarmState:
    """L factors, float8_e4m3fn (B, P, heads, T, T), and residuals, by CallKey."""

    def __init__(self) -> None:
        self._factors: dict[CallKey, tuple[Grid, torch.Tensor]] = {}
        self._starts: dict[CallKey, torch.Tensor | None] = {}
        """What the leading calls of this step started from (None: cold), for the branches that follow; it is missing
        where none was expected."""
        self._residuals: dict[CallKey, tuple[Grid, Residual]] = {}
        self._used: dict[CallKey, int] = {}
        """The step in which each residual was last used."""
        self.keeps = True
        """Later calls go on with what this one keeps; False for a rehearsal."""
        self.peak_bytes = 0

    def factor(self, key: CallKey, grid: Grid, q: torch.Tensor) -> tuple[torch.Tensor | None, bool]:
        """The L that a call with q (B, N, heads, D) starts from, None for a cold start, and whether to keep its own.

        A branch that follows keeps none while the leading branch has an L of its shape and device.
        """
        first = key.leading
        leading = self._fitting_factor(first, grid, q)
        if first == key:
            return leading, True
        if leading is not None:
            # Where no branch was expected to follow, what the leading one ended with is the best that is left.
            return self._starts.get(first, leading), False
        return self._fitting_factor(key, grid, q), True

    def _fitting_factor(self, key: CallKey, grid: Grid, q: torch.Tensor) -> torch.Tensor | None:
        kept_grid, factor = self._factors.get(key, (None, None))
        if factor is None or kept_grid != grid or factor.device != q.device:
            return None
        return factor if factor.shape[0] == q.shape[0] and factor.shape[2] == q.shape[2] else None

    def put(self, key: CallKey, grid: Grid, factor: torch.Tensor, start: torch.Tensor | None, follow: bool) -> None:
        """Keep a call's L and, if other branches ``follow`` the leading one, what it started from."""
        self._factors[key] = (grid, factor)
        self._starts.pop(key, None)
        if key == key.leading and (follow or start is None):
            self._starts[key] = start

    def residual(
        self,
        key: CallKey,
        grid: Grid,
        q: torch.Tensor,
        first_frame: bool,
        step: int,
        *,
        shared: bool,
    ) -> tuple[Residual, bool]:
        """The residual of a call with q (B, N, heads, D), and whether frames have their turns in this call.

        ``shared``: all branches use that of the leading one, if the shape fits, and frames have their turns there.
        ``step``: of the clip. A residual has aged by the steps in which its branch, or its layer, was left out.
        """
        if shared and key != key.leading:
            leading = self._fitting_residual(key.leading, grid, q)
            if leading is not None:
                return leading, False
        kept = self._fitting_residual(key, grid, q)
        if kept is None:
            kept = Residual(q, grid[0], first_frame=first_frame)
            self._residuals[key] = (grid, kept)
        elif step > self._used[key] + 1:
            kept.fade(step - self._used[key] - 1)
        self._used[key] = step
        return kept, True

    def _fitting_residual(self, key: CallKey, grid: Grid, q: torch.Tensor) -> Residual | None:
        kept_grid, kept = self._residuals.get(key, (None, None))
        return kept if kept is not None and kept_grid == grid and kept.fits(q) else None

    def rehearsal(self) -> WarmState:
        """A copy to throw away: the same L, and fresh residuals."""
        copy = WarmState()
        copy._factors, copy._starts = dict(self._factors), dict(self._starts)
        copy.keeps = False
        return copy

    def copy(self) -> WarmState:
        """A copy that goes on from here by itself."""
        twin = WarmState()
        twin._factors, twin._starts = dict(self._factors), dict(self._starts)  # the tensors are never changed in place
        twin._residuals = {key: (grid, kept.copy()) for key, (grid, kept) in self._residuals.items()}
        twin._used, twin.keeps = dict(self._used), self.keeps
        return twin

    def drop(self) -> None:
        """Forget everything: later calls start cold."""
        self._factors.clear()
        self._starts.clear()
        self._residuals.clear()
        self._used.clear()

    def note_peak(self) -> None:
        """Update ``peak_bytes``; once a step is enough, because a new factor is as large as the one it replaces."""
        held = sum(factor.nbytes for _, factor in self._factors.values())
        held += sum(start.nbytes for start in self._starts.values() if start is not None)
        held += sum(residual.nbytes for _, residual in self._residuals.values())
        self.peak_bytes = max(self.peak_bytes, held)

    def clear(self) -> None:
        self.drop()
        self.peak_bytes = 0
