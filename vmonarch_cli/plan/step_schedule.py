"""The schedule of a clip: what every denoising step computes, from the real number of steps and forwards.

One function decides how many frames a call recomputes (`ClipSchedule.due`). The session runs by it and the plan counts
with it, so that what is shown and counted is what runs. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

from vmonarch_cli.errors import PresetError
from vmonarch_cli.plan.call_options import options_for
from vmonarch_cli.presets import Preset, at_steps
from vmonarch_kernels.turns import first_call_turns, turns_before


@dataclass(frozen=True)
class Stage:
    """Where a step stands among the transformers of a clip, which take over from one another."""

    number: int = 0
    """How many transformers worked before the one that works now."""
    first_step: int = 0
    """The first step of the one that works now."""


FIRST_STAGE = Stage()


@dataclass(frozen=True)
class ClipSchedule:
    """What a clip's calls recompute; ``schedule_for`` makes it."""

    preset: Preset
    """As ``at_steps`` resolves it."""
    frames: int
    """Latent frames."""
    steps: int | None
    """Denoising steps; None if not known, which spreads turns evenly."""
    stages: int = 1
    """Transformers that take over from one another."""

    def due(self, step: int, layer: int, forwards: int, stage: Stage) -> int:
        """Frames that have their turn in the leading forward of a step, or in any where residuals are not shared.

        ``forwards``: those of the step.
        """
        preset = self.preset
        weight = 1.0 if preset.layer_refresh is None else preset.layer_refresh[layer]
        lead = forwards if preset.shared_refresh else 1
        index, most = step - int(preset.dense_steps), self.frames - int(preset.first_frame)
        if index < 0 or not weight:
            return 0
        if preset.step_refresh is not None:
            upto = [weight * lead * sum(preset.step_refresh[int(preset.dense_steps) : end]) for end in (step, step + 1)]
            due = math.ceil(upto[1] - 1e-9) - math.ceil(upto[0] - 1e-9)
        elif self.stages > 1 and self.steps is not None:
            due = self._staged(step, weight, lead, stage)
        else:
            calls = None if self.steps is None else self.steps - int(preset.dense_steps)
            able = self.frames if preset.first_turns is None else most
            before, after = (
                turns_before(call, weight * preset.refresh, able, calls, lead, first=preset.first_turns)
                for call in (index, index + 1)
            )
            due = after - before
        return min(due, most)

    def _staged(self, step: int, weight: float, lead: int, stage: Stage) -> int:
        """A transformer that takes over has no residuals: its first step takes many turns, and all others share what is
        left, evenly. Which step that is shows only when it comes, so every stage's first turns are set aside.
        """
        preset, dense = self.preset, int(self.preset.dense_steps)
        calls = (self.steps or 0) - dense
        mean = weight * preset.refresh
        first = first_call_turns(mean, self.frames, calls / self.stages, lead, preset.first_turns)
        rest = calls - self.stages
        if rest < 1:
            first = mean * lead
        taken = math.floor(first + 1e-9) if rest > 0 else math.ceil(first - 1e-9)
        if step == max(stage.first_step, dense):
            return taken
        each = (mean * lead * calls - self.stages * taken) / rest if rest > 0 else mean * lead
        before = step - dense - stage.number - (1 if stage.first_step >= dense or not stage.number else 0)
        return math.ceil(each * (before + 1) - 1e-9) - math.ceil(each * before - 1e-9)


@lru_cache(maxsize=256)
def schedule_for(preset: Preset, frames: int, steps: int | None, layers: int, stages: int = 1) -> ClipSchedule:
    """The schedule of a clip of ``frames`` latent frames and ``steps`` denoising steps, in a model of so many layers.

    Raises PresetError for a preset made for another number of steps or layers.
    """
    for name, count, noun in (("step_refresh", steps, "step"), ("layer_refresh", layers, "layer")):
        given: Sequence[float] | None = getattr(preset, name)
        if given is not None and count is not None and len(given) != count:
            raise PresetError(
                f"preset '{preset.name}': field '{name}' has {len(given)} numbers, one for each {noun}, and there are "
                f"{count} {noun}s"
            )
    resolved = at_steps(preset, steps)
    return ClipSchedule(resolved, frames, steps, stages)


class ClipCalls:
    """What every call of a preset's clips asks, answered once: a small call has no time to work it out again.

    Raises what ``at_steps`` raises.
    """

    def __init__(self, preset: Preset, steps: int | None) -> None:
        """``steps``: of a clip; None if not known."""
        self.preset = at_steps(preset, steps)
        """As it is in a clip of so many steps."""
        self.options = cache(partial(options_for, self.preset))
        """``options_for`` of latent frames, and whether the call is ``warm``."""
        self._preset, self._steps = preset, steps
        self._due: dict[tuple[int, int, int], Callable[[int, int, int, Stage], int]] = {}

    def due(self, frames: int, layers: int, stages: int) -> Callable[[int, int, int, Stage], int]:
        """``ClipSchedule.due`` of a clip's latent frames, in a model of so many layers and stages."""
        key = (frames, layers, stages)
        if key not in self._due:
            schedule = schedule_for(self._preset, frames, self._steps, layers, stages)
            self._due[key] = lru_cache(maxsize=4096)(schedule.due)
        return self._due[key]
