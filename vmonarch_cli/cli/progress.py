"""The progress bar of a run, on stderr: one line that follows the events of a run."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from vmonarch_cli.cli.output import Output
from vmonarch_cli.clip.events import (
    ClipDone,
    ClipStarted,
    ClipWarning,
    CompilingKernels,
    Decoding,
    Event,
    FramesDecoded,
    ModelLoaded,
    ModelLoading,
    Retrying,
    StepDone,
)
from vmonarch_cli.text import clock, counted, seconds
from vmonarch_cli.timing import ClipResult, Pace, StepAttention, attention_speedup

_OTHER_LINES = 9
"""Of the head and foot of the table and of the bar."""
EVERY_S = 30.0
"""Seconds between two lines about steps or frames where there is no terminal."""
_WIDE = 72
"""Columns from which on the bar has room for the speedup, too."""


class RunClock(ProgressColumn):
    """One clock for a whole run: the time since it began, and what is left of it as far as anybody knows."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """`now`: a clock in seconds."""
        self._now = now
        self._began = now()
        self._left: tuple[float, float] | None = None
        super().__init__()

    def expect(self, left: float | None) -> None:
        """So many seconds are left from now on; None: nobody knows."""
        self._left = None if left is None else (self._now(), left)

    @property
    def left(self) -> float | None:
        """Seconds that are left now."""
        return None if self._left is None else max(0.0, self._left[1] - (self._now() - self._left[0]))

    def words(self) -> str:
        """'1:12, 0:08 left'."""
        left = self.left
        return clock(self._now() - self._began) + ("" if left is None else f", {clock(left)} left")

    def render(self, task: Task) -> Text:
        """The column; rich calls it at every drawing."""
        return Text(self.words(), style="progress.elapsed")


class _BarUnderTable(Progress):
    """A progress bar with something above it."""

    def __init__(self, above: Callable[[], RenderableType | None], *columns: ProgressColumn, **extra: Any) -> None:
        self._above = above
        super().__init__(*columns, **extra)

    def get_renderables(self) -> Iterable[RenderableType]:
        above = self._above()
        if above is not None:
            yield above
        yield from super().get_renderables()


class OnTerminal:
    """A context manager: while it runs, its bar is drawn, where there is one."""

    def __init__(self, out: Output, make: Callable[..., Progress], *more: ProgressColumn) -> None:
        """`make` gets the columns of the bar, the last of which are `more`. Without a terminal there is no bar."""
        self._out = out
        self._bar: Progress | None = None
        if out.stderr.is_terminal and not out.silent:
            self._bar = make(
                SpinnerColumn("line" if out.stderr.options.ascii_only else "dots"),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[count]}", markup=False),
                *more,
                console=out.stderr,
                transient=True,
            )

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


class RunProgress(OnTerminal):
    """A context manager to hand to a run as `on_event`.

    On a terminal it draws a bar that vanishes at the end, with the steps, their seconds, the attention's speedup so far
    and the clock of the run, and with `live` the table of the steps so far above it. Elsewhere it writes one plain line
    per phase, and now and then one of where a long phase stands. `on_clip` gets every finished clip and the seconds
    that loading took, with the bar out of the way.

    The time left is that of the phase for a single clip, and that of all clips for several.
    """

    def __init__(
        self,
        out: Output,
        on_clip: Callable[[ClipResult, float | None], None] = lambda *_: None,
        live: Callable[[Sequence[StepAttention], int], RenderableType] | None = None,
        *,
        clips: int | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clips`: how many are to be made, where a clip's own count is another one; `now`: a clock in seconds."""
        self.steps: list[StepAttention] = []
        """Steps of the clip that is being made; none once it is finished."""
        self._live = live
        self._on_clip = on_clip
        self._clock = RunClock(now)
        super().__init__(out, functools.partial(_BarUnderTable, self._table), self._clock)
        self._now = now
        self._task: TaskID | None = None
        self._clip = ""
        self._load_s: float | None = None
        self._clips = clips
        self._waiting = clips or 1
        """Clips that are not finished."""
        self._clip_began: float | None = None
        self._current = 0
        """Number of the clip that is being denoised, or was the last to be."""
        self._last_end = 0.0
        self._took: list[float] = []
        """Seconds of each finished clip."""
        self._pace: Pace | None = None
        self._told = now()

    def __call__(self, event: Event) -> None:
        match event:
            case ModelLoading():
                self._phase("loading the model")
            case ModelLoaded(seconds=load_s):
                self._load_s = load_s
            case ClipStarted(index=index, count=count, steps=steps):
                self._clip = self._title(index, count) if count > 1 else "denoising"
                self.steps = []
                self._pace = None
                self._clip_began, self._current = self._now(), index
                if self._clips is None:
                    self._waiting = count - index
                self._phase(self._clip, total=steps)
                self._expect(None)
            case CompilingKernels():
                self._phase(f"{self._clip}: compiling kernels, once", keep=True)
            case StepDone(step=step):
                self._step(step)
            case Decoding():
                self._pace = Pace(0, now=self._now)  # of as many frames as the first part says
                self._phase("decoding")
                self._expect(None)
            case FramesDecoded(done=done, total=total):
                self._frames(done, total)
            case ClipWarning(sentence=sentence):
                self._out.warn(sentence)
            case Retrying(sentence=sentence):
                self._pace = None
                self._out.retry(sentence)
            case ClipDone(result=result):
                self._end_clip(result.index)
                self.aside(lambda: self._on_clip(result, self._load_s))

    def aside(self, write: Callable[[], None]) -> None:
        """Let something write on the terminal, with the bar out of the way."""
        if self._bar:
            self._bar.stop()
        write()
        if self._bar:
            self._bar.start()

    def drop_clip(self, index: int) -> None:
        """Clip `index` will not be finished here: it failed, or another process makes it."""
        if index == self._current:
            self._clip_began = None
        self._end_clip(index, counts=False)

    def _title(self, index: int, count: int) -> str:
        """What a clip of several is called."""
        return f"clip {index + 1} of {count}"

    def _gain(self) -> float | None:
        """How many times as fast as dense attention the clip's attention is so far; None where nobody knows."""
        return attention_speedup(self.steps)

    def _end_clip(self, index: int, *, counts: bool = True) -> None:
        """Clip `index` is over, perhaps while the next one is denoised; one that `counts` tells what a clip takes."""
        now, began = self._now(), self._clip_began
        if counts and index != self._current:
            began = self._last_end or None  # since the one before it: the next one has begun meanwhile
        if counts and began is not None:
            self._took.append(now - max(began, self._last_end))
        self._last_end = now
        if index == self._current:
            self.steps = []
            self._clip_began = None
        self._waiting = max(0, self._waiting - 1)
        self._clock.expect(None)

    def _step(self, step: StepAttention) -> None:
        if step.index == 0:  # of a clip that is denoised once more, too
            self._pace = None
            self.steps = []
        self.steps.append(step)
        done, total = step.index + 1, step.total
        if total is None:
            return
        step_s = statistics.fmean(one.step_s for one in self.steps)
        if self._pace is None:  # the first step is over: what came before it was text and compilation as well
            self._pace = Pace(total, done, self._now)
        left = self._pace.left(done)
        self._expect(step_s * (total - done) if left is None else left, step_s * total)
        gain = self._gain()
        words = [f"{done}/{total}", f"{seconds(step_s)} a step"]
        if gain is not None and self._out.stderr.width >= _WIDE:
            words.append(f"attention {gain:.2f}x")
        self._advance(self._clip, done, total, ", ".join(words))

    def _frames(self, done: int, total: int) -> None:
        if self._pace is None:  # decoding began once more
            self._pace = Pace(total, done, self._now)
        self._pace.total = total
        self._expect(self._pace.left(done))
        self._advance("decoding", done, total, f"{done}/{total} frames")

    def _expect(self, phase_left: float | None, clip_s: float | None = None) -> None:
        """Tell the clock what is left: `phase_left` seconds of this phase, and all of the clips that come after.

        `clip_s`: about what a clip takes, as long as none is finished.
        """
        others = self._waiting - 1
        if self._took:
            mean = statistics.fmean(self._took)
            spent = 0.0 if self._clip_began is None else self._now() - self._clip_began
            self._clock.expect(max(phase_left or 0.0, mean - spent) + others * mean)
        elif others <= 0:
            self._clock.expect(phase_left)
        elif phase_left is not None and clip_s is not None:
            self._clock.expect(phase_left + others * clip_s)

    def _advance(self, words: str, done: int, total: int, count: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, description=words, count=count)
        elif self._now() - self._told >= EVERY_S and done < total:
            self._told = self._now()
            self._out.tell(f"{words}: {count}; {self._clock.words()}")

    def _table(self) -> RenderableType | None:
        """The last steps that fit the height of the terminal."""
        if self._live is None or not self.steps:
            return None
        size = self._out.stderr.size
        return self._live(self.steps[-max(1, size.height - _OTHER_LINES) :], size.width)

    def _phase(self, words: str, total: int | None = None, keep: bool = False) -> None:
        """Show what is going on; `keep` leaves the count of steps as it is."""
        self._told = self._now()
        if self._bar and self._task is not None and keep:
            self._bar.update(self._task, description=words)
        elif self._bar:
            # A new task: rich cannot make a counting bar indeterminate again.
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(words, total=total, count=f"0/{total}" if total else "")
        else:
            self._out.tell(f"{words} ({counted(total, 'step')})" if total else words)
