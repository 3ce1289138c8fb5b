"""The flags of `vmonarch calibrate`, resolved and checked before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmonarch_cli.errors import InputError, OutputError
from vmonarch_cli.media.paths import output_path
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.models.registry import DEMO_ALIAS
from vmonarch_cli.plan import checks
from vmonarch_cli.plan.call_options import options_for
from vmonarch_cli.plan.costs import Work
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.plan.request import GenerateRequest
from vmonarch_cli.plan.resolve import resolve
from vmonarch_cli.presets import parse_preset
from vmonarch_cli.profile.calibrate.limits import cheapest, units_of
from vmonarch_cli.text import counted, shown
from vmonarch_cli.tune.prompts import held_apart

DEFAULT_MEASURED, DEFAULT_EVAL = 4, 4
"""Prompts of the demo model to measure with, and to verify with, where no flag says how many."""
_NOISE_APART = 1_000_000
"""Seeds of the measured clips begin so far above those of the held-out ones."""


@dataclass(frozen=True)
class CalibrateRequest:
    """The flags of `vmonarch calibrate` as they came; None means not given."""

    clip: GenerateRequest
    """Model, starting preset and its changes, steps, guidance, shape, seed, device, dtype, offload."""
    output: str | None = None
    budget: float | None = None
    error: float | None = None
    eval_prompts: int | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class CalibratePlan:
    """Everything that calibration needs to know, resolved and checked."""

    clip: Plan
    """A clip of the model with the starting preset."""
    prompts: tuple[str, ...]
    """What is measured with."""
    held_out: tuple[str, ...]
    """What the written preset is compared with dense attention on; no measurement has them."""
    output: Path
    budget: float
    """Mean units of a call that the preset may cost; those of dense attention where `error` says what it must reach."""
    error: float | None
    """Mean relative error of the final latents to reach with as little work as that takes."""
    overwrite: bool = False

    @property
    def work(self) -> Work:
        """What the clip's attention depends on."""
        return self.clip.work

    def noise_seed(self, number: int) -> int:
        """Of a measured clip's noise; a held-out one has the clip's own seed and its number."""
        return self.clip.seed + _NOISE_APART + number


def resolve_calibrate(request: CalibrateRequest, prompts: Sequence[str] | None) -> CalibratePlan:
    """Resolve and check a request; VmonarchError in one sentence for anything that cannot be done.

    prompts: of a file; None takes those of the demo model.
    """
    output = _output(request)
    checks.number("--budget", request.budget, 0, 1e6)
    checks.number("--error", request.error, 0, 1)
    checks.whole("--eval-prompts", request.eval_prompts, 1, 1000)
    if request.budget is not None and request.error is not None:
        raise InputError("--budget and --error are both given: name the work to stay within, or the error to reach")
    clip = resolve(request.clip, needs_prompt=False, needs_source=False, takes_dense=False)
    _check_clip(clip)
    budget = _budget(request, clip)
    held_out = DEFAULT_EVAL if request.eval_prompts is None else request.eval_prompts
    measured, kept = _prompts(clip, prompts, held_out)
    return CalibratePlan(clip, measured, kept, output, budget, request.error, request.overwrite)


def _output(request: CalibrateRequest) -> Path:
    """The preset's path; OutputError when it could not be written, or something would be lost."""
    if request.output is None:
        raise OutputError("--output is missing: it takes the file of the preset, as in --output my.toml")
    path = output_path(request.output)
    if path.suffix != ".toml":
        raise OutputError(f"--output takes a file that ends in .toml, got {shown(request.output)}")
    if path.is_dir():
        raise OutputError(f"--output takes a file, and {path} is a folder")
    if path.exists() and not request.overwrite:
        raise OutputError(f"{path} exists already: pass --overwrite to replace it, or another --output")
    parse_preset("", source="--output", stem=path.stem)  # the file's name is that of the preset
    return path


def _check_clip(clip: Plan) -> None:
    preset, model = clip.preset, clip.model
    checks.structured(preset, "what all others are measured against", clip.preset_reason)
    if options_for(preset, clip.grid[0]).exact:
        raise InputError(
            f"preset {preset.name} is exact on {counted(clip.grid[0], 'latent frame')}, so that "
            "there is nothing to measure: choose more frames or another preset"
        )
    facts = PIPELINES[model.pipeline]
    if facts.takes_image or facts.takes_video:
        needed = "a first frame" if facts.takes_image else "a video"
        raise InputError(f"{model.alias} cannot be calibrated: it needs {needed}, and clips come from prompts")
    if clip.seed_was_drawn:
        raise InputError(
            "--seed -1 draws another seed each time, so that nobody could repeat the evidence: give a seed"
        )


def _budget(request: CalibrateRequest, clip: Plan) -> float:
    """The units to stay within, those of the starting preset where no flag asks."""
    work, dense = clip.work, 4 * clip.grid[0]
    if request.error is not None:
        return dense
    if request.budget is None:
        return min(float(dense), units_of(work, clip.preset))
    least = cheapest(work, clip.preset)
    if request.budget < least:
        raise InputError(
            f"--budget {request.budget:g} is less than structured attention costs without any exact frames: "
            f"{least:.1f} units in {clip.steps} steps of {clip.grid[0]} latent frames (dense is {dense})"
        )
    if request.budget >= dense:
        raise InputError(
            f"--budget {request.budget:g} is not below dense attention, which costs {dense} units with "
            f"{clip.grid[0]} latent frames"
        )
    return request.budget


def _prompts(clip: Plan, given: Sequence[str] | None, held_out: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(prompts to measure with, held-out prompts), which have none in common."""
    if given is None:
        if clip.model.alias != DEMO_ALIAS:
            raise InputError(
                f"no prompts to calibrate {clip.model.alias} with: --prompts-file takes a file with one prompt per line"
            )
        from vmonarch_cli.demo.captions import plain_caption
        from vmonarch_cli.demo.score import held_out_specs

        texts = list(dict.fromkeys(plain_caption(spec) for spec in held_out_specs(2 * (held_out + DEFAULT_MEASURED))))
        return tuple(texts[held_out : held_out + DEFAULT_MEASURED]), tuple(texts[:held_out])
    return held_apart(clip, given, held_out, "measure")
