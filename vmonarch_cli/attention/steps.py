"""Which clip, denoising step and forward a call belongs to, and what is known of each.

Nobody announces them. With a pipeline, ``swap`` watches its scheduler: ``set_timesteps``, which every pipeline calls
once, begins a clip, and ``step`` ends a step. A step begins with the first forward after either. No values are
compared, so nothing waits for the device. Callers without a pipeline call begin_clip, begin_step and end_step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from vmonarch_cli.attention.joint import Rows, Text, valid_rows
from vmonarch_cli.attention.warm import Grid
from vmonarch_cli.plan.step_schedule import FIRST_STAGE, Stage

NO_STEP = (
    "a swapped transformer ran outside a denoising step: give `swapped` the pipeline, whose scheduler tells the steps "
    "apart, or call session.begin_step() and session.end_step() around each step"
)


@dataclass(frozen=True)
class RunningForward:
    """The transformer forward that is running."""

    step: int
    """0-based denoising step of the clip."""
    transformer: int
    grid: Grid
    """(T, H, W) tokens."""
    number: int
    """How many forwards of this transformer the step had before."""
    both_prompts: bool
    """Its samples are those of all negative prompts and then those of all prompts, as diffusers orders them."""
    guided: bool
    """Guidance is on, if not in every step: another forward may follow although none did in the last step."""
    packed: Text | None = None
    """The other tokens of a sequence that packs the video's together with them."""
    _valid: dict[tuple[int, ...], list[Rows] | None] = field(default_factory=dict)
    """Real text tokens by the mask's shape: all layers of a forward share one mask, and reading one waits."""

    def text(self, tokens: int, first: bool, mask: torch.Tensor | None) -> Text:
        """The text side of a joint call with so many text tokens."""
        if mask is None:
            return Text(tokens, tokens if first else 0, None)
        if mask.shape not in self._valid:
            self._valid[mask.shape] = valid_rows(mask)
        return Text(tokens, tokens if first else 0, self._valid[mask.shape])


@dataclass
class Step:
    """A denoising step in which a forward has begun."""

    index: int
    """0-based within the clip."""
    forward: RunningForward
    forwards: Counter[int] = field(default_factory=Counter)
    """Forwards so far, by transformer."""


class StepTracker:
    """Keeps count of a clip's steps and forwards."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.total: int | None = None
        """Steps of the clip, if known."""
        self.forwards = 1
        """Forwards of one transformer in the clip's last step."""
        self.stage = FIRST_STAGE
        """Where the running step stands among the clip's transformers."""
        self._done = 0
        self._announced: int | None = None
        """Index given to begin_step, until the step's first forward."""
        self._watching = False
        self._transformers: set[int] = set()
        """Those that the last step ran."""

    def begin_clip(self, total: int | None, *, watching: bool | None = None, forwards: int = 1) -> None:
        """Start over; ``watching`` (False until it is given) says that steps begin by themselves from here on.

        ``forwards``: of one transformer in the steps before the first one that runs here.
        """
        self.step = self._announced = None
        self.total, self.forwards, self._done, self.stage = total, forwards, 0, FIRST_STAGE
        self._transformers = set()
        self._watching = self._watching if watching is None else watching

    def begin_step(self, index: int | None, total: int | None) -> None:
        self.total = self.total if total is None else total
        self._announced = self._done if index is None else index

    def end_step(self) -> Step:
        """The step that ends; RuntimeError when no forward has begun one."""
        if self.step is None:
            raise RuntimeError("end_step was called without a forward since the last step")
        step, self.step, self._announced = self.step, None, None
        self._transformers = set(step.forwards)
        self.forwards = max(step.forwards.values())
        self._done += 1
        return step

    def begin_forward(
        self, transformer: int, grid: Grid, both_prompts: bool, guided: bool, packed: Text | None = None
    ) -> bool:
        """Count a forward and say whether it begins a step. ``both_prompts`` matters only in a step's first forward."""
        begins = self.step is None
        if begins and self._announced is None and not self._watching:
            raise RuntimeError(NO_STEP)
        index = self._done if self._announced is None else self._announced
        number = 0 if self.step is None else self.step.forwards[transformer]
        forward = RunningForward(index, transformer, grid, number, both_prompts and number == 0, guided, packed)
        if self.step is None:
            self.step = Step(index, forward)
            if self._transformers and self.changes_over(transformer):
                self.stage = Stage(self.stage.number + 1, index)
        self.step.forward = forward
        self.step.forwards[transformer] += 1
        return begins

    def changes_over(self, transformer: int) -> bool:
        """Whether the last step did not run this transformer: a two-stage model does not go back to its first."""
        return transformer not in self._transformers

    def forward(self, transformer: int) -> RunningForward:
        """The forward that is running; RuntimeError when it is not one of this transformer."""
        if self.step is None or self.step.forward.transformer != transformer:
            raise RuntimeError(NO_STEP)
        return self.step.forward
