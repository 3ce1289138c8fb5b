"""Noise levels (sigmas) of a clip's denoising steps: which sampler takes them, and what they are. No torch."""

from __future__ import annotations

import itertools
import math
import re
from typing import NamedTuple

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.base import ModelEntry
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.text import near, shown

OWN = "own"
SAMPLERS = (OWN, "unipc", "euler", "dpm++", "dpm++sde", "lcm")
"""What `--sampler` takes; "own" is the scheduler that the model comes with, as it is set there."""
_KINDS = {"UniPCMultistepScheduler": "unipc", "FlowMatchEulerDiscreteScheduler": "euler"}
_OF_FAMILY = {
    "wan": "unipc",
    "skyreels-v2": "unipc",
    "hunyuan-video": "euler",
    "hunyuan-video-1.5": "euler",
    "ltx-video": "euler",
    "ltx-2": "euler",
    "kandinsky-5": "euler",
    "kandinsky-6": "euler",
    "motif-video": "euler",
}
_KNOWN_LEVELS = ("wan", "skyreels-v2", "hunyuan-video", "hunyuan-video-1.5")
"""Families whose own schedule follows from the steps and the shift alone."""
_MAX_SIGMAS = 1000


class NoiseLevels(NamedTuple):
    """The noise levels of a clip."""

    sampler: str
    sigmas: tuple[float, ...] | None
    """Noise level at which each step begins, falling, within (0, 1]; None where the scheduler decides when it runs."""
    forced: bool
    """The scheduler is replaced, or set to these levels; otherwise they are what it does by itself."""


def read_sigmas(text: str) -> tuple[float, ...]:
    """'1,0.75,0.5' as numbers; InputError when they are not, not falling, or not within 0 to 1."""
    values = []
    for part in re.split(r"\s*,\s*|\s+", text.strip()):
        try:
            values.append(float(part))
        except ValueError:
            raise InputError(
                f"--sigmas takes numbers with commas between them, as in 1,0.75,0.5, got {shown(part or text)}"
            ) from None
    return check_sigmas(tuple(values))


def check_sigmas(values: tuple[float, ...]) -> tuple[float, ...]:
    """The list as it came; InputError when it is empty, too long, not falling, or not within 0 to 1."""
    if not 1 <= len(values) <= _MAX_SIGMAS:
        raise InputError(f"--sigmas takes 1 to {_MAX_SIGMAS} noise levels, got {len(values)}")
    for value in values:
        if not (math.isfinite(value) and 0 < value <= 1):
            last = ": the 0 at the end is added" if value == 0 and value is values[-1] else ""
            raise InputError(f"--sigmas takes noise levels above 0 and up to 1, got {value:g}{last}")
    for before, after in itertools.pairwise(values):
        if after >= before:
            raise InputError(f"--sigmas takes noise levels that fall, got {after:g} after {before:g}")
    return values


def check_sampler(value: str | None) -> str | None:
    """A known sampler, or None; InputError that names them."""
    if value is not None and value not in SAMPLERS:
        raise InputError(f"--sampler takes {', '.join(SAMPLERS)}, got {shown(value)}{near(value, SAMPLERS)}")
    return value


def own_sampler(model: ModelEntry) -> str | None:
    """What the scheduler that a model comes with does; None for those that are no flow-matching samplers known here."""
    if not model.has_flow_shift or not PIPELINES[model.pipeline].takes_sigmas:
        return None
    return _OF_FAMILY.get(model.family) if model.scheduler is None else _KINDS.get(model.scheduler)


def usual_sampling(model: ModelEntry, num_frames: int, steps: int) -> tuple[str, float]:
    """(sampler, guidance scale) of a clip for which nobody chose them."""
    long = model.long_clips
    if long is None or num_frames < long.num_frames or steps < long.steps:
        return OWN, model.defaults.guidance_scale
    return long.sampler, long.guidance_scale


def resolve_noise_levels(
    model: ModelEntry,
    sampler: str,
    sigmas: tuple[float, ...],
    steps: int,
    flow_shift: float | None,
    strength: float | None = None,
) -> NoiseLevels:
    """The noise levels of a clip; InputError for what a model cannot have.

    sigmas: as given, empty for none. flow_shift: what is resolved so far, None for the scheduler's own. strength: the
    part of the schedule, up to its end, that the steps are of; None for all of it.
    """
    own = own_sampler(model)
    if strength is not None:
        return _end_of_schedule(model, sampler, steps, flow_shift, strength)
    changes = sampler not in (OWN, own) or bool(sigmas)
    if changes and own is None:
        flag = "--sigmas" if sigmas else "--sampler"
        raise InputError(
            f"{flag} cannot be set: the noise schedule of {model.alias} is not a flow from noise level 1 to 0"
        )
    if sigmas:
        if len(sigmas) != steps:
            raise InputError(f"--sigmas has {len(sigmas)} noise levels and --steps is {steps}: give one for each step")
        return NoiseLevels(sampler, sigmas, forced=True)
    if changes:
        if flow_shift is None:
            raise InputError(
                f"--sampler {sampler} needs --flow-shift or --sigmas: the own schedule of {model.alias} follows its "
                "number of tokens"
            )
        return NoiseLevels(sampler, _shifted([1 - i / steps for i in range(steps)], flow_shift), forced=True)
    if flow_shift is None or own is None or model.family not in _KNOWN_LEVELS:
        return NoiseLevels(sampler, None, forced=False)
    if own == "unipc":
        return NoiseLevels(sampler, _shifted(_of_unipc(steps), flow_shift), forced=False)
    if model.family.startswith("hunyuan"):
        return NoiseLevels(sampler, _shifted([1 - i / steps for i in range(steps)], flow_shift), forced=False)
    return NoiseLevels(sampler, None, forced=False)


def changeover(
    model: ModelEntry, steps: int, flow_shift: float | None, sigmas: tuple[float, ...] | None = None
) -> int | None:
    """The first step (from 0) of a model's second transformer, `steps` where it never takes over; None for a model of
    one.

    sigmas: noise level at which each step begins, where it is known; else that of an even schedule with this shift.
    """
    if model.boundary_ratio is None:
        return None
    levels = sigmas or _shifted([1 - i / steps for i in range(steps)], 1.0 if flow_shift is None else flow_shift)
    return next((step for step, level in enumerate(levels) if level < model.boundary_ratio), steps)


def _end_of_schedule(
    model: ModelEntry, sampler: str, steps: int, flow_shift: float | None, strength: float
) -> NoiseLevels:
    """The last levels of a longer schedule, of which the steps are the part `strength`."""
    own = own_sampler(model)
    if own is None or flow_shift is None:
        raise InputError(
            f"--video needs --sigmas: the noise levels of {model.alias} are known only when its own schedule runs"
        )
    all_steps = max(steps, round(steps / strength))
    by_unipc = sampler == OWN and own == "unipc"
    levels = _of_unipc(all_steps) if by_unipc else [1 - i / all_steps for i in range(all_steps)]
    return NoiseLevels(sampler, _shifted(levels[-steps:], flow_shift), forced=True)


def _of_unipc(steps: int) -> list[float]:
    """diffusers' levels begin at 0.999, before they are shifted."""
    return [0.999 * (1 - i / steps) for i in range(steps)]


def _shifted(levels: list[float], shift: float) -> tuple[float, ...]:
    """The flow shift: s -> shift s / (1 + (shift - 1) s)."""
    return tuple(round(shift * level / (1 + (shift - 1) * level), 6) for level in levels)
