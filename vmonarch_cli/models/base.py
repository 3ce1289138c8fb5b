"""What the tool knows about a model before it loads a byte of it: figures, defaults and shape rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.config import MAX_FIGURE, Config
from vmonarch_cli.presets import DEFAULT_PRESET

Grid = tuple[int, int, int]
"""Tokens: latent frames, rows, columns."""
ClipShape = tuple[int, int, int]
"""Height and width in pixels, frames."""

CACHES = ("first-block", "pab", "taylorseer")
"""Step caches of diffusers that `--cache` offers."""


Figure = Annotated[int, Field(ge=1, le=MAX_FIGURE)]
"""A width, a size or a number of layers."""


class Defaults(BaseModel):
    """Settings of a run that nobody gave (pixels, frames, frames per second, denoising steps)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: int
    width: int
    num_frames: int
    fps: int
    steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    flow_shift: float | None = None
    negative_prompt: str = ""
    dense_every: int = 5
    preset: str = DEFAULT_PRESET


@dataclass(frozen=True)
class PipelineFacts:
    """What a run must know of one diffusers pipeline class: how it takes text, images and guidance.

    What touches diffusers (the place of its self-attention, its decoder, its quirks) is in `vmonarch_cli/families`, in
    the file of the family's name.
    """

    name: str
    family: str
    transformer: str
    """Class name of its transformer."""
    text: tuple[str, ...]
    """What `encode_prompt` returns, under the names that the pipeline's call gives it."""
    figures: Callable[[Config, Config], dict[str, Any]]
    """Fields of a `ModelEntry` from the transformer's config and the VAE's."""
    negative: Literal["together", "apart", "never"] = "together"
    """How the negative prompt is encoded: by the same call, by a second one, or not at all (embedded guidance)."""
    takes_image: bool = False
    image_pipeline: str | None = None
    """The class that the same checkpoint is used with when a first frame is given."""
    text_with_image: bool = False
    """The text encoder reads the first frame together with the prompt: the pipeline's call encodes both."""
    vae_in_dtype: bool = False
    """The pipeline gives the first frame to the VAE in the transformer's dtype, so the VAE must have that dtype."""
    guider: bool = False
    """Guidance is a component of the pipeline, not an argument of its call."""
    guidance_by_batch: bool = False
    """Guidance is one forward of two samples, not two forwards."""
    caches: tuple[str, ...] = CACHES
    """The step caches of diffusers that run in it: each wants something of the pipeline or the transformer."""
    lora: bool = True
    """diffusers loads LoRA weights into it."""
    compiles: bool = True
    """diffusers names the repeated blocks of its transformer, so that they can be compiled."""
    transformer_config: Callable[[ModelEntry], dict[str, Any]] | None = None
    """Arguments of the transformer's class that build it for an entry, without its weights; None for the families whose
    whole models are not profiled."""


class ModelEntry(BaseModel):
    """One model: where it is, what its transformer looks like, what it can make.

    `layers`, `heads`, `head_dim`, `ffn_dim` and `text_dim` (width of the text encoder's output) describe one
    transformer; `transformers` says how many there are (two in Wan 2.2 A14B, of which each denoising step uses one).
    `vae_temporal` and `vae_spatial` are the VAE's compression factors, `patch` the transformer's patch (frames, height,
    width) in latent pixels. Parameter counts are of one transformer, the text encoder and the VAE.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: str
    title: str
    family: str = "wan"
    pipeline: str = "WanPipeline"
    hub_id: str | None = None
    aliases: tuple[str, ...] = ()
    licence: str = "unknown"

    patch: tuple[Figure, Figure, Figure] = (1, 2, 2)
    vae_temporal: Figure = 4
    vae_spatial: Figure = 8
    latent_channels: Figure = 16
    heads: Figure
    head_dim: Figure
    layers: Figure
    ffn_dim: Figure
    text_dim: Figure = 4096
    transformers: int = 1
    boundary_ratio: float | None = Field(default=None, gt=0, lt=1)
    max_sequence_length: Figure = 512
    frame_offset: int = 1
    """Frames that the VAE encodes alone, before groups of `vae_temporal`: 1, or 0 (Allegro)."""
    vae_float32: bool = False
    """Decode in float32 whatever the transformer's dtype is."""
    fixed_size: tuple[int, int] | None = None
    """The only height and width that the model can make, where its positions are learned."""
    min_frames: int = 1
    takes_image: bool = False
    """The model needs a first frame, which `--image` gives."""
    image_pipeline: str | None = None
    """Pipeline class that continues a first frame with the same weights, for a model that also works without one."""
    embedded_guidance: bool = False
    """The guidance scale is an input of the transformer, and a step has one forward."""

    transformer_params: int
    text_encoder_params: int
    vae_params: int

    trained_only_at_default: bool = False
    defaults: Defaults

    @property
    def side_multiple(self) -> int:
        """Height and width must be multiples of this many pixels (16 at least: the Wan pipeline checks for it)."""
        return math.lcm(self.vae_spatial * self.patch[1], self.vae_spatial * self.patch[2], 16)

    @property
    def hidden_dim(self) -> int:
        """Width of the transformer's residual stream."""
        return self.heads * self.head_dim

    def grid(self, height: int, width: int, num_frames: int) -> Grid:
        """Token grid (T latent frames, H, W) of a valid clip of that many pixels and frames."""
        latent_frames = (num_frames - self.frame_offset) // self.vae_temporal + self.frame_offset
        return (
            -(-latent_frames // self.patch[0]),  # CogVideoX 1.5 fills up its last patch
            height // (self.vae_spatial * self.patch[1]),
            width // (self.vae_spatial * self.patch[2]),
        )

    def check_shape(self, height: int, width: int, num_frames: int) -> None:
        """InputError naming the nearest valid size or frame counts when the model cannot make this shape."""
        step = self.side_multiple
        if height < step or width < step or height % step or width % step:
            sizes = " and ".join(f"{w}x{h}" for w, h in _nearest_sizes(width, height, step))
            raise InputError(
                f"size {width}x{height} does not fit {self.alias}: width and height must be multiples of {step} "
                f"pixels, the nearest valid {'sizes are' if ' and ' in sizes else 'size is'} {sizes}"
            )
        if self.fixed_size is not None and (height, width) != self.fixed_size:
            raise InputError(
                f"size {width}x{height} does not fit {self.alias}: its positions are learned, and the only valid size "
                f"is {self.fixed_size[1]}x{self.fixed_size[0]}"
            )
        period, offset = self.vae_temporal * self.patch[0], self.frame_offset
        least = max(offset or period, self.min_frames)
        if num_frames < least or (num_frames - offset) % period:
            below = max(least, (num_frames - offset) // period * period + offset)
            raise InputError(
                f"{num_frames} frames do not fit {self.alias}: the frame count must be a multiple of {period}"
                f"{' plus one' if offset else ''}{f', {least} at least' if self.min_frames > 1 else ''}, "
                f"the nearest valid counts are {below} and {below + period}"
            )


def _nearest_sizes(width: int, height: int, step: int) -> list[tuple[int, int]]:
    """The one or two valid sizes (width, height) closest to the one asked for, the closest first."""

    def options(side: int) -> set[int]:
        low = side // step * step
        return {max(step, low), max(step, low if side % step == 0 else low + step)}

    pairs = [(w, h) for w in options(width) for h in options(height)]
    return sorted(pairs, key=lambda p: ((p[0] - width) ** 2 + (p[1] - height) ** 2, p))[:2]
