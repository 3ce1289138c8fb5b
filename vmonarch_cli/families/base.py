"""What a family says of itself: where its self-attention is, how its latents become frames, what its pipeline needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vmonarch_cli.attention.base import MonarchProcessor
from vmonarch_cli.attention.joint import Packed
from vmonarch_cli.families.fusing import FusedBlock, StreamShape
from vmonarch_cli.models.base import Grid, ModelEntry

Shape = tuple[int, int, int]
"""Height and width in pixels, frames."""
WholeDecoder = Callable[[Any, torch.Tensor, Shape | None], torch.Tensor]
"""(pipeline, its latents, shape of the clip) -> frames (1, 3, F, height, width), from -1 to 1."""
Decoder = Callable[[Any, torch.Tensor, Shape | None], Iterator[torch.Tensor]]
"""The same in parts (1, 3, f, height, width), in order; f is all of F where the VAE makes all frames together."""
Encoder = Callable[[Any, torch.Tensor], torch.Tensor]
"""(pipeline, frames (1, 3, F, height, width) from -1 to 1, in the VAE's dtype) -> latents as its transformer takes
them, without noise."""
SoundDecoder = Callable[[Any, torch.Tensor], tuple[torch.Tensor, int]]
"""(pipeline, its latents of sound) -> samples (1, channels, N), from -1 to 1, and how many of them a second has."""


def latent_grid(transformer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Grid:
    """Token grid (T, H, W) of a forward on latents (B, C, F, H, W): their shape over the patch size."""
    latents: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    frames, rows, columns = latents.shape[2:]
    p_t, p_h, p_w = patch_of(transformer.config)
    return frames // p_t, rows // p_h, columns // p_w


def patch_of(config: Any) -> Grid:
    """A transformer's patch (frames, height, width); families write it as one, two or three numbers."""
    patch = config.patch_size
    if not isinstance(patch, int):
        t, h, w = patch
        return t, h, w
    return getattr(config, "patch_size_t", None) or 1, patch, patch


def unchanged(pipeline: Any, arguments: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
    """The arguments of a pipeline's call as they are."""
    return nullcontext(arguments)


def stock_plan(transformer: Any) -> dict[str, Any]:
    """Which tensors context parallelism splits by tokens, as diffusers says."""
    return dict(transformer._cp_plan)


@dataclass(frozen=True)
class LatentClip:
    """A clip in latents: frames, height and width."""

    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, entry: ModelEntry, height: int, width: int, num_frames: int) -> LatentClip:
        """A clip of that many pixels and frames, in whole patches: where latent frames do not fill the last patch, the
        pipelines add some.
        """
        frames = entry.grid(height, width, num_frames)[0] * entry.patch[0]
        return cls(frames, height // entry.vae_spatial, width // entry.vae_spatial)


def no_inputs(entry: ModelEntry, clip: LatentClip, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Nothing beside latents, timestep and text."""
    return {}


@dataclass(frozen=True)
class ForwardInputs:
    """What one forward of a transformer takes, made from a model's entry alone: no weights, no text."""

    latents: Callable[[ModelEntry, LatentClip], tuple[int, ...]] = lambda entry, clip: (
        1,
        entry.latent_channels,
        clip.frames,
        clip.height,
        clip.width,
    )
    """Shape of the latents, batch 1."""
    others: Callable[[ModelEntry, LatentClip, torch.device, torch.dtype], dict[str, Any]] = no_inputs
    """What it takes beside latents, timestep and text embeddings."""
    timestep: Callable[[float], float] = lambda sigma: 1000 * sigma
    """Its timestep at a noise level from 1 to 0."""
    timed_frames: bool = False
    """It takes a timestep for each latent frame, (1, 1, frames, 1, 1)."""
    towards_clip: bool = False
    """Its velocity points from the noise to the clip; most models' points from the clip to the noise."""


@dataclass(frozen=True)
class Family:
    """A transformer class of diffusers and the pipelines around it."""

    processors: Mapping[str, type[MonarchProcessor]]
    """Class name of a stock processor -> its replacement."""
    patterns: tuple[re.Pattern[str], ...]
    """Full module paths of the self-attention layers, one pattern for each stack of blocks; the first group is the
    number within the stack. Layers are numbered on from stack to stack."""
    decode: Decoder
    """The end of the pipeline's own call."""
    grid: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Grid] = latent_grid
    """(transformer, args, kwargs of its forward) -> token grid, which processors never see."""
    packed: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Packed] | None = None
    """The same for a transformer of one packed sequence, whose grid is a part of it; `grid` is then not asked."""
    obstacle: Callable[[Any], str | None] = lambda transformer: None
    """Why a transformer of this class cannot be swapped after all, or None."""
    prompt: Callable[[str], str | list[str]] = lambda text: text
    """A prompt as the pipeline's `encode_prompt` takes it."""
    encoded: Callable[[dict[str, Any]], dict[str, Any]] = lambda found: found
    """What `encode_prompt` returned for one text, by name -> what of it the pipeline's call takes."""
    adjusted: Callable[[Any, dict[str, Any]], AbstractContextManager[dict[str, Any]]] = unchanged
    """(pipeline, arguments of its call) -> a context that gives the arguments to use, and puts right what the call
    would do otherwise."""
    conditions: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda pipeline, options: options
    """(pipeline, options of a run) -> the options with an image or a video as this pipeline's call takes it."""
    always_tiled: bool = False
    """diffusers decodes with its VAE in tiles only."""
    plain_calls: bool = False
    """Its self-attention calls hold one sample and no text: their shapes follow from a clip's alone."""
    parallel_plan: Callable[[Any], dict[str, Any]] = stock_plan
    """Which tensors of a transformer context parallelism splits by tokens."""
    parallel_obstacle: str | None = None
    """Why it cannot be split although diffusers has a plan for it, or None."""
    decode_sound: SoundDecoder | None = None
    """The end of the pipeline's own call for its sound; None for families that make none."""
    readers: Mapping[str, Callable[[Path], Any]] = field(default_factory=dict)
    """Of a modular pipeline the components that `from_pretrained` of their class does not read everywhere; each takes
    the component's folder."""
    batches: bool = False
    """Each tensor that a forward takes has the samples in front, so that clips can be put side by side."""
    missing: Callable[[], str | None] = lambda: None
    """Which package its pipelines need that is not installed, or None."""
    check_prompt: Callable[[Any, str], None] | None = None
    """(pipeline, prompt) -> InputError where the model's own safety checks refuse it; the pipeline's call checks only
    prompts that it encodes itself."""
    encode: Encoder | None = None
    """Frames to latents, the inverse of `decode`; None where the transformer takes more than latents of this shape."""
    forward: ForwardInputs | None = None
    """None for families whose whole models are not profiled."""
    fused: Mapping[str, FusedBlock] = field(default_factory=dict)
    """Class name of a block -> its fused form; empty for families that have none."""
    rehearse_fused: Callable[[StreamShape], None] | None = None
    """Calls the fused operations of a block, whose shapes follow from a clip's alone; None where they do not."""

    def self_attentions(self, transformer: Any) -> dict[int, Any]:
        """Layer number -> module. ``_orig_mod.`` is what torch.compile puts in front of names."""
        stacks: list[dict[int, Any]] = [{} for _ in self.patterns]
        for name, module in transformer.named_modules():
            for stack, pattern in zip(stacks, self.patterns, strict=True):
                match = pattern.fullmatch(name.replace("_orig_mod.", ""))
                if match:
                    stack[int(match[1])] = module
        found = [module for stack in stacks for _, module in sorted(stack.items())]
        return dict(enumerate(found))


def layers(*paths: str) -> tuple[re.Pattern[str], ...]:
    """Patterns of paths in which N stands for the layer's number."""
    return tuple(re.compile(re.escape(path).replace("N", r"(\d+)")) for path in paths)


# What the decoders share


def at_once(decode: WholeDecoder) -> Decoder:
    """A decoder that makes all frames together, as one that gives them in parts."""

    def parts(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> Iterator[torch.Tensor]:
        yield decode(pipeline, latents, shape)

    return parts


def mean_and_std(pipeline: Any, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The VAE's statistics of latents (B, C, F, h, w), each (1, C, 1, 1, 1)."""
    config = pipeline.vae.config
    mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1, 1)
    return mean, latents.new_tensor(config.latents_std).view(1, -1, 1, 1, 1)


def run_vae(pipeline: Any, latents: torch.Tensor, *more: Any) -> torch.Tensor:
    """Frames of latents that the VAE takes as they are."""
    clip: torch.Tensor = pipeline.vae.decode(latents, *more, return_dict=False)[0]
    return clip


def start_offloaded(module: Any) -> None:
    """Let a module that offloading moves about come to the device, as diffusers does before `decode`."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)


def encoded(pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
    """Latents of frames as the VAE gives them: the mode of its distribution, without chance."""
    latents: torch.Tensor = pipeline.vae.encode(frames, return_dict=False)[0].mode()
    return latents


def encode_scaled(pipeline: Any, frames: torch.Tensor) -> torch.Tensor:
    """The encoder of the families whose VAE has a scaling factor and no statistics."""
    factor: float = pipeline.vae.config.scaling_factor
    return encoded(pipeline, frames) * factor


def decode_scaled(pipeline: Any, latents: torch.Tensor, shape: Shape | None) -> torch.Tensor:
    """The whole decoder of the families whose VAE has a scaling factor and no statistics."""
    return run_vae(pipeline, latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor)
