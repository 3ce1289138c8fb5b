"""What the tool knows about a model before it loads a byte of it: figures, defaults and shape rules."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from vmonarch_cli.errors import InputError

Grid = tuple[int, int, int]


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


class ModelEntry(BaseModel):
    """One model: where it is, what its transformer looks like, what it can make.

    `layers`, `heads`, `head_dim`, `ffn_dim` and `text_dim` (width of the text encoder's output) describe one transformer; `transformers` says how many there are (two in
    Wan 2.2 A14B, of which each denoising step uses one). `vae_temporal` and `vae_spatial` are the VAE's compression
    factors, `patch` the transformer's patch (frames, height, width) in latent pixels. Parameter counts are of one
    transformer, the text encoder and the VAE.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    alias: str
    title: str
    family: str = "wan"
    pipeline: str = "WanPipeline"
    hub_id: str | None = None
    aliases: tuple[str, ...] = ()
    licence: str = "unknown"

    patch: Grid = (1, 2, 2)
    vae_temporal: int = 4
    vae_spatial: int = 8
    latent_channels: int = 16
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int = 4096
    transformers: int = 1
    boundary_ratio: float | None = None
    max_sequence_length: int = 512

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
        latent_frames = (num_frames - 1) // self.vae_temporal + 1
        return (
            latent_frames // self.patch[0],
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
        period = self.vae_temporal * self.patch[0]
        if num_frames < 1 or (num_frames - 1) % period:
            below = max(1, (num_frames - 1) // period * period + 1)
            near = f"{below} and {below + period}" if num_frames > 1 else f"1 and {1 + period}"
            raise InputError(
                f"{num_frames} frames do not fit {self.alias}: the frame count must be a multiple of {period} plus "
                f"one, the nearest valid counts are {near}"
            )


def _nearest_sizes(width: int, height: int, step: int) -> list[tuple[int, int]]:
    """The one or two valid sizes (width, height) closest to the one asked for, the closest first."""

    def options(side: int) -> set[int]:
        low = side // step * step
        return {max(step, low), max(step, low if side % step == 0 else low + step)}

    pairs = [(w, h) for w in options(width) for h in options(height)]
    return sorted(pairs, key=lambda p: ((p[0] - width) ** 2 + (p[1] - height) ** 2, p))[:2]
