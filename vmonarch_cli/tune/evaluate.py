"""Held-out prompts, before and after: how far the preset's clips are from the teacher's, from the same noise."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vmonarch_cli.errors import InputError
from vmonarch_cli.media.metrics import SSIM_WINDOW, psnr, relative_error, ssim
from vmonarch_cli.media.publish import atomic
from vmonarch_cli.pipeline.call import decode_whole
from vmonarch_cli.presets import load_preset
from vmonarch_cli.tune.request import TunePlan
from vmonarch_cli.tune.trajectories import sample, side_by_side

_MAX_PSNR = 100.0
"""Stands for infinity, which JSON cannot say."""


@dataclass(frozen=True)
class ClipFigures:
    """One clip against the teacher's."""

    latent_error: float
    """Relative L2 error of the final latents."""
    psnr: float
    """dB."""
    ssim: float | None


@dataclass(frozen=True)
class Figures:
    """All held-out clips of a model, before or after."""

    latent_error_mean: float
    latent_error_median: float
    psnr: float
    """Mean, dB."""
    ssim: float | None
    """Mean; None for frames that are too small."""

    @classmethod
    def of(cls, clips: Sequence[ClipFigures]) -> Figures:
        errors = [clip.latent_error for clip in clips]
        similar = [clip.ssim for clip in clips if clip.ssim is not None]
        return cls(
            statistics.fmean(errors),
            statistics.median(errors),
            statistics.fmean(clip.psnr for clip in clips),
            statistics.fmean(similar) if similar else None,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    pipeline: Any, plan: TunePlan, when: str, numbers: Sequence[int], on_clip: Callable[[int], None], **swap: Any
) -> None:
    """Make held-out clips with the preset and compare them; each result is a file of the work folder.

    when: "before" or "after". What is there already is not made again; "after" always is, because the weights are new.
    """
    folder = plan.work / "evaluation"
    paths = {number: folder / f"{when}-{number:03d}.json" for number in numbers}
    wanted = [number for number in numbers if when == "after" or not paths[number].exists()]
    for number in sorted(set(numbers) - set(wanted)):
        on_clip(number)
    for some in side_by_side(pipeline, plan, wanted):
        for number, figures in zip(some, _compare(pipeline, plan, some, folder, swap), strict=True):
            with atomic(paths[number], overwrite=True) as temporary:
                temporary.write_text(json.dumps(asdict(figures)))
            on_clip(number)


def read_figures(plan: TunePlan, when: str) -> Figures | None:
    """The results of all held-out clips; None where none are held out."""
    found = []
    for number in range(len(plan.held_out)):
        path = plan.work / "evaluation" / f"{when}-{number:03d}.json"
        try:
            found.append(ClipFigures(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            raise InputError(f"{path} cannot be read: remove it, and it will be made again") from None
    return Figures.of(found) if found else None


def _compare(
    pipeline: Any, plan: TunePlan, numbers: Sequence[int], folder: Path, swap: dict[str, Any]
) -> Iterator[ClipFigures]:
    """The clips of some held-out prompts, sampled side by side and compared one by one."""
    clip = plan.clip
    prompts, seeds = [plan.held_out[number] for number in numbers], [clip.seed + number for number in numbers]
    paths = [folder / f"teacher-{number:03d}.safetensors" for number in numbers]
    if all(path.exists() for path in paths):
        teachers = [load_file(path)["latents"] for path in paths]
    else:
        teachers = list(sample(pipeline, clip, prompts, seeds, load_preset("dense")).split(1))
        for path, teacher in zip(paths, teachers, strict=True):
            with atomic(path, overwrite=True) as temporary:
                save_file({"latents": teacher.contiguous()}, temporary)
    made = sample(pipeline, clip, prompts, seeds, clip.preset, **swap).split(1)
    for latents, teacher in zip(made, teachers, strict=True):
        own, expected = (_frames(pipeline, plan, x) for x in (latents, teacher))
        ratio = psnr(own, expected)
        similar = ssim(own, expected) if min(own.shape[-2:]) >= SSIM_WINDOW else None
        yield ClipFigures(relative_error(latents, teacher), _MAX_PSNR if math.isinf(ratio) else ratio, similar)


def _frames(pipeline: Any, plan: TunePlan, latents: Tensor) -> Tensor:
    """(F, 3, H, W), float64 in [0, 1]."""
    clip = plan.clip
    frames = decode_whole(pipeline, latents, (clip.height, clip.width, clip.num_frames))
    return torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255
