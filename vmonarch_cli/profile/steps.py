"""Denoising steps of one model under every kind of attention, in turn on the same inputs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.families.base import LatentClip
from vmonarch_cli.families.registry import FAMILIES, forward_inputs
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.pipeline.fuse import fused
from vmonarch_cli.plan.tuned import adapter_names
from vmonarch_cli.presets import at_steps, load_preset
from vmonarch_cli.profile.contenders import Contender, contenders, fused_blocks, structured
from vmonarch_cli.profile.model_settings import ModelSettings
from vmonarch_cli.profile.repeat import Budget, OnWork, call_memory, order_of_round, reason, timed, wall
from vmonarch_cli.profile.results import ModelProfile, OutputCheck, Spread, StepRow
from vmonarch_cli.timing import Pace

COLD_REPEATS = 3
# A model in which self-attention is exact may differ from the dense one by what rounding adds up to over its layers.
_EXACT_BUDGET = {torch.bfloat16: 8e-2, torch.float16: 2e-2, torch.float32: 1e-3}


@dataclass(frozen=True)
class StepTensors:
    """One denoising step's input; `contexts` holds one embedding per forward, `others` what else a forward takes."""

    latents: Tensor
    timestep: Tensor
    contexts: tuple[Tensor, ...]
    guidance_scale: float
    others: Mapping[str, Any] = field(default_factory=dict)


def first_inputs(settings: ModelSettings, contexts: tuple[Tensor, ...]) -> StepTensors:
    """The input of a clip's first step: noise of the settings' seed."""
    entry = settings.entry
    clip = LatentClip.of(entry, settings.height, settings.width, settings.num_frames)
    forward = forward_inputs(entry)
    noise = torch.randn(forward.latents(entry, clip), generator=torch.Generator("cpu").manual_seed(settings.seed))
    others = forward.others(entry, clip, settings.device, settings.dtype)
    start = _timestep(settings, 1.0)
    return StepTensors(noise.to(settings.device), start, contexts, settings.guidance_scale, others)


def predict(contender: Contender, transformer: Any, inputs: StepTensors) -> Tensor:
    """The guided prediction of one denoising step."""
    with contender.enter():
        return _entered(contender, transformer, inputs)


def _entered(contender: Contender, transformer: Any, inputs: StepTensors) -> Tensor:
    """``predict`` where the contender's attention is in its place."""
    if contender.session is not None:
        contender.session.begin_step()
    latents = inputs.latents.to(inputs.contexts[0].dtype)
    parts = [
        transformer(
            hidden_states=latents,
            timestep=inputs.timestep,
            encoder_hidden_states=context,
            return_dict=False,
            **inputs.others,
        )[0]
        for context in inputs.contexts
    ]
    if len(parts) == 2:
        parts[0] = parts[1] + inputs.guidance_scale * (parts[0] - parts[1])
    if contender.session is not None:
        contender.session.end_step()
    prediction: Tensor = parts[0]
    return prediction


def timed_step(contender: Contender, transformer: Any, inputs: StepTensors, device: torch.device) -> Tensor:
    """The step's prediction; its times are added to the contender's.

    To put an attention in its place takes the host milliseconds, once a clip: that is no part of a step.
    """
    found: list[Tensor] = []
    with contender.enter():
        calls = {"step": lambda: found.append(_entered(contender, transformer, inputs))}
        seconds = timed(calls, device, repeats=1)
    contender.seconds += seconds["step"]
    if contender.session is not None:
        contender.attention.append(contender.session.steps[-1].attention_s)
    return found[0]


@dataclass
class StepsRun:
    """Measures the steps of one transformer into a profile; `on_result` follows whatever was added."""

    settings: ModelSettings
    transformer: Any
    profile: ModelProfile
    checks: list[OutputCheck]
    budget: Budget
    on_result: Callable[[], None]
    on_work: OnWork

    def measure(self, contexts: tuple[Tensor, ...]) -> None:
        """First steps of every kind of attention, the plumbing's check, the clip's steps, and cold first steps."""
        inputs = first_inputs(self.settings, contexts)
        masked = "encoder_attention_mask" in inputs.others
        chosen = self.settings
        kinds = contenders(
            self.transformer,
            chosen.presets,
            chosen.device,
            chosen.dtype,
            chosen.backends,
            masked,
            chosen.tuned,
            chosen.entry.head_dim,
        )
        if masked:
            self.profile.notes.append(
                "dense: preset dense, which leaves the text's padding out; the stock model masks it"
            )
        kinds = self._with_fused_blocks(kinds, masked)
        ready, expected = self._first_steps(kinds, inputs)
        if expected is None:
            self.profile.notes.append("no dense attention ran, so nothing here can be compared with it")
        else:
            self.on_work("checking the plumbing")
            self.checks.append(self._plumbing_check(inputs, expected))
            if chosen.fused_impl is not None:
                with fused(self.transformer, chosen.fused_impl):
                    self.checks.append(self._plumbing_check(inputs, expected, "with fused blocks "))
        inputs = self._rounds(kinds, ready, inputs)
        self.on_work("first steps of warm presets")
        self._cold_rows(ready, inputs)
        self.on_result()

    def _with_fused_blocks(self, kinds: list[Contender], masked: bool) -> list[Contender]:
        """With every preset, a dense attention and skipped attention once more among fused blocks.

        Dense: the first, which is the fastest as a rule; where the stock model masks its text, preset `dense`.
        """
        chosen = self.settings
        if chosen.fused_impl is None:
            return kinds
        presets = {preset.name for preset in chosen.presets}
        dense = [c for c in kinds if c.row.kind == "dense" and (c.session is not None or not masked)][:1]
        stock = [*(c for c in kinds if c.row.name in presets and c.row.kind == "structured"), *dense, kinds[-1]]
        made = [fused_blocks(self.transformer, c, chosen.fused_how, chosen.fused_impl) for c in stock]
        return [*kinds[:-1], *made[:-1], kinds[-1], made[-1]]

    def _first_steps(self, kinds: list[Contender], inputs: StepTensors) -> tuple[list[Contender], Tensor | None]:
        """(contenders that ran, the first dense prediction); each dense one after it is checked against that."""
        ready: list[Contender] = []
        expected: Tensor | None = None
        pace = Pace(len(kinds))
        for index, contender in enumerate(kinds):
            row = contender.row
            if expected is not None and not self.budget.allows(0.0):
                contender.row = replace(row, failure=f"--seconds {self.budget.seconds:g} left no time for it")
                continue
            self.on_work(f"{row.name}: first steps", pace.left(index))
            try:
                prediction = self._warm_up(contender, inputs)
            except Exception as error:
                contender.row = replace(row, failure=reason(error))
                if contender.session is not None:
                    contender.session.begin_clip()
            else:
                ready.append(contender)
                if row.kind == "dense" and expected is not None:
                    self.checks.append(self._exact_check(prediction, expected, f"{row.name} against dense"))
                elif row.kind == "dense":
                    expected = prediction
            self._update(kinds)
            self.on_result()
        return ready, expected

    def _warm_up(self, contender: Contender, inputs: StepTensors) -> Tensor:
        """Cold step, and a second one, which is warm where the preset is, so that no later step compiles anything."""
        device = self.settings.device
        first_s, prediction = wall(lambda: predict(contender, self.transformer, inputs), device)
        result: Tensor = prediction
        if not torch.isfinite(result).all():
            raise ValueError("the prediction is not finite")
        peak = call_memory(lambda: predict(contender, self.transformer, inputs), device)
        if peak is None and contender.session is not None and contender.row.note == "warm":
            predict(contender, self.transformer, inputs)
        contender.row = replace(contender.row, first_call_s=first_s, peak_bytes=peak)
        return result

    def _rounds(self, kinds: list[Contender], ready: list[Contender], inputs: StepTensors) -> StepTensors:
        """The clip's steps; returns the input of the last one."""
        chosen, sigmas = self.settings, _sigmas(self.settings)
        round_s, pace = 0.0, Pace(chosen.steps)
        for index in range(chosen.steps):
            if index and not self.budget.allows(1.5 * round_s):
                self.profile.notes.append(f"--seconds ended the measurement after {index} of {chosen.steps} steps")
                break
            self.on_work(f"step {index + 1} of {chosen.steps}", pace.left(index))
            inputs = replace(inputs, timestep=_timestep(chosen, sigmas[index]))
            round_s, velocity = wall(lambda: self._round(ready, inputs, index), chosen.device)  # noqa: B023
            self._update(kinds)
            self.on_result()
            if velocity is not None:  # Euler's method along dense attention's prediction
                step = (sigmas[index + 1] - sigmas[index]) * velocity.float()
                step = -step if forward_inputs(chosen.entry).towards_clip else step
                inputs = replace(inputs, latents=inputs.latents + step)
        return inputs

    def _round(self, ready: list[Contender], inputs: StepTensors, index: int) -> Tensor | None:
        """One step of every contender, in the round's own order; returns dense attention's prediction."""
        predictions: dict[int, Tensor] = {}
        for contender in order_of_round(ready, index):
            try:
                predictions[id(contender)] = timed_step(contender, self.transformer, inputs, self.settings.device)
            except Exception as error:
                contender.row = replace(contender.row, failure=reason(error))
                ready.remove(contender)
        dense = next((c for c in ready if c.row.kind == "dense"), None)
        if dense is None:
            return None
        expected = predictions[id(dense)]
        for contender in ready:
            if contender.row.kind == "structured":
                contender.errors.append(relative_error(predictions[id(contender)], expected))
        return expected

    def _cold_rows(self, ready: list[Contender], inputs: StepTensors) -> None:
        """First steps of a clip for presets that start warm later on."""
        for contender in ready:
            session = contender.session
            if contender.row.note != "warm" or session is None or not contender.seconds:
                continue
            cold = replace(contender, seconds=[], attention=[], errors=[])
            try:
                for _ in range(min(COLD_REPEATS, self.settings.steps)):
                    if cold.seconds and not self.budget.allows(2 * cold.seconds[0]):
                        break
                    session.begin_clip()
                    timed_step(cold, self.transformer, inputs, self.settings.device)
            except Exception as error:
                name = contender.row.name
                self.profile.notes.append(f"first steps of {name} were not measured: {reason(error)}")
                continue
            spread, attention_s = Spread.of(cold.seconds), statistics.median(cold.attention)
            row = StepRow(contender.row.name, "structured", "cold", spread, attention_s, stock=contender.row.stock)
            rows = self.profile.rows
            rows.insert(next(place for place, other in enumerate(rows) if other.name == row.name), row)
        self._clip_times()

    def _update(self, kinds: list[Contender]) -> None:
        """The profile's rows, from what the contenders have gathered so far."""
        self.profile.rows = [self._row(contender) for contender in kinds]
        self._clip_times()

    def _row(self, contender: Contender) -> StepRow:
        row, period = contender.row, contender.period
        if not contender.seconds:
            return row
        errors = [] if self.settings.random_weights else contender.errors
        return replace(
            row,
            step=Spread.over(contender.seconds, period),
            attention_s=Spread.over(contender.attention, period).median if row.kind == "structured" else None,
            error=statistics.median(errors) if errors else None,
        )

    def _clip_times(self) -> None:
        """Denoising of a whole clip: dense first steps as the preset has them, one cold step, the rest as measured."""
        profile, steps = self.profile, self.settings.clip_steps
        presets = {preset.name: preset for preset in self.settings.presets}
        presets |= {name: tuned.adapter.made_for for name, tuned in adapter_names(self.settings.tuned).items()}
        presets |= self.settings.fused_names
        dense = profile.fastest_dense
        for place, row in enumerate(profile.rows):
            if row.step is None or row.note == "cold" or row.kind == "skipped":
                continue
            preset = presets.get(row.name)
            first = min(steps, int(at_steps(preset, steps).dense_steps)) if preset and row.kind == "structured" else 0
            total = first * (dense.step.median if dense and dense.step else row.step.median)
            cold = profile.row(row.name, "cold")
            if cold is not None and cold.step is not None and steps > first:
                total += cold.step.median
                first += 1
            profile.rows[place] = replace(row, clip_s=total + (steps - first) * row.step.median)

    def _exact_check(self, prediction: Tensor, expected: Tensor, against: str) -> OutputCheck:
        return OutputCheck(relative_error(prediction, expected), _EXACT_BUDGET[self.settings.dtype], against)

    def _plumbing_check(self, inputs: StepTensors, expected: Tensor, how: str = "") -> OutputCheck:
        """A step with a band over all frames, which is dense attention by way of the structured code."""
        layers = FAMILIES[type(self.transformer).__name__].self_attentions(self.transformer)
        session = AttentionSession(load_preset("exact"), [len(layers)])
        contender = structured(self.transformer, StepRow("exact", "structured"), session)
        against = f"preset exact {how}against dense, one whole step"
        try:
            return self._exact_check(predict(contender, self.transformer, inputs), expected, against)
        except Exception as error:
            return OutputCheck(math.inf, _EXACT_BUDGET[self.settings.dtype], f"{against}: {reason(error)}")


def _sigmas(settings: ModelSettings) -> list[float]:
    """Noise levels of a clip's steps under the flow shift, from 1 to 0."""
    steps, shift = max(settings.clip_steps, settings.steps), settings.flow_shift
    even = [1 - index / steps for index in range(steps + 1)]
    return [shift * s / (1 + (shift - 1) * s) for s in even]


def _timestep(settings: ModelSettings, sigma: float) -> Tensor:
    forward = forward_inputs(settings.entry)
    time = torch.tensor([forward.timestep(sigma)], device=settings.device)
    if not forward.timed_frames:
        return time
    clip = LatentClip.of(settings.entry, settings.height, settings.width, settings.num_frames)
    return time.expand(1, 1, clip.frames, 1, 1)
