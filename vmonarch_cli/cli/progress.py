"""The progress bar of a run, on stderr: one line that follows the events of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from vmonarch_cli.cli.output import Output
from vmonarch_cli.clip.events import (
    ClipDone,
    ClipStarted,
    ClipWarning,
    CompilingKernels,
    Decoding,
    Event,
    ModelLoaded,
    ModelLoading,
    Retrying,
    StepDone,
)
from vmonarch_cli.timing import ClipResult, StepAttention

_OTHER_LINES = 9
"""Of the head and foot of the table and of the bar."""


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

    On a terminal it draws a bar that vanishes at the end, and with `live` the table of the steps so far above it;
    elsewhere it writes one plain line per phase. `on_clip` gets every finished clip and the seconds that loading took,
    with the bar out of the way.
    """

    def __init__(
        self,
        out: Output,
        on_clip: Callable[[ClipResult, float | None], None] = lambda *_: None,
        live: Callable[[Sequence[StepAttention], int], RenderableType] | None = None,
    ) -> None:
        self.steps: list[StepAttention] = []
        """Steps of the clip that is being made; none once it is finished."""
        self._live = live
        self._on_clip = on_clip
        super().__init__(out, functools.partial(_BarUnderTable, self._table), TimeElapsedColumn())
        self._task: TaskID | None = None
        self._total: int | None = None
        self._clip = ""
        self._load_s: float | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case ModelLoading():
                self._phase("loading the model")
            case ModelLoaded(seconds=seconds):
                self._load_s = seconds
            case ClipStarted(index=index, count=count, steps=steps):
                self._clip = f"clip {index + 1} of {count}" if count > 1 else "denoising"
                self.steps = []
                self._phase(self._clip, total=steps)
            case CompilingKernels():
                self._phase(f"{self._clip}: compiling kernels, once", keep=True)
            case StepDone(step=step):
                self.steps.append(step)
                if self._bar and self._task is not None:
                    done = step.index + 1
                    fraction = f"{done}/{self._total}"
                    self._bar.update(self._task, completed=done, description=self._clip, count=fraction)
            case Decoding():
                self._phase("decoding")
            case ClipWarning(sentence=sentence):
                self._out.warn(sentence)
            case Retrying(sentence=sentence):
                self._out.retry(sentence)
            case ClipDone(result=result):
                self.steps = []
                if self._bar:
                    self._bar.stop()
                self._on_clip(result, self._load_s)
                if self._bar:
                    self._bar.start()

    def _table(self) -> RenderableType | None:
        """The last steps that fit the height of the terminal."""
        if self._live is None or not self.steps:
            return None
        size = self._out.stderr.size
        return self._live(self.steps[-max(1, size.height - _OTHER_LINES) :], size.width)

    def _phase(self, words: str, total: int | None = None, keep: bool = False) -> None:
        """Show what is going on; `keep` leaves the count of steps as it is."""
        if self._bar and self._task is not None and keep:
            self._bar.update(self._task, description=words)
        elif self._bar:
            # A new task: rich cannot make a counting bar indeterminate again.
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._total = total
            self._task = self._bar.add_task(words, total=total, count=f"0/{total}" if total else "")
        else:
            self._out.tell(f"{words} ({total} steps)" if total else words)
