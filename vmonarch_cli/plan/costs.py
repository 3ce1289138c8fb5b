"""What a clip's self-attention computes and keeps, in operations and bytes, from the preset that it runs with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.models.base import Grid, ModelEntry
from vmonarch_cli.plan.call_options import options_for
from vmonarch_cli.plan.noise_levels import changeover
from vmonarch_cli.plan.step_schedule import FIRST_STAGE, Stage, schedule_for
from vmonarch_cli.presets import Preset, at_steps
from vmonarch_kernels.cost import dense_flops, l_bytes, monarch_flops, residual_bytes


class Flops(BaseModel):
    """Self-attention floating-point operations of one clip, all dense and as planned (a multiply-add counts as two)."""

    model_config = ConfigDict(frozen=True)

    dense_call: int
    """One dense self-attention call of one layer."""
    structured_call: int
    """The same call as the preset computes it in most steps (warm, where it starts warm)."""
    dense: int
    """All calls of the clip, dense."""
    planned: int
    """All calls of the clip as planned: cold and warm calls, dense steps and dense layers counted as such."""


def branches_of(model: ModelEntry, guidance_scale: float) -> int:
    """Forwards of one denoising step (or samples of one forward): two where guidance compares two prompts, and those of
    other kinds of guidance.
    """
    if guidance_scale <= 1:
        return 1
    return (1 if model.embedded_guidance else 2) + model.extra_forwards


class StepCost(BaseModel):
    """One denoising step of a clip as planned; means are over its forwards and layers."""

    model_config = ConfigDict(frozen=True)

    step: int
    """From 1."""
    dense: bool
    """All calls run dense."""
    frames_exact: float
    """Query frames of a call, on the mean, that attend exactly to all keys."""
    units: float
    """Mean work of a call in units of N P D operations a head: dense attention is 4 T, of T latent frames."""
    flops: int
    """Operations of all calls."""


@dataclass(frozen=True)
class Work:
    """What a clip's self-attention depends on, beside its preset."""

    model: ModelEntry
    grid: Grid
    steps: int
    forwards: int
    """Forwards of one denoising step (2 with guidance)."""
    flow_shift: float | None = None
    others: int = 0
    """Tokens of each call beside those of the grid."""
    sigmas: tuple[float, ...] | None = None
    """Noise level at which each step begins, where it is known."""

    def step_costs(self, preset: Preset) -> list[StepCost]:
        """The resolved schedule of a clip: a row for each denoising step."""
        model, frames = self.model, self.grid[0]
        schedule = schedule_for(preset, frames, self.steps, model.layers, model.transformers)
        resolved = schedule.preset
        takes_over = changeover(model, self.steps, self.flow_shift, self.sigmas)
        dense_call = self._dense_call
        dense_layers = model.layers if preset.attention == "dense" else min(model.layers, resolved.dense_layers)
        call = functools.cache(functools.partial(self._call, resolved))
        rows = []
        for step in range(self.steps):
            stage = Stage(1, takes_over) if takes_over is not None and step >= takes_over else FIRST_STAGE
            warm = step > max(stage.first_step, int(resolved.dense_steps))
            dense = step < resolved.dense_steps or dense_layers == model.layers
            calls = [(float(frames), dense_call)] * (self.forwards * (model.layers if dense else dense_layers))
            for layer in () if dense else range(dense_layers, model.layers):
                due = schedule.due(step, layer, self.forwards, stage)
                calls += [call(warm, due), *[call(warm, 0 if resolved.shared_refresh else due)] * (self.forwards - 1)]
            exact, work = (sum(values) for values in zip(*calls, strict=True))
            unit = dense_call * len(calls) / (4 * frames)
            rows.append(
                StepCost(
                    step=step + 1,
                    dense=dense,
                    frames_exact=round(exact / len(calls), 2),
                    units=round(work / unit, 2),
                    flops=round(work),
                )
            )
        return rows

    def flops(self, preset: Preset, rows: Sequence[StepCost]) -> Flops:
        """Operations of a clip whose steps are `rows`, as `step_costs` counts them."""
        model, resolved = self.model, at_steps(preset, self.steps)
        dense_call = self._dense_call
        structured_call = dense_call
        if preset.attention != "dense":
            usual = options_for(resolved, self.grid[0], warm=resolved.warm_start)
            structured_call = monarch_flops(self.grid, model.heads, model.head_dim, **usual.cost(), others=self.others)
        return Flops(
            dense_call=dense_call,
            structured_call=structured_call,
            dense=dense_call * model.layers * self.forwards * self.steps,
            planned=sum(row.flops for row in rows),
        )

    @property
    def _dense_call(self) -> int:
        return dense_flops(self.grid, self.model.heads, self.model.head_dim, others=self.others)

    def _call(self, preset: Preset, warm: bool, due: int) -> tuple[float, int]:
        """(frames exact, operations) of one structured call."""
        options = options_for(preset, self.grid[0], warm=warm)
        if options.exact:
            return self.grid[0], self._dense_call
        heads, head_dim = self.model.heads, self.model.head_dim
        # Frames that have their turn are exact on top of the structured part, even where that comes to all of them.
        cost = {**options.cost(), "refresh": 0, "others": self.others}
        turns = due * dense_flops(self.grid, heads, head_dim) // self.grid[0]
        return due + int(preset.first_frame), monarch_flops(self.grid, heads, head_dim, **cost) + turns


def count_flops(
    model: ModelEntry,
    grid: Grid,
    preset: Preset,
    steps: int,
    branches: int,
    flow_shift: float | None = None,
    *,
    others: int = 0,
) -> Flops:
    """Self-attention operations of a clip; `branches` is the number of forwards per step (2 with guidance), `others`
    the tokens of a call beside those of the grid.
    """
    work = Work(model, grid, steps, branches, flow_shift, others)
    return work.flops(preset, work.step_costs(preset))


def kept_by(model: ModelEntry, grid: Grid, preset: Preset, guidance_scale: float) -> int:
    """Bytes that the transformer at work keeps from step to step, in all layers that run structured.

    One byte per entry of L (warm start), twice where other branches start from what the leading one started from; and
    per entry of the output (frame refresh), for every branch or once for all that share it.
    """
    options = options_for(preset, grid[0])
    if preset.attention == "dense":
        return 0
    layers = max(0, model.layers - preset.dense_layers)
    branches = branches_of(model, guidance_scale)
    call = l_bytes(grid, model.heads) * min(2, branches) if options.keeps_l else 0
    if options.refresh:
        call += residual_bytes(grid, model.heads, model.head_dim) * (1 if preset.shared_refresh else branches)
    return call * layers
