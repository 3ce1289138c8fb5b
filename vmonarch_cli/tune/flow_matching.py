"""Tuning on clips, as the paper does it: flow matching, where the target is the difference between noise and clip.

A clip is encoded once by the VAE. Its file keeps its latents x_0 and what the pipeline's own loop gives the transformer
in every step: text, timestep, noise level. In training each pass draws a new noise e and goes through the sampler's own
noise levels, falling: x = (1 - s) x_0 + s e, with e - x_0 as the target at each. So the preset's warm starts and
corrections see a clip that comes out of its noise step by step, as in sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmonarch_cli.errors import InputError, ModelError
from vmonarch_cli.families.registry import FAMILIES, family_of
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.pipeline.parts import transformers_of
from vmonarch_cli.presets import load_preset
from vmonarch_cli.text import with_article
from vmonarch_cli.tune.clips import pixels
from vmonarch_cli.tune.recorder import ForwardRecorder
from vmonarch_cli.tune.request import TunePlan
from vmonarch_cli.tune.trajectories import sample, save_clip, trajectory_path


def check_family(plan: TunePlan) -> None:
    """InputError for a model whose transformer takes more than noisy latents, which clips alone do not give, and for a
    batch of one whose inputs cannot be put side by side.
    """
    model = plan.clip.model
    family = FAMILIES[PIPELINES[model.pipeline].transformer]
    if plan.videos and family.encode is None:
        raise InputError(
            f"--videos: {model.alias} cannot be tuned on clips, because its transformer takes more than their latents; "
            "without --videos its own dense sampling teaches it"
        )
    if plan.batch > 1 and not family.batches:
        raise InputError(
            f"--batch {plan.batch}: clips of {model.alias} cannot be put side by side, because its transformer takes "
            "inputs that are not of one clip each: leave it out"
        )


@torch.no_grad()
def encode_clip(pipeline: Any, plan: TunePlan, number: int) -> Path:
    """Make the file of a clip; it appears whole or not at all. Returns at once where it is there.

    Forwards of steps that the preset runs dense are left out. The forward without the prompt is kept where that is no
    prompt at all: flow matching would teach a negative prompt to show what it should prevent.
    """
    path = trajectory_path(plan, number)
    if path.exists():
        return path
    frames = torch.from_numpy(pixels(plan.videos[number], plan.clip)).permute(3, 0, 1, 2)[None]
    vae = pipeline.vae
    encode = family_of(pipeline).encode
    if encode is None:
        raise ModelError(f"{with_article(type(pipeline).__name__)} cannot be tuned on clips")
    latents = encode(pipeline, (frames.to(vae.device).float() / 127.5 - 1).to(vae.dtype))
    recorder = ForwardRecorder()
    with _idle(pipeline):
        sample(pipeline, plan.clip, [plan.videos[number].caption], [0], load_preset("dense"), recorder)
    if recorder.forwards[0].velocity.shape != latents.shape:
        raise ModelError(
            f"clip {plan.videos[number].path} became latents of {tuple(latents.shape)}, and the transformer takes "
            f"{tuple(recorder.forwards[0].velocity.shape)}"
        )
    kept = [forward for forward in recorder.forwards if forward.step >= plan.dense_steps]
    if plan.clip.negative_prompt.strip():
        kept = [forward for i, forward in enumerate(kept) if not i or kept[i - 1].step != forward.step]
    save_clip(path, kept, latents, recorder.sigmas, recorder.guidance)
    return path


@contextmanager
def _idle(pipeline: Any) -> Iterator[None]:
    """The transformers predict zeros, at no cost: only what the pipeline's loop gives them is wanted."""

    def zeros(hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.zeros_like(hidden_states),)

    transformers = transformers_of(pipeline)
    for transformer in transformers:
        transformer.forward = zeros
    try:
        yield
    finally:
        for transformer in transformers:
            del transformer.forward
