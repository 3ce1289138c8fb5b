"""The progress of clips that are held against each other: their times so far beside the reference's, live."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import RenderableType
from rich.table import Table

from vmonarch_cli.cli.output import Output
from vmonarch_cli.cli.progress import RunProgress
from vmonarch_cli.cli.tables import ABSENT, table, times
from vmonarch_cli.clip.events import ClipStarted, Decoding, Event, StepDone
from vmonarch_cli.text import as_fast, counted, seconds
from vmonarch_cli.timing import ClipResult, StepAttention


class RaceProgress(RunProgress):
    """A context manager to hand to a comparison as `on_event`.

    On a terminal a table above the bar has a row for each clip: its steps, and its attention and denoising against the
    first clip's over the same steps. Elsewhere a line says so when the steps of a clip are done.
    """

    def __init__(
        self,
        out: Output,
        names: Sequence[str],
        on_clip: Callable[[ClipResult, float | None], None] = lambda *_: None,
    ) -> None:
        """`names`: of the clips, in the order in which they are made; the first is the reference."""
        self._names = list(names)
        self._runs: dict[str, list[StepAttention]] = {name: [] for name in names}
        self._runner = self._names[0]
        super().__init__(out, on_clip)

    def __call__(self, event: Event) -> None:
        match event:
            case ClipStarted(index=index):
                self._runner = self._names[index]
                self._runs[self._runner] = []
            case StepDone(step=step):
                steps = self._runs[self._runner]
                if step.index == 0:  # of a clip that is denoised once more, too
                    steps.clear()
                steps.append(step)
            case Decoding():
                if self._bar is None:
                    self._out.tell(self._sentence())
        super().__call__(event)

    def _title(self, index: int, count: int) -> str:
        return f"{self._names[index]} ({index + 1} of {count})"

    def _gain(self) -> float | None:
        return self._over_reference(self._runner, "attention_s")

    def _table(self) -> RenderableType | None:
        return race_table(self._runs) if any(self._runs.values()) else None

    def _over_reference(self, name: str, figure: str) -> float | None:
        return over_reference(self._runs[self._names[0]], self._runs[name], figure)

    def _sentence(self) -> str:
        """'fast: 6 steps in 31.2 s, attention 9.8 s, 2.71x as fast as dense's'."""
        steps, gain = self._runs[self._runner], self._gain()
        took, attention = (sum(getattr(step, name) for step in steps) for name in ("step_s", "attention_s"))
        words = f"{self._runner}: {counted(len(steps), 'step')} in {seconds(took)}, attention {seconds(attention)}"
        return words if gain is None else f"{words}, {as_fast(gain)} as {self._names[0]}'s"


def race_table(runs: dict[str, list[StepAttention]]) -> Table:
    """A row for each clip of `runs` (name -> its steps so far, the reference first)."""
    reference, *_ = runs.values()
    made = table("clip")
    for title in ("steps", "seconds a step", "attention", "denoising", "attention so far", "denoising so far"):
        made.add_column(title, justify="right")
    for name, steps in runs.items():
        if not steps:
            made.add_row(name, *[ABSENT] * 6)
            continue
        took, attention = (sum(getattr(step, figure) for step in steps) for figure in ("step_s", "attention_s"))
        made.add_row(
            name,
            str(len(steps)),
            f"{took / len(steps):.2f}",
            seconds(attention),
            seconds(took),
            *(times(over_reference(reference, steps, figure)) for figure in ("attention_s", "step_s")),
        )
    return made


def over_reference(reference: Sequence[StepAttention], steps: Sequence[StepAttention], figure: str) -> float | None:
    """How many times as long the reference took for as many steps; None for the reference itself, and before a step.

    figure: "attention_s" or "step_s".
    """
    if steps is reference or not steps or len(reference) < len(steps):
        return None
    ours = sum(getattr(step, figure) for step in steps)
    return sum(getattr(step, figure) for step in reference[: len(steps)]) / ours if ours > 0 else None
