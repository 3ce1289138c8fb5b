"""The progress of `vmonarch tune` and `calibrate` on stderr: phases, the time left, and the loss of training."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import Progress, TaskID

from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.progress import EVERY_S, OnTerminal, RunClock
from vmonarch_cli.timing import Pace

if TYPE_CHECKING:
    from vmonarch_cli.tune.loop import TrainStep

_SMOOTH = 0.9


class PhaseProgress(OnTerminal):
    """A context manager. On a terminal a bar that vanishes at the end, with one clock for the run and the time that its
    phase has left; elsewhere a line per phase and now and then one of where a long one stands.
    """

    def __init__(self, out: Output) -> None:
        self._clock = RunClock(time.monotonic)
        super().__init__(out, Progress, self._clock)
        self._task: TaskID | None = None
        self._words = ""
        self._loss: float | None = None
        self._told = float("-inf")
        self._pace: Pace | None = None
        self._trained: Pace | None = None

    def phase(self, words: str, done: int, total: int | None) -> None:
        """What is going on, and how much of it is done."""
        count = f"{done}/{total}" if total else ""
        if words != self._words:
            self._words = words
            self._pace = None if total is None else Pace(total, done, time.monotonic)
            self._told = time.monotonic()
            if self._bar is None:
                self._out.tell(f"{words} ({total})" if total else words)
            else:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(words, total=total, count=count)
        self._clock.expect(None if self._pace is None else self._pace.left(done))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, count=count)
        elif total and done < total and time.monotonic() - self._told >= EVERY_S:
            self._told = time.monotonic()
            self._out.tell(f"{words}: {count}; {self._clock.words()}")

    def step(self, step: TrainStep) -> None:
        """A step of training is done."""
        self._loss = step.loss if self._loss is None else _SMOOTH * self._loss + (1 - _SMOOTH) * step.loss
        now = time.monotonic()
        first = self._trained is None
        if self._trained is None:
            self._trained = Pace(1.0, step.done, time.monotonic)
        self._clock.expect(self._trained.left(step.done))
        of = f"/{step.steps}" if step.steps else ""
        words = f"step {step.step}{of}, loss {self._loss:.4g}, lr {step.rate:.2g}"
        if self._bar is not None:
            if self._words != "training":
                self.phase("training", 0, 1000)
                self._clock.expect(None)
            if self._task is not None:
                self._bar.update(self._task, completed=round(1000 * step.done), count=words)
        elif first or now - self._told >= EVERY_S or step.done >= 1:
            self._told = now
            clock = f"; {self._clock.words()}" if step.done < 1 else ""
            self._out.tell(f"training: {words}{clock}")
