"""The progress of `vmonarch tune` on stderr: phases, and the loss, the learning rate and the time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import Progress, TaskID

from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.progress import OnTerminal

if TYPE_CHECKING:
    from vmonarch_cli.tune.loop import TrainStep

_SMOOTH = 0.9
_EVERY_S = 30.0


class TuneProgress(OnTerminal):
    """A context manager. On a terminal a bar that vanishes at the end; elsewhere a line per phase and now and then one
    of training.
    """

    def __init__(self, out: Output) -> None:
        super().__init__(out, Progress)
        self._task: TaskID | None = None
        self._words = ""
        self._loss: float | None = None
        self._told = float("-inf")
        self._began: tuple[float, float] | None = None
        """Time and share of the training at its first step here."""

    def phase(self, words: str, done: int, total: int | None) -> None:
        """What is going on, and how much of it is done."""
        count = f"{done}/{total}" if total else ""
        if words != self._words:
            self._words = words
            if self._bar is None:
                self._out.tell(f"{words} ({total})" if total else words)
            else:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(words, total=total, count=count)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, count=count)

    def step(self, step: TrainStep) -> None:
        """A step of training is done."""
        self._loss = step.loss if self._loss is None else _SMOOTH * self._loss + (1 - _SMOOTH) * step.loss
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step.done)
        of = f"/{step.steps}" if step.steps else ""
        words = f"step {step.step}{of}, loss {self._loss:.4g}, lr {step.rate:.2g}{self._left(step, now)}"
        if self._bar is not None:
            if self._words != "training":
                self.phase("training", 0, 1000)
            if self._task is not None:
                self._bar.update(self._task, completed=round(1000 * step.done), count=words)
        elif now - self._told >= _EVERY_S or step.done >= 1:
            self._told = now
            self._out.tell(f"training: {words}")

    def _left(self, step: TrainStep, now: float) -> str:
        if self._began is None or step.done <= self._began[1]:
            return ""
        seconds = (now - self._began[0]) / (step.done - self._began[1]) * (1 - step.done)
        return f", {int(seconds // 60)}:{int(seconds % 60):02d} left"
