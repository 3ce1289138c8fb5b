"""What the calls of a clip took: marks on the device's clock, first calls apart, and samples of dense attention.

Nothing here waits for a GPU before a step ends: a wait would leave it idle at the next layer and show up in the step's
time. The one exception is a first call, which compiles for seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from vmonarch_cli.attention.clock import Clock, Mark
from vmonarch_cli.attention.steps import Step
from vmonarch_cli.timing import StepAttention

REPEATS_GPU = 3
"""Timed dense calls of a sample on a GPU; their median counts. On a CPU a call is long, and one is enough."""

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class DenseSample:
    """Dense calls on the tensors of a structured call; read it after the clock has settled."""

    name: str
    """Of the dense attention, the fastest that was compared."""
    spans: list[tuple[Mark, Mark]]
    squares: torch.Tensor
    """(2,) float32: sum of squares of (structured - dense), and of dense."""
    of: _TimedCall

    def seconds(self) -> float:
        """Median time of one dense call."""
        return statistics.median(Clock.seconds(*span) for span in self.spans)

    def error(self) -> float:
        """Relative L2 error of the structured output."""
        difference, norm = self.squares.tolist()
        return float((difference / norm) ** 0.5) if norm > 0 else 0.0


@dataclass(frozen=True)
class _TimedCall:
    start: Mark
    stop: Mark
    structured: bool


@dataclass
class _Marks:
    """Of a step that is running; they are read when it ends."""

    clock: Clock
    start: Mark
    calls: list[_TimedCall] = field(default_factory=list)
    excluded: list[tuple[Mark, Mark]] = field(default_factory=list)
    first_calls: list[tuple[Mark, Mark]] = field(default_factory=list)
    sample: DenseSample | None = None


class Meter:
    """Times the calls of a clip's steps. First calls and samples are work that a run without measuring does not do, so
    they are in no figure but their own.
    """

    def __init__(self, on_first_call: Callable[[], None] = lambda: None) -> None:
        self.excluded_s = 0.0
        """Seconds of the current clip spent in first calls and samples."""
        self._on_first_call = on_first_call
        self._marks: _Marks | None = None
        self._known_variants: set[Hashable] = set()
        self._known_shapes: set[Hashable] = set()
        self._fastest: dict[Hashable, str] = {}

    def begin_clip(self) -> None:
        """Forget the figures of the clip before; what was compiled stays compiled."""
        self.excluded_s = 0.0
        self._marks = None

    def begin_step(self, device: torch.device) -> None:
        clock = Clock(device)
        self._marks = _Marks(clock, clock.mark())

    def end_step(self, step: Step, total: int | None, sigma: float | None) -> StepAttention:
        """The step's figures; waits for the device, so that they are final."""
        marks = self._running()
        stop = marks.clock.mark()
        marks.clock.settle()
        self._marks = None
        self.excluded_s += _total(marks.excluded)
        return _figures(marks, stop, step, total, sigma)

    def dense(self, q: torch.Tensor, run: Run) -> torch.Tensor:
        """Time a call that runs dense."""
        if self._running().clock.on_gpu:
            self._warm_up(q, run)
        return self._timed(run, structured=False)

    def structured(self, run: Run) -> torch.Tensor:
        """Time a structured call."""
        return self._timed(run, structured=True)

    def first_call(self, variant: Hashable, rehearse: Run) -> None:
        """Run a kernel variant once before its first timed call: compilation is never counted as attention."""
        if variant in self._known_variants:
            return
        marks = self._running()
        marks.clock.settle()
        start = marks.clock.mark()
        self._on_first_call()
        rehearse()
        marks.clock.settle()
        span = (start, marks.clock.mark())
        marks.first_calls.append(span)
        marks.excluded.append(span)
        self._known_variants.add(variant)

    @property
    def has_sample(self) -> bool:
        """Whether dense attention was sampled in this step."""
        return self._running().sample is not None

    def sample(self, q: torch.Tensor, runs: Mapping[str, Run], out: torch.Tensor) -> None:
        """Time dense attention on the tensors of the last call, and compare that call's ``out`` (B, S, heads, D).

        ``runs``: dense attention by name; the fastest for tensors of this shape counts. The first one must run, others
        may raise RuntimeError, as torch's backends do for tensors that they cannot take.
        """
        marks = self._running()
        began = marks.clock.mark()
        name = self._fastest_of(q, runs)
        run = runs[name]
        spans: list[tuple[Mark, Mark]] = []
        dense = out
        for _ in range(REPEATS_GPU if marks.clock.on_gpu else 1):
            start = marks.clock.mark()
            dense = run()
            spans.append((start, marks.clock.mark()))
        marks.sample = DenseSample(name, spans, _squares(out, dense), marks.calls[-1])
        marks.excluded.append((began, marks.clock.mark()))

    def _fastest_of(self, q: torch.Tensor, runs: Mapping[str, Run]) -> str:
        """The fastest on tensors of this shape, by one warm call of each; it waits for the device, once a shape."""
        shape, clock = (q.shape, q.dtype, q.device), self._running().clock
        if shape not in self._fastest:
            spans: dict[str, tuple[Mark, Mark]] = {}
            for name, run in runs.items():
                try:
                    run()
                    start = clock.mark()
                    if len(runs) > 1:
                        run()
                    spans[name] = (start, clock.mark())
                except RuntimeError:
                    if not spans:
                        raise
            clock.settle()
            self._fastest[shape] = min(spans, key=lambda name: Clock.seconds(*spans[name]))
        return self._fastest[shape]

    def _timed(self, run: Run, *, structured: bool) -> torch.Tensor:
        marks = self._running()
        start = marks.clock.mark()
        out = run()
        marks.calls.append(_TimedCall(start, marks.clock.mark(), structured))
        return out

    @torch.no_grad()
    def _warm_up(self, q: torch.Tensor, run: Run) -> None:
        """One untimed dense call per shape: cuDNN plans and CPU pages must not count against dense attention. It keeps
        nothing for gradients: where a layer runs again in the backward pass there is no such call.
        """
        shape = (q.shape, q.dtype, q.device)
        if shape not in self._known_shapes:
            marks = self._running()
            start = marks.clock.mark()
            run()
            marks.excluded.append((start, marks.clock.mark()))
            self._known_shapes.add(shape)

    def _running(self) -> _Marks:
        if self._marks is None:
            raise RuntimeError("a call was timed outside a denoising step")
        return self._marks


def _squares(out: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """(2,) float32: sum of squares of (out - dense), and of dense, both (B, S, heads, D)."""
    squares = torch.zeros(2, dtype=torch.float32, device=out.device)
    for head in range(out.shape[2]):  # one head at a time: a float32 copy of a long clip's output is gigabytes
        exact = dense[:, :, head].float()
        squares[0] += (out[:, :, head].float() - exact).square().sum()
        squares[1] += exact.square().sum()
    return squares


def _total(spans: Sequence[tuple[Mark, Mark]]) -> float:
    return sum(Clock.seconds(*span) for span in spans)


def _figures(marks: _Marks, stop: Mark, step: Step, total: int | None, sigma: float | None) -> StepAttention:
    """Read a step's marks, which must have settled."""
    attention_s = _total([(call.start, call.stop) for call in marks.calls])
    dense_by = None if marks.sample is None else marks.sample.name
    dense_calls_s = _total([(call.start, call.stop) for call in marks.calls if not call.structured])
    structured_calls = sum(call.structured for call in marks.calls)
    dense_call_s = dense_s = sampled_s = error = None
    if marks.sample is not None:
        dense_call_s, error = marks.sample.seconds(), marks.sample.error()
        sampled_s = Clock.seconds(marks.sample.of.start, marks.sample.of.stop)
        dense_s = dense_call_s * structured_calls + dense_calls_s
    elif structured_calls == 0:
        # The step ran dense: what it took is the dense time.
        dense_s = attention_s
    return StepAttention(
        index=step.index,
        total=total,
        sigma=sigma,
        step_s=Clock.seconds(marks.start, stop) - _total(marks.excluded),
        attention_s=attention_s,
        calls=len(marks.calls),
        structured_calls=structured_calls,
        dense_call_s=dense_call_s,
        dense_call_by=dense_by,
        dense_s=dense_s,
        sampled_attention_s=sampled_s,
        error=error,
        first_call_s=_total(marks.first_calls) if marks.first_calls else None,
    )
