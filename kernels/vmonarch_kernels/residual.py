"""Frame refresh (ours): every call recomputes a few frames exactly, in turn, and keeps what that changed.

First-frame recomputation that moves on. The error of structured attention lies in the values' side: R, and with it
R V, is shared by all query frames. It changes slowly from one denoising step to the next, so the difference that a
frame's exact attention made stays a good correction until the frame's next turn (../README.md, frame refresh).
"""

from typing import Any

import torch
from torch import Tensor

from vmonarch_kernels.api import frame_attention, monarch_attention
from vmonarch_kernels.structure import split_frames
from vmonarch_kernels.torch_impl import L_DTYPE

DECAY = 0.95
"""What of a correction is left after each call: it fades as it ages."""
_LARGEST = torch.finfo(L_DTYPE).max
_GOLDEN = 0.6180339887498949


class Residual:
    """Exact minus structured attention of every frame when it was last computed, for one layer of one clip.

    ``values`` float8_e4m3fn (B, N, heads, D) times ``scale`` float32 (B, heads, T) is what is added to the output.
    """

    def __init__(self, q: Tensor, frames: int, *, first_frame: bool = True) -> None:
        """Nothing known yet for tensors of q's shape (B, N, heads, D); with ``first_frame`` frame 0 needs no turn."""
        batch, _, heads, _ = q.shape
        self.values = torch.zeros(q.shape, dtype=torch.uint8, device=q.device).view(L_DTYPE)
        self.scale = torch.zeros(batch, heads, frames, dtype=torch.float32, device=q.device)
        self._order = turns(frames, first_frame)
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + self.scale.nbytes

    def fits(self, q: Tensor) -> bool:
        """Whether it is of a call with q's shape and device."""
        return self.values.shape == q.shape and self.values.device == q.device

    def fresh(self) -> "Residual":
        """Another one for calls of the same shape, which knows nothing yet."""
        return Residual(self.values, self.scale.shape[2], first_frame=0 not in self._order)

    def forget(self) -> None:
        """Know nothing again, and begin with the first turn."""
        self.scale.zero_()
        self._next = 0

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], refresh: int, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``monarch_attention`` with the corrections added, and the next ``refresh`` frames exact.

        Args:
            q: as in ``monarch_attention``, of the shape that this was made for.
            k: as q.
            v: as q.
            grid: as in ``monarch_attention``.
            refresh: frames to recompute, 1 or more; all of them at the most.
            options: keyword arguments of ``monarch_attention``.

        Returns:
            (out, L), L being None unless ``return_l`` is given.

        """
        count = min(refresh, len(self._order))
        chosen = list(dict.fromkeys(self._order[(self._next + i) % len(self._order)] for i in range(count)))
        self._next = (self._next + count) % len(self._order)
        self.scale.mul_(DECAY)
        for frame in chosen:  # a fill takes a number from the host; indexing with a list would copy one to the device
            self.scale[:, :, frame].fill_(0)
        result = monarch_attention(q, k, v, grid, residual=(self.values, self.scale), **options)
        out, factor = result if isinstance(result, tuple) else (result, None)
        rows = split_frames(out, grid[0])
        named = {name: options[name] for name in ("scale", "impl", "extra") if name in options}
        for frame in chosen:
            exact = frame_attention(q, k, v, grid, frame, **named)
            self._keep(frame, exact, rows[:, frame])
            rows[:, frame] = exact
        return out, factor

    def _keep(self, frame: int, exact: Tensor, structured: Tensor) -> None:
        """Remember a frame's correction (B, P, heads, D), scaled to the range of 8 bits by its largest entry."""
        difference = exact - structured
        largest = torch.linalg.vector_norm(difference, ord=float("inf"), dim=(1, 3)).float()
        scale = largest.clamp_min(1e-30) / _LARGEST
        kept = split_frames(self.values, self.scale.shape[2])[:, frame]
        kept.copy_(difference / scale[:, None, :, None])
        self.scale[:, :, frame] = scale


def turns(frames: int, first_frame: bool) -> list[int]:
    """The order in which frames are recomputed: by the golden ratio, so that neighbours' turns lie far apart.

    Where frame 0, on which later frames lean, is not exact in every call (``first_frame``), it has every fourth turn.
    """
    later = sorted(range(1, frames), key=lambda frame: frame * _GOLDEN % 1)
    if first_frame:
        return later
    return [frame for i in range(0, max(1, len(later)), 3) for frame in (0, *later[i : i + 3])]
