"""Frame refresh (ours): every call recomputes a few frames exactly, in turn, and keeps what that changed.

It is the first-frame recomputation for all frames. The error of structured attention lies in R V, which all query
frames share. It changes slowly from one denoising step to the next. So the difference between a frame's exact and its
structured attention, its residual, stays a good correction until the frame's next turn (../README.md, frame refresh).
"""

import copy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from vmonarch_kernels.api import attend, frame_attention, resolve_impl
from vmonarch_kernels.autograd import in_backward_pass, needs_gradient
from vmonarch_kernels.graphs import Graphs, Refresh
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import L_DTYPE, packed_residual, split_frames
from vmonarch_kernels.turns import Turn, planned_turns, turns_before

DECAY = 0.95
"""Factor of every residual in each call: it fades as it ages."""
NEIGHBOUR_SHARE = 0.25
"""Weight of a recomputed frame's residual in those of the frames beside it, which are older."""
_LARGEST = torch.finfo(L_DTYPE).max


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
        self._packed, self._views = packed_residual(q.shape, (batch, tokens // frames, heads, frames), q.device)
        self.values, self.scale = self._views
        self._first_frame = first_frame
        self._next = 0
        self._calls, self._expected_calls = 0, calls
        self.graphs: Graphs | None = None
        """Replays the small ones of the calls that it takes; None for none."""
        self._called: int | None = None  # id(self) after a call outside of a backward pass; copies have another one

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.values.nbytes + self.scale.nbytes

    def fade(self, calls: int) -> None:
        """Let it age by calls that did not happen: steps in which its forward was left out."""
        self.scale.mul_(DECAY**calls)

    def fits(self, q: Tensor) -> bool:
        """Whether it is of a call with q's shape and device."""
        return self.values.shape == q.shape and self.values.device == q.device

    def copy(self) -> "Residual":
        """One that goes on from here by itself."""
        twin = copy.copy(self)
        twin._packed, twin._views = packed_residual(self.values.shape, self.scale.shape, self.values.device)
        twin.values, twin.scale = twin._views
        twin.values.copy_(self.values)
        twin.scale.copy_(self.scale)
        return twin

    def attention(
        self,
        inputs: Inputs,
        options: Options,
        refresh: float,
        *,
        forwards: int = 1,
        count: int | None = None,
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
            count: how many frames to recompute in this very call, where the caller plans them; ``refresh`` and
                ``forwards`` then say nothing.
            impl: as in ``attend``.
            return_l: as in ``attend``.

        Returns:
            (out, L), L being None unless ``return_l`` is set.

        Raises RuntimeError inside a backward pass after calls outside of one: there a checkpoint computes its forward
        again, with turns that are taken and a residual that has changed. Keep the call outside of
        ``torch.utils.checkpoint``, or repeat it on a copy that was made before it.

        """
        self._refuse_again("attention")
        turns = self._take_turns(self._due(refresh, forwards) if count is None else count)
        if self.graphs is not None and self._is_replayed(inputs, impl):
            self.graphs.fade(self.scale, DECAY, turns)
            return self._replayed(self.graphs, inputs, options, turns, return_l)
        self.scale.mul_(DECAY)
        for frame, _ in turns:  # a fill takes a number from the host; indexing with a list would copy one to the device
            self.scale[..., frame].fill_(0)
        out, l_new = self._attend(inputs, options, impl, return_l)
        if turns and out.requires_grad:
            out = out.clone()  # the call's own output is kept for its backward pass
        scale = options.score_scale(inputs.head_dim)
        for frame, beside in turns:
            self._recompute(frame, list(beside), inputs, scale, impl, out)
        return out, l_new

    def attention_without_turns(
        self, inputs: Inputs, options: Options, *, impl: str = "auto", return_l: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``attend`` with the residual added as it is, for the other forwards of a step.

        Guidance compares their outputs with that of the forward that takes the turns. Arguments, result and
        errors as in ``attention``.
        """
        self._refuse_again("attention_without_turns")
        if self.graphs is not None and self._is_replayed(inputs, impl):
            return self._replayed(self.graphs, inputs, options, (), return_l)
        return self._attend(inputs, options, impl, return_l)

    def _is_replayed(self, inputs: Inputs, impl: str) -> bool:
        q = inputs.q
        if impl != "triton":  # what that needs is checked where it first runs
            impl = resolve_impl(impl, q.device, q.dtype, inputs.head_dim)
        return self.graphs is not None and self.graphs.takes(inputs, impl)

    def _replayed(
        self, graphs: Graphs, inputs: Inputs, options: Options, turns: tuple[Turn, ...], return_l: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A call and its turns through ``graphs``, which has residual buffers of its own beside the other tensors'."""
        residual = self.values, self.scale
        packed = self._packed if self.values is self._views[0] and self.scale is self._views[1] else None
        kept = Inputs(inputs.q, inputs.k, inputs.v, inputs.grid, inputs.l_prev, inputs.extra, residual)
        recompute = partial(_recomputed, scale=options.score_scale(inputs.head_dim))
        return graphs.refreshed(kept, options, Refresh(turns, recompute, packed), return_l=return_l)

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

    def _due(self, refresh: float, forwards: int) -> int:
        """How many frames have their turn in the next call, by the mean."""
        frames = self.scale.shape[3]
        before, after = (
            turns_before(calls, refresh, frames, self._expected_calls, forwards)
            for calls in (self._calls, self._calls + 1)
        )
        self._calls += 1
        return after - before

    def _take_turns(self, count: int) -> tuple[Turn, ...]:
        """Those of this call; none where the only frame is exact in every call."""
        taken, self._next = planned_turns(self.scale.shape[3], self._first_frame, self._next, count)
        return taken

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


def _recomputed(turn: Tensor, inputs: Inputs, out: Tensor, *, scale: float) -> None:
    """A turn on the tensors of ``Graphs``."""
    from vmonarch_kernels.launch import turn_triton

    assert inputs.residual is not None  # noqa: S101 - for the type checker: _replayed has given one
    turn_triton(inputs, out, inputs.residual, turn, NEIGHBOUR_SHARE, scale)
