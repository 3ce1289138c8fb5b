"""Frame refresh (ours): every call recomputes a few frames exactly, in turn, and keeps what that changed.

It is the first-frame recomputation for all frames. The error of structured attention lies in R V, which all query
frames share. It changes slowly from one denoising step to the next. So the difference between a frame's exact and its
structured attention, its residual, stays a good correction until the frame's next turn (../README.md, frame refresh).
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from vmonarch_kernels.api import attend, frame_attention, resolve_impl
from vmonarch_kernels.autograd import in_backward_pass, needs_gradient
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import L_DTYPE, split_frames

DECAY = 0.95
"""Factor of every residual in each call: it fades as it ages."""
NEIGHBOUR_SHARE = 0.25
"""Weight of a recomputed frame's residual in those of the frames beside it, which are older."""
FIRST_TURNS = 1 / 3
"""Share of one forward's turns that come in the first call, where no frame has a residual yet ..."""
FIRST_FRAMES = 0.5
"""... but at most this share of all frames."""
EARLY_TURNS, EARLY_CALLS = 0.8, 0.2
"""After the first call, at most this share of the turns that are left comes in this share of a clip's calls."""
_LARGEST = torch.finfo(L_DTYPE).max
_GOLDEN = 0.6180339887498949


class Residual:
    """Exact minus structured attention of every frame when it was last computed, for one layer of one clip.

    ``values`` float8_e4m3fn (B, N, heads, D) times ``scale`` float32 (B, P, heads, T) is what is added to the output.
    """

    def __init__(self, q: Tensor, frames: int, *, first_frame: bool = True, calls: int | None = None) -> None:
        """A residual of zero for tensors of q's shape (B, N, heads, D).

        With ``first_frame`` frame 0 is exact in every call and needs no turn. ``calls`` is the number of calls that
        will come; where it is known, turns come earlier (``turns_before``).
        """
        batch, tokens, heads, _ = q.shape
        self.values = torch.zeros(q.shape, dtype=torch.uint8, device=q.device).view(L_DTYPE)
        self.scale = torch.zeros(batch, tokens // frames, heads, frames, dtype=torch.float32, device=q.device)
        self._order = turns(frames, first_frame)
        self._next = 0
        self._calls, self._expected_calls = 0, calls
        self._called: int | None = None  # id(self) after a call outside of a backward pass; copies have another one

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + self.scale.nbytes

    def fits(self, q: Tensor) -> bool:
        """Whether it is of a call with q's shape and device."""
        return self.values.shape == q.shape and self.values.device == q.device

    def attention(
        self,
        inputs: Inputs,
        options: Options,
        refresh: float,
        *,
        forwards: int = 1,
        impl: str = "auto",
        return_l: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``attend`` with the residual added, and the next ``refresh`` frames exact.

        Args:
            inputs: as in ``attend``, of the shape that this was made for; without a residual of their own.
            options: as in ``attend``.
            refresh: frames to recompute, above 0; at most all of them. A fraction is the mean over several calls,
                rounded up in the first: 0.75 is one frame in three calls of four. Where the number of calls is known,
                it is the mean over all of them.
            forwards: how many calls of this step use this residual: this one, which takes the turns of all, and those
                of ``attention_without_turns`` that follow.
            impl: as in ``attend``.
            return_l: as in ``attend``.

        Returns:
            (out, L), L being None unless ``return_l`` is set.

        Raises RuntimeError inside a backward pass after calls outside of one: there a checkpoint computes its forward
        again, with turns that are taken and a residual that has changed. Keep the call outside of
        ``torch.utils.checkpoint``, or repeat it on a copy that was made before it.

        """
        self._refuse_again("attention")
        chosen = self._take_turns(refresh, forwards)
        self.scale.mul_(DECAY)
        for frame in chosen:  # a fill takes a number from the host; indexing with a list would copy one to the device
            self.scale[..., frame].fill_(0)
        out, l_new = self._attend(inputs, options, impl, return_l)
        if chosen and out.requires_grad:
            out = out.clone()  # the call's own output is kept for its backward pass
        for frame in chosen:
            beside = [x for x in (frame - 1, frame + 1) if x in self._order and x not in chosen]
            self._recompute(frame, beside, inputs, options.score_scale(inputs.head_dim), impl, out)
        return out, l_new

    def attention_without_turns(
        self, inputs: Inputs, options: Options, *, impl: str = "auto", return_l: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``attend`` with the residual added as it is, for the other forwards of a step.

        Guidance compares their outputs with that of the forward that takes the turns. Arguments, result and
        errors as in ``attention``.
        """
        self._refuse_again("attention_without_turns")
        return self._attend(inputs, options, impl, return_l)

    def _attend(self, inputs: Inputs, options: Options, impl: str, return_l: bool) -> tuple[Tensor, Tensor | None]:
        residual = self.values, self.scale
        if needs_gradient(inputs):
            residual = self.values.clone(), self.scale.clone()  # later calls change them before this one's backward
        return attend(replace(inputs, residual=residual), options, impl=impl, return_l=return_l)

    def _refuse_again(self, name: str) -> None:
        """RuntimeError where a checkpoint computes a call again: it would be another call."""
        if not in_backward_pass():
            self._called = id(self)
        elif self._called == id(self):
            raise RuntimeError(
                f"Residual.{name} was called in a backward pass, as torch.utils.checkpoint computes a forward again, "
                "but a residual changes from call to call; keep the call outside of the checkpoint."
            )

    def _take_turns(self, refresh: float, forwards: int) -> list[int]:
        """The frames of this call; none where the only frame is exact in every call."""
        if not self._order:
            return []
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

    def _recompute(self, frame: int, beside: list[int], inputs: Inputs, scale: float, impl: str, out: Tensor) -> None:
        """Replace a frame of ``out`` by its exact attention; keep what that changed, for frames ``beside`` it too."""
        q, k, v, grid = inputs.q, inputs.k, inputs.v, inputs.grid
        if not out.requires_grad and resolve_impl(impl, q.device, q.dtype, inputs.head_dim) == "triton":
            from vmonarch_kernels.launch import refresh_triton

            refresh_triton(inputs, out, (self.values, self.scale), frame, beside, NEIGHBOUR_SHARE, scale)
            return
        structured = split_frames(out, grid[0])[:, frame]
        exact = frame_attention(q, k, v, grid, frame, scale=scale, impl=impl, extra=inputs.extra)
        change = exact.detach().float() - structured.detach().float()
        values = split_frames(self.values, grid[0])
        for other in beside:
            before = values[:, other].float() * self.scale[..., other, None]
            self._keep(other, NEIGHBOUR_SHARE * change + (1 - NEIGHBOUR_SHARE) * before)
        self._keep(frame, change)
        structured.copy_(exact)

    def _keep(self, frame: int, change: Tensor) -> None:
        """Make a change (B, P, heads, D) the frame's residual, every row in 8 bits scaled by its largest entry."""
        scale = change.abs().amax(-1).clamp_min(1e-30) / _LARGEST
        split_frames(self.values, self.scale.shape[3])[:, frame] = (change / scale[..., None]).to(L_DTYPE)
        self.scale[..., frame] = scale


def turns_before(call: int, refresh: float, frames: int, calls: int | None, forwards: int = 1) -> int:
    """How many turns come before a call (from 0): ``refresh`` for each forward on the mean, evenly unless ``calls`` is
    known.

    A residual serves every later call, so most turns come early: some in the first call, where structured attention
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
