"""What a clip will look like, from the latents of a step that is not the last: small pictures, and stopping early.

The clean latents that a step predicts become colours by a linear map, latent by latent: one product instead of a
decoder. The map is a least-squares fit on pictures that the model's own VAE encodes, so that it fits every VAE that
has an encoder here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from vmonarch_cli.errors import InputError
from vmonarch_cli.families.registry import FAMILIES, family_of
from vmonarch_cli.models.catalogue import PIPELINES
from vmonarch_cli.plan.plan import Plan
from vmonarch_cli.text import with_article

Picture = npt.NDArray[np.uint8]
_FRAMES = 8
"""Frames of a strip."""
_TILE = 96
"""Pixels of a strip's tile, about: latents are enlarged by a whole factor."""
_SIDE, _RIM = 16, 1
"""Latents that each picture of the fit is wide and high, and those at its rim that do not count."""
_COARSE = (4, 5, 6)
"""Colours along a side of each picture, with smooth changes between them."""
_RIDGE = 1e-3


class StoppedEarly(Exception):
    """Ends a pipeline's loop after a step; `latents` are the clean ones that the step predicts."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.latents = latents


@dataclass(frozen=True)
class Preview:
    """How a clip is watched while it is denoised."""

    on_picture: Callable[[int, Picture], None]
    """Gets the index of the clip and a strip (height, width, 3) of its frames after each step but the last."""
    stop: Callable[[], bool] = lambda: False
    """Whether the step that was just made is to be the last."""


def check_preview(plan: Plan) -> None:
    """InputError, before anything is loaded, for a model whose latents no map is known of."""
    facts = PIPELINES[plan.pipeline]
    if facts.modular or facts.sound or FAMILIES[facts.transformer].encode is None:
        raise InputError(
            f"--preview does not know latents of {plan.model.alias}: valid are demo, Wan, SkyReels-V2 and HunyuanVideo"
        )


class Previews:
    """The pictures of one clip, and what they cost."""

    def __init__(self, pipeline: Any, preview: Preview, index: int) -> None:
        """Fit the map of the pipeline's VAE; `index`: of the clip."""
        began = time.perf_counter()
        self._preview = preview
        self._index = index
        self._maps = colour_maps(pipeline)
        self._clean: torch.Tensor | None = None
        self._fit_s = time.perf_counter() - began
        self.drawn_s = 0.0
        """Wall clock of all pictures."""

    @property
    def seconds(self) -> float:
        """Wall clock of the fit and of all pictures."""
        return self._fit_s + self.drawn_s

    def on_clean(self, latents: torch.Tensor) -> None:
        """A step was made, which predicts these clean latents (1, C, F, h, w)."""
        self._clean = latents

    def after_step(self, index: int, total: int) -> None:
        """Draw what was predicted; StoppedEarly where this step was to be the last."""
        if self._clean is None or index + 1 >= total:
            return
        began = time.perf_counter()
        try:
            if torch.isfinite(self._clean).all():
                self._preview.on_picture(self._index, strip(self._clean, self._maps))
        finally:
            self.drawn_s += time.perf_counter() - began
        if self._preview.stop():
            raise StoppedEarly(self._clean)


@torch.no_grad()
def colour_maps(pipeline: Any) -> torch.Tensor:
    """(2, C + 1, 3): colours from 0 to 1 of a latent's C values and a constant, by least squares; first for the first
    latent frame, which holds one frame, and then for the others, which hold several.

    The pictures are smooth random colours, which do not move; every latent of all of them is a sample.
    """
    family, vae = family_of(pipeline), pipeline.vae
    if family.encode is None:
        raise ValueError(f"latents of {with_article(type(pipeline).__name__)} have no encoder here")
    device = getattr(pipeline, "_execution_device", vae.device)
    generator = torch.Generator().manual_seed(0)
    samples, colours = [], []
    for coarse in _COARSE:
        small = F.interpolate(torch.rand(1, 3, coarse, coarse, generator=generator), (_SIDE, _SIDE), mode="bilinear")
        picture = F.interpolate(small, scale_factor=pipeline.vae_scale_factor_spatial, mode="nearest")
        clip = (2 * picture - 1)[:, :, None].expand(-1, -1, 9, -1, -1)
        latents = family.encode(pipeline, clip.to(device, vae.dtype)).float().cpu()
        inside = slice(_RIM, _SIDE - _RIM)
        samples.append(_with_constant(latents[0].movedim(0, -1))[:, inside, inside].flatten(1, 2))
        colours.append(small[0].movedim(0, -1)[inside, inside].flatten(0, 1).expand(latents.shape[2], -1, -1))
    values, wanted = torch.cat(samples, dim=1), torch.cat(colours, dim=1)
    return torch.stack(
        [_fitted(values[part].flatten(0, 1), wanted[part].flatten(0, 1)) for part in (slice(1), slice(1, None))]
    )


def _fitted(values: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """(C + 1, 3): what makes colours (n, 3) of values (n, C + 1), with a little ridge for values that go together."""
    ridge = _RIDGE * len(values) * torch.eye(values.shape[1])
    found: torch.Tensor = torch.linalg.solve(values.T @ values + ridge, values.T @ colours)
    return found


@torch.no_grad()
def strip(latents: torch.Tensor, maps: torch.Tensor) -> Picture:
    """A row of frames (height, width, 3) of latents (1, C, F, h, w), spread over the clip; `maps`: of `colour_maps`."""
    count = latents.shape[2]
    picked = torch.linspace(0, count - 1, min(_FRAMES, count)).round().long()
    values = _with_constant(latents[0].index_select(1, picked.to(latents.device)).float().cpu().movedim(0, -1))
    frames = [tile @ maps[min(int(number), 1)] for number, tile in zip(picked, values, strict=True)]
    row = (torch.cat(frames, dim=1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    scale = max(1, math.ceil(_TILE / values.shape[2]))
    found: Picture = row.repeat(scale, axis=0).repeat(scale, axis=1)
    return found


def _with_constant(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
