"""What one attention call is: its tensors and its options. Imports no torch.

Every implementation takes these two. The flat list of arguments exists only where it must: in the public
``monarch_attention`` and in the custom op behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_FRAMES = 256
"""Latent frames that a call takes at most."""
Grid = tuple[int, int, int]
"""(T, H, W): latent frames, rows and columns of patches."""


@dataclass(frozen=True)
class Options:
    """How a call approximates; the defaults are the paper's.

    Raises ValueError that names the field, what came and what is valid.
    """

    num_steps: int = 2
    """Iterations of R-step and L-step, 1 or more."""
    c_floor: float = 0.1
    """Lower bound of c_r, in (0, 1]."""
    first_frame: bool = True
    """Frame 0's queries see every token exactly."""
    band: int | None = None
    """None, or w >= 0: every query frame sees its 2w + 1 nearest key frames exactly."""
    scale: float | None = None
    """Factor of the scores; 1 / sqrt(D) when None."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps is {self.num_steps}; valid are integers from 1.")
        if not 0 < self.c_floor <= 1:
            raise ValueError(f"c_floor is {self.c_floor}; valid are numbers above 0 and up to 1.")
        if self.band is not None and self.band < 0:
            raise ValueError(f"band is {self.band}; valid are None and integers from 0.")

    def score_scale(self, head_dim: int) -> float:
        """The factor of the scores for heads of this dimension."""
        return head_dim**-0.5 if self.scale is None else self.scale


PAPER = Options()
"""The paper's algorithm: two cold iterations and an exact first frame."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a call: B samples of N = T * H * W tokens in raster order of ``grid``."""

    q: Tensor
    """(B, N, heads, D), as ``k`` and ``v``; one dtype, any strides."""
    k: Tensor
    v: Tensor
    grid: Grid
    l_prev: Tensor | None = None
    """Warm start: 256 L of an earlier call, float8_e4m3fn (B, H * W, heads, T, T), any strides."""
    extra: tuple[Tensor, Tensor] | None = None
    """(out (B, N, heads, D), lse (B, N, heads)): every query's attention over keys outside the video."""
    residual: tuple[Tensor, Tensor] | None = None
    """(values (B, N, heads, D) float8_e4m3fn, scale (B, H * W, heads, T) float32): their product is added."""

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Every tensor with the name that errors give it."""
        found = [("q", self.q), ("k", self.k), ("v", self.v)]
        if self.l_prev is not None:
            found.append(("l_prev", self.l_prev))
        for name, pair in (("extra", self.extra), ("residual", self.residual)):
            found += [(name, x) for x in pair or ()]
        return found

    @property
    def frames(self) -> int:
        """Latent frames T."""
        return self.grid[0]

    @property
    def head_dim(self) -> int:
        """Head dimension D."""
        return self.q.shape[-1]
