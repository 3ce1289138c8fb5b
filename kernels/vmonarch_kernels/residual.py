"""Frame refresh (ours): every call recomputes a few frames exactly, in turn, and keeps what that changed.

First-frame recomputation that moves on. The error of structured attention lies in the values' side: R, and with it
R V, is shared by all query frames. It changes slowly from one denoising step to the next, so the difference that a
frame's exact attention made stays a good correction until the frame's next turn (../README.md, frame refresh).
"""

import math
from typing import Any

import torch
from torch import Tensor

from vmonarch_kernels.api import frame_attention, monarch_attention, resolve_impl
from vmonarch_kernels.structure import L_DTYPE, split_frames

DECAY = 0.95
"""What of a correction is left after each call: it fades as it ages."""
NEIGHBOUR_SHARE = 0.25
"""Weight of a recomputed frame's correction in those of the frames beside it, which hold older ones."""
FIRST_TURNS = 1 / 3
"""How much of one forward's turns come in the first call, where nothing corrects the frames yet."""
FIRST_FRAMES = 0.5
"""... which are at the most so much of all frames."""
EARLY_TURNS, EARLY_CALLS = 0.8, 0.2
"""Of the turns left so many at the most come in the calls from the second on that make up so much of a clip."""
_LARGEST = torch.finfo(L_DTYPE).max
_GOLDEN = 0.6180339887498949


class Residual:
    """Exact minus structured attention of every frame when it was last computed, for one layer of one clip.

    ``values`` float8_e4m3fn (B, N, heads, D) times ``scale`` float32 (B, P, heads, T) is what is added to the output.
    """

    def __init__(self, q: Tensor, frames: int, *, first_frame: bool = True, calls: int | None = None) -> None:
        """Nothing known yet for tensors of q's shape (B, N, heads, D); with ``first_frame`` frame 0 needs no turn.

        With the number of ``calls`` that will come turns come earlier (``turns_before``).
        """
        batch, tokens, heads, _ = q.shape
        self.values = torch.zeros(q.shape, dtype=torch.uint8, device=q.device).view(L_DTYPE)
        self.scale = torch.zeros(batch, tokens // frames, heads, frames, dtype=torch.float32, device=q.device)
        self._order = turns(frames, first_frame)
        self._next = 0
        self._calls, self._expected_calls = 0, calls

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + self.scale.nbytes

    def fits(self, q: Tensor) -> bool:
        """Whether it is of a call with q's shape and device."""
        return self.values.shape == q.shape and self.values.device == q.device

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int, int],
        refresh: float,
        *,
        forwards: int = 1,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``monarch_attention`` with the corrections added, and the next ``refresh`` frames exact.

        Args:
            q: as in ``monarch_attention``, of the shape that this was made for.
            k: as q.
            v: as q.
            grid: as in ``monarch_attention``.
            refresh: frames to recompute, above 0; all of them at the most. A fraction is their mean over several calls,
                rounded up in the first: 0.75 is one frame in three calls of four. Where the number of calls was
                told it is the mean over all of them.
            forwards: calls of this step with the same corrections: this one, which takes the turns of all, and those of
                ``corrected`` that follow.
            options: keyword arguments of ``monarch_attention``.

        Returns:
            (out, L), L being None unless ``return_l`` is given.

        """
        chosen = self._take_turns(refresh, forwards)
        self.scale.mul_(DECAY)
        for frame in chosen:  # a fill takes a number from the host; indexing with a list would copy one to the device
            self.scale[..., frame].fill_(0)
        out, factor = self.corrected(q, k, v, grid, **options)
        named = {name: options[name] for name in ("scale", "impl", "extra") if name in options}
        for frame in chosen:
            beside = [x for x in (frame - 1, frame + 1) if x in self._order and x not in chosen]
            self._recompute(frame, beside, q, k, v, grid, out, **named)
        return out, factor

    def corrected(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int], **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``monarch_attention`` with the corrections added as they are: for a step's other forwards, which guidance
        compares with the one that takes the turns. Arguments and result as in ``attention``.
        """
        result = monarch_attention(q, k, v, grid, residual=(self.values, self.scale), **options)
        return result if isinstance(result, tuple) else (result, None)

    def _take_turns(self, refresh: float, forwards: int) -> list[int]:
        """The frames of this call."""
        frames = self.scale.shape[3]
        before, after = (
            turns_before(calls, refresh, frames, self._expected_calls, forwards)
            for calls in (self._calls, self._calls + 1)
        )
        self._calls += 1
        count = min(after - before, len(self._order))
        chosen = [self._order[(self._next + i) % len(self._order)] for i in range(count)]
        self._next = (self._next + count) % len(self._order)
        return list(dict.fromkeys(chosen))

    def _recompute(
        self,
        frame: int,
        beside: list[int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int, int],
        out: Tensor,
        *,
        scale: float | None = None,
        impl: str = "auto",
        extra: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Replace a frame of ``out`` by its exact attention; keep what that changed, for frames ``beside`` it too."""
        if resolve_impl(impl, q.device, q.dtype, q.shape[-1]) == "triton":
            from vmonarch_kernels.launch import refresh_triton

            scale = q.shape[-1] ** -0.5 if scale is None else scale
            kept = (self.values, self.scale)
            refresh_triton(q, k, v, extra, out, kept, grid[0], frame, beside, NEIGHBOUR_SHARE, scale)
            return
        structured = split_frames(out, grid[0])[:, frame]
        exact = frame_attention(q, k, v, grid, frame, scale=scale, impl=impl, extra=extra)
        change = exact.float() - structured.float()
        values = split_frames(self.values, grid[0])
        for other in beside:
            before = values[:, other].float() * self.scale[..., other, None]
            self._keep(other, NEIGHBOUR_SHARE * change + (1 - NEIGHBOUR_SHARE) * before)
        self._keep(frame, change)
        structured.copy_(exact)

    def _keep(self, frame: int, change: Tensor) -> None:
        """Make a change (B, P, heads, D) the frame's correction, every row in 8 bits scaled by its largest entry."""
        scale = change.abs().amax(-1).clamp_min(1e-30) / _LARGEST
        split_frames(self.values, self.scale.shape[3])[:, frame] = (change / scale[..., None]).to(L_DTYPE)
        self.scale[..., frame] = scale


def turns_before(call: int, refresh: float, frames: int, calls: int | None, forwards: int = 1) -> int:
    """How many turns come before a call (from 0): ``refresh`` for each forward on the mean, evenly unless ``calls`` is
    known.

    A correction serves every later call, so most turns come early: some in the first call, where structured attention
    is farthest from dense, then one for every frame, or most of what is left where that is fewer; the rest come evenly.
    """
    mean = refresh * forwards
    if calls is None or calls < 3 or call == 0:
        return math.ceil(mean * call - 1e-9)
    # What the first call takes does not depend on the forwards: how many a step has is known when it ends.
    first = math.floor(min(FIRST_FRAMES * frames, FIRST_TURNS * refresh * calls) + 1e-9)
    early_calls = max(1, round(EARLY_CALLS * calls))
    left = mean * calls - first
    early = max(min(frames, EARLY_TURNS * left), left * early_calls / (calls - 1))
    late = (left - early) / (calls - 1 - early_calls)
    return first + math.ceil(early * min(1.0, (call - 1) / early_calls) + late * max(0, call - 1 - early_calls) - 1e-9)


def turns(frames: int, first_frame: bool) -> list[int]:
    """The order in which frames are recomputed: by the golden ratio, so that neighbours' turns lie far apart.

    Where frame 0, on which later frames lean, is not exact in every call (``first_frame``), it has every fourth turn.
    """
    later = sorted(range(1, frames), key=lambda frame: frame * _GOLDEN % 1)
    if first_frame:
        return later
    return [frame for i in range(0, max(1, len(later)), 3) for frame in (0, *later[i : i + 3])]
