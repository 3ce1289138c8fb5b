"""Structured calls on small shapes, recorded once as CUDA graphs and replayed.

A call is six launches and more, which the host takes longer to make than a GPU takes to run where tokens are few. All
layers of a model make the same calls on other tensors. So the tensors of a call are copied to buffers that stay where
they are, its launches are replayed, and the result is copied out. The first call of its kind runs as it is (it
compiles), the second one is recorded, the third and all later ones are replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vmonarch_kernels.api import attend
from vmonarch_kernels.autograd import needs_gradient
from vmonarch_kernels.cost import is_small, l_row_entries
from vmonarch_kernels.spec import Inputs, Options
from vmonarch_kernels.structure import L_DTYPE

_MOST_BUFFERS = 8
"""Kinds of calls whose buffers are kept: two or three for each shape."""
Replay = Callable[[], None]
Turn = tuple[int, tuple[int, ...]]
"""A frame that is recomputed, and the frames beside it that get a share of its change."""
Recompute = Callable[[int, Sequence[int], Inputs, Tensor], None]
"""Recomputes a frame of the inputs in the output, in place, and its residual and that of the frames beside it."""


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
        """Parts of calls: the attention of all frames, and each frame that is recomputed."""
        self.replayed_calls = 0
        """Calls whose attention of all frames was replayed."""
        self._capture, self._given = capture or CudaCapture(), capture is not None
        self._kept: dict[Hashable, _Buffers] = {}

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
        return self.refreshed(inputs, options, (), None, return_l=return_l)

    def refreshed(
        self,
        inputs: Inputs,
        options: Options,
        turns: Sequence[Turn],
        recompute: Recompute | None,
        *,
        return_l: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """``attend``, and then ``recompute`` of every turn, which changes ``inputs.residual`` in place."""
        with torch.cuda.device(inputs.q.device) if inputs.q.is_cuda else nullcontext():
            buffers = self._buffers(inputs, options, return_l)
            buffers.load(inputs)
            replayed = self.replayed
            self._run(buffers, "attend", lambda: buffers.attend(options, return_l))
            self.replayed_calls += self.replayed - replayed
            for frame, beside in turns:
                if recompute is None or buffers.out is None:
                    raise ValueError("turns came without a way to recompute them; valid are both or neither.")
                launch = _bound(recompute, frame, beside, buffers.inputs, buffers.out)
                self._run(buffers, (frame, beside), launch)
            return buffers.results(inputs.residual if turns else None)

    def _buffers(self, inputs: Inputs, options: Options, return_l: bool) -> _Buffers:
        shapes = tuple((name, x.shape, x.stride(), x.dtype) for name, x in inputs.tensors())
        kind = (inputs.q.device, inputs.grid, shapes, options, return_l, torch.is_inference_mode_enabled())
        if kind not in self._kept:
            if len(self._kept) == _MOST_BUFFERS:
                self._kept.clear()
            self._kept[kind] = _Buffers(inputs)
        return self._kept[kind]

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

    def __init__(self, inputs: Inputs) -> None:
        copies = {id(x): _like(x) for _, x in inputs.tensors()}

        def pair(found: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
            return None if found is None else (copies[id(found[0])], copies[id(found[1])])

        self.inputs = replace(
            inputs,
            q=copies[id(inputs.q)],
            k=copies[id(inputs.k)],
            v=copies[id(inputs.v)],
            l_prev=None if inputs.l_prev is None else copies[id(inputs.l_prev)],
            extra=pair(inputs.extra),
            residual=pair(inputs.residual),
        )
        self.out: Tensor | None = None
        self.l_new: Tensor | None = None
        self.seen: set[Hashable] = set()
        """Parts that ran on these buffers, so that their kernels are compiled and loaded."""
        self.replays: dict[Hashable, Replay] = {}

    def load(self, inputs: Inputs) -> None:
        """Copy a call's tensors here."""
        for (_, mine), (_, theirs) in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            _rows(mine).copy_(_rows(theirs))

    def attend(self, options: Options, return_l: bool) -> None:
        self.out, self.l_new = attend(self.inputs, options, impl="triton", return_l=return_l)

    def results(self, residual: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """Output and L in tensors of their own; what has become of the residual goes into the call's."""
        assert self.out is not None  # noqa: S101 - for the type checker: the call has run
        if residual is not None and self.inputs.residual is not None:
            for mine, theirs in zip(self.inputs.residual, residual, strict=True):
                theirs.copy_(mine)
        l_new = self.l_new
        return self.out.clone(), None if l_new is None else _rows(l_new).clone()[..., : l_new.shape[-1]]


def _bound(recompute: Recompute, frame: int, beside: tuple[int, ...], inputs: Inputs, out: Tensor) -> Replay:
    return lambda: recompute(frame, beside, inputs, out)


def _like(x: Tensor) -> Tensor:
    """An uninitialised tensor that lies as x does; L with the ends of its rows."""
    rows = _rows(x)
    return torch.empty_like(rows)[..., : x.shape[-1]] if rows is not x else torch.empty_like(x)


def _rows(x: Tensor) -> Tensor:
    """L as ``empty_l`` lays it out, with the ends of its rows, which are zero; other tensors as they are."""
    if x.dtype != L_DTYPE or x.ndim != 5:
        return x
    _, positions, heads, frames, _ = x.shape
    row = l_row_entries(frames)
    if x.stride() != (positions * heads * frames * row, heads * frames * row, frames * row, row, 1):
        return x
    return x.as_strided((*x.shape[:-1], row), x.stride())
