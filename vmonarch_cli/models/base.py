"""What the tool knows about a model before it loads a byte of it: figures, defaults and shape rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vmonarch_cli.errors import InputError
from vmonarch_cli.models.config import MAX_FIGURE, Config
from vmonarch_cli.models.shapes import Axis, Chunks, PackedRows, Tiles, axis, nearest_sizes
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


class LongClips(BaseModel):
    """How clips are sampled that have so many frames and denoising steps or more; the defaults hold for all others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_frames: int
    steps: int
    sampler: str
    guidance_scale: float


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
    takes_sigmas: bool = True
    """Its noise levels fall from 1 to 0 and can be given; Mochi's count backwards."""
    lora: bool = True
    """diffusers loads LoRA weights into it."""
    sound: bool = False
    """It makes sound with the frames."""
    takes_video: bool = False
    """It needs a video that the clip is made from."""
    video_pipeline: str | None = None
    """The class that the same checkpoint is used with when a video is given."""
    noises_video: bool = False
    """A given video is encoded and noised up to a level of the schedule, from which the clip is denoised."""
    continues: int = 0
    """Frames at the end of a given video that a clip goes on from; 0 where a video is as long as the clip."""
    last_image: bool = False
    """It takes a last frame, with a first one or alone."""
    modular: tuple[str, ...] = ()
    """Of a modular pipeline the components that its text and frame workflows use; empty for an ordinary one."""
    needed: tuple[str, ...] = ("transformer", "text_encoder", "vae")
    """Components without which an ordinary pipeline's folder is not complete."""
    distilled: bool = False
    """Guidance is in its weights: it takes neither a scale nor a second text."""
    compiles: bool = True
    """diffusers names the repeated blocks of its transformer, so that they can be compiled."""
    fuses: bool = False
    """The blocks of its transformer have a fused form."""
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
    revision: str | None = None
    """Branch of the hub's repository that has the model in diffusers' format; None for its main one."""
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
    """Decode in float32 whatever the transformer's dtype is, unless `--vae-dtype` says otherwise."""
    fixed_size: tuple[int, int] | None = None
    """The only height and width that the model can make, where its positions are learned."""
    max_grid: tuple[int | None, int | None, int | None] = (None, None, None)
    """Largest grid (T, H, W) of tokens that its positions reach; None where there is no limit."""
    clips_attended: int = 1
    """Clips of one grid in its largest self-attention call; they run as one clip of so many times the frames."""
    decoder_tiles: Tiles | None = None
    """Of a decoder that leaves blank what its tiles do not fill."""
    min_frames: int = 1
    chunks: Chunks | None = None
    """Of a VAE that encodes a clip in chunks, from which latent frames are dropped at the end."""
    packed: PackedRows | None = None
    """Of a model whose self-attention has more than the video in one sequence; the prompt's tokens are not among it."""
    longest_sound: float | None = None
    """Seconds of sound that its positions reach; None where there is no limit, or no sound."""
    distilled: bool = False
    """Guidance is in these weights: a scale above 1 is not valid. Its pipeline also runs others, which take one."""
    min_steps: int = 1
    """Fewest denoising steps that its noise schedule can be made of."""
    scheduler: str | None = None
    """Class name of the scheduler that a folder comes with; None for that of its family."""
    has_flow_shift: bool = True
    """Its noise schedule has a shift that can be set."""
    takes_image: bool = False
    """The model needs a first frame, which `--image` gives."""
    image_pipeline: str | None = None
    """Pipeline class that continues a first frame with the same weights, for a model that also works without one."""
    takes_video: bool = False
    """The model needs a video to make the clip from, which `--video` gives."""
    video_pipeline: str | None = None
    """Pipeline class that makes a clip from a given video with the same weights."""
    embedded_guidance: bool = False
    """The guidance scale is an input of the transformer, and a step has one forward."""
    extra_forwards: int = 0
    """Forwards of a step beside those of the prompts, of one sample each: guidance of other kinds, on by default."""

    transformer_params: int
    text_encoder_params: int
    vae_params: int

    trained_sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) of the clips it was trained on; none: of many."""
    trained_frames: tuple[int, int] = (1, 1)
    """Frames of the shortest and of the longest of them."""
    defaults: Defaults
    long_clips: LongClips | None = None
    """What is other than the defaults where a clip is long."""

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
        if self.chunks is not None:
            latent_frames = self.chunks.latent_frames(num_frames)
        return (
            -(-latent_frames // self.patch[0]),  # CogVideoX 1.5 fills up its last patch
            height // (self.vae_spatial * self.patch[1]),
            width // (self.vae_spatial * self.patch[2]),
        )

    def other_tokens(self, height: int, width: int, num_frames: int, given: int = 0) -> int:
        """Tokens that the self-attention of a packed sequence has beside those of the grid, the prompt's aside: of
        sound, and of so many frames that are given.
        """
        if self.packed is None:
            return 0
        _, rows, columns = self.grid(height, width, num_frames)
        return self.packed.sound_rows(num_frames) + given * self.packed.per_position * rows * columns

    def axes(self) -> tuple[Axis, Axis, Axis]:
        """Valid frame counts, heights and widths."""
        tile, stride = (None,) * 3, (None,) * 3
        if self.decoder_tiles is not None:
            tile, stride = self.decoder_tiles.tile, self.decoder_tiles.stride  # type: ignore[assignment]
        frames, rows, columns = self.max_grid
        heights, widths = (
            axis(self.side_multiple, most and most * self.vae_spatial * patch, tile[i], stride[i])
            for i, most, patch in ((1, rows, self.patch[1]), (2, columns, self.patch[2]))
        )
        period, offset = self.vae_temporal * self.patch[0], self.frame_offset
        most_frames = frames and (frames * self.patch[0] - offset) * self.vae_temporal + offset
        if self.decoder_tiles is not None:
            return axis(period, most_frames, tile[0], stride[0]), heights, widths
        if self.chunks is not None:
            return Axis(self.min_frames, self.chunks.frames, self.chunks.most_frames), heights, widths
        return Axis(max(offset or period, self.min_frames), period, most_frames), heights, widths

    def check_shape(self, height: int, width: int, num_frames: int) -> None:
        """InputError naming the nearest valid size or frame counts when the model cannot make this shape."""
        counts, heights, widths = self.axes()
        misfit = f"size {width}x{height} does not fit {self.alias}"
        if not (heights.holds(height) and widths.holds(width)):
            rule = f"width and height must be multiples of {self.side_multiple} pixels"
            if self.decoder_tiles is not None:
                rule = (
                    f"its decoder works in tiles, which fill widths of {widths.first} plus a multiple of {widths.step} "
                    f"and heights of {heights.first} plus a multiple of {heights.step} pixels"
                )
            raise InputError(f"{misfit}: {rule}, {nearest_sizes(width, height, widths, heights)}")
        if heights.exceeds(height) or widths.exceeds(width):
            _, rows, columns = self.max_grid
            raise InputError(
                f"{misfit}: its positions reach {rows} rows and {columns} columns of tokens, and the largest valid "
                f"size is {widths.largest}x{heights.largest}"
            )
        if self.fixed_size is not None and (height, width) != self.fixed_size:
            raise InputError(
                f"{misfit}: its positions are learned, and the only valid size "
                f"is {self.fixed_size[1]}x{self.fixed_size[0]}"
            )
        self._check_frames(num_frames, counts)

    def _check_frames(self, num_frames: int, counts: Axis) -> None:
        misfit = f"{num_frames} frames do not fit {self.alias}"
        if counts.exceeds(num_frames) and self.chunks is not None:
            raise InputError(f"{misfit}: it makes clips of {counts.first} to {counts.largest} frames")
        if counts.exceeds(num_frames):
            raise InputError(
                f"{misfit}: its positions reach {self.max_grid[0]} latent frames, and the largest valid count is "
                f"{counts.largest}"
            )
        if counts.holds(num_frames):
            return
        below = counts.around(num_frames)[0]
        nearest = f"the nearest valid counts are {below} and {below + counts.step}"
        if self.decoder_tiles is not None:
            raise InputError(
                f"{misfit}: its decoder works in tiles, which fill counts of {counts.first} plus a multiple of "
                f"{counts.step}, {nearest}"
            )
        if self.chunks is not None:
            raise InputError(
                f"{misfit}: the frame count must be a multiple of {counts.step} plus {self.chunks.latents}, "
                f"{counts.first} at least, {nearest}"
            )
        raise InputError(
            f"{misfit}: the frame count must be a multiple of {counts.step}"
            f"{' plus one' if self.frame_offset else ''}"
            f"{f', {counts.first} at least' if self.min_frames > 1 else ''}, {nearest}"
        )
