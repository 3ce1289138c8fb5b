"""Exact frames given to steps and layers where the forecast says that they lower a clip's error most for their work."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vmonarch_cli.plan.costs import Work
from vmonarch_cli.plan.step_schedule import FIRST_STAGE, schedule_for
from vmonarch_cli.presets import Preset
from vmonarch_cli.profile.calibrate.forecast import CallKind, Groups, Replay, Weights, in_groups
from vmonarch_cli.profile.calibrate.limits import bare, units_of

STEP_GROUPS = LAYER_GROUPS = 8
"""At most so many kinds of steps, and of layers, are told apart: each costs whole clips to measure."""
DENSE_LAYERS = (0, 1, 2)
_WEIGHT_STEPS = (1.25, 1.6)
_ROUNDS = 24
_TINY = 1e-9


@dataclass(frozen=True)
class Found:
    """A preset and what is expected of it."""

    preset: Preset
    units: float
    """Mean work of a call; dense attention is four times the latent frames."""
    error: float
    """Forecast of the mean relative error of the final latents."""


def step_groups(steps: int) -> list[list[int]]:
    """The first two steps differ most from all others."""
    return in_groups(steps, 2, STEP_GROUPS)


def layer_groups(layers: int) -> list[list[int]]:
    """Layers in even runs."""
    return in_groups(layers, 0, LAYER_GROUPS)


@dataclass(frozen=True)
class _Draft:
    """Turns of the leading forward by step, and layers' weights, by group."""

    turns: tuple[float, ...]
    weights: tuple[float, ...]
    choice: CallKind
    dense_layers: int = 0


class Allocator:
    """Looks for the best preset within a budget, on what was measured of a model."""

    def __init__(self, work: Work, preset: Preset, replay: Replay, weights: Weights) -> None:
        """`preset`: the starting point, as `at_steps` resolved it; what it does not vary stays."""
        self._work, self._start, self._replay, self._weights = work, bare(preset), replay, weights
        self._steps: Groups = step_groups(work.steps)
        self._layers: Groups = layer_groups(work.model.layers)

    def best(self, budget: float) -> Found:
        """The preset of the lowest forecast error at no more than `budget` units."""
        drafts = [self._filled(self._empty(choice, dense), budget) for choice, dense in self._kinds(budget)]
        few = sorted(drafts, key=self.error)[:2]
        polished = [self._polished(draft, budget) for draft in few]
        draft = min(polished, key=self.error)
        preset = self._preset(draft)
        return Found(preset, units_of(self._work, preset), self.error(draft))

    def forecast(self, preset: Preset) -> float:
        """Forecast error of any preset of the same kind of call."""
        choice = CallKind(preset.first_frame, preset.shared_refresh, int(preset.dense_steps))
        return self._error(preset, choice)

    def error(self, draft: _Draft) -> float:
        """Forecast of the mean relative error of the final latents."""
        return self._error(self._preset(draft), draft.choice)

    def _error(self, preset: Preset, choice: CallKind) -> float:
        work, replay = self._work, self._replay
        schedule = schedule_for(preset, work.grid[0], work.steps, work.model.layers, work.model.transformers)
        total = np.zeros(1)
        for layer in range(preset.dense_layers, work.model.layers):
            due = tuple(schedule.due(step, layer, work.forwards, FIRST_STAGE) for step in range(work.steps))
            weighted = self._weights.steps @ replay.layer(layer, due, choice)
            total = total + self._weights.layers[layer] * weighted
        return float(np.sqrt(total).mean())

    def _kinds(self, budget: float) -> list[tuple[CallKind, int]]:
        sharing = (False, True) if self._work.forwards > 1 and self._replay.branches > 1 else (False,)
        layers = [count for count in DENSE_LAYERS if count < self._work.model.layers]
        found = []
        for first, shared, steps, dense in itertools.product((False, True), sharing, self._replay.dense_steps, layers):
            choice = CallKind(first, shared, steps)
            if self._units(self._empty(choice, dense)) <= budget + _TINY:
                found.append((choice, dense))
        return found

    def _empty(self, choice: CallKind, dense_layers: int) -> _Draft:
        return _Draft((0.0,) * len(self._steps), (1.0,) * len(self._layers), choice, dense_layers)

    def _lead(self, choice: CallKind) -> int:
        return self._work.forwards if choice.shared else 1

    def _preset(self, draft: _Draft) -> Preset:
        steps, layers = [0.0] * self._work.steps, [1.0] * self._work.model.layers
        for group, turns in zip(self._steps, draft.turns, strict=True):
            for step in group:
                steps[step] = round(turns / self._lead(draft.choice), 4)
        for group, weight in zip(self._layers, draft.weights, strict=True):
            for layer in group:
                layers[layer] = round(weight, 3)
        return self._start.model_copy(
            update={
                "first_frame": draft.choice.first_frame,
                "shared_refresh": draft.choice.shared,
                "dense_steps": draft.choice.dense_steps,
                "dense_layers": draft.dense_layers,
                "refresh": sum(steps) / len(steps),
                "step_refresh": tuple(steps),
                "layer_refresh": None if len(set(layers)) == 1 else tuple(layers),
            }
        )

    def _units(self, draft: _Draft) -> float:
        return units_of(self._work, self._preset(draft))

    def _fits(self, draft: _Draft, budget: float) -> bool:
        most = self._work.grid[0] - int(draft.choice.first_frame)
        return max(draft.turns) <= most and min(draft.turns) >= 0 and self._units(draft) <= budget + _TINY

    def _moved(self, draft: _Draft, changes: Sequence[tuple[int, float]]) -> _Draft:
        turns = list(draft.turns)
        for group, by in changes:
            turns[group] += by
        return replace(draft, turns=tuple(turns))

    def _filled(self, draft: _Draft, budget: float) -> _Draft:
        """Turns added one by one where they gain most for their work, until no more fit."""
        able = [number for number, group in enumerate(self._steps) if group[-1] >= draft.choice.dense_steps]
        while True:
            now, spent = self.error(draft), self._units(draft)
            tried = [self._moved(draft, [(group, 1)]) for group in able]
            fitting = [other for other in tried if self._fits(other, budget)]
            if not fitting:
                return draft
            # One more turn can cost nothing, where the weights of layers round it away.
            draft = max(fitting, key=lambda other: (now - self.error(other)) / max(self._units(other) - spent, _TINY))

    def _polished(self, draft: _Draft, budget: float) -> _Draft:
        """Turns moved between steps and weights between layers as long as that lowers the error."""
        for _ in range(_ROUNDS):
            fitting = (other for other in self._neighbours(draft) if self._fits(other, budget))
            better = min(fitting, key=self.error, default=draft)
            if self.error(better) >= self.error(draft) * (1 - 1e-4):
                break
            draft = better
        return self._filled(draft, budget)

    def _neighbours(self, draft: _Draft) -> list[_Draft]:
        found = []
        for a, b in itertools.permutations(range(len(self._steps)), 2):
            gives, takes = len(self._steps[a]), len(self._steps[b])
            for count in (1.0, 2.0):
                found.append(self._moved(draft, [(a, -count), (b, count * gives / takes)]))
        for a, b in itertools.permutations(range(len(self._layers)), 2):
            for factor in _WEIGHT_STEPS:
                weights = list(draft.weights)
                more = weights[a] * (factor - 1)
                weights[a] += more
                weights[b] -= more * len(self._layers[a]) / len(self._layers[b])
                if weights[b] > 0:
                    found.append(replace(draft, weights=tuple(weights)))
        return found
