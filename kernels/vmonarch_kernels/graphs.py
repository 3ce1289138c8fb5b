"""Structured calls on small shapes, recorded once as CUDA graphs and replayed.

A call is six launches and more, which the host takes longer to make than a GPU takes to run where tokens are few. All
layers of a model make the same calls on other tensors. So the tensors of a call are copied to buffers that stay where
they are, its launches are replayed, and the result is copied out. The first call of its kind runs as it is (it
compiles), the second one is recorded, the third and all later ones are replayed. Frames that have their turn are told
to the recorded launches by a tensor, so that one recording serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from vmonarch_kernels.api import attend
from vmonarch_kernels.autograd import needs_gradient
from vmonarch_kernels.cost import is_small, l_row_entries
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import L_DTYPE, packed_residual
from vmonarch_kernels.turns import Turn

_MOST_BUFFERS = 8
"""Kinds of calls whose buffers are kept: two or three for each shape."""
_MOST_TURNS = 256
"""Sets of turns of which tensors are kept: one for every step of a few clips."""
_Made = TypeVar("_Made")
Replay = Callable[[], None]
Recompute = Callable[[Tensor, Inputs, Tensor], None]
"""Recomputes a frame of the inputs in the output, in place, and its residual and that of the frames beside it. A tensor
says which: int32 (4,), the frame, 1 or 0 for the one before and the one after it, and a 0.
"""


class Refresh(NamedTuple):
    """What comes after the attention of all frames, in a call with a residual."""

    turns: tuple[Turn, ...]
    recompute: Recompute
    packed: Tensor | None = None
    """The bytes of both tensors of the residual, where ``packed_residual`` made it."""


class Capture(Protocol):
    """Records what a function launches, without running it; what it returns can then be called to run it."""

    def __call__(self, launch: Callable[[], None]) -> Replay: ...


class CudaCapture:
    """CUDA graphs of torch, which share their memory: they run one after another."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, launch: Callable[[], None]) -> Replay:
        """Raises whatever `launch` or CUDA raises; the stream is then as before."""
        graph, stream, current = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Other threads compile kernels and copy frames meanwhile, which is none of this stream's business.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        replay: Replay = graph.replay
        return replay


class Graphs:
    """The recorded calls of one attention. Not for several threads at a time."""

    def __init__(self, capture: Capture | None = None) -> None:
        """capture: how launches are recorded; CUDA graphs by default, which is nothing where there is no GPU."""
        self.failure: str | None = None
        """Why nothing is recorded any more; calls then run as they are."""
        self.recorded = 0
        self.replayed = 0
        """Parts of calls: the attention of all frames, and the frames that are recomputed."""
        self.replayed_calls = 0
        """Calls whose attention of all frames was replayed."""
        self._capture, self._given = capture or CudaCapture(), capture is not None
        self._kept: dict[Hashable, _Buffers] = {}
        self._turns: dict[Hashable, Tensor] = {}
        """What tells launches of turns, made once for the same turns of all layers."""

    def takes(self, inputs: Inputs, impl: str) -> bool:
        """Whether a call goes this way: a small one of the Triton kernels on a GPU, without gradients."""
        q = inputs.q
        if self.failure is not None or impl != "triton" or not is_small(q.shape[1], q.shape[2]):
            return False
        if not self._given and (not q.is_cuda or torch.cuda.is_current_stream_capturing()):
            return False
        return not needs_gradient(inputs)

    def attend(self, inputs: Inputs, options: Options, *, return_l: bool = False) -> tuple[Tensor, Tensor | None]:
        """``vmonarch_kernels.attend`` of a call that this takes: the same to the bit, in tensors of its own."""
        return self.refreshed(inputs, options, None, return_l=return_l)

    def refreshed(
        self, inputs: Inputs, options: Options, refresh: Refresh | None, *, return_l: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """``attend``, and then every turn, which changes ``inputs.residual`` in place."""
        device = inputs.q.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.refreshed(inputs, options, refresh, return_l=return_l)
        packed = None if refresh is None else refresh.packed
        buffers = self._buffers(inputs, options, packed is not None, return_l)
        buffers.load(inputs, packed)
        replayed = self.replayed
        self._run(buffers, "attend", partial(buffers.attend, options, return_l))
        self.replayed_calls += self.replayed - replayed
        if refresh is not None and refresh.turns:
            turns = buffers.turns(len(refresh.turns))
            turns.copy_(self._told(refresh.turns, device))
            self._run(buffers, len(turns), partial(buffers.recompute, refresh.recompute, turns))
            buffers.give_back(inputs.residual, packed)
        return buffers.results()

    def fade(self, scale: Tensor, decay: float, turns: tuple[Turn, ...]) -> None:
        """Multiply the scale of a residual (B, P, heads, T) by ``decay``, and that of frames with a turn by zero.

        It is one launch.
        """

        def factors() -> Tensor:
            due = {frame for frame, _ in turns}
            values = [0.0 if frame in due else decay for frame in range(scale.shape[-1])]
            return torch.tensor(values, dtype=scale.dtype, device=scale.device)

        kind = (scale.device, scale.shape[-1], decay, turns)
        scale.mul_(_remembered(self._turns, _MOST_TURNS, kind, factors))

    def _told(self, turns: tuple[Turn, ...], device: torch.device) -> Tensor:
        """Turns as launches are told them, int32 (turns, 4); a row is 16 bytes, as Triton likes its pointers."""
        rows = [(frame, frame - 1 in beside, frame + 1 in beside, 0) for frame, beside in turns]
        make = partial(torch.tensor, rows, dtype=torch.int32, device=device)
        return _remembered(self._turns, _MOST_TURNS, (device, turns), make)

    def _buffers(self, inputs: Inputs, options: Options, packed: bool, return_l: bool) -> _Buffers:
        pairs = (*(inputs.extra or _NO_PAIR), *(inputs.residual or _NO_PAIR))
        lie = tuple([_layout(x) for x in (inputs.q, inputs.k, inputs.v, inputs.l_prev, *pairs)])
        kind = (inputs.q.device, inputs.grid, lie, options, packed, return_l, torch.is_inference_mode_enabled())
        return _remembered(self._kept, _MOST_BUFFERS, kind, partial(_Buffers, inputs, packed))

    def _run(self, buffers: _Buffers, name: Hashable, launch: Callable[[], None]) -> None:
        """Run, record or replay one part of a call on its buffers."""
        replay = buffers.replays.get(name)
        if replay is None and name in buffers.seen and self.failure is None:
            try:
                replay = buffers.replays[name] = self._capture(launch)
                self.recorded += 1
            except Exception as error:
                # Parts recorded before write to outputs of their own: nothing of this kind is replayed from here on.
                self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        if replay is None or self.failure is not None:
            buffers.seen.add(name)
            launch()
            return
        replay()
        self.replayed += 1


class _Buffers:
    """The tensors that one kind of call is recorded on."""

    def __init__(self, inputs: Inputs, packed: bool) -> None:
        q, k, v, residual = inputs.q, inputs.k, inputs.v, inputs.residual
        self._qkv: Tensor | None = None
        """q, k and v one behind the other, where one launch can copy all of them."""
        if _can_be_joined(q, k, v):
            self._qkv = q.new_empty((3 * q.shape[0], *q.shape[1:]))
            q, k, v = self._qkv.chunk(3)
        else:
            q, k, v = (torch.empty_like(x) for x in (q, k, v))
        self._l_rows = start = None
        self._row_ends = False
        """L comes with the ends of its rows, which are copied too: a copy of one piece."""
        if inputs.l_prev is not None:
            rows = _rows(inputs.l_prev)
            self._l_rows, self._row_ends = torch.empty_like(rows), rows is not inputs.l_prev
            start = self._l_rows[..., : inputs.l_prev.shape[-1]]
        self._packed: Tensor | None = None
        if packed and residual is not None:
            self._packed, residual = packed_residual(residual[0].shape, residual[1].shape, q.device)
        else:
            residual = _pair_like(residual)
        self.inputs = Inputs(q, k, v, inputs.grid, start, _pair_like(inputs.extra), residual)
        self.out: Tensor | None = None
        self.l_rows: Tensor | None = None
        """The L that was made, with the ends of its rows."""
        self.seen: set[Hashable] = set()
        """Parts that ran on these buffers, so that their kernels are compiled and loaded."""
        self.replays: dict[Hashable, Replay] = {}
        self._turns: dict[int, Tensor] = {}

    def turns(self, count: int) -> Tensor:
        """Where the launches of so many turns read which they are, int32 (count, 4)."""
        if count not in self._turns:
            self._turns[count] = torch.empty((count, 4), dtype=torch.int32, device=self.inputs.q.device)
        return self._turns[count]

    def recompute(self, recompute: Recompute, turns: Tensor) -> None:
        for turn in turns:
            recompute(turn, self.inputs, self.made)

    def load(self, inputs: Inputs, packed: Tensor | None) -> None:
        """Copy a call's tensors here."""
        if self._qkv is not None:
            torch.cat((inputs.q, inputs.k, inputs.v), out=self._qkv)
        else:
            self.inputs.q.copy_(inputs.q)
            self.inputs.k.copy_(inputs.k)
            self.inputs.v.copy_(inputs.v)
        if self._l_rows is not None and inputs.l_prev is not None:
            rows = self._l_rows
            rows.copy_(inputs.l_prev.as_strided(rows.shape, rows.stride()) if self._row_ends else inputs.l_prev)
        _copy_pair(self.inputs.extra, inputs.extra)
        if self._packed is not None and packed is not None:
            self._packed.copy_(packed)
        else:
            _copy_pair(self.inputs.residual, inputs.residual)

    def attend(self, options: Options, return_l: bool) -> None:
        self.out, l_new = attend(self.inputs, options, impl="triton", return_l=return_l)
        self.l_rows = None if l_new is None else _rows(l_new)

    @property
    def made(self) -> Tensor:
        """The output, after a call."""
        assert self.out is not None  # noqa: S101 - for the type checker: the call has run
        return self.out

    def give_back(self, residual: tuple[Tensor, Tensor] | None, packed: Tensor | None) -> None:
        """What has become of the residual goes into the call's."""
        if self._packed is not None and packed is not None:
            packed.copy_(self._packed)
        else:
            _copy_pair(residual, self.inputs.residual)

    def results(self) -> tuple[Tensor, Tensor | None]:
        """Output and L in tensors of their own."""
        l_new = None if self.l_rows is None else self.l_rows.clone().narrow(-1, 0, self.inputs.frames)
        return self.made.clone(), l_new


_NO_PAIR = (None, None)


def _remembered(kept: dict[Hashable, _Made], most: int, kind: Hashable, make: Callable[[], _Made]) -> _Made:
    """What was made of this kind before, or now; where there would be more than `most`, all others are forgotten."""
    found = kept.get(kind)
    if found is None:
        if len(kept) == most:
            kept.clear()
        found = kept[kind] = make()
    return found


def _layout(x: Tensor | None) -> Hashable:
    return None if x is None else (x.shape, x.stride(), x.dtype)


def _can_be_joined(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether one launch copies all three as they lie, and kernels find each on a multiple of 16 bytes."""
    alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    return alike and all(x.is_contiguous() for x in (q, k, v)) and q.nbytes % 16 == 0


def _pair_like(pair: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    return None if pair is None else (torch.empty_like(pair[0]), torch.empty_like(pair[1]))


def _copy_pair(to: tuple[Tensor, Tensor] | None, source: tuple[Tensor, Tensor] | None) -> None:
    if to is not None and source is not None:
        to[0].copy_(source[0])
        to[1].copy_(source[1])


def _rows(x: Tensor) -> Tensor:
    """L as ``empty_l`` lays it out, with the ends of its rows, which are zero; other tensors as they are."""
    if x.dtype != L_DTYPE or x.ndim != 5:
        return x
    _, positions, heads, frames, _ = x.shape
    row = l_row_entries(frames)
    if x.stride() != (positions * heads * frames * row, heads * frames * row, frames * row, row, 1):
        return x
    return x.as_strided((*x.shape[:-1], row), x.stride())
