"""One run of `vmonarch calibrate`: measure, allocate, verify on held-out prompts, write."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vmonarch_cli.attention.session import AttentionSession
from vmonarch_cli.attention.structured import Attention
from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.media.metrics import relative_error
from vmonarch_cli.models import hub
from vmonarch_cli.models.tuned import fingerprint, short
from vmonarch_cli.pipeline.device import DTYPES
from vmonarch_cli.pipeline.load import load_pipeline
from vmonarch_cli.pipeline.preflight import Machine
from vmonarch_cli.pipeline.samplers import set_schedule
from vmonarch_cli.presets import Preset, load_preset
from vmonarch_cli.profile.calibrate.allocate import Allocator, Found, layer_groups, step_groups
from vmonarch_cli.profile.calibrate.forecast import Groups, Replay, Squares, Weights
from vmonarch_cli.profile.calibrate.lacks import ClipLacks, LackRecorder, Probe
from vmonarch_cli.profile.calibrate.limits import bare, cheapest, units_of
from vmonarch_cli.profile.calibrate.preset_file import write_preset
from vmonarch_cli.profile.calibrate.request import CalibratePlan
from vmonarch_cli.tune.trajectories import sample

PROBED = 2
"""Of the measured prompts, those of the probes: each is a whole clip for every group of steps and of layers."""
_TRIES = 3
"""Presets that are verified on the way to --error."""
_HALVINGS = 8

OnPhase = Callable[[str, int, int | None], None]
"""(what is going on, how much of it is done, how much there is)."""


@dataclass(frozen=True)
class PresetFigures:
    """A preset against dense attention on the held-out prompts."""

    preset: str
    units: float
    """Mean work of a call; dense attention is four times the latent frames."""
    error_mean: float
    """Mean relative error of the final latents."""
    error_median: float
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """A group of steps, or of layers, as it was measured and as the preset treats it."""

    first: int
    last: int
    """From 1, both included."""
    error: float
    """Relative error of the final latents when these calls alone are structured, without exact frames."""
    refresh: float
    """Of steps: frames recomputed in a forward, on the mean of the layers. Of layers: their weight."""


@dataclass(frozen=True)
class CalibrateResult:
    """What a run came to."""

    path: Path
    preset: Preset
    fingerprint: str
    before: PresetFigures
    after: PresetFigures
    forecast: float
    steps: tuple[Row, ...]
    layers: tuple[Row, ...]

    @property
    def gains_nothing(self) -> bool:
        """On the held-out prompts the written preset is no closer to dense, for no less work."""
        return self.after.error_mean >= self.before.error_mean and self.after.units >= self.before.units

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "path": str(self.path),
            "fingerprint": self.fingerprint,
            "preset": self.preset.model_dump(mode="json"),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "forecast": self.forecast,
            "steps": [asdict(row) for row in self.steps],
            "layers": [asdict(row) for row in self.layers],
        }


def calibrate(
    plan: CalibratePlan, machine: Machine, *, on_phase: OnPhase = lambda words, done, total: None
) -> CalibrateResult:
    """Measure a plan's model and write its preset; nothing is written before the preset has been verified.

    Raises InputError when the error that was asked for is not reached.
    """
    on_phase("loading the model", 0, None)
    clip = plan.clip
    pipeline = load_pipeline(
        clip.model_source,
        device=torch.device(machine.device),
        dtype=DTYPES[machine.dtype],
        revision=clip.revision,
        setup=machine.decided(clip),
    )
    return _Run(plan, pipeline, on_phase).run()


class _Run:
    def __init__(self, plan: CalibratePlan, pipeline: Any, on_phase: OnPhase) -> None:
        self._plan, self._pipeline, self._on_phase = plan, pipeline, on_phase
        self._clip, self._work = plan.clip, plan.work
        self._bare = bare(plan.clip.preset)
        self._layers = [plan.clip.model.layers] * plan.clip.model.transformers
        self._scheduler = pipeline.scheduler
        self._teachers: list[Tensor] = []
        """Final latents of the held-out prompts' dense clips."""
        self._dense: list[Tensor] = []
        """Final latents of the measured prompts' dense clips."""

    def run(self) -> CalibrateResult:
        plan, clip = self._plan, self._clip
        lacks = self._measured()
        by_step = self._probed("steps", step_groups(clip.steps), lambda group, step, layer: step in group)
        by_layer = self._probed("layers", layer_groups(clip.model.layers), lambda group, step, layer: layer in group)
        replay = Replay(lacks, clip.guidance_scale)
        weights = Weights(replay, step_groups(clip.steps), layer_groups(clip.model.layers), (by_step, by_layer))
        allocator = Allocator(self._work, clip.preset, replay, weights)
        self._teachers = self._clips("dense attention on held-out prompts", load_preset("dense"))
        before = self._verified(clip.preset)
        found, after = self._searched(allocator)
        stamp = fingerprint(_folder(plan))
        preset = found.preset.model_copy(update=self._labels(stamp, before, after))
        written = write_preset(preset, plan.output, overwrite=plan.overwrite)
        steps = _rows(step_groups(clip.steps), by_step, written.step_refresh or ())
        layers = _rows(layer_groups(clip.model.layers), by_layer, written.layer_refresh or (1.0,) * clip.model.layers)
        return CalibrateResult(plan.output, written, stamp, before, after, found.error, steps, layers)

    # Measuring

    def _measured(self) -> list[ClipLacks]:
        found = []
        for number, prompt in enumerate(self._plan.prompts):
            self._on_phase("measuring calls of dense clips", number, len(self._plan.prompts))
            recorder = LackRecorder(self._bare, self._layers, self._clip.steps)
            self._dense.append(self._sampled(prompt, self._plan.noise_seed(number), recorder))
            found.append(recorder.lacks())
        return found

    def _probed(self, noun: str, groups: Groups, where: Callable[[Sequence[int], int, int], bool]) -> Squares:
        """Mean squared relative error of clips in which only a group's calls are structured."""
        prompts = self._plan.prompts[:PROBED]
        words, total, done = f"measuring {noun} alone", len(prompts) * len(groups), 0
        squares = np.zeros(len(groups))
        for number, prompt in enumerate(prompts):
            seed, dense = self._plan.noise_seed(number), self._dense[number]
            for place, group in enumerate(groups):
                self._on_phase(words, done, total)
                probe = Probe(self._bare, self._layers, partial(where, group))
                squares[place] += relative_error(self._sampled(prompt, seed, probe), dense) ** 2 / len(prompts)
                done += 1
        return squares

    def _sampled(self, prompt: str, seed: int, attention: Attention) -> Tensor:
        session = AttentionSession(self._bare, self._layers, attention=attention)
        return self._sample(prompt, seed, self._bare, session=session)

    def _sample(self, prompt: str, seed: int, preset: Preset, **swap: Any) -> Tensor:
        """Final latents of a clip."""
        self._pipeline.scheduler = self._scheduler
        set_schedule(self._pipeline, self._clip, seed)
        return sample(self._pipeline, self._clip, [prompt], [seed], preset, **swap)

    # Allocating and verifying

    def _searched(self, allocator: Allocator) -> tuple[Found, PresetFigures]:
        plan = self._plan
        if plan.error is None:
            found = self._named(self._tried(allocator, plan.budget))
            return found, self._verified(found.preset)
        tried: list[PresetFigures] = []
        wanted = plan.error
        for _ in range(_TRIES):
            found = self._named(self._tried(allocator, self._reaching(allocator, wanted).units))
            tried.append(self._verified(found.preset))
            if tried[-1].error_mean <= plan.error:
                return found, tried[-1]
            wanted = wanted * min(1.0, plan.error / tried[-1].error_mean) * 0.95
        best = min(tried, key=lambda figures: figures.error_mean)
        raise InputError(
            f"--error {plan.error:g} was not reached: the best of {len(tried)} presets came to {best.error_mean:.3f} "
            f"at {best.units:.1f} units, and dense attention costs {4 * self._clip.grid[0]}"
        )

    def _named(self, found: Found) -> Found:
        """What was found under the name of its file, which tells it from the starting preset."""
        return replace(found, preset=found.preset.model_copy(update={"name": self._plan.output.stem}))

    def _tried(self, allocator: Allocator, budget: float) -> Found:
        """The best of an allocator's candidates by whole clips of the measured prompts; the better half of them after
        the first prompts goes on to the others.
        """
        self._on_phase("allocating exact frames", 0, None)
        left = allocator.candidates(budget)
        errors: dict[Preset, list[float]] = {found.preset: [] for found in left}
        prompts = self._plan.prompts
        for rows in (range(len(prompts))[:PROBED], range(len(prompts))[PROBED:]):
            total, done = len(left) * len(rows), 0
            for number in rows:
                seed = self._plan.noise_seed(number)
                dense = self._dense[number]
                for found in left:
                    self._on_phase(f"trying {len(left)} presets on {len(rows)} prompts", done, total)
                    made = self._sample(prompts[number], seed, found.preset)
                    errors[found.preset].append(relative_error(made, dense))
                    done += 1
            left = sorted(left, key=lambda found: statistics.fmean(errors[found.preset]))
            left = left[: max(1, (len(left) + 1) // 2)]
        return left[0]

    def _reaching(self, allocator: Allocator, wanted: float) -> Found:
        """About the least work whose forecast is within an error."""
        self._on_phase("allocating exact frames", 0, None)
        low, high = cheapest(self._work, self._clip.preset), 4.0 * self._clip.grid[0]
        found = allocator.best(low)
        if found.error <= wanted:
            return found
        found = allocator.best(high - 0.1)
        for _ in range(_HALVINGS if found.error <= wanted else 0):
            middle = allocator.best((low + high) / 2)
            if middle.error <= wanted:
                found, high = middle, (low + high) / 2
            else:
                low = (low + high) / 2
        return found

    def _verified(self, preset: Preset) -> PresetFigures:
        clips = self._clips(f"{preset.name} on held-out prompts", preset)
        errors = tuple(relative_error(made, dense) for made, dense in zip(clips, self._teachers, strict=True))
        units = units_of(self._work, preset)
        return PresetFigures(preset.name, units, statistics.fmean(errors), statistics.median(errors), errors)

    def _clips(self, words: str, preset: Preset) -> list[Tensor]:
        """Final latents of the held-out prompts."""
        plan, made = self._plan, []
        for number, prompt in enumerate(plan.held_out):
            self._on_phase(words, number, len(plan.held_out))
            made.append(self._sample(prompt, self._clip.seed + number, preset))
        return made

    def _labels(self, stamp: str, before: PresetFigures, after: PresetFigures) -> dict[str, Any]:
        plan, clip = self._plan, self._clip
        shape = f"{clip.width}x{clip.height}, {clip.num_frames} frames, seed {clip.seed}"
        sampling = f"{clip.steps} steps, guidance {clip.guidance_scale:g}"
        held_out = f"{len(plan.held_out)} held-out prompts"
        evidence = (
            f"measured on {clip.model.alias}, weights {short(stamp)}: {shape}, {sampling}, {len(plan.prompts)} prompts",
            *(
                f"{figures.preset}: {figures.units:.2f} units (dense {4 * clip.grid[0]}), relative error of the final "
                f"latents {figures.error_mean:.4f} on the mean of {held_out} ({figures.error_median:.4f} their median)"
                for figures in (before, after)
            ),
        )
        words = f"Made by `vmonarch calibrate` of {before.preset} for {clip.model.alias} in {sampling}."
        return {"name": plan.output.stem, "description": words, "evidence": evidence}


def _rows(groups: Groups, squares: Squares, values: Sequence[float]) -> tuple[Row, ...]:
    return tuple(
        Row(group[0] + 1, group[-1] + 1, float(square) ** 0.5, statistics.fmean(values[place] for place in group))
        for group, square in zip(groups, squares, strict=True)
    )


def _folder(plan: CalibratePlan) -> Path:
    """Where the weights are, which have been loaded."""
    source, revision = plan.clip.model_source, plan.clip.revision
    found = Path(source) if Path(source).is_dir() else hub.cached_folder(source, revision)
    if found is None:
        raise ModelError(f"the weights of {plan.clip.model.alias} are not in the cache any more")
    return found
